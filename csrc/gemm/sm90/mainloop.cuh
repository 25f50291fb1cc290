// The main loop of the Hopper GEMM: the producer that keeps the ring of K blocks full, and the
// consumers that multiply and promote. fp8_gemm_nt.cuh has the map of these roles.
#pragma once

#include "../../device/sm90/ring.cuh"
#include "../../device/sm90/thread_coord.cuh"
#include "layout.cuh"
#include "ptx/isa/barrier.h"
#include "ptx/isa/cluster.h"
#include "ptx/isa/elect.h"
#include "ptx/isa/fence.h"
#include "ptx/isa/memory.h"
#include "ptx/isa/tma.h"
#include "ptx/isa/wgmma.h"
#include "schedule.cuh"

namespace torchext::sm90 {

// Row of b at which a tile's features begin. M-grouped: b holds the matrices of all groups, one
// below the other. Along K: all groups share b.
__device__ __forceinline__ uint32_t row_of_b(const GemmParams& p, const Work& work) {
  return p.grouping == Grouping::kAlongK ? work.n : work.group * p.n + work.n;
}

// ---- producer: one warp ----

template <class L>
__device__ void produce(const GemmParams& p, Shared<L>& shared) {
  using S = Shared<L>;
  const bool leader = ptx::elect_sync();
  RingPosition<L::kStages> ring;
  Schedule<L> schedule(p, shared.tile_end);
  for (Work work; schedule.next(work);) {
    if (leader) {
      const uint32_t b_row = row_of_b(p, work);
      const uint32_t row = L::kSwapped ? b_row : work.m, column = L::kSwapped ? work.m : b_row;
      for (uint32_t block = work.k_begin; block < work.k_end; ++block, ring.advance()) {
        ptx::mbarrier* full = &shared.full[ring.slot];
        if (p.multicast)
          ptx::mbarrier_wait_cluster(&shared.empty[ring.slot], ring.phase ^ 1);
        else
          ptx::mbarrier_wait(&shared.empty[ring.slot], ring.phase ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, S::kBytesPerStage);
        const int k = block * kTileK;
        if (p.multicast) {  // this CTA loads half of the rows, the other CTA the rest
          const uint32_t half = ptx::cluster_ctarank() * (L::kRows / 2);
          ptx::cp_async_bulk_tensor_2d_load_multicast(&shared.rows[ring.slot][half * kTileK],
                                                      &p.rows, full, k, row + half, 0b11);
        } else {
          ptx::cp_async_bulk_tensor_2d_load(shared.rows[ring.slot], &p.rows, full, k, row);
        }
        ptx::cp_async_bulk_tensor_2d_load(shared.columns[ring.slot], &p.columns, full, k, column);
        if constexpr (L::kGated)
          ptx::cp_async_bulk_tensor_2d_load(&shared.columns[ring.slot][L::kTileN * kTileK],
                                            &p.columns, full, k, column + p.n);
        if constexpr (S::kRowVector)
          ptx::cp_async_bulk_tensor_2d_load(shared.row_scale[ring.slot], &p.row_scale, full, row,
                                            block);
        if constexpr (S::kColumnVector)
          ptx::cp_async_bulk_tensor_2d_load(shared.column_scale[ring.slot], &p.column_scale, full,
                                            column, block);
        if constexpr (S::kColumnVector && L::kGated)
          ptx::cp_async_bulk_tensor_2d_load(&shared.column_scale[ring.slot][L::kTileN],
                                            &p.column_scale, full, column + p.n, block);
      }
    }
    __syncwarp();
  }
}

// ---- consumers ----

// b's 128x128 scales for a tile, fetched from global memory one K block ahead of their use.
template <class L>
struct BlockScales {
  uint32_t first[L::kBlockScales];  // of the tile's features
  float value[L::kBlockScales];

  __device__ BlockScales(const GemmParams& p, const Work& work) {
#pragma unroll
    for (int i = 0; i < L::kBlockScales; ++i) {
      uint32_t n = min(work.n + i * L::kBlockSpan, p.n - 1);
      if constexpr (L::kGated)  // the gate's block, up's first block, up's second block
        n = i == 0 ? work.n : min(p.n + work.n + (i - 1) * L::kBlockSpan, 2 * p.n - 1);
      first[i] = uint32_t(work.group * p.b_scale_group + n / kScaleGroup * p.b_scale_row);
    }
  }
  __device__ void fetch(const GemmParams& p, uint32_t k_block) {
#pragma unroll
    for (int i = 0; i < L::kBlockScales; ++i)
      value[i] = ptx::ld_global_nc_f32(p.b_scale + first[i] + k_block * p.b_scale_k_block);
  }
};

// A K block whose wgmmas are in flight: its slot, and b's block scales.
template <class L>
struct Pending {
  uint32_t slot;
  float block_scale[L::kBlockScales];
};

// For groups along K: zeroes the columns of a K block outside [first, last), which belong to other
// groups, in all rows of both operands. All consumers call it together.
template <class L>
__device__ __forceinline__ void zero_other_columns(Shared<L>& shared, uint32_t slot, int first,
                                                   int last, const ThreadCoord& at) {
  const auto clear = [&](uint8_t* rows, int count) {
    for (int i = at.warpgroup * 128 + at.thread(); i < count * 8; i += L::kConsumers) {
      const int row = i / 8, chunk = i % 8 * 16;  // 16 bytes under 128-byte swizzle
      if (first <= chunk && chunk + 16 <= last) continue;
      const uint32_t address = ptx::shared_address(rows + row * kTileK + (chunk ^ row % 8 * 16));
      uint4 bytes = ptx::ld_shared_v4_u32(address);
      uint32_t* words = &bytes.x;
#pragma unroll
      for (int b = 0; b < 16; ++b)
        if (chunk + b < first || chunk + b >= last) words[b / 4] &= ~(0xffu << b % 4 * 8);
      ptx::st_shared_v4_u32(address, bytes);
    }
  };
  clear(shared.rows[slot], L::kRows);
  clear(shared.columns[slot], L::kColumns);
  ptx::fence_proxy_async_shared();
  ptx::bar_sync(kConsumersBarrier, L::kConsumers);
}

// Starts the wgmmas of 64 rows and kPartColumns columns of a K block.
template <class L, class A, class B>
__device__ __forceinline__ void multiply(Shared<L>& shared, uint32_t slot, uint32_t row,
                                         uint32_t column, float (&block)[L::kRegisters]) {
  const uint64_t a = ptx::wgmma_descriptor_k_major_128b(&shared.rows[slot][row * kTileK]);
  const uint64_t b = ptx::wgmma_descriptor_k_major_128b(&shared.columns[slot][column * kTileK]);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kTileK / 32; ++step)
    ptx::wgmma_m64nNk32(A(), B(), block, a + step * 2, b + step * 2, step > 0);
  ptx::wgmma_commit_group();
}

// Scales of this thread's rows, row() and row() + 8, times b's block scales.
template <class L>
struct RowFactors {
  float value[2][L::kBlockScales];

  __device__ __forceinline__ RowFactors(const Shared<L>& shared, const Pending<L>& pending,
                                        uint32_t row_of_tile, const ThreadCoord& at) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float scale = 1;
      if constexpr (Shared<L>::kRowVector)
        scale = ptx::ld_shared_f32(
            ptx::shared_address(&shared.row_scale[pending.slot][row_of_tile + at.row()]) +
            h * 8 * sizeof(float));
#pragma unroll
      for (int i = 0; i < L::kBlockScales; ++i)
        value[h][i] = L::k1D2D ? scale * pending.block_scale[i] : scale;
    }
  }
};

// Gated tiles: the first column of the tile at which up has its second block scale.
template <class L>
__device__ __forceinline__ uint32_t next_block_of_up(const GemmParams& p, const Work& work) {
  return kScaleGroup - (p.n + work.n) % kScaleGroup;
}

// total += scales * block. Column scales are read when they are needed, to save registers.
// `straddles`: columns from next_block on have up's second block scale.
template <class L, bool straddles = false>
__device__ __forceinline__ void promote(const Shared<L>& shared, const Pending<L>& pending,
                                        const RowFactors<L>& rows, int part, const ThreadCoord& at,
                                        const float (&block)[L::kRegisters],
                                        float (&total)[L::kRegisters], uint32_t next_block = 0) {
  const uint32_t column_scales =
      ptx::shared_address(&shared.column_scale[pending.slot][part * L::kPartColumns + at.column()]);
#pragma unroll
  for (int i = 0; i < L::kRegisters; i += 4) {  // eight columns
    float2 pair{1, 1};
    if constexpr (Shared<L>::kColumnVector)
      pair = ptx::ld_shared_v2_f32(column_scales + i / 4 * 8 * sizeof(float));
    const int span = (part * L::kPartColumns + i / 4 * 8) / L::kBlockSpan % L::kBlockScales;
#pragma unroll
    for (int j = i; j < i + 4; ++j) {
      float row = rows.value[j / 2 % 2][span];
      if constexpr (straddles)
        if (i / 4 * 8 + at.column() + j % 2 >= next_block) row = rows.value[j / 2 % 2][2];
      if constexpr (L::kRowwise)
        total[j] += block[j];
      else if constexpr (Shared<L>::kColumnVector)
        total[j] = fmaf(row * (j % 2 == 0 ? pair.x : pair.y), block[j], total[j]);
      else
        total[j] = fmaf(row, block[j], total[j]);
      ptx::wgmma_pin(total[j]);  // computed here, not after the block's next wgmma.fence
    }
  }
}

// total = sum over the tile's K blocks of scales * (rows @ columns.T).
template <class L, class A, class B>
__device__ __forceinline__ void accumulate_tile(const GemmParams& p, Shared<L>& shared,
                                                const Work& work, const ThreadCoord& at,
                                                RingPosition<L::kStages>& ring,
                                                float (&total)[L::kBlocks][L::kRegisters]) {
#pragma unroll
  for (auto& block : total)
#pragma unroll
    for (float& value : block) value = 0;

  const uint32_t first_row = at.warpgroup * L::kSlices * 64;
  const uint32_t next_block = L::kGated ? next_block_of_up<L>(p, work) : 0;
  BlockScales<L> scales(p, work);
  if (L::k1D2D && work.k_begin < work.k_end) scales.fetch(p, work.k_begin);

  // Waits for the next K block, and fetches the block scales of the one after it.
  const auto take = [&](uint32_t k_block) {
    Pending<L> pending{ring.slot, {}};
    if constexpr (L::k1D2D) {
#pragma unroll
      for (int i = 0; i < L::kBlockScales; ++i) pending.block_scale[i] = scales.value[i];
      if (k_block + 1 < work.k_end) scales.fetch(p, k_block + 1);
    }
    ptx::mbarrier_wait(&shared.full[ring.slot], ring.phase);
    if constexpr (L::kGranularity == Granularity::k1D1D && !L::kSwapped) {
      if (p.grouping == Grouping::kAlongK) {
        const int first = int(work.k_first) - int(k_block * kTileK);
        const int last = int(work.k_last) - int(k_block * kTileK);
        if (first > 0 || last < kTileK) zero_other_columns<L>(shared, ring.slot, first, last, at);
      }
    }
    ring.advance();
    return pending;
  };
  const auto release = [&](const Pending<L>& pending) {
    __syncwarp();  // all lanes have read their part of the slot
    if (p.multicast) {
      if (at.lane < 2) ptx::mbarrier_arrive_cluster(&shared.empty[pending.slot], at.lane);
    } else if (at.lane == 0) {
      ptx::mbarrier_arrive(&shared.empty[pending.slot]);
    }
  };

  if constexpr (L::kBuffers == 2) {
    float even[L::kRegisters], odd[L::kRegisters];
    const auto start = [&](uint32_t k_block, float (&block)[L::kRegisters]) {
      const Pending<L> pending = take(k_block);
      multiply<L, A, B>(shared, pending.slot, first_row, 0, block);
      return pending;
    };
    const auto finish = [&](const Pending<L>& pending, float (&block)[L::kRegisters]) {
      const RowFactors<L> rows(shared, pending, first_row, at);
#pragma unroll
      for (float& value : block) ptx::wgmma_pin(value);
      if constexpr (!Shared<L>::kColumnVector) release(pending);
      promote<L>(shared, pending, rows, 0, at, block, total[0]);
      if constexpr (Shared<L>::kColumnVector) release(pending);
    };
    if (work.k_begin == work.k_end) return;
    uint32_t k_block = work.k_begin;
    Pending<L> first = start(k_block, even);
    for (; k_block + 2 < work.k_end; k_block += 2) {
      const Pending<L> second = start(k_block + 1, odd);
      ptx::wgmma_wait_group<1>();
      finish(first, even);
      first = start(k_block + 2, even);
      ptx::wgmma_wait_group<1>();
      finish(second, odd);
    }
    if (k_block + 1 < work.k_end) {
      const Pending<L> second = start(k_block + 1, odd);
      ptx::wgmma_wait_group<1>();
      finish(first, even);
      ptx::wgmma_wait_group<0>();
      finish(second, odd);
    } else {
      ptx::wgmma_wait_group<0>();
      finish(first, even);
    }
  } else {
    for (uint32_t k_block = work.k_begin; k_block < work.k_end; ++k_block) {
      const Pending<L> pending = take(k_block);
      float block[L::kRegisters];
#pragma unroll
      for (int i = 0; i < L::kBlocks; ++i) {
        const uint32_t row = first_row + i / L::kParts * 64;
        const uint32_t column = i % L::kParts * L::kPartColumns;
        multiply<L, A, B>(shared, pending.slot, row, column, block);
        const RowFactors<L> rows(shared, pending, row, at);
        ptx::wgmma_wait_group<0>();
#pragma unroll
        for (float& value : block) ptx::wgmma_pin(value);
        const bool last = i + 1 == L::kBlocks;
        if (last && !Shared<L>::kColumnVector) release(pending);
        if (L::kGated && L::k1D2D && i == 1 && next_block < kScaleGroup)
          promote<L, true>(shared, pending, rows, 1, at, block, total[i], next_block);
        else
          promote<L>(shared, pending, rows, i % L::kParts, at, block, total[i]);
        if (last && Shared<L>::kColumnVector) release(pending);
      }
    }
  }
}

}  // namespace torchext::sm90
