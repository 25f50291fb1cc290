// quantize_128x128, and quantize_128x128_dual, which writes the FP8 data transposed as well. Both
// copies share their scales, so that only bytes are transposed.
//
// Contract: the static asserts below tie the CTA's 256 threads to a block of 128x128. Rows of the
// outputs start at multiples of 16 bytes. Each CTA quantizes one block; its warps all do the same:
//
//   load      A lane loads 16 elements (eight lanes load a row) and keeps them in registers.
//   reduce    Warps write their largest magnitudes to shared memory, meet at __syncthreads, and
//             each thread computes the block's scale.
//   store     Each lane quantizes and stores its elements. Dual: it also writes the FP8 data to
//             shared memory, permuted in units of 16 bytes to avoid bank conflicts.
//   transpose Dual only, after another __syncthreads: a thread reads 16 rows of 4 columns,
//             transposes them in registers and stores 16 bytes of each of 4 rows.
#include "../../device/matrix.cuh"
#include "../quantize.h"

namespace torchext::quantizers {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlock = int(kScaleGroup);
constexpr int kRowStep = kThreads / 8;
constexpr int kPasses = kBlock / kRowStep;
static_assert(kBlock == 8 * 16, "eight lanes of 16 elements hold a row");
static_assert(kThreads / 8 * 4 == kBlock, "eight lanes of 16 rows hold four columns");

struct Transposed {
  uint8_t* data;
  int64_t stride;  // bytes between rows, a multiple of 16
};

// Where a 16-byte chunk of a block's FP8 data lies in shared memory. Eight lanes write the chunks
// of one row together, and read the same chunk of rows 16j: both reach different banks.
__device__ inline int chunk_offset(int row, int chunk) {
  return row * (kBlock / 16) + (chunk ^ (row >> 4));
}

// Word i of the result has bytes i of a, b, c and d.
__device__ inline uint4 transpose4x4(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t ab_low = __byte_perm(a, b, 0x5140), ab_high = __byte_perm(a, b, 0x7362);
  const uint32_t cd_low = __byte_perm(c, d, 0x5140), cd_high = __byte_perm(c, d, 0x7362);
  return {__byte_perm(ab_low, cd_low, 0x5410), __byte_perm(ab_low, cd_low, 0x7632),
          __byte_perm(ab_high, cd_high, 0x5410), __byte_perm(ab_high, cd_high, 0x7632)};
}

// `interior`: all of the block's rows and columns exist and are aligned.
template <class In, class Out, bool dual, bool interior>
__device__ void quantize_block(const Source& x, const Sink& out, const Transposed& transposed,
                               uint32_t dropped_mantissa, uint32_t block_row, uint32_t block_col) {
  __shared__ uint32_t warp_largest[kWarps];
  __shared__ uint4 tile[dual ? kBlock * kBlock / 16 : 1];
  {
    const int lane = threadIdx.x % 8, tile_row = threadIdx.x / 8;
    const int64_t row = int64_t(block_row) * kBlock + tile_row;
    const int64_t col = int64_t(block_col) * kBlock + lane * 16;
    const int rows = interior ? kBlock : valid_of(row, x.rows, kBlock);
    const int valid = interior ? 16 : valid_of(col, x.cols, 16);

    Elements16<In> e[kPasses];
    const uint8_t* from = x.at(row, col);
#pragma unroll
    for (int i = 0; i < kPasses; ++i)
      e[i] = load16<In>(from + kRowStep * i * x.row_stride, x.col_stride, interior || x.aligned,
                        kRowStep * i < rows ? valid : 0);
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) largest = In::larger(largest, magnitudes(e[i]));
    largest = amax_bits<In>(reduce_magnitudes<In>(largest, 32));
    if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
    __syncthreads();
    largest = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) largest = max(largest, warp_largest[i]);
    const GroupScale scale = scale_of(largest, Out::kMax, dropped_mantissa);
    if (threadIdx.x == 0) *out.scale_at(block_row, block_col) = scale.scale;

    uint8_t* to = out.at(row, col);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const uint4 bytes = quantize16<In, Out>(e[i], scale);
      store16(to + kRowStep * i * out.data_stride, kRowStep * i < rows ? valid : 0, bytes);
      if constexpr (dual) tile[chunk_offset(tile_row + kRowStep * i, lane)] = bytes;
    }
  }
  if constexpr (dual) {
    __syncthreads();
    const int lane = threadIdx.x % 8;  // owns 16 rows from 16 * lane on, 4 columns from 4 * quad on
    const int quad = threadIdx.x / 8;
    const uint32_t* from =
        reinterpret_cast<const uint32_t*>(tile + chunk_offset(16 * lane, quad / 4)) + quad % 4;
    uint4 quarter[4];  // four rows each
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = from[(4 * i + j) * (kBlock / 4)];
      quarter[i] = transpose4x4(words[0], words[1], words[2], words[3]);
    }
    const int64_t row = int64_t(block_row) * kBlock + 16 * lane;
    const int64_t col = int64_t(block_col) * kBlock + 4 * quad;
    const int valid = interior ? 16 : valid_of(row, x.rows, 16);
    const int cols = interior ? 4 : valid_of(col, x.cols, 4);
    uint8_t* to = transposed.data + col * transposed.stride + row;
    const uint4 columns[4] = {{quarter[0].x, quarter[1].x, quarter[2].x, quarter[3].x},
                              {quarter[0].y, quarter[1].y, quarter[2].y, quarter[3].y},
                              {quarter[0].z, quarter[1].z, quarter[2].z, quarter[3].z},
                              {quarter[0].w, quarter[1].w, quarter[2].w, quarter[3].w}};
#pragma unroll
    for (int c = 0; c < 4; ++c)
      store16(to + c * transposed.stride, c < cols ? valid : 0, columns[c]);
  }
}

template <class In, class Out, bool dual>
__device__ void quantize_128x128(const Source& x, const Sink& out, const Transposed& transposed,
                                 uint32_t dropped_mantissa, uint32_t block_cols) {
  const uint32_t block_col = blockIdx.x % block_cols;
  const uint32_t block_row = blockIdx.x / block_cols;
  if (x.aligned && (block_row + 1) * kScaleGroup <= x.rows &&
      (block_col + 1) * kScaleGroup <= x.cols)
    quantize_block<In, Out, dual, true>(x, out, transposed, dropped_mantissa, block_row, block_col);
  else
    quantize_block<In, Out, dual, false>(x, out, transposed, dropped_mantissa, block_row,
                                         block_col);
}

#define KERNEL(In, Out)                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads) quantize_128x128_##In##_##Out(            \
      Source x, Sink out, uint32_t dropped_mantissa, uint32_t block_cols) {                        \
    quantize_128x128<In, Out, false>(x, out, {}, dropped_mantissa, block_cols);                    \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(kThreads) quantize_128x128_dual_##In##_##Out(       \
      Source x, Sink out, Transposed transposed, uint32_t dropped_mantissa, uint32_t block_cols) { \
    quantize_128x128<In, Out, true>(x, out, transposed, dropped_mantissa, block_cols);             \
  }
TORCHEXT_QUANTIZERS(KERNEL)
#undef KERNEL

}  // namespace torchext::quantizers

namespace torchext {

void quantize_blocks_cuda(Device& device, const MatrixView& x, const QuantizeOptions& options,
                          const QuantizedView& out, void* transposed_data,
                          int64_t transposed_stride, Buffers buffers) {
  using namespace quantizers;
  if (x.rows == 0 || x.cols == 0) return;
  const uint32_t dropped = options.pow2_scale ? kMantissa : 0;
  const int64_t block_cols = ceil_div(x.cols, kScaleGroup);
  const LaunchConfig config{grid_of(ceil_div(x.rows, kScaleGroup) * block_cols, 1), {kThreads}};
  const Transposed transposed{static_cast<uint8_t*>(transposed_data), transposed_stride};
  TORCHEXT_CHECK(is_aligned(transposed.data, transposed.stride),
                 "quantized rows must start at multiples of 16 bytes");
#define LAUNCH(In, Out)                                                                        \
  if (x.dtype == In::kDtype && options.e5m2 == Out::kE5m2) {                                   \
    if (transposed_data == nullptr)                                                            \
      return device.launch(TORCHEXT_KERNEL(quantize_128x128_##In##_##Out), config, buffers,    \
                           source_of(x), sink_of(out), dropped, block_cols);                   \
    return device.launch(TORCHEXT_KERNEL(quantize_128x128_dual_##In##_##Out), config, buffers, \
                         source_of(x), sink_of(out), transposed, dropped, block_cols);         \
  }
  TORCHEXT_QUANTIZERS(LAUNCH)
#undef LAUNCH
}

}  // namespace torchext
