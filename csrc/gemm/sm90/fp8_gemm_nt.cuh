// Hopper FP8 GEMM: out[M, N] = scales x (a[M, K] @ b[N, K].T), FP32 promotion every 128 of K.
//
// Persistent: each CTA walks over 128x128 tiles of the output. Three warpgroups:
//
//   producer   one elected thread keeps a ring of kStages slots full: for each K block it waits for
//              empty[slot], then has TMA bring a's and b's tiles and their 1x128 scales, which
//              complete full[slot]. The other threads of the warpgroup leave at once; its registers
//              go to the consumers.
//   consumers  two warpgroups, 64 rows of the tile each. For each K block: wait for full[slot];
//              four wgmma m64n128k32 into `block`; wait for them; arrive at empty[slot] (a warp at
//              a time); promote: total += scale * block in FP32. While one warpgroup promotes, the
//              other has the tensor cores. After the last K block: row-wise scales, bias, old
//              output; then the tile goes to shared memory and out by TMA, whose read of it is
//              awaited only when the next tile wants the space. Where TMA cannot store (rows not
//              16-byte aligned, or accumulating), threads store from registers.
//
// Ragged M, N, K: TMA fills what lies outside with zeros on loads and leaves it out on stores.
#pragma once

#include "params.h"
#include "ptx/isa/barrier.h"
#include "ptx/isa/convert.h"
#include "ptx/isa/elect.h"
#include "ptx/isa/fence.h"
#include "ptx/isa/matrix.h"
#include "ptx/isa/mbarrier.h"
#include "ptx/isa/memory.h"
#include "ptx/isa/register_budget.h"
#include "ptx/isa/tma.h"
#include "ptx/isa/wgmma.h"

namespace torchext::sm90 {

constexpr int kStages = 5;
constexpr int kStoreBytes = kConsumerRows * 2 * kSwizzleBytes;  // staging of a consumer warpgroup

// setmaxnreg: 128 * 40 + 256 * 232 registers of the SM's 65,536.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(128 * kProducerRegisters + 256 * kConsumerRegisters <= 65536);

template <Granularity granularity>
struct Shared {
  static constexpr bool kLoadsScalesA = granularity != Granularity::kRowwise;
  static constexpr bool kLoadsScalesB = granularity == Granularity::k1D1D;

  // TMA and wgmma under 128-byte swizzle want 1024-byte alignment; every array here keeps it.
  uint8_t a[kStages][kTileM * kTileK];
  uint8_t b[kStages][kTileN * kTileK];
  uint8_t store[kConsumerWarpgroups][kStoreBytes];
  float a_scale[kLoadsScalesA ? kStages : 1][kTileM];
  float b_scale[kLoadsScalesB ? kStages : 1][kTileN];
  float column_scale[kConsumerWarpgroups][kTileN], column_bias[kConsumerWarpgroups][kTileN];
  ptx::mbarrier full[kStages], empty[kStages];

  static constexpr uint32_t kBytesPerStage = sizeof a[0] + sizeof b[0] +
                                             (kLoadsScalesA ? sizeof a_scale[0] : 0) +
                                             (kLoadsScalesB ? sizeof b_scale[0] : 0);
};

// Position in the ring; a slot's phase flips each time round.
struct RingPosition {
  uint32_t slot = 0, phase = 0;
  __device__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// Tiles in strips of kStripRows tile rows, column by column within a strip, so that CTAs that run
// side by side share tiles of a and b in L2.
struct Tile {
  static constexpr uint32_t kStripRows = 8;
  uint32_t m, n;  // of the first element

  __device__ Tile(uint32_t index, uint32_t m_tiles, uint32_t n_tiles) {
    const uint32_t strip = index / (kStripRows * n_tiles);
    const uint32_t within = index % (kStripRows * n_tiles);
    const uint32_t rows = min(kStripRows, m_tiles - strip * kStripRows);
    m = (strip * kStripRows + within % rows) * kTileM;
    n = within / rows * kTileN;
  }
};

// Calls body(load), where load(data, i) reads element i of an array of `dtype` as FP32: one branch
// for all the loads in `body`.
template <class Body>
__device__ __forceinline__ void with_loader(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::Float)
    body([](const void* data, int64_t i) { return static_cast<const float*>(data)[i]; });
  else if (dtype == ScalarType::BFloat16)
    body([](const void* data, int64_t i) {
      return ptx::cvt_f32_bf16(static_cast<const uint16_t*>(data)[i]);
    });
  else
    body([](const void* data, int64_t i) {
      return ptx::cvt_f32_f16(static_cast<const uint16_t*>(data)[i]);
    });
}

__device__ __forceinline__ uint32_t pack(ScalarType dtype, float low, float high) {
  return dtype == ScalarType::BFloat16 ? ptx::cvt_rn_bf16x2_f32(high, low)
                                       : ptx::cvt_rn_f16x2_f32(high, low);
}

template <Granularity granularity>
__device__ void produce(const GemmParams& p, Shared<granularity>& shared, uint32_t m_tiles,
                        uint32_t n_tiles) {
  using S = Shared<granularity>;
  RingPosition at;
  for (uint32_t index = blockIdx.x; index < m_tiles * n_tiles; index += gridDim.x) {
    const Tile tile(index, m_tiles, n_tiles);
    for (uint32_t block = 0; block < p.k_blocks; ++block, at.advance()) {
      ptx::mbarrier* full = &shared.full[at.slot];
      ptx::mbarrier_wait(&shared.empty[at.slot], at.phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, S::kBytesPerStage);
      const int k = block * kTileK;
      ptx::cp_async_bulk_tensor_2d_load(shared.a[at.slot], &p.a, full, k, tile.m);
      ptx::cp_async_bulk_tensor_2d_load(shared.b[at.slot], &p.b, full, k, tile.n);
      if constexpr (S::kLoadsScalesA)
        ptx::cp_async_bulk_tensor_2d_load(shared.a_scale[at.slot], &p.a_scale, full, tile.m, block);
      if constexpr (S::kLoadsScalesB)
        ptx::cp_async_bulk_tensor_2d_load(shared.b_scale[at.slot], &p.b_scale, full, tile.n, block);
    }
  }
}

// A consumer thread's place in its warpgroup's 64x128 part of the tile. In arrays of 64 values,
// element 4 * j + 2 * h + i is row `row + 8 * h`, column `column + 8 * j + i`.
struct Fragment {
  uint32_t warpgroup, warp, lane;  // of the consumers; of the warpgroup; of the warp
  __device__ uint32_t row() const { return warp * 16 + lane / 4; }
  __device__ uint32_t column() const { return lane % 4 * 2; }
};

// total += scale * block for one K block. `slot` holds its 1x128 scales; b_scale is 1D2D's.
template <Granularity granularity>
__device__ __forceinline__ void promote(float (&total)[64], const float (&block)[64],
                                        const float (&scale)[2], const float2 (&b_scale)[16]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const float row_scale = scale[i / 2 % 2];
    if constexpr (granularity == Granularity::k1D2D) {
      total[i] = fmaf(row_scale, block[i], total[i]);
    } else if constexpr (granularity == Granularity::k1D1D) {
      const float column_scale = i % 2 == 0 ? b_scale[i / 4].x : b_scale[i / 4].y;
      total[i] = fmaf(row_scale * column_scale, block[i], total[i]);
    } else {
      total[i] += block[i];
    }
  }
}

// total = sum over K blocks of scale * (a block @ b block.T).
template <Granularity granularity, class A, class B>
__device__ __forceinline__ void accumulate_tile(const GemmParams& p, Shared<granularity>& shared,
                                                const Tile& tile, const Fragment& at,
                                                RingPosition& ring, float (&total)[64]) {
  using S = Shared<granularity>;
  constexpr bool k1D2D = granularity == Granularity::k1D2D;
#pragma unroll
  for (float& value : total) value = 0;
  const uint32_t first_row = at.warpgroup * kConsumerRows;

  // 1D2D: b's scale of the next K block is fetched while this one is multiplied.
  const float* b_scales = p.b_scale_data + tile.n / kGroup * p.b_scale_row;
  float next_b_scale = k1D2D && p.k_blocks > 0 ? ptx::ld_global_nc_f32(b_scales) : 1;

  for (uint32_t k_block = 0; k_block < p.k_blocks; ++k_block, ring.advance()) {
    const float block_scale = next_b_scale;
    if (k1D2D && k_block + 1 < p.k_blocks)
      next_b_scale = ptx::ld_global_nc_f32(b_scales + (k_block + 1) * p.b_scale_group);

    ptx::mbarrier_wait(&shared.full[ring.slot], ring.phase);
    const uint64_t a = ptx::wgmma_descriptor_k_major_128b(&shared.a[ring.slot][first_row * kTileK]);
    const uint64_t b = ptx::wgmma_descriptor_k_major_128b(shared.b[ring.slot]);
    float block[64];
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTileK / 32; ++step)
      ptx::wgmma_m64n128k32(A(), B(), block, a + step * 2, b + step * 2, step > 0);
    ptx::wgmma_commit_group();

    float scale[2] = {1, 1};
    float2 column_scale[16];
    if constexpr (S::kLoadsScalesA) {
      const uint32_t scales = ptx::shared_address(&shared.a_scale[ring.slot][first_row + at.row()]);
      scale[0] = ptx::ld_shared_f32(scales) * block_scale;
      scale[1] = ptx::ld_shared_f32(scales + 8 * sizeof(float)) * block_scale;
    }
    if constexpr (S::kLoadsScalesB) {
      const uint32_t scales = ptx::shared_address(&shared.b_scale[ring.slot][at.column()]);
#pragma unroll
      for (int j = 0; j < 16; ++j)
        column_scale[j] = ptx::ld_shared_v2_f32(scales + j * 8 * sizeof(float));
    }

    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (float& value : block) ptx::wgmma_pin(value);
    __syncwarp();  // all lanes have read their scales
    if (at.lane == 0) ptx::mbarrier_arrive(&shared.empty[ring.slot]);
    promote<granularity>(total, block, scale, column_scale);
  }
}

// What the epilogue needs of the tile's columns. Thread t of a warpgroup fetches column t's before
// the main loop, which hides the latency, and shares them after it.
struct ColumnTerms {
  float scale, bias;  // row-wise scale of b; bias

  __device__ static ColumnTerms fetch(const GemmParams& p, bool rowwise, uint32_t column) {
    ColumnTerms terms{1, 0};
    if (column >= p.n) return terms;
    if (rowwise) terms.scale = ptx::ld_global_nc_f32(p.b_scale_data + column * p.b_scale_row);
    if (p.bias != nullptr)
      with_loader(p.bias_dtype, [&](auto load) { terms.bias = load(p.bias, column); });
    return terms;
  }
};

// Row-wise scales, bias and the old output, in FP32.
template <Granularity granularity>
__device__ __forceinline__ void finish_tile(const GemmParams& p, Shared<granularity>& shared,
                                            const Tile& tile, const Fragment& at,
                                            const ColumnTerms& fetched, float (&total)[64]) {
  constexpr bool kRowwise = granularity == Granularity::kRowwise;
  const uint32_t row = tile.m + at.warpgroup * kConsumerRows + at.row();
  const uint32_t column = tile.n + at.column();
  if (kRowwise || p.bias != nullptr) {
    float* scales = shared.column_scale[at.warpgroup];
    float* biases = shared.column_bias[at.warpgroup];
    const uint32_t own = at.warp * 32 + at.lane;
    ptx::bar_sync(1 + at.warpgroup, 128);  // the last tile's have been read
    scales[own] = fetched.scale;
    biases[own] = fetched.bias;
    ptx::bar_sync(1 + at.warpgroup, 128);
    float row_scale[2] = {1, 1};
    if constexpr (kRowwise) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (row + 8 * h < p.m)
          row_scale[h] = ptx::ld_global_nc_f32(p.a_scale_data + (row + 8 * h) * p.a_scale_row);
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const uint32_t c = at.column() + i / 4 * 8 + i % 2;
      if constexpr (kRowwise) total[i] *= row_scale[i / 2 % 2] * scales[c];
      total[i] += biases[c];
    }
  }
  if (p.accumulate) {
    with_loader(p.out_dtype, [&](auto load) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const uint32_t r = row + i / 2 % 2 * 8, c = column + i / 4 * 8 + i % 2;
        if (r < p.m && c < p.n) total[i] += load(p.out, r * p.out_stride + c);
      }
    });
  }
}

// From registers: any stride and alignment.
__device__ __forceinline__ void store_directly(const GemmParams& p, const Tile& tile,
                                               const Fragment& at, const float (&total)[64]) {
  const uint32_t row = tile.m + at.warpgroup * kConsumerRows + at.row();
  const uint32_t column = tile.n + at.column();
#pragma unroll
  for (int i = 0; i < 64; i += 2) {
    const uint32_t r = row + i / 2 % 2 * 8, c = column + i / 4 * 8;
    if (r >= p.m) continue;
    const int64_t offset = r * p.out_stride + c;
    if (p.out_dtype == ScalarType::Float) {
      float* out = static_cast<float*>(p.out) + offset;
      if (c < p.n) out[0] = total[i];
      if (c + 1 < p.n) out[1] = total[i + 1];
    } else {
      uint16_t* out = static_cast<uint16_t*>(p.out) + offset;
      const uint32_t pair = pack(p.out_dtype, total[i], total[i + 1]);
      if (c < p.n) out[0] = uint16_t(pair);
      if (c + 1 < p.n) out[1] = uint16_t(pair >> 16);
    }
  }
}

// Through shared memory: columns of 128 bytes by 64 rows, each under 128-byte swizzle (the 16-byte
// chunk of a row is XORed with the row's index modulo 8), two at a time.
__device__ __forceinline__ void store_by_tma(const GemmParams& p, const Tile& tile,
                                             const Fragment& at, const float (&total)[64],
                                             uint8_t* staging) {
  constexpr int kColumnBytes = kConsumerRows * kSwizzleBytes;
  const uint32_t barrier = 1 + at.warpgroup;
  const bool leader = at.warp == 0 && at.lane == 0;
  const uint32_t base = ptx::shared_address(staging);
  const uint32_t m = tile.m + at.warpgroup * kConsumerRows;

  const auto begin = [&] {  // the previous store has read the staging space
    if (leader) ptx::cp_async_bulk_wait_group_read<0>();
    ptx::bar_sync(barrier, 128);
  };
  const auto send = [&](uint32_t n, uint32_t columns_in_128_bytes) {
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(barrier, 128);
    if (!leader) return;
#pragma unroll
    for (int part = 0; part < 2; ++part)
      ptx::cp_async_bulk_tensor_2d_store(&p.out_map, staging + part * kColumnBytes,
                                         n + part * columns_in_128_bytes, m);
    ptx::cp_async_bulk_commit_group();
  };

  if (p.out_dtype == ScalarType::Float) {
    const uint32_t row = at.row();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      begin();
#pragma unroll
      for (int j = 0; j < 8; ++j) {  // eight columns, 32 bytes
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // row and row + 8 swizzle alike
          const uint32_t chunk = (j % 4 * 2 + at.column() / 4) ^ (row % 8);
          const float* pair = &total[(half * 8 + j) * 4 + 2 * h];
          ptx::st_shared_v2_f32(base + j / 4 * kColumnBytes + (row + 8 * h) * kSwizzleBytes +
                                    chunk * 16 + at.column() % 4 * 4,
                                pair[0], pair[1]);
        }
      }
      send(tile.n + half * 64, 32);
    }
    return;
  }

  begin();
  const uint32_t row = at.warp * 16 + at.lane % 16;  // the row whose address this lane gives
#pragma unroll
  for (int j = 0; j < 16; j += 2) {  // sixteen columns, 32 bytes
    const uint32_t chunk = (j % 8 + at.lane / 16) ^ (row % 8);
    ptx::stmatrix_x4(base + j / 8 * kColumnBytes + row * kSwizzleBytes + chunk * 16,
                     pack(p.out_dtype, total[4 * j], total[4 * j + 1]),
                     pack(p.out_dtype, total[4 * j + 2], total[4 * j + 3]),
                     pack(p.out_dtype, total[4 * j + 4], total[4 * j + 5]),
                     pack(p.out_dtype, total[4 * j + 6], total[4 * j + 7]));
  }
  send(tile.n, 64);
}

template <Granularity granularity, class A, class B>
__device__ __forceinline__ void fp8_gemm_nt(const GemmParams& p) {
  using S = Shared<granularity>;
  static_assert(sizeof(S) <= 227 * 1024, "shared memory of an SM");
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  S& shared = *reinterpret_cast<S*>(shared_bytes);

  const uint32_t m_tiles = (p.m + kTileM - 1) / kTileM, n_tiles = (p.n + kTileN - 1) / kTileN;
  const uint32_t warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kStages; ++slot) {
      ptx::mbarrier_init(&shared.full[slot], 1);
      ptx::mbarrier_init(&shared.empty[slot], kConsumerWarpgroups * 4);  // one a warp
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x < 32 && ptx::elect_sync()) produce(p, shared, m_tiles, n_tiles);
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    const Fragment at{warpgroup - 1, threadIdx.x / 32 % 4, threadIdx.x % 32};
    RingPosition ring;
    for (uint32_t index = blockIdx.x; index < m_tiles * n_tiles; index += gridDim.x) {
      const Tile tile(index, m_tiles, n_tiles);
      const auto columns = ColumnTerms::fetch(p, granularity == Granularity::kRowwise,
                                              tile.n + at.warp * 32 + at.lane);
      float total[64];
      accumulate_tile<granularity, A, B>(p, shared, tile, at, ring, total);
      finish_tile<granularity>(p, shared, tile, at, columns, total);
      if (p.store_by_tma)
        store_by_tma(p, tile, at, total, shared.store[at.warpgroup]);
      else
        store_directly(p, tile, at, total);
    }
    if (at.warp == 0 && at.lane == 0) ptx::cp_async_bulk_wait_group<0>();
  }
}

}  // namespace torchext::sm90

// One kernel and its entry in the file's table.
#define TORCHEXT_FP8_GEMM_NT(NAME, GRANULARITY, A, B)                                        \
  extern "C" __global__ void __launch_bounds__(torchext::sm90::kThreads, 1)                  \
      NAME(const __grid_constant__ torchext::sm90::GemmParams params) {                      \
    torchext::sm90::fp8_gemm_nt<torchext::Granularity::GRANULARITY, ptx::A, ptx::B>(params); \
  }

#define TORCHEXT_FP8_GEMM_NT_ENTRY(NAME, GRANULARITY)                                         \
  torchext::sm90::GemmKernel {                                                                \
    TORCHEXT_KERNEL(NAME), sizeof(torchext::sm90::Shared<torchext::Granularity::GRANULARITY>) \
  }
