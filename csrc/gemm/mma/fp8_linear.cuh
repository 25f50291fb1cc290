// The weights-only product by mma.sync: out[M, N] = x[M, K] @ (scales x weight[N, K]).T for a BF16,
// FP16 or FP32 x and an FP8 weight, with FP32 promotion every 128 of K. The kernels of sm_80 and
// later are instances of this file (../sm80, ../sm90).
//
// Contract: a kernel is fp8_linear<Core, Config>, launched with KernelParams (kernels.h) whose a is
// x without a scale and whose b is the weight; with Config::kThreads threads and kSharedBytes bytes
// of dynamic shared memory. Rows of x start at multiples of 16 bytes. There are no groups and no
// activation. The static asserts of LinearConfig say which tiles are legal.
//
// Persistent: each CTA walks over tiles of the output (schedule.cuh). All its warps have the same
// role. For each K block (128 of K):
//
//   copy      Each thread waits for its own copies of this K block, then all meet at __syncthreads:
//             now the block has arrived for all warps, and the slot of the previous block is free.
//             Into that slot, each thread starts its copies of the K block that is kStages - 1
//             ahead, 16 bytes per cp.async. Rows outside the matrix, and columns outside K, become
//             zeros (cp.async's source size). Positions in a row are XORed with the row's index, so
//             that reading meets no bank conflict: chunks of 16 bytes of the weight, and steps (16
//             of K) of x.
//   multiply  A warp owns kWarpRows x kWarpColumns of the tile. ldmatrix brings four neighbors of K
//             of a row of the weight to a lane, which widens them to BF16 or FP16, exactly. A lane
//             loads the same four of K of its rows of x; those of an FP32 x become three BF16 each.
//             mma.sync.m16n8k16 then takes K in another order than memory has, the same for both
//             operands, which does not change what is summed. The sum over the K block goes into
//             `block`.
//   promote   total += scale of the weight * block in FP32.
//
// After the tile's last K block:
//
//   finish    The tile goes through shared memory, in place of the operands, to the epilogue
//             (epilogue.cuh).
//
// Every element of the output is computed by the same instructions in the same order in every tile
// size, so its bits do not depend on M.
#pragma once

#include "epilogue.cuh"
#include "kernels.h"
#include "ptx/isa/copy.h"
#include "ptx/isa/floating.h"
#include "ptx/isa/matrix.h"
#include "ptx/isa/mma.h"
#include "schedule.cuh"

namespace torchext::mma {

// Where four elements of x, which lie side by side, go in an operand of mma.sync.m16n8k16: word 0
// has the first two, word 2 the last two. Words 1 and 3: the same for the row eight below.
using Words = uint32_t[4];

// A 16-bit x is such an operand as it is.
struct NarrowX {
  static constexpr int kBytes = 2, kParts = 1, kStepsAtOnce = 2;  // of 32 of K

  static __device__ __forceinline__ void load(const uint8_t* x, int below, Words (&parts)[1]) {
    const uint2 top = *reinterpret_cast<const uint2*>(x);
    const uint2 bottom = *reinterpret_cast<const uint2*>(x + below);
    parts[0][0] = top.x;
    parts[0][1] = bottom.x;
    parts[0][2] = top.y;
    parts[0][3] = bottom.y;
  }
};

// An FP32 x is the exact sum of three BF16: the upper half of its bits, the upper half of what that
// leaves, and the rest. The smallest part comes first, since it is added first. The parts of a NaN
// sum to NaN; an Inf has but one part.
struct SplitX {
  static constexpr int kBytes = 4, kParts = 3, kStepsAtOnce = 1;

  static __device__ __forceinline__ float rest(float x) {
    const float high = __uint_as_float(__float_as_uint(x) & 0xffff0000);
    return isinf(x) ? 0 : x - high;
  }
  // The upper halves of two values as a pair.
  static __device__ __forceinline__ uint32_t uppers(float low, float high) {
    return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
  }
  static __device__ __forceinline__ void load(const uint8_t* x, int below, Words (&parts)[3]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float4 v = *reinterpret_cast<const float4*>(x + h * below);
#pragma unroll
      for (int part = 2; part >= 0; --part) {
        parts[part][h] = uppers(v.x, v.y);
        parts[part][2 + h] = uppers(v.z, v.w);
        v = {rest(v.x), rest(v.y), rest(v.z), rest(v.w)};
      }
    }
  }
};

// How a weight becomes FP16. An e4m3 becomes 2^-8 times its value (conversions.cuh), which kUnit
// corrects in the product. In `spread`, the codes are the upper bytes of the halves.
template <class W>
struct ToF16 : NarrowX {
  static constexpr bool kE4m3 = std::is_same_v<W, ptx::e4m3>;
  static constexpr float kUnit = kE4m3 ? kE4m3AsF16Unit : 1;

  static __device__ __forceinline__ uint32_t widen(uint32_t spread) {
    return kE4m3 ? e4m3_as_f16x2(spread) : spread;
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&x)[4],
                                                  const uint32_t (&w)[2]) {
    ptx::mma_m16n8k16_f16(d, x[0], x[1], x[2], x[3], w[0], w[1]);
  }
};

// How a weight becomes BF16. Shifted into place, the code is a BF16 of 2^(kBias - 127) times its
// value, subnormals included; a multiplication by a power of two corrects that, since sums of such
// small products would underflow. NaN (and Inf of e5m2) is the only magnitude whose exponent field
// carries when kCarry is added; `carried` then sets the BF16's upper exponent bits, and the
// multiplication keeps NaN and Inf.
template <class W, class X = NarrowX>
struct ToBf16 : X {
  static constexpr bool kE4m3 = std::is_same_v<W, ptx::e4m3>;
  static constexpr float kUnit = 1;
  static constexpr int kBias = kE4m3 ? 7 : 15, kShift = kE4m3 ? 4 : 3;
  static constexpr uint32_t kMagnitude = kE4m3 ? 0x07f007f0 : 0x0fe00fe0;
  static constexpr uint32_t kCarry = kE4m3 ? 0x00100010 : 0x00800080;  // to the least special code
  static constexpr uint32_t kCarried = kE4m3 ? 0x08000800 : 0x10001000;
  static constexpr uint32_t kPower = (127 + 127 - kBias) << 7;  // 2^(127 - kBias)

  static __device__ __forceinline__ uint32_t widen(uint32_t spread) {
    const uint32_t halves = (spread >> kShift & kMagnitude) | (spread & 0x80008000);
    const uint32_t carried = ((halves & kMagnitude) + kCarry) & kCarried;
    const uint32_t special = (carried << kShift) - carried;
    return ptx::fma_rn_bf16x2(halves | special, kPower << 16 | kPower, 0x80008000);
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&x)[4],
                                                  const uint32_t (&w)[2]) {
    ptx::mma_m16n8k16_bf16(d, x[0], x[1], x[2], x[3], w[0], w[1]);
  }
};

template <class W>
using SplitToBf16 = ToBf16<W, SplitX>;

// A tile of kTileM rows and 128 columns, computed by kWarpsM x kWarpsN warps, for elements of x of
// kBytes bytes.
template <int kTileM_, int kWarpsM_, int kWarpsN_, int kStages_, int kBytes_>
struct LinearConfig {
  static constexpr int kTileM = kTileM_, kStages = kStages_, kBytes = kBytes_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpRows = kTileM / kWarpsM, kWarpColumns = kTileN / kWarpsN;
  static constexpr int kM = kWarpRows / 16, kN = kWarpColumns / 8;  // mma tiles of a warp
  static constexpr int kRowBytesX = kTileK * kBytes, kChunksX = kRowBytesX / 16;
  static constexpr int kStepBytes = 16 * kBytes;         // of a row of x in a step
  static constexpr int kSwizzle = 128 / kStepBytes;      // steps in all banks of shared memory
  static constexpr int kRowStepX = kThreads / kChunksX;  // kChunksX threads copy a row of x
  static constexpr int kRowStepW = kThreads / 8;         // eight copy a row of the weight
  static constexpr int kCopiesX = kTileM / kRowStepX, kCopiesW = kTileN / kRowStepW;
  static constexpr uint32_t kBytesX = kTileM * kRowBytesX, kStageBytes = kBytesX + kTileN * kTileK;
  static constexpr uint32_t kSharedBytes = kStages * kStageBytes;
  static_assert(kTileM * kTilePitch * sizeof(float) <= kSharedBytes,
                "the finished product takes the place of operands");
  static_assert(kRowStepX % kSwizzle == 0 && kRowStepW % 8 == 0, "a thread's rows swizzle alike");
  static_assert(kN % 2 == 0, "ldmatrix.x4 brings two tiles of the weight");
};
// All take 96 KiB, which fits an SM of sm_86 and sm_89, too.
using LinearLarge = LinearConfig<128, 2, 4, 2, 2>;
using LinearSmall = LinearConfig<32, 1, 4, 4, 2>;
using LinearSplit = LinearConfig<32, 1, 4, 3, 4>;  // of an FP32 x, whose rows take twice the memory

// A thread copies its part of a K block: one chunk of every kRowStepX-th row of x, and one of every
// kRowStepW-th row of the weight.
template <class C>
struct LinearCopier {
  const uint8_t *x, *w;         // the thread's chunk of its first row of each operand, at K = 0
  int64_t x_step, w_step;       // bytes from one of the thread's rows to the next
  uint32_t valid = 0;           // one bit per row of x, and from bit 16 on, per row of the weight
  uint32_t shared_x, shared_w;  // addresses of the thread's first chunks in slot 0
  uint32_t k_end;

  __device__ LinearCopier(const GemmProblem& p, const Tile& tile, uint32_t w_rows, uint32_t shared)
      : k_end(tile.k_end) {
    const uint32_t x_row = threadIdx.x / C::kChunksX, x_chunk = threadIdx.x % C::kChunksX;
    const uint32_t w_row = threadIdx.x / 8, w_chunk = threadIdx.x % 8;
    x = static_cast<const uint8_t*>(p.a) + (tile.row + x_row) * p.a_stride * C::kBytes +
        x_chunk * 16;
    w = static_cast<const uint8_t*>(p.b) + (tile.column + w_row) * p.b_stride + w_chunk * 16;
    x_step = C::kRowStepX * p.a_stride * C::kBytes;
    w_step = C::kRowStepW * p.b_stride;
#pragma unroll
    for (int i = 0; i < C::kCopiesX; ++i)
      valid |= uint32_t(tile.row + x_row + i * C::kRowStepX < tile.rows_end) << i;
#pragma unroll
    for (int i = 0; i < C::kCopiesW; ++i)
      valid |= uint32_t(w_row + i * C::kRowStepW < w_rows) << (16 + i);
    shared_x =
        shared + x_row * C::kRowBytesX + (x_chunk * 16 ^ (x_row % C::kSwizzle * C::kStepBytes));
    shared_w = shared + C::kBytesX + w_row * kTileK + (w_chunk ^ (w_row % 8)) * 16;
  }

  // How many of a chunk's bytes lie before the end of K, for elements of `size` bytes.
  __device__ uint32_t bytes_before_end(uint32_t k, uint32_t size) const {
    return k < k_end ? min((k_end - k) * size, 16u) : 0;
  }

  __device__ void start(int slot, uint32_t k_block) const {
    const uint32_t k = k_block * kTileK, offset = slot * C::kStageBytes;
    const uint32_t x_bytes =
        bytes_before_end(k + threadIdx.x % C::kChunksX * (16 / C::kBytes), C::kBytes);
    const uint32_t w_bytes = bytes_before_end(k + threadIdx.x % 8 * 16, 1);
#pragma unroll
    for (int i = 0; i < C::kCopiesX; ++i)
      ptx::cp_async_cg_shared_global_16(shared_x + offset + i * C::kRowStepX * C::kRowBytesX,
                                        x + i * x_step + int64_t(k) * C::kBytes,
                                        valid >> i & 1 ? x_bytes : 0);
#pragma unroll
    for (int i = 0; i < C::kCopiesW; ++i)
      ptx::cp_async_cg_shared_global_16(shared_w + offset + i * C::kRowStepW * kTileK,
                                        w + i * w_step + k, valid >> (16 + i) & 1 ? w_bytes : 0);
  }
};

// Scales of one K block for the thread's columns, which begin at row `w_row` of the weight; 1 if
// the scales are row-wise.
template <class C>
__device__ __forceinline__ void load_scales(const KernelParams& params, uint32_t w_row,
                                            uint32_t k_block, float (&scale)[C::kN][2]) {
  const GemmProblem& p = params.problem;
  const float* scales = p.b_scale + k_block * p.b_scale_k_block;
  float one = 1;
  if (p.granularity == Granularity::k1D2D)
    one = ptx::ld_global_nc_f32(scales + w_row / kScaleGroup * p.b_scale_row);
#pragma unroll
  for (int j = 0; j < C::kN; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t c = w_row + 8 * j + e;
      scale[j][e] = p.granularity == Granularity::k1D1D && c < params.width
                        ? ptx::ld_global_nc_f32(scales + c * p.b_scale_row)
                        : one;
    }
}

template <class Core, class C>
__device__ __forceinline__ void fp8_linear(const KernelParams& params) {
  static_assert(Core::kBytes == C::kBytes, "the tile is for x of another size");
  extern __shared__ __align__(128) uint8_t shared[];
  const GemmProblem& p = params.problem;
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t first_row = threadIdx.x / 32 / C::kWarpsN * C::kWarpRows;  // of the warp
  const uint32_t first_column = threadIdx.x / 32 % C::kWarpsN * C::kWarpColumns;
  const uint32_t row = first_row + lane / 4, column = first_column + lane % 4 * 2;

  // The row and the chunk of 16 of K that this lane addresses in ldmatrix.x4, which loads four
  // matrices of eight rows of one chunk: 0, 1 = rows 0-7 of chunks c, c + 1; 2, 3 = rows 8-15.
  const uint32_t w_row = first_column + lane / 16 * 8 + lane % 8, w_chunk = lane / 8 % 2;
  const uint32_t x_swizzle = row % C::kSwizzle;  // rows 8 apart swizzle alike

  Schedule<C::kTileM> schedule(p, params.width);
  Tile tile;
  while (schedule.next(tile)) {
    const LinearCopier<C> copier(p, tile, min(params.width - tile.column, uint32_t(kTileN)), base);
    const uint32_t end = ceil_div_u32(tile.k_end, kTileK);
    float total[C::kM][C::kN][4] = {};

    __syncthreads();  // the last tile has been finished
#pragma unroll
    for (int s = 0; s < C::kStages - 1; ++s) {
      if (s < end) copier.start(s, s);
      ptx::cp_async_commit_group();
    }
    int slot = 0;
#pragma unroll 1
    for (uint32_t k_block = 0; k_block < end; ++k_block) {
      ptx::cp_async_wait_group<C::kStages - 2>();
      __syncthreads();  // the block is there for all, and the last block's slot is free
      if (k_block + C::kStages - 1 < end)
        copier.start(slot == 0 ? C::kStages - 1 : slot - 1, k_block + C::kStages - 1);
      ptx::cp_async_commit_group();

      const uint8_t* x =
          shared + slot * C::kStageBytes + row * C::kRowBytesX + lane % 4 * (C::kStepBytes / 4);
      const uint32_t w = base + slot * C::kStageBytes + C::kBytesX + w_row * kTileK;
      float block[C::kM][C::kN][4] = {};
#pragma unroll Core::kStepsAtOnce
      for (int step = 0; step < kTileK / 32; ++step) {
        uint32_t halves[C::kN][2][2];  // [row block][16 of K][pair]
#pragma unroll
        for (int j = 0; j < C::kN; j += 2) {
          uint32_t words[4];
          ptx::ldmatrix_x4(words, w + j * 8 * kTileK + ((2 * step + w_chunk) ^ (w_row % 8)) * 16);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            halves[j + i / 2][i % 2][0] = Core::widen(__byte_perm(words[i], 0, 0x1404));
            halves[j + i / 2][i % 2][1] = Core::widen(__byte_perm(words[i], 0, 0x3424));
          }
        }
#pragma unroll
        for (int i = 0; i < C::kM; ++i)
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            Words parts[Core::kParts];
            Core::load(x + i * 16 * C::kRowBytesX + ((2 * step + s) ^ x_swizzle) * C::kStepBytes,
                       8 * C::kRowBytesX, parts);
#pragma unroll
            for (const Words& part : parts)
#pragma unroll
              for (int j = 0; j < C::kN; ++j) Core::multiply(block[i][j], part, halves[j][s]);
          }
      }

      float scale[C::kN][2];
      load_scales<C>(params, tile.column + column, k_block, scale);
#pragma unroll
      for (int i = 0; i < C::kM; ++i)
#pragma unroll
        for (int j = 0; j < C::kN; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            total[i][j][e] = fmaf(scale[j][e % 2], block[i][j][e] * Core::kUnit, total[i][j][e]);
      slot = slot + 1 == C::kStages ? 0 : slot + 1;
    }

    __syncthreads();  // operands have been read: the product may take their place
    float* product = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < C::kM; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < C::kN; ++j)
          *reinterpret_cast<float2*>(product + (row + 16 * i + 8 * h) * kTilePitch + column +
                                     8 * j) = {total[i][j][2 * h], total[i][j][2 * h + 1]};
    __syncthreads();
    finish_tile<C::kTileM>(params, tile, GroupOperand(p, tile.group), product, nullptr);
  }
}

}  // namespace torchext::mma

// The kernels of one GPU, for every format of x and of the weight and both tile sizes, and the
// function that picks one of them.
#define TORCHEXT_LINEAR_KERNEL(NAME, CORE, W, CONFIG)                                      \
  extern "C" __global__ void __launch_bounds__(torchext::mma::CONFIG::kThreads, 1)         \
      NAME(const __grid_constant__ torchext::mma::KernelParams params) {                   \
    torchext::mma::fp8_linear<torchext::mma::CORE<ptx::W>, torchext::mma::CONFIG>(params); \
  }
#define TORCHEXT_LINEAR_FORMAT(NAME, W)                                         \
  TORCHEXT_LINEAR_KERNEL(NAME##_bf16_##W##_128x128x128, ToBf16, W, LinearLarge) \
  TORCHEXT_LINEAR_KERNEL(NAME##_bf16_##W##_32x128x128, ToBf16, W, LinearSmall)  \
  TORCHEXT_LINEAR_KERNEL(NAME##_f16_##W##_128x128x128, ToF16, W, LinearLarge)   \
  TORCHEXT_LINEAR_KERNEL(NAME##_f16_##W##_32x128x128, ToF16, W, LinearSmall)    \
  TORCHEXT_LINEAR_KERNEL(NAME##_f32_##W##_32x128x128, SplitToBf16, W, LinearSplit)
#define TORCHEXT_LINEAR_ENTRY(NAME, CONFIG)                                                       \
  torchext::mma::GemmKernel{TORCHEXT_KERNEL(NAME), torchext::mma::CONFIG::kTileM,                 \
                            torchext::mma::CONFIG::kThreads, torchext::mma::CONFIG::kSharedBytes, \
                            0}
#define TORCHEXT_LINEAR_ENTRIES(NAME, W)                                   \
  {                                                                        \
    {TORCHEXT_LINEAR_ENTRY(NAME##_bf16_##W##_128x128x128, LinearLarge),    \
     TORCHEXT_LINEAR_ENTRY(NAME##_bf16_##W##_32x128x128, LinearSmall)},    \
        {TORCHEXT_LINEAR_ENTRY(NAME##_f16_##W##_128x128x128, LinearLarge), \
         TORCHEXT_LINEAR_ENTRY(NAME##_f16_##W##_32x128x128, LinearSmall)}, \
    {                                                                      \
      TORCHEXT_LINEAR_ENTRY(NAME##_f32_##W##_32x128x128, LinearSplit),     \
          TORCHEXT_LINEAR_ENTRY(NAME##_f32_##W##_32x128x128, LinearSplit)  \
    }                                                                      \
  }
#define TORCHEXT_LINEAR_KERNELS(NAME)                                                     \
  TORCHEXT_LINEAR_FORMAT(NAME, e4m3)                                                      \
  TORCHEXT_LINEAR_FORMAT(NAME, e5m2)                                                      \
  torchext::mma::GemmKernel torchext::mma::NAME(TileSize size, ScalarType x, bool e5m2) { \
    static const GemmKernel kernels[2][3][2] = {TORCHEXT_LINEAR_ENTRIES(NAME, e4m3),      \
                                                TORCHEXT_LINEAR_ENTRIES(NAME, e5m2)};     \
    const int format = x == ScalarType::BFloat16 ? 0 : x == ScalarType::Half ? 1 : 2;     \
    return kernels[e5m2][format][int(size)];                                              \
  }
