// From accumulators to global memory: row-wise scales, bias and the old output are applied in FP32,
// then the sum is rounded once. Tiles that are not swapped are stored from registers, either
// through boxes for TMA or directly. Swapped tiles are stored through a transposed copy of the
// product in shared memory, where a cluster that splits K adds up the parts.
#pragma once

#include "../../device/loaders.cuh"
#include "../../device/sm90/tma_store.cuh"
#include "../../device/unrolled.cuh"
#include "layout.cuh"
#include "ptx/isa/barrier.h"
#include "ptx/isa/cluster.h"
#include "ptx/isa/memory.h"
#include "ptx/isa/tma.h"
#include "schedule.cuh"

namespace torchext::sm90 {

// Index in out of the first element of row r of a.
__device__ __forceinline__ int64_t out_offset(const GemmParams& p, const Work& work, uint32_t r) {
  const int64_t group = p.grouping == Grouping::kAlongK ? work.group * p.out_group_stride : 0;
  return group + r * p.out_stride;
}

// total * scale. __fmul_rn keeps the compiler from contracting this with a following bias add into
// an FMA. It would do so for some tiles only, and their bits would differ.
__device__ __forceinline__ float rescaled(float total, float scale) {
  return __fmul_rn(total, scale);
}

// Row-wise scale, and index of the bias, of feature n of the group's b.
__device__ __forceinline__ float row_scale_of_b(const GemmParams& p, const Work& work, uint32_t n) {
  return ptx::ld_global_nc_f32(p.b_scale + work.group * p.b_scale_group + n * p.b_scale_row);
}
__device__ __forceinline__ int64_t bias_index(const GemmParams& p, const Work& work, uint32_t n) {
  return int64_t(work.group) * p.n + n;
}

// ---- tiles that are not swapped ----

// Puts row-wise scales and biases of the tile's columns into shared memory, if there are any. It is
// called before the main loop, which has no registers for them; finish_tile() reads them after it.
template <class L>
__device__ __forceinline__ void share_column_terms(const GemmParams& p, Shared<L>& shared,
                                                   const Work& work, const ThreadCoord& at) {
  if (!L::kRowwise && p.bias == nullptr) return;
  ptx::bar_sync(warpgroup_barrier(at), 128);  // the warpgroup has read the last tile's terms
#pragma unroll
  for (int column = at.thread(); column < L::kColumns; column += 128) {
    const bool up = L::kGated && column >= L::kTileN;
    const uint32_t n = work.n + column - (up ? L::kTileN : 0);
    float factor = 1, bias = 0;
    if (n < p.n) {
      const uint32_t feature = n + (up ? p.n : 0);
      if constexpr (L::kRowwise) factor = row_scale_of_b(p, work, feature);
      if (p.bias != nullptr)
        with_loader(p.bias_dtype,
                    [&](auto load) { bias = load(p.bias, bias_index(p, work, feature)); });
    }
    shared.factor[at.warpgroup][column] = factor;
    shared.bias[at.warpgroup][column] = bias;
  }
  ptx::bar_sync(warpgroup_barrier(at), 128);
}

// First row of a, and first feature, of a warpgroup's block i.
template <class L>
__device__ __forceinline__ uint32_t first_row_of(const Work& work, const ThreadCoord& at, int i) {
  return work.m + (at.warpgroup * L::kSlices + i / L::kParts) * 64;
}
template <class L>
__device__ __forceinline__ uint32_t first_column_of(const Work& work, int i) {
  return work.n + i % L::kParts * L::kPartColumns;
}

template <class L>
__device__ __forceinline__ void finish_tile(const GemmParams& p, Shared<L>& shared,
                                            const Work& work, const ThreadCoord& at,
                                            float (&total)[L::kBlocks][L::kRegisters]) {
  if (L::kRowwise || p.bias != nullptr) {
#pragma unroll
    for (int b = 0; b < L::kBlocks; ++b) {
      const uint32_t row = first_row_of<L>(work, at, b) + at.row();
      float row_scale[2] = {1, 1};
      if constexpr (L::kRowwise) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (row + 8 * h < work.m_end)
            row_scale[h] = ptx::ld_global_nc_f32(p.a_scale + (row + 8 * h) * p.a_scale_row);
      }
#pragma unroll
      for (int i = 0; i < L::kRegisters; ++i) {
        const uint32_t column = b % L::kParts * L::kPartColumns + at.column() + at.column_of(i);
        if constexpr (L::kRowwise)
          total[b][i] =
              rescaled(total[b][i], row_scale[i / 2 % 2] * shared.factor[at.warpgroup][column]);
        total[b][i] += shared.bias[at.warpgroup][column];
      }
    }
  }
}

// Stores from registers, with any stride, alignment and number of rows. Accumulation loads the old
// output kAtATime elements at a time; all of it would not fit in registers beside the accumulators.
template <class L>
__device__ __forceinline__ void store_directly(const GemmParams& p, const Work& work,
                                               const ThreadCoord& at, int b,
                                               float (&total)[L::kRegisters]) {
  constexpr int kAtATime = 16;
  static_assert(L::kRegisters % kAtATime == 0);
  const uint32_t row = first_row_of<L>(work, at, b) + at.row();
  const uint32_t column = first_column_of<L>(work, b) + at.column();
  const auto row_of = [&](int i) { return row + at.row_of(i); };
  const auto column_of = [&](int i) { return column + at.column_of(i); };
#pragma unroll
  for (int first = 0; first < L::kRegisters; first += kAtATime) {
    if (p.accumulate) {
      with_loader(p.out_dtype, [&](auto load) {
#pragma unroll
        for (int i = first; i < first + kAtATime; ++i)
          if (row_of(i) < work.m_end && column_of(i) < p.n)
            total[i] += load(p.out, out_offset(p, work, row_of(i)) + column_of(i));
      });
    }
#pragma unroll
    for (int i = first; i < first + kAtATime; i += 2) {
      if (row_of(i) >= work.m_end) continue;
      const uint32_t c = column_of(i);
      const int64_t offset = out_offset(p, work, row_of(i)) + c;
      if (p.out_dtype == ScalarType::Float) {
        float* out = static_cast<float*>(p.out) + offset;
        if (c < p.n) out[0] = total[i];
        if (c + 1 < p.n) out[1] = total[i + 1];
      } else {
        uint16_t* out = static_cast<uint16_t*>(p.out) + offset;
        const uint32_t pair = pack_16bit(p.out_dtype, total[i], total[i + 1]);
        if (c < p.n) out[0] = uint16_t(pair);
        if (c + 1 < p.n) out[1] = uint16_t(pair >> 16);
      }
    }
  }
}

// Where TmaStore stores a tile.
struct OutTarget {
  const GemmParams& p;
  const Work& work;
  __device__ __forceinline__ const void* map() const { return &p.out_map; }
  __device__ __forceinline__ ScalarType dtype() const { return p.out_dtype; }
  __device__ __forceinline__ bool adds() const { return p.accumulate; }
  __device__ __forceinline__ uint32_t z() const {
    return p.grouping == Grouping::kAlongK ? work.group : 0;
  }
};

template <class L>
__device__ __forceinline__ void store_tile(const GemmParams& p, Shared<L>& shared, const Work& work,
                                           const ThreadCoord& at,
                                           float (&total)[L::kBlocks][L::kRegisters]) {
  // The previous tile may have ended at any box; this one starts with the first.
  if (at.thread() == 0) ptx::cp_async_bulk_wait_group_read<0>();
  TmaStore<L::kStoreBoxes> by_tma{shared.store[at.warpgroup]};
  // TMA adds in FP32. Other outputs are rounded once, after the sum.
  const bool whole = p.out_by_tma && (!p.accumulate || p.out_dtype == ScalarType::Float);
  // The output of an empty group stays as it is: adding zero would turn -0 into 0.
  if (p.grouping == Grouping::kAlongK && p.accumulate && work.k_begin == work.k_end) return;
  // TMA stops storing at the end of a matrix, but not at the end of a group of rows.
  const bool bounded = p.grouping == Grouping::kNone || p.grouping == Grouping::kAlongK;
  unrolled<L::kBlocks>([&](auto b) {
    if (whole && (bounded || first_row_of<L>(work, at, b) + 64 <= work.m_end))
      by_tma.send_accumulator(OutTarget{p, work}, at, first_column_of<L>(work, b),
                              first_row_of<L>(work, at, b), total[b]);
    else
      store_directly<L>(p, work, at, b, total[b]);
  });
}

// ---- swapped tiles ----

// Writes the product to shared memory, transposed, with one row per token. In a cluster that splits
// K, each CTA then adds up a share of the product, in the order of ranks, and stores it. Waits:
// staged_full, until all CTAs have written their parts; staged_empty, until all have read them.
template <class L>
struct StagedEpilogue {
  uint32_t phase = 0;

  __device__ __forceinline__ void run(const GemmParams& p, Shared<L>& shared, const Work& work,
                                      const ThreadCoord& at, const float (&total)[L::kRegisters]) {
    const Place place = Place::here();
    ptx::mbarrier_wait(&shared.staged_empty, phase ^ 1);
    const uint32_t row = at.warpgroup * 64 + at.row();
#pragma unroll
    for (int i = 0; i < L::kRegisters; ++i)
      ptx::st_shared_f32(
          ptx::shared_address(&shared.staged[at.column() + at.column_of(i)][row + at.row_of(i)]),
          total[i]);
    __syncwarp();
    if (at.lane < place.cluster) ptx::mbarrier_arrive_cluster(&shared.staged_full, at.lane);
    ptx::mbarrier_wait_cluster(&shared.staged_full, phase);

    constexpr uint32_t kQuads = L::kRows / 4;  // groups of four features in a token's row
    const uint32_t share = ceil_div_u32(L::kColumns * kQuads, place.cluster);
    const uint32_t end = min((place.rank + 1) * share, L::kColumns * kQuads);
    for (uint32_t i = place.rank * share + at.warpgroup * 128 + at.thread(); i < end;
         i += L::kConsumers) {
      const uint32_t token = i / kQuads, feature = i % kQuads * 4;
      const uint32_t m = work.m + token, n = work.n + feature;
      if (m >= work.m_end || n >= p.n) continue;
      const uint32_t address = ptx::shared_address(&shared.staged[token][feature]);
      float sum[4] = {};
#pragma unroll
      for (uint32_t rank = 0; rank < kMaxSplits; ++rank) {
        if (rank >= place.cluster) break;
        const float4 part = ptx::ld_shared_cluster_v4_f32(ptx::mapa(address, rank));
        sum[0] = rank == 0 ? part.x : sum[0] + part.x;
        sum[1] = rank == 0 ? part.y : sum[1] + part.y;
        sum[2] = rank == 0 ? part.z : sum[2] + part.z;
        sum[3] = rank == 0 ? part.w : sum[3] + part.w;
      }
      store(p, work, m, n, sum);
    }
    __syncwarp();
    if (at.lane < place.cluster)
      ptx::mbarrier_arrive_done_reading(
          ptx::mapa(ptx::shared_address(&shared.staged_empty), at.lane));
    phase ^= 1;
  }

 private:
  // Finishes and stores four features of a token.
  static __device__ __forceinline__ void store(const GemmParams& p, const Work& work, uint32_t m,
                                               uint32_t n, float (&sum)[4]) {
    const uint32_t count = min(p.n - n, 4u);
    const int64_t offset = out_offset(p, work, m) + n;
    if constexpr (L::kRowwise) {
      const float row_scale = ptx::ld_global_nc_f32(p.a_scale + m * p.a_scale_row);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count) sum[i] = rescaled(sum[i], row_scale * row_scale_of_b(p, work, n + i));
    }
    if (p.bias != nullptr) {
      with_loader(p.bias_dtype, [&](auto load) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < count) sum[i] += load(p.bias, bias_index(p, work, n) + i);
      });
    }
    if (p.accumulate) {
      with_loader(p.out_dtype, [&](auto load) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < count) sum[i] += load(p.out, offset + i);
      });
    }
    const bool together = p.out_aligned && count == 4;
    if (p.out_dtype == ScalarType::Float) {
      float* out = static_cast<float*>(p.out) + offset;
      if (together)
        *reinterpret_cast<float4*>(out) = {sum[0], sum[1], sum[2], sum[3]};
      else
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < count) out[i] = sum[i];
    } else {
      uint16_t* out = static_cast<uint16_t*>(p.out) + offset;
      const uint2 pairs = {pack_16bit(p.out_dtype, sum[0], sum[1]),
                           pack_16bit(p.out_dtype, sum[2], sum[3])};
      if (together) {
        *reinterpret_cast<uint2*>(out) = pairs;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < count) out[i] = uint16_t((i < 2 ? pairs.x : pairs.y) >> i % 2 * 16);
      }
    }
  }
};

}  // namespace torchext::sm90
