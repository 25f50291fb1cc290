// Accumulators to global memory through TMA: a warpgroup fills boxes of 64 rows and 128 bytes in
// shared memory, under 128-byte swizzle (the 16-byte chunk of a row is XORed with the row's index
// modulo 8), and its first thread has TMA store them. That thread waits for TMA to have read a box
// only when the box is to be filled again.
//
// Contract: all 128 threads of the warpgroup call every function together. `boxes` has kBoxes *
// kStoreBoxBytes bytes, aligned to 1024. The tensor map has boxes {128 bytes, 64 rows, 1} of the
// output's dtype, 128-byte swizzle. Whoever reuses the boxes with a new TmaStore first waits with
// cp_async_bulk_wait_group_read<0>() in thread 0; before the CTA exits, that thread waits with
// cp_async_bulk_wait_group<0>().
#pragma once

#include "../loaders.cuh"
#include "boxes.h"
#include "ptx/isa/barrier.h"
#include "ptx/isa/fence.h"
#include "ptx/isa/matrix.h"
#include "ptx/isa/memory.h"
#include "ptx/isa/tma.h"
#include "thread_coord.cuh"

namespace torchext::sm90 {

// `target`: what to store into; target.map() is the tensor map, target.z() the third coordinate,
// target.dtype() the dtype: FP32, BF16 or FP16, or FP8 for send() alone, and target.adds() whether to
// add to what is there, which must be FP32. Each store calls these functions anew, so that no register
// holds their results between stores.
template <int kBoxes>
struct TmaStore {
  uint8_t* boxes;
  int next = 0;  // the box to fill next; a constant once loops are unrolled

  // Fills the next box: fill(address) writes this thread's part of it to shared memory.
  template <class Fill>
  __device__ __forceinline__ uint8_t* filled(const ThreadCoord& at, const Fill& fill) {
    uint8_t* box = boxes + next * kStoreBoxBytes;
    next = (next + 1) % kBoxes;
    if (at.thread() == 0) ptx::cp_async_bulk_wait_group_read<kBoxes - 1>();
    ptx::bar_sync(warpgroup_barrier(at), 128);
    fill(ptx::shared_address(box));
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(warpgroup_barrier(at), 128);
    return box;
  }

  // Stores a box that is filled(), at column x, row y.
  template <class Target>
  __device__ __forceinline__ void send(const Target& target, const ThreadCoord& at, uint32_t x,
                                       uint32_t y, const uint8_t* box) const {
    if (at.thread() != 0) return;
    if (target.adds())
      ptx::cp_reduce_async_bulk_tensor_3d_add(target.map(), box, x, y, target.z());
    else
      ptx::cp_async_bulk_tensor_3d_store(target.map(), box, x, y, target.z());
    ptx::cp_async_bulk_commit_group();
  }

  // Stores an accumulator of 64 rows and 2 * registers columns, rounded to target.dtype().
  template <class Target, int registers>
  __device__ __forceinline__ void send_accumulator(const Target& target, const ThreadCoord& at,
                                                   uint32_t x, uint32_t y,
                                                   const float (&total)[registers]) {
    if (target.dtype() == ScalarType::Float) {
      const uint32_t row = at.row();
#pragma unroll
      for (int first = 0; first < 2 * registers; first += 32) {
        const uint8_t* ready = filled(at, [&](uint32_t box) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {  // eight columns, 32 bytes
#pragma unroll
            for (int h = 0; h < 2; ++h) {  // row and row + 8 swizzle alike
              const uint32_t chunk = (j * 2 + at.column() / 4) ^ (row % 8);
              const float* pair = &total[(first / 8 + j) * 4 + 2 * h];
              ptx::st_shared_v2_f32(
                  box + (row + 8 * h) * kSwizzleBytes + chunk * 16 + at.column() % 4 * 4, pair[0],
                  pair[1]);
            }
          }
        });
        send(target, at, x + first, y, ready);
      }
      return;
    }
    const uint32_t row = at.warp * 16 + at.lane % 16;  // the row whose address this lane gives
#pragma unroll
    for (int first = 0; first < 2 * registers; first += 64) {
      const uint8_t* ready = filled(at, [&](uint32_t box) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {  // sixteen columns, 32 bytes
          const uint32_t chunk = (j + at.lane / 16) ^ (row % 8);
          const float* t = &total[(first / 8 + j) * 4];
          ptx::stmatrix_x4(
              box + row * kSwizzleBytes + chunk * 16, pack_16bit(target.dtype(), t[0], t[1]),
              pack_16bit(target.dtype(), t[2], t[3]), pack_16bit(target.dtype(), t[4], t[5]),
              pack_16bit(target.dtype(), t[6], t[7]));
        }
      });
      send(target, at, x + first, y, ready);
    }
  }
};

}  // namespace torchext::sm90
