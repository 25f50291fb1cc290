// Dequantizes FP8 data to a wide dtype. Every warp works by itself, on a tile of 16 rows and 128
// columns: eight lanes take a row, 16 columns each. With 16 rows, M-major scales are loaded in
// whole sectors. A lane loads its 16 columns of four rows, then, row by row, loads the scale,
// multiplies and stores. Contract: all of a lane's 16 columns share a scale (dequantize_cuda checks
// this).
#include "../../device/matrix.cuh"
#include "../quantize.h"

namespace torchext::quantizers {

constexpr int kWarps = 4;
constexpr int kRowsPerLane = 4;
constexpr int kRowsPerWarp = 4 * kRowsPerLane;
constexpr int kTileCols = 8 * 16;

// The scale of element [row, col] is [row >> row_shift, col >> col_shift].
struct Scales {
  const float* data;
  int64_t row_stride, col_stride;
  int row_shift, col_shift;

  __device__ float at(int64_t row, int64_t col) const {
    return __ldg(data + (row >> row_shift) * row_stride + (col >> col_shift) * col_stride);
  }
};

struct Result {
  uint8_t* data;
  int64_t stride;  // bytes between rows
  bool aligned;    // rows start at multiples of 16 bytes
};

template <class Out>
__device__ uint32_t scaled_word(const float* x, float scale) {
  if constexpr (Out::kPerWord == 2)
    return Out::pack(__fmul_rn(x[1], scale), __fmul_rn(x[0], scale));
  else
    return bits_of(__fmul_rn(x[0], scale));
}

// Stores 16 elements of each lane. Two neighboring lanes, whose elements are neighbors too, swap
// halves of 32 bytes, so that each store of a pair fills a whole sector of memory.
template <class Out>
__device__ void store_whole(uint8_t* address, const Elements16<Out>& y) {
  constexpr int kBytes = Elements16<Out>::kWords * 4;  // of a lane
  const bool odd = threadIdx.x % 2 != 0;
#pragma unroll
  for (int i = 0; i < Elements16<Out>::kWords; i += 8) {
    uint4 kept, other;
    uint32_t *keep = &kept.x, *swap = &other.x;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = y.words[i + j], high = y.words[i + j + 4];
      keep[j] = odd ? high : low;
      swap[j] = __shfl_xor_sync(~0u, odd ? low : high, 1);
    }
    uint8_t* even = address + i * 4 + (odd ? 16 - kBytes : 0);  // of the even lane's sector
    *reinterpret_cast<uint4*>(even) = odd ? other : kept;
    *reinterpret_cast<uint4*>(even + kBytes) = odd ? kept : other;
  }
}

// Stores the first `valid` of 16 elements.
template <class Out>
__device__ void store(uint8_t* address, bool aligned, int valid, const Elements16<Out>& y) {
  if (aligned && valid == 16) {
#pragma unroll
    for (int i = 0; i < Elements16<Out>::kWords; i += 4)
      reinterpret_cast<uint4*>(address)[i / 4] = {y.words[i], y.words[i + 1], y.words[i + 2],
                                                  y.words[i + 3]};
    return;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i >= valid) break;
    if constexpr (Out::kPerWord == 2)
      reinterpret_cast<uint16_t*>(address)[i] = uint16_t(y.words[i / 2] >> i % 2 * 16);
    else
      reinterpret_cast<uint32_t*>(address)[i] = y.words[i];
  }
}

// `interior`: all of the warp's rows and columns exist and are aligned.
template <class In, class Out, bool interior>
__device__ void dequantize_rows(const Source& x, const Scales& scales, const Result& y, int64_t row,
                                int64_t col) {
  const int rows = interior ? kRowsPerWarp : valid_of(row, x.rows, kRowsPerWarp);
  const int valid = interior ? 16 : valid_of(col, x.cols, 16);
  const uint8_t* from = x.at(row, col);
  uint8_t* to = y.data + row * y.stride + col * (4 / Out::kPerWord);
  for_each_loaded<fp8, kRowsPerLane, interior>(
      [&](int i) {
        return load16<fp8>(from + 4 * i * x.row_stride, x.col_stride, interior || x.aligned,
                           4 * i < rows ? valid : 0);
      },
      [&](int i, const Elements16<fp8>& e) {
        if (4 * i >= rows || valid == 0) return;
        const float scale = scales.at(row + 4 * i, col);
        Elements16<Out> result;
#pragma unroll
        for (int j = 0; j < 16; j += 2) {
          float values[2];
          In::unpack(uint16_t(e.words[j / 4] >> j % 4 * 8), values);
          result.words[j / Out::kPerWord] = scaled_word<Out>(values, scale);
          if constexpr (Out::kPerWord == 1)
            result.words[j + 1] = scaled_word<Out>(values + 1, scale);
        }
        if constexpr (interior)
          store_whole(to + 4 * i * y.stride, result);
        else
          store(to + 4 * i * y.stride, y.aligned, valid, result);
      });
}

template <class In, class Out>
__device__ void dequantize(const Source& x, const Scales& scales, const Result& y,
                           uint32_t tile_cols) {
  const uint32_t tile = blockIdx.x * kWarps + threadIdx.x / 32;
  const int64_t first_row = int64_t(tile / tile_cols) * kRowsPerWarp;
  const int64_t first_col = int64_t(tile % tile_cols) * kTileCols;
  const int64_t row = first_row + threadIdx.x % 32 / 8;
  const int64_t col = first_col + threadIdx.x % 8 * 16;
  if (x.aligned && y.aligned && first_row + kRowsPerWarp <= x.rows &&
      first_col + kTileCols <= x.cols)
    dequantize_rows<In, Out, true>(x, scales, y, row, col);
  else
    dequantize_rows<In, Out, false>(x, scales, y, row, col);
}

#define KERNEL(Out, In)                                                                \
  extern "C" __global__ void __launch_bounds__(32 * kWarps)                            \
      dequantize_##In##_##Out(Source x, Scales scales, Result y, uint32_t tile_cols) { \
    dequantize<In, Out>(x, scales, y, tile_cols);                                      \
  }
TORCHEXT_QUANTIZERS(KERNEL)
#undef KERNEL

}  // namespace torchext::quantizers

namespace torchext {
namespace {

// log2 of how many rows or columns share a scale; if all do, a shift that makes every index 0.
int shift_of(int64_t group, int64_t count) {
  if (group >= count) return 62;
  int shift = 0;
  while ((int64_t(1) << shift) < group) ++shift;
  TORCHEXT_CHECK(int64_t(1) << shift == group, "dequantize: groups of ", group, " of ", count);
  return shift;
}

}  // namespace

void dequantize_cuda(Device& device, const DequantizeView& view, Buffers buffers) {
  using namespace quantizers;
  if (view.rows == 0 || view.cols == 0) return;
  TORCHEXT_CHECK(view.col_group >= std::min<int64_t>(view.cols, 16), "dequantize: groups of ",
                 view.col_group, " columns");
  const Source source{static_cast<const uint8_t*>(view.data),
                      view.rows,
                      view.cols,
                      view.data_row_stride,
                      view.data_col_stride,
                      view.data_col_stride == 1 && is_aligned(view.data, view.data_row_stride)};
  const Scales scales{view.scale, view.scale_row_stride, view.scale_col_stride,
                      shift_of(view.row_group, view.rows), shift_of(view.col_group, view.cols)};
  const int64_t y_stride = view.y_stride * element_size(view.y_dtype);
  const Result result{static_cast<uint8_t*>(view.y), y_stride, is_aligned(view.y, y_stride)};
  const int64_t tile_cols = ceil_div(view.cols, kTileCols);
  const int64_t tiles = ceil_div(view.rows, kRowsPerWarp) * tile_cols;
  const LaunchConfig config{grid_of(tiles, kWarps), {32 * kWarps}};
#define LAUNCH(Out, In)                                                                     \
  if (view.y_dtype == Out::kDtype && view.e5m2 == In::kE5m2)                                \
    return device.launch(TORCHEXT_KERNEL(dequantize_##In##_##Out), config, buffers, source, \
                         scales, result, tile_cols);
  TORCHEXT_QUANTIZERS(LAUNCH)
#undef LAUNCH
}

}  // namespace torchext
