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

// Loads the 1x128 scales of `count` rows of a or b, K block by K block. TMA does it where the first
// row is a multiple of four: it reads only from multiples of 16 bytes, and for other addresses the
// GPU reports an illegal instruction. Elsewhere, as in groups that begin at any row, the warp's lanes
// copy the scales. With a count of 0 there is nothing to do.
template <int count, bool of_b, int unroll>
struct ScaleVector {
  uint32_t row;

  __device__ __forceinline__ bool by_tma() const { return count == 0 || row % 4 == 0; }
  __device__ __forceinline__ uint32_t tma_bytes() const {
    return by_tma() ? count * sizeof(float) : 0;
  }
  __device__ __forceinline__ void load(float* to, const TensorMap& map, ptx::mbarrier* full,
                                       uint32_t block) const {
    if (by_tma() && count > 0) ptx::cp_async_bulk_tensor_2d_load(to, &map, full, row, block);
  }
  // `rows`: how many a or b has.
  __device__ __forceinline__ void copy(float* to, const GemmParams& p, uint32_t rows,
                                       uint32_t block) const {
    if (by_tma()) return;
    const float* from = (of_b ? p.b_scale : p.a_scale) + row +
                        block * (of_b ? p.b_scale_k_block : p.a_scale_k_block);
#pragma unroll unroll
    for (int first = 0; first < count; first += 32) {
      const int i = first + threadIdx.x;
      if (first + 32 > count && i >= count) break;
      const float scale = row + i < rows ? ptx::ld_global_nc_f32(from + i) : 0;
      ptx::st_shared_f32(ptx::shared_address(to + i), scale);
    }
  }
};

template <class L>
__device__ void produce(const GemmParams& p, Shared<L>& shared) {
  using S = Shared<L>;
  constexpr int kScales = S::kColumnVector ? L::kTileColumns : 0;
  const uint32_t b_rows =
      (p.grouping == Grouping::kAlongK ? 1 : p.groups) * p.n * (L::kGated ? 2 : 1);
  const bool leader = ptx::elect_sync();
  RingPosition<L::kStages> ring;
  Schedule<L> schedule(p, shared.tile_end);
  for (Work work; schedule.next(work);) {
    const uint32_t b_row = row_of_b(p, work);
    const uint32_t row = L::kSwapped ? b_row : work.m, column = L::kSwapped ? work.m : b_row;
    constexpr int kUnroll = L::k1D2D ? 2 : 1;  // the other kernels have no registers to spare
    const ScaleVector<kScales, !L::kSwapped, kUnroll> scale{column};
    const ScaleVector<L::kGated ? kScales : 0, true, kUnroll> up_scale{column + p.n};
    const bool copies = !scale.by_tma() || !up_scale.by_tma();
    const auto prefetch =
        [&](uint32_t block) {  // what ScalesAhead will fetch: 32 rows by each lane
          if (L::kRowScales != Scales::kVector || threadIdx.x * 32 >= L::kRows) return;
          const uint32_t r = row + threadIdx.x * 32;
          if (r < (L::kSwapped ? b_rows : p.m))
            ptx::prefetch_global_l2((L::kSwapped ? p.b_scale : p.a_scale) + r +
                                    block * (L::kSwapped ? p.b_scale_k_block : p.a_scale_k_block));
        };
    for (uint32_t block = work.k_begin; block < work.k_end; ++block, ring.advance()) {
      ptx::mbarrier* full = &shared.full[ring.slot];
      uint8_t* columns = shared.columns[ring.slot];
      float* scales = shared.column_scale[ring.slot];
      prefetch(block);
      if (leader) ptx::mbarrier_wait(&shared.empty[ring.slot], ring.phase ^ 1);
      if (copies) {
        __syncwarp();  // the slot is empty
        scale.copy(scales, p, L::kSwapped ? p.m : b_rows, block);
        up_scale.copy(scales + L::kTileColumns, p, b_rows, block);
        ptx::fence_proxy_async_shared();  // before TMA's next load to the same place
        __syncwarp();
      }
      if (!leader) continue;
      ptx::mbarrier_arrive_expect_tx(full,
                                     S::kBytesPerStage + scale.tma_bytes() + up_scale.tma_bytes());
      const int k = block * kTileK;
      if (p.multicast) {  // this CTA loads half of the rows, the other CTA the rest
        const uint32_t half = ptx::cluster_ctarank() * (L::kRows / 2);
        ptx::cp_async_bulk_tensor_2d_load_multicast(&shared.rows[ring.slot][half * kTileK], &p.rows,
                                                    full, k, row + half, 0b11);
      } else {
        ptx::cp_async_bulk_tensor_2d_load(shared.rows[ring.slot], &p.rows, full, k, row);
      }
      ptx::cp_async_bulk_tensor_2d_load(columns, &p.columns, full, k, column);
      if constexpr (L::kGated)
        ptx::cp_async_bulk_tensor_2d_load(columns + L::kTileColumns * kTileK, &p.columns, full, k,
                                          column + p.n);
      scale.load(scales, p.column_scale, full, block);
      up_scale.load(scales + L::kTileColumns, p.column_scale, full, block);
    }
    __syncwarp();
  }
}

// ---- consumers ----

// The factors of a K block for this thread's accumulators: the 1x128 scales of its rows times b's
// 128x128 scales. Where the columns have a scale each, promote() multiplies by it.
template <class L>
struct Factors {
  // [slice of 64 rows][row() or row() + 8][scale of the columns]
  float value[L::kSlices][2][L::kBlockScales];
};

// Scales of the rows and 128x128 scales, fetched from global memory one K block ahead. They do not
// come through the ring, because then a warp would wait for shared memory between its first wgmma
// and the others (ptxas moves the reads there), with the tensor cores idle: 90 cycles on an H200.
template <class L>
struct ScalesAhead {
  static constexpr bool kVector = L::kRowScales == Scales::kVector;
  static constexpr int kBlocks = L::k1D2D ? L::kBlockScales : 0;
  // Offsets of the scales at the K block to fetch next. 32 bits suffice: each scale belongs to 128
  // bytes of an operand.
  uint32_t rows, blocks[kBlocks + 1];
  float row[L::kSlices][2], block[kBlocks + 1];

  // Row of the tile, and of its operand, that is this thread's first.
  static __device__ __forceinline__ uint32_t first_of_tile(const ThreadCoord& at) {
    return at.warpgroup * L::kSlices * 64 + at.row();
  }
  static __device__ __forceinline__ uint32_t tile_of(const Work& work) {
    return L::kSwapped ? work.n : work.m;
  }

  __device__ __forceinline__ ScalesAhead(const GemmParams& p, const Work& work,
                                         const ThreadCoord& at) {
    if constexpr (kVector) {
      const int64_t k_block = L::kSwapped ? p.b_scale_k_block : p.a_scale_k_block;
      rows = uint32_t((L::kSwapped ? work.group * p.b_scale_group : 0) + tile_of(work) +
                      first_of_tile(at) + work.k_begin * k_block);
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      uint32_t n = min(work.n + i * L::kBlockSpan, p.n - 1);
      if constexpr (L::kGated)  // the gate's block, up's first block, up's second block
        n = i == 0 ? work.n : min(p.n + work.n + (i - 1) * L::kBlockSpan, 2 * p.n - 1);
      blocks[i] = uint32_t(work.group * p.b_scale_group + n / kScaleGroup * p.b_scale_row +
                           work.k_begin * p.b_scale_k_block);
    }
  }

  __device__ __forceinline__ void fetch(const GemmParams& p, const Work& work,
                                        const ThreadCoord& at) {
    if constexpr (kVector) {
      const float* from = (L::kSwapped ? p.b_scale : p.a_scale) + rows;
      const uint32_t end = L::kSwapped ? p.n : p.m;
      const bool whole = tile_of(work) + L::kRows <= end;
#pragma unroll
      for (int i = 0; i < L::kSlices; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int r = i * 64 + h * 8;
          const bool exists = whole || tile_of(work) + first_of_tile(at) + r < end;
          row[i][h] = exists ? ptx::ld_global_nc_f32(from + r) : 0;
        }
      rows += uint32_t(L::kSwapped ? p.b_scale_k_block : p.a_scale_k_block);
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      block[i] = ptx::ld_global_nc_f32(p.b_scale + blocks[i]);
      blocks[i] += uint32_t(p.b_scale_k_block);
    }
  }

  __device__ __forceinline__ Factors<L> factors() const {
    Factors<L> factors;
#pragma unroll
    for (int i = 0; i < L::kSlices; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < L::kBlockScales; ++j) {
          float& value = factors.value[i][h][j];
          value = kVector ? row[i][h] : 1;
          if constexpr (L::k1D2D) value = kVector ? value * block[j] : block[j];
        }
    return factors;
  }
};

// A K block in the ring, to be multiplied and promoted.
template <class L>
struct Pending {
  uint32_t slot;
  uint32_t rows, columns;  // low words of the wgmma descriptors of this warpgroup's operands
  Factors<L> factors;
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

// Starts the wgmmas of 64 rows and kPartColumns columns of a K block: those from `row` and `column`
// of the warpgroup's operands on.
template <class L, class A, class B>
__device__ __forceinline__ void multiply(const Pending<L>& pending, int row, int column,
                                         float (&block)[L::kRegisters]) {
  const uint32_t a = pending.rows + row * kTileK / 16, b = pending.columns + column * kTileK / 16;
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kTileK / 32; ++step)
    ptx::wgmma_m64nNk32(A(), B(), block, ptx::wgmma_descriptor_k_major_128b(a + step * 2),
                        ptx::wgmma_descriptor_k_major_128b(b + step * 2), step > 0);
  ptx::wgmma_commit_group();
}

// Gated tiles: the first column of the tile at which up has its second block scale.
template <class L>
__device__ __forceinline__ uint32_t next_block_of_up(const GemmParams& p, const Work& work) {
  return kScaleGroup - (p.n + work.n) % kScaleGroup;
}

// total += scales * block. Column scales are read when they are needed, to save registers.
// `straddles`: columns from next_block on have up's second block scale.
template <class L, bool straddles = false>
__device__ __forceinline__ void promote(const Shared<L>& shared, const Pending<L>& pending,
                                        int slice, int part, const ThreadCoord& at,
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
      const auto& factors = pending.factors.value[slice][j / 2 % 2];
      float row = factors[span];
      if constexpr (straddles)
        if (i / 4 * 8 + at.column() + j % 2 >= next_block) row = factors[2];
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

// Tells the producers that a warp has finished reading a slot: that of this CTA, and with multicast
// the other CTA's too. Lane r tells CTA r; or lane 0 its own.
struct EmptySlots {
  uint32_t address;  // of empty[0], in the cluster's shared memory
  bool tells;

  __device__ __forceinline__ EmptySlots(const GemmParams& p, const ptx::mbarrier* empty,
                                        const ThreadCoord& at) {
    const uint32_t rank = p.multicast ? at.lane % 2 : ptx::cluster_ctarank();
    address = ptx::mapa(ptx::shared_address(empty), rank);
    tells = at.lane < (p.multicast ? 2 : 1);
  }
  __device__ __forceinline__ void release(uint32_t slot) const {
    if (tells) ptx::mbarrier_arrive_done_reading(address + slot * sizeof(ptx::mbarrier));
  }
};

// total = sum over the tile's K blocks of scales * (rows @ columns.T).
template <class L, class A, class B>
__device__ __forceinline__ void accumulate_tile(const GemmParams& p, Shared<L>& shared,
                                                const Work& work, const ThreadCoord& at,
                                                const EmptySlots& empty,
                                                RingPosition<L::kStages>& ring,
                                                float (&total)[L::kBlocks][L::kRegisters]) {
#pragma unroll
  for (auto& block : total)
#pragma unroll
    for (float& value : block) value = 0;

  const uint32_t first_row = at.warpgroup * L::kSlices * 64;
  const uint32_t next_block = L::kGated ? next_block_of_up<L>(p, work) : 0;
  ScalesAhead<L> scales(p, work, at);
  if (work.k_begin < work.k_end) scales.fetch(p, work, at);

  const uint32_t rows = ptx::wgmma_descriptor_low_word(&shared.rows[0][first_row * kTileK]);
  const uint32_t columns = ptx::wgmma_descriptor_low_word(shared.columns[0]);

  // Waits for the next K block.
  const auto take = [&](uint32_t k_block) {
    Pending<L> pending{ring.slot,
                       rows + ring.slot * (L::kRows * kTileK / 16),
                       columns + ring.slot * (L::kColumns * kTileK / 16),
                       {}};
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
  // While the tensor cores work: finds the factors, and fetches the scales of the next K block.
  const auto prepare = [&](uint32_t k_block, Pending<L>& pending) {
    pending.factors = scales.factors();
    if (k_block + 1 < work.k_end) scales.fetch(p, work, at);
  };
  const auto release = [&](const Pending<L>& pending) {
    __syncwarp();  // all lanes have read their part of the slot
    empty.release(pending.slot);
  };

  if constexpr (L::kBuffers == 2) {
    float even[L::kRegisters], odd[L::kRegisters];
    const auto start = [&](uint32_t k_block, float (&block)[L::kRegisters]) {
      Pending<L> pending = take(k_block);
      multiply<L, A, B>(pending, 0, 0, block);
      prepare(k_block, pending);
      return pending;
    };
    const auto finish = [&](const Pending<L>& pending, float (&block)[L::kRegisters]) {
#pragma unroll
      for (float& value : block) ptx::wgmma_pin(value);
      if constexpr (!Shared<L>::kColumnVector) release(pending);
      promote<L>(shared, pending, 0, 0, at, block, total[0]);
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
      Pending<L> pending = take(k_block);
      float block[L::kRegisters];
#pragma unroll
      for (int i = 0; i < L::kBlocks; ++i) {
        multiply<L, A, B>(pending, i / L::kParts * 64, i % L::kParts * L::kPartColumns, block);
        if (i == 0) prepare(k_block, pending);
        ptx::wgmma_wait_group<0>();
#pragma unroll
        for (float& value : block) ptx::wgmma_pin(value);
        const bool last = i + 1 == L::kBlocks;
        if (last && !Shared<L>::kColumnVector) release(pending);
        if (L::kGated && L::k1D2D && i == 1 && next_block < kScaleGroup)
          promote<L, true>(shared, pending, 0, 1, at, block, total[i], next_block);
        else
          promote<L>(shared, pending, i / L::kParts, i % L::kParts, at, block, total[i]);
        if (last && Shared<L>::kColumnVector) release(pending);
      }
    }
  }
}

}  // namespace torchext::sm90
