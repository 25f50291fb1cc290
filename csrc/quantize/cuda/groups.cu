// Quantizes with 1x128 scales: along rows (quantize_1x128), along columns with a transposed result
// (quantize_1x128_t), or both from one read (quantize_1x128_dual), also with the sums over rows
// (quantize_1x128_dual_bias_grad). device/quantize_groups.cuh has the contract and the map; here the
// elements are loaded.
#include "../../device/quantize_groups.cuh"
#include "../quantize.h"

namespace torchext::quantizers {

// ---- along rows ----

// `interior`: all of the warp's rows and columns exist and are aligned.
template <class In, class Out, bool interior>
__device__ void quantize_rows(const Source& x, const Sink& out, uint32_t dropped_mantissa,
                              int64_t row, uint32_t group) {
  const int64_t col = group * kScaleGroup + threadIdx.x % 8 * 16;
  const int rows = interior ? kRowsPerWarp : valid_of(row, x.rows, kRowsPerWarp);
  const int valid = interior ? 16 : valid_of(col, x.cols, 16);
  const uint8_t* from = x.at(row, col);
  quantize_each_row<In, 4>(
      Out(), out, dropped_mantissa, row, group, rows, valid, [&](const auto& use) {
        for_each_loaded<In, kRowsPerLane, interior>(
            [&](int i) {
              return load16<In>(from + 4 * i * x.row_stride, x.col_stride, interior || x.aligned,
                                4 * i < rows ? valid : 0);
            },
            use);
      });
}

template <class In, class Out>
__device__ void quantize_1x128(const Source& x, const Sink& out, uint32_t dropped_mantissa,
                               uint32_t groups) {
  const uint32_t tile = blockIdx.x * kRowWarps + threadIdx.x / 32;
  const uint32_t group = tile % groups;
  const int64_t first_row = int64_t(tile / groups) * kRowsPerWarp;
  const int64_t row = first_row + threadIdx.x % 32 / 8;
  if (x.aligned && first_row + kRowsPerWarp <= x.rows && (group + 1) * kScaleGroup <= x.cols)
    quantize_rows<In, Out, true>(x, out, dropped_mantissa, row, group);
  else
    quantize_rows<In, Out, false>(x, out, dropped_mantissa, row, group);
}

#define KERNEL(In, Out)                                                                     \
  extern "C" __global__ void __launch_bounds__(32 * kRowWarps) quantize_1x128_##In##_##Out( \
      Source x, Sink out, uint32_t dropped_mantissa, uint32_t groups) {                     \
    quantize_1x128<In, Out>(x, out, dropped_mantissa, groups);                              \
  }
TORCHEXT_QUANTIZERS(KERNEL)
#undef KERNEL

// ---- along columns, or both ways ----

template <class In, bool by_rows, bool interior, class Format, class Sums>
__device__ void quantize_group_tile(Format format, const Source& x, const Sink& out,
                                    const Sink& transposed, uint32_t dropped_mantissa,
                                    uint32_t row_group, uint32_t group, const Sums& sums) {
  extern __shared__ uint4 tile[];
  {
    const int tile_row = threadIdx.x / 8;
    const int64_t row = int64_t(row_group) * kTile + tile_row;
    const int64_t col = group * kScaleGroup + threadIdx.x % 8 * 16;
    const int rows = interior ? kTile : valid_of(row, x.rows, kTile);
    const int valid = interior ? 16 : valid_of(col, x.cols, 16);
    const uint8_t* from = x.at(row, col);
    const auto each = [&](const auto& use) {
      for_each_loaded<In, kTileRowsPerLane, interior>(
          [&](int i) {
            return load16<In>(from + kTileRowStep * i * x.row_stride, x.col_stride,
                              interior || x.aligned, kTileRowStep * i < rows ? valid : 0);
          },
          [&](int i, const Elements16<In>& e) {
            store_to_tile(tile, tile_row + kTileRowStep * i, e);
            use(i, e);
          });
    };
    if constexpr (by_rows)
      quantize_each_row<In, kTileRowStep>(format, out, dropped_mantissa, row, group, rows, valid,
                                          each);
    else
      each([](int, const Elements16<In>&) {});
  }
  __syncthreads();
  quantize_tile_columns<In, interior>(format, tile, x.rows, x.cols, transposed, dropped_mantissa,
                                      row_group, group, sums);
}

template <class In, bool by_rows, class Format, class Sums>
__device__ void quantize_1x128_tile(Format format, const Source& x, const Sink& out,
                                    const Sink& transposed, uint32_t dropped_mantissa,
                                    uint32_t groups, const Sums& sums) {
  const uint32_t group = blockIdx.x % groups;
  const uint32_t row_group = blockIdx.x / groups;
  if (x.aligned && (row_group + 1) * kScaleGroup <= x.rows && (group + 1) * kScaleGroup <= x.cols)
    quantize_group_tile<In, by_rows, true>(format, x, out, transposed, dropped_mantissa, row_group,
                                           group, sums);
  else
    quantize_group_tile<In, by_rows, false>(format, x, out, transposed, dropped_mantissa, row_group,
                                            group, sums);
}

#define KERNEL(In, Out)                                                                   \
  extern "C" __global__ void __launch_bounds__(kTileThreads, In::kPerWord == 2 ? 4 : 2)   \
      quantize_1x128_t_##In##_##Out(Source x, Sink transposed, uint32_t dropped_mantissa, \
                                    uint32_t groups) {                                    \
    quantize_1x128_tile<In, false>(Out(), x, {}, transposed, dropped_mantissa, groups,    \
                                   NoColumnSums());                                       \
  }                                                                                       \
  extern "C" __global__ void __launch_bounds__(kTileThreads, In::kPerWord == 2 ? 4 : 2)   \
      quantize_1x128_dual_##In##_##Out(Source x, Sink out, Sink transposed,               \
                                       uint32_t dropped_mantissa, uint32_t groups) {      \
    quantize_1x128_tile<In, true>(Out(), x, out, transposed, dropped_mantissa, groups,    \
                                  NoColumnSums());                                        \
  }
TORCHEXT_QUANTIZERS(KERNEL)
#undef KERNEL

// ---- both ways, with the sums over rows ----

#define KERNEL(In)                                                                              \
  extern "C" __global__ void __launch_bounds__(kTileThreads, 2)                                 \
      quantize_1x128_dual_bias_grad_##In(Source x, Sink out, Sink transposed, EitherFp8 format, \
                                         uint32_t dropped_mantissa, uint32_t groups,            \
                                         ColumnSums sums) {                                     \
    quantize_1x128_tile<In, true>(format, x, out, transposed, dropped_mantissa, groups, sums);  \
  }
TORCHEXT_INPUTS(KERNEL)
#undef KERNEL

extern "C" __global__ void sum_row_tiles_of_input(const float* partial, uint32_t row_tiles,
                                                  uint32_t cols, float* sums) {
  sum_row_tiles(partial, row_tiles, cols, sums);
}

}  // namespace torchext::quantizers

namespace torchext {

void quantize_groups_cuda(Device& device, const MatrixView& x, const QuantizeOptions& options,
                          const QuantizedView* row, const QuantizedView* transposed,
                          Buffers buffers) {
  using namespace quantizers;
  if (x.rows == 0 || x.cols == 0) return;
  const Source source = source_of(x);
  const uint32_t dropped = options.pow2_scale ? kMantissa : 0;
  const int64_t groups = ceil_div(x.cols, kScaleGroup);
  if (transposed == nullptr) {
    const int64_t tiles = ceil_div(x.rows, kRowsPerWarp) * groups;
    const LaunchConfig config{grid_of(tiles, kRowWarps), {32 * kRowWarps}};
#define LAUNCH(In, Out)                                                                         \
  if (x.dtype == In::kDtype && options.e5m2 == Out::kE5m2)                                      \
    return device.launch(TORCHEXT_KERNEL(quantize_1x128_##In##_##Out), config, buffers, source, \
                         sink_of(*row), dropped, groups);
    TORCHEXT_QUANTIZERS(LAUNCH)
#undef LAUNCH
  }
  LaunchConfig config{grid_of(ceil_div(x.rows, kScaleGroup) * groups, 1), {kTileThreads}};
  config.shared_bytes = uint32_t(kTile * kTile * element_size(x.dtype));
#define LAUNCH(In, Out)                                                                      \
  if (x.dtype == In::kDtype && options.e5m2 == Out::kE5m2) {                                 \
    if (row == nullptr)                                                                      \
      return device.launch(TORCHEXT_KERNEL(quantize_1x128_t_##In##_##Out), config, buffers,  \
                           source, sink_of(*transposed), dropped, groups);                   \
    return device.launch(TORCHEXT_KERNEL(quantize_1x128_dual_##In##_##Out), config, buffers, \
                         source, sink_of(*row), sink_of(*transposed), dropped, groups);      \
  }
  TORCHEXT_QUANTIZERS(LAUNCH)
#undef LAUNCH
}

void quantize_groups_bias_grad_cuda(Device& device, const MatrixView& x,
                                    const QuantizeOptions& options, const QuantizedView& row,
                                    const QuantizedView& transposed, float* bias_grad,
                                    float* partial_sums, Buffers buffers) {
  using namespace quantizers;
  const Source source = source_of(x);
  const uint32_t dropped = options.pow2_scale ? kMantissa : 0;
  const int64_t groups = ceil_div(x.cols, kScaleGroup), row_tiles = ceil_div(x.rows, kScaleGroup);
  const ColumnSums sums{row_tiles == 1 ? bias_grad : partial_sums, x.cols};
  LaunchConfig config{grid_of(row_tiles * groups, 1), {kTileThreads}};
  config.shared_bytes = uint32_t(kTile * kTile * element_size(x.dtype));
#define LAUNCH(In)                                                                              \
  if (x.dtype == In::kDtype)                                                                    \
    device.launch(TORCHEXT_KERNEL(quantize_1x128_dual_bias_grad_##In), config, buffers, source, \
                  sink_of(row), sink_of(transposed), EitherFp8{options.e5m2}, dropped, groups,  \
                  sums);
  TORCHEXT_INPUTS(LAUNCH)
#undef LAUNCH
  if (row_tiles == 1) return;
  const size_t sums_bytes = size_t(x.cols) * sizeof(float);
  device.launch(TORCHEXT_KERNEL(sum_row_tiles_of_input),
                {grid_of(x.cols, kTileThreads), {kTileThreads}},
                {{partial_sums, size_t(row_tiles) * sums_bytes, Access::read, "partial sums"},
                 {bias_grad, sums_bytes, Access::write, "bias_grad"}},
                partial_sums, row_tiles, x.cols, bias_grad);
}

}  // namespace torchext
