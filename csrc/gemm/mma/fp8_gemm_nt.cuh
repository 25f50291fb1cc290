// FP8 GEMM by mma.sync: out[M, N] = scales x (a[M, K] @ b[N, K].T), with FP32 promotion every 128
// of K. The kernels of sm_80 and sm_89 are instances of this file (../sm80, ../sm89); they differ
// in how a warp multiplies (Sm80, Sm89 below). Everything else is common: dense and grouped
// products, row-wise and block scales, quantizing epilogues.
//
// Contract: a kernel is fp8_gemm_nt<Core, Config, granularity>, launched with KernelParams
// (kernels.h), Config::kThreads threads and kSharedBytes bytes of dynamic shared memory, plus
// kGateBytes for SwiGLU. The static asserts of Config below and of kernels.h say which tiles are
// legal.
//
// Persistent: each CTA walks over tiles of the output (schedule.cuh). All its warps have the same
// role. For each K block (128 of K):
//
//   copy      Each thread waits for its own copies of this K block, then all meet at __syncthreads:
//             now the block has arrived for all warps, and the slot of the previous block is free.
//             Into that slot, each thread starts its copies of the K block that is kStages - 1
//             ahead, 16 bytes per cp.async. Rows outside the matrix or of another group, and
//             columns outside K, become zeros (cp.async's source size). A row is 128 bytes in
//             shared memory; its 16-byte chunks are XORed with the row's index modulo 8, so that
//             ldmatrix meets no bank conflict.
//   multiply  A warp owns kWarpRows x kWarpColumns of the tile. ldmatrix leaves FP8 in registers as
//             mma.sync.m16n8k32 needs it: four neighbors of K per lane. The sum over the K block
//             goes into `block`.
//   promote   total += scale * block in FP32. If registers allow, the scales are loaded while the
//             warp multiplies.
//
// After the tile's last K block:
//
//   finish    The tile goes through shared memory, in place of the operands, to the epilogue
//             (epilogue.cuh).
#pragma once

#include "epilogue.cuh"
#include "kernels.h"
#include "ptx/isa/copy.h"
#include "ptx/isa/matrix.h"
#include "ptx/isa/mma.h"
#include "schedule.cuh"

namespace torchext::mma {

// sm_89's tensor cores multiply FP8. They keep 13 fraction bits of a sum, as Hopper's do.
template <class A, class B>
struct Sm89 {
  static constexpr float kUnit = 1;
  static constexpr bool kScalesFitEarly = true;
  static constexpr int kStepsAtOnce = 4;  // of 32 of K

  // kN x 8 rows of b and 32 of K, as ldmatrix loads them.
  template <int kN>
  struct Operand {
    uint32_t words[kN][2];
    __device__ void set(int j, uint32_t low, uint32_t high) {
      words[j][0] = low;
      words[j][1] = high;
    }
  };

  template <int kN>
  static __device__ __forceinline__ void multiply(float (&d)[kN][4], const uint32_t (&a)[4],
                                                  const Operand<kN>& b) {
#pragma unroll
    for (int j = 0; j < kN; ++j) ptx::mma_m16n8k32(A(), B(), d[j], a, b.words[j][0], b.words[j][1]);
  }
};

// sm_80's tensor cores do not multiply FP8. They multiply f16, which holds every value of both
// formats exactly (bf16 does, too, but f16 is cheaper to make). An e5m2 is the upper byte of an
// f16. An e4m3, shifted by one place, is an f16 of 2^-8 times its value (conversions.cuh; NaN stays
// NaN); kUnit corrects the product. Four e4m3 take 11 integer instructions and no multiplication.
// Bytes 0 and 2 of a register become one pair of f16, bytes 1 and 3 the other. This permutes K, in
// the same way for a and for b, which does not change what is summed.
template <class A, class B>
struct Sm80 {
  // odd: bytes 1 and 3 of `codes`; even: bytes 0 and 2.
  static __device__ __forceinline__ uint32_t odd(ptx::e4m3, uint32_t codes) {
    return e4m3_as_f16x2(codes);
  }
  static __device__ __forceinline__ uint32_t odd(ptx::e5m2, uint32_t codes) {
    return e5m2_as_f16x2(codes);
  }
  static __device__ __forceinline__ uint32_t even(ptx::e4m3, uint32_t codes) {
    return e4m3_as_f16x2(codes << 8);
  }
  static __device__ __forceinline__ uint32_t even(ptx::e5m2, uint32_t codes) {
    return __byte_perm(codes, 0, 0x2404);
  }
  static constexpr float unit(ptx::e4m3) { return kE4m3AsF16Unit; }
  static constexpr float unit(ptx::e5m2) { return 1; }
  static constexpr float kUnit = unit(A()) * unit(B());
  static constexpr bool kScalesFitEarly = false;
  static constexpr int kStepsAtOnce = 2;  // more would take more registers than there are

  template <int kN>
  struct Operand {
    uint32_t halves[kN][2][2];  // [row block][16 of K][even bytes, odd bytes]
    __device__ void set(int j, uint32_t low, uint32_t high) {
      halves[j][0][0] = even(B(), low);
      halves[j][0][1] = odd(B(), low);
      halves[j][1][0] = even(B(), high);
      halves[j][1][1] = odd(B(), high);
    }
  };

  template <int kN>
  static __device__ __forceinline__ void multiply(float (&d)[kN][4], const uint32_t (&a)[4],
                                                  const Operand<kN>& b) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t x[4] = {even(A(), a[2 * s]), even(A(), a[2 * s + 1]), odd(A(), a[2 * s]),
                             odd(A(), a[2 * s + 1])};
#pragma unroll
      for (int j = 0; j < kN; ++j)
        ptx::mma_m16n8k16_f16(d[j], x[0], x[1], x[2], x[3], b.halves[j][s][0], b.halves[j][s][1]);
    }
  }
};

// A tile of kTileM rows and 128 columns, computed by kWarpsM x kWarpsN warps.
template <int kTileM_, int kWarpsM_, int kWarpsN_, int kStages_>
struct Config {
  static constexpr int kTileM = kTileM_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpRows = kTileM / kWarpsM, kWarpColumns = kTileN / kWarpsN;
  static constexpr int kM = kWarpRows / 16, kN = kWarpColumns / 8;  // mma tiles of a warp
  static constexpr int kRowStep = kThreads / 8;                     // eight threads copy a row
  static constexpr int kCopiesA = kTileM / kRowStep, kCopiesB = kTileN / kRowStep;
  static constexpr uint32_t kBytesA = kTileM * kTileK, kStageBytes = kBytesA + kTileN * kTileK;
  static constexpr uint32_t kSharedBytes = kStages * kStageBytes;
  static constexpr uint32_t kGateBytes = kTileM * kTilePitch * sizeof(float);
  static_assert(kGateBytes <= kSharedBytes, "the finished product takes the place of operands");
  static_assert(kRowStep % 8 == 0, "a thread's rows swizzle alike");
  static_assert(kN % 2 == 0, "ldmatrix.x4 brings two tiles of b");
};
using Large = Config<128, 2, 4, 3>;  // 96 KiB: fits an SM of sm_86 and sm_89, too
using Small = Config<32, 1, 4, 4>;   // 80 KiB; SwiGLU: 16 KiB more

// What a thread copies of a K block: chunk threadIdx.x % 8 of every kRowStep-th row.
template <class C>
struct Copier {
  const uint8_t *a, *b;    // the thread's first row of each operand, at column 0
  int64_t a_step, b_step;  // from one of the thread's rows to the next
  uint32_t valid = 0;      // one bit per row of a and, from bit 16 on, per row of b
  uint32_t shared;         // address of the thread's chunk in its first row of slot 0
  uint32_t k_begin, k_end;

  __device__ Copier(const GemmProblem& p, const Tile& tile, const GroupOperand& group,
                    uint32_t b_row, uint32_t b_rows, uint32_t shared_base)
      : k_begin(tile.k_begin), k_end(tile.k_end) {
    const uint32_t row = threadIdx.x / 8;
    a = static_cast<const uint8_t*>(p.a) + (tile.row + row) * p.a_stride;
    b = group.b + (b_row + row) * p.b_stride;
    a_step = C::kRowStep * p.a_stride;
    b_step = C::kRowStep * p.b_stride;
#pragma unroll
    for (int i = 0; i < C::kCopiesA; ++i)
      valid |= uint32_t(holds(p, tile, tile.row + row + i * C::kRowStep)) << i;
#pragma unroll
    for (int i = 0; i < C::kCopiesB; ++i)
      valid |= uint32_t(row + i * C::kRowStep < b_rows) << (16 + i);
    shared = shared_base + row * kTileK + ((threadIdx.x % 8) ^ (row % 8)) * 16;
  }

  // Copies a chunk of 16 bytes; the first `skipped` belong to another group along K and become
  // zeros, as do those from `end` on.
  __device__ static void copy_edge(uint32_t to, const uint8_t* from, int skipped, int end) {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (i >= skipped && i < end) words[i / 4] |= uint32_t(from[i]) << i % 4 * 8;
    ptx::st_shared_v4_u32(to, words[0], words[1], words[2], words[3]);
  }

  __device__ void start(int slot, uint32_t k_block) const {
    const uint32_t k = k_block * kTileK + threadIdx.x % 8 * 16;
    const uint32_t bytes = k < k_end ? min(k_end - k, 16u) : 0;
    const uint32_t to = shared + slot * C::kStageBytes;
    if (k < k_begin && k + 16 > k_begin) {
#pragma unroll 1
      for (int i = 0; i < C::kCopiesA; ++i)
        copy_edge(to + i * C::kRowStep * kTileK, a + i * a_step + k, int(k_begin - k),
                  valid >> i & 1 ? bytes : 0);
#pragma unroll 1
      for (int i = 0; i < C::kCopiesB; ++i)
        copy_edge(to + C::kBytesA + i * C::kRowStep * kTileK, b + i * b_step + k, int(k_begin - k),
                  valid >> (16 + i) & 1 ? bytes : 0);
      return;
    }
    const uint32_t wanted = k < k_begin ? 0 : bytes;
#pragma unroll
    for (int i = 0; i < C::kCopiesA; ++i)
      ptx::cp_async_cg_shared_global_16(to + i * C::kRowStep * kTileK, a + i * a_step + k,
                                        valid >> i & 1 ? wanted : 0);
#pragma unroll
    for (int i = 0; i < C::kCopiesB; ++i)
      ptx::cp_async_cg_shared_global_16(to + C::kBytesA + i * C::kRowStep * kTileK,
                                        b + i * b_step + k, valid >> (16 + i) & 1 ? wanted : 0);
  }
};

// Which elements of the tile a thread holds: value [i][j][2 * h + e] is of row
// row() + 16 * i + 8 * h and column column() + 8 * j + e.
template <class C>
struct ThreadCoord {
  uint32_t lane, warp_m, warp_n;
  __device__ ThreadCoord()
      : lane(threadIdx.x % 32),
        warp_m(threadIdx.x / 32 / C::kWarpsN),
        warp_n(threadIdx.x / 32 % C::kWarpsN) {}
  __device__ uint32_t row() const { return warp_m * C::kWarpRows + lane / 4; }
  __device__ uint32_t column() const { return warp_n * C::kWarpColumns + lane % 4 * 2; }
};

// Scales of one K block for the thread's rows and columns.
template <class C, Granularity granularity>
struct BlockScales {
  float a[C::kM][2];
  float b[granularity == Granularity::k1D1D ? C::kN : 1][2];

  // The thread's rows of a begin at `row`, its columns of b at `b_row`.
  __device__ void load(const KernelParams& params, const GroupOperand& group, uint32_t row,
                       uint32_t rows_end, uint32_t b_row, uint32_t b_end, uint32_t k_block) {
    if constexpr (granularity == Granularity::kRowwise) return;
    const GemmProblem& p = params.problem;
    const float* rows = p.a_scale + k_block * p.a_scale_k_block;
    const float* cols = group.scale + k_block * p.b_scale_k_block;
#pragma unroll
    for (int i = 0; i < C::kM; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t r = row + 16 * i + 8 * h;
        a[i][h] = r < rows_end ? ptx::ld_global_nc_f32(rows + r * p.a_scale_row) : 0;
      }
    if constexpr (granularity == Granularity::k1D2D) {
      b[0][0] = ptx::ld_global_nc_f32(cols + b_row / kScaleGroup * p.b_scale_row);
    } else {
#pragma unroll
      for (int j = 0; j < C::kN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t c = b_row + 8 * j + e;
          b[j][e] = c < b_end
                        ? ptx::ld_global_nc_f32(cols + (c >> params.b_scale_shift) * p.b_scale_row)
                        : 0;
        }
    }
  }
};

// total = sum over K blocks of scale * (a block @ b block.T), with the group's b from row b_row on.
template <class Core, class C, Granularity granularity>
__device__ __forceinline__ void accumulate_tile(const KernelParams& params, const Tile& tile,
                                                const GroupOperand& group, uint32_t b_row,
                                                uint32_t b_rows, uint32_t shared,
                                                float (&total)[C::kM][C::kN][4]) {
  const ThreadCoord<C> at;
  const Copier<C> copier(params.problem, tile, group, b_row, b_rows, shared);
  const uint32_t first = tile.k_begin / kTileK;
  const uint32_t end = tile.k_end > tile.k_begin ? (tile.k_end + kTileK - 1) / kTileK : first;

  // The row and the 16-byte chunk that this lane addresses in ldmatrix.x4, which loads four
  // matrices of eight rows of one chunk. c: the first chunk of the step (32 of K).
  //   a: matrices 0, 1 = rows 0-7, 8-15 of chunk c; matrices 2, 3 = the same rows of chunk c + 1.
  //   b: matrices 0, 1 = rows 0-7 of chunks c, c + 1; matrices 2, 3 = rows 8-15 of the same.
  const uint32_t a_row = at.warp_m * C::kWarpRows + at.lane % 16, a_chunk = at.lane / 16;
  const uint32_t b_lane_row = at.warp_n * C::kWarpColumns + at.lane / 16 * 8 + at.lane % 8;
  const uint32_t b_chunk = at.lane / 8 % 2;

#pragma unroll
  for (int i = 0; i < C::kM; ++i)
#pragma unroll
    for (int j = 0; j < C::kN; ++j)
#pragma unroll
      for (float& value : total[i][j]) value = 0;

  __syncthreads();  // the last tile's slots have been read
#pragma unroll
  for (int s = 0; s < C::kStages - 1; ++s) {
    if (first + s < end) copier.start(s, first + s);
    ptx::cp_async_commit_group();
  }
  int slot = 0;
#pragma unroll 1
  for (uint32_t k_block = first; k_block < end; ++k_block) {
    ptx::cp_async_wait_group<C::kStages - 2>();
    __syncthreads();  // the block is there for all, and the last block's slot is free
    if (k_block + C::kStages - 1 < end)
      copier.start(slot == 0 ? C::kStages - 1 : slot - 1, k_block + C::kStages - 1);
    ptx::cp_async_commit_group();
    BlockScales<C, granularity> scales;
    const auto load_scales = [&] {
      scales.load(params, group, tile.row + at.row(), tile.rows_end, b_row + at.column(),
                  b_row + b_rows, k_block);
    };
    constexpr bool kEarly = granularity == Granularity::k1D2D && Core::kScalesFitEarly;
    if constexpr (kEarly) load_scales();  // the scales arrive while the warp multiplies

    const uint32_t a = shared + slot * C::kStageBytes + a_row * kTileK;
    const uint32_t b = shared + slot * C::kStageBytes + C::kBytesA + b_lane_row * kTileK;
    float block[C::kM][C::kN][4] = {};
#pragma unroll Core::kStepsAtOnce
    for (int step = 0; step < kTileK / 32; ++step) {
      typename Core::template Operand<C::kN> operand;
#pragma unroll
      for (int j = 0; j < C::kN; j += 2) {
        uint32_t words[4];
        ptx::ldmatrix_x4(words,
                         b + j * 8 * kTileK + ((2 * step + b_chunk) ^ (b_lane_row % 8)) * 16);
        operand.set(j, words[0], words[1]);
        operand.set(j + 1, words[2], words[3]);
      }
#pragma unroll
      for (int i = 0; i < C::kM; ++i) {
        uint32_t words[4];
        ptx::ldmatrix_x4(words, a + i * 16 * kTileK + ((2 * step + a_chunk) ^ (a_row % 8)) * 16);
        Core::multiply(block[i], words, operand);
      }
    }
    if constexpr (!kEarly) load_scales();  // earlier, there would be too few registers

#pragma unroll
    for (int i = 0; i < C::kM; ++i)
#pragma unroll
      for (int j = 0; j < C::kN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float sum = block[i][j][e] * Core::kUnit;
          float& value = total[i][j][e];
          if constexpr (granularity == Granularity::k1D2D)
            value = fmaf(scales.a[i][e / 2] * scales.b[0][0], sum, value);
          else if constexpr (granularity == Granularity::k1D1D)
            value = fmaf(scales.a[i][e / 2] * scales.b[j][e % 2], sum, value);
          else
            value += sum;
        }
    slot = slot + 1 == C::kStages ? 0 : slot + 1;
  }
}

// Writes the tile from registers to rows of kTilePitch floats in shared memory.
template <class C>
__device__ __forceinline__ void stage_tile(float* rows, const float (&total)[C::kM][C::kN][4]) {
  const ThreadCoord<C> at;
#pragma unroll
  for (int i = 0; i < C::kM; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < C::kN; ++j)
        *reinterpret_cast<float2*>(rows + (at.row() + 16 * i + 8 * h) * kTilePitch + at.column() +
                                   8 * j) = {total[i][j][2 * h], total[i][j][2 * h + 1]};
}

template <class Core, class C, Granularity granularity>
__device__ __forceinline__ void fp8_gemm_nt(const KernelParams& params) {
  extern __shared__ __align__(128) uint8_t shared[];
  const GemmProblem& p = params.problem;
  float* product = reinterpret_cast<float*>(shared);
  float* gate = reinterpret_cast<float*>(shared + C::kSharedBytes);

  Schedule<C::kTileM> schedule(p, params.width);
  Tile tile;
  while (schedule.next(tile)) {
    const GroupOperand group(p, tile.group);
    const uint32_t columns = min(params.width - tile.column, uint32_t(kTileN));
    const bool gated = p.activation == Activation::kSwiGLU;
#pragma unroll 1
    for (int pass = gated ? 0 : 1; pass < 2; ++pass) {  // SwiGLU: the gate, then what it gates
      float total[C::kM][C::kN][4];
      accumulate_tile<Core, C, granularity>(params, tile, group,
                                            tile.column + (gated && pass == 1 ? params.width : 0),
                                            columns, ptx::shared_address(shared), total);
      __syncthreads();  // operands have been read: the product may take their place
      stage_tile<C>(pass == 0 ? gate : product, total);
    }
    __syncthreads();
    finish_tile<C::kTileM>(params, tile, group, product, gate);
  }
}

}  // namespace torchext::mma

// The kernels of one way to multiply and one granularity, for all formats and tile sizes, and the
// function that picks one of them.
#define TORCHEXT_MMA_KERNEL(NAME, CORE, GRANULARITY, A, B, CONFIG)                         \
  extern "C" __global__ void __launch_bounds__(torchext::mma::CONFIG::kThreads, 1)         \
      NAME(const __grid_constant__ torchext::mma::KernelParams params) {                   \
    torchext::mma::fp8_gemm_nt<torchext::mma::CORE<ptx::A, ptx::B>, torchext::mma::CONFIG, \
                               torchext::Granularity::GRANULARITY>(params);                \
  }
#define TORCHEXT_MMA_SIZES(NAME, CORE, GRANULARITY, A, B)                             \
  TORCHEXT_MMA_KERNEL(NAME##_##A##_##B##_128x128x128, CORE, GRANULARITY, A, B, Large) \
  TORCHEXT_MMA_KERNEL(NAME##_##A##_##B##_32x128x128, CORE, GRANULARITY, A, B, Small)
#define TORCHEXT_MMA_ENTRY(NAME, CONFIG)                                                   \
  torchext::mma::GemmKernel {                                                              \
    TORCHEXT_KERNEL(NAME), torchext::mma::CONFIG::kTileM, torchext::mma::CONFIG::kThreads, \
        torchext::mma::CONFIG::kSharedBytes, torchext::mma::CONFIG::kGateBytes             \
  }
#define TORCHEXT_MMA_ENTRIES(NAME, A, B)                      \
  {TORCHEXT_MMA_ENTRY(NAME##_##A##_##B##_128x128x128, Large), \
   TORCHEXT_MMA_ENTRY(NAME##_##A##_##B##_32x128x128, Small)}
#define TORCHEXT_MMA_KERNELS(NAME, CORE, GRANULARITY)                                      \
  TORCHEXT_MMA_SIZES(NAME, CORE, GRANULARITY, e4m3, e4m3)                                  \
  TORCHEXT_MMA_SIZES(NAME, CORE, GRANULARITY, e4m3, e5m2)                                  \
  TORCHEXT_MMA_SIZES(NAME, CORE, GRANULARITY, e5m2, e4m3)                                  \
  TORCHEXT_MMA_SIZES(NAME, CORE, GRANULARITY, e5m2, e5m2)                                  \
  torchext::mma::GemmKernel torchext::mma::NAME(TileSize size, bool a_e5m2, bool b_e5m2) { \
    static const GemmKernel kernels[2][2][2] = {                                           \
        {TORCHEXT_MMA_ENTRIES(NAME, e4m3, e4m3), TORCHEXT_MMA_ENTRIES(NAME, e4m3, e5m2)},  \
        {TORCHEXT_MMA_ENTRIES(NAME, e5m2, e4m3), TORCHEXT_MMA_ENTRIES(NAME, e5m2, e5m2)}}; \
    return kernels[a_e5m2][b_e5m2][int(size)];                                             \
  }
