// Activations, quantized with 1x128 scales: along rows (activate_1x128), along columns with a
// transposed result (activate_1x128_t), or both from one read (activate_1x128_dual).
// device/quantize_groups.cuh has the contract and the map; here the elements are computed in FP32.
// The kind of activation and the FP8 format are parameters: kernels for each pair would have the
// same inner loops.
#include "operands.cuh"

namespace torchext::quantizers {

template <class In>
__device__ Loaded<In> load_operands(const Operands& a, const uint8_t* address, int valid) {
  Loaded<In> loaded;
  loaded.gate = load16<In>(address, a.x.col_stride, a.x.aligned, valid);
  loaded.up = {};
  if (a.gated) loaded.up = load16<In>(address + a.up_offset, a.x.col_stride, a.x.aligned, valid);
  return loaded;
}

template <class In>
__device__ void activate_rows(const Operands& a, const Sink& out, EitherFp8 format,
                              uint32_t dropped_mantissa, uint32_t groups) {
  const uint32_t tile = blockIdx.x * kRowWarps + threadIdx.x / 32;
  const uint32_t group = tile % groups;
  const int64_t row = int64_t(tile / groups) * kRowsPerWarp + threadIdx.x % 32 / 8;
  const int64_t col = group * kScaleGroup + threadIdx.x % 8 * 16;
  const int rows = valid_of(row, a.x.rows, kRowsPerWarp), valid = valid_of(col, a.x.cols, 16);
  const uint8_t* from = a.x.at(row, col);
  quantize_each_row<f32, 4>(
      format, out, dropped_mantissa, row, group, rows, valid, [&](const auto& use) {
        for_each_ahead<kRowsPerLane>(
            [&](int i) {
              return load_operands<In>(a, from + 4 * i * a.x.row_stride, 4 * i < rows ? valid : 0);
            },
            [&](int i, const Loaded<In>& loaded) { use(i, activated(a, loaded)); });
      });
}

template <class In, bool by_rows>
__device__ void activate_tile(const Operands& a, const Sink& out, const Sink& transposed,
                              EitherFp8 format, uint32_t dropped_mantissa, uint32_t groups) {
  extern __shared__ uint4 tile[];
  const uint32_t group = blockIdx.x % groups, row_group = blockIdx.x / groups;
  const int tile_row = threadIdx.x / 8;
  const int64_t row = int64_t(row_group) * kTile + tile_row;
  const int64_t col = group * kScaleGroup + threadIdx.x % 8 * 16;
  const int rows = valid_of(row, a.x.rows, kTile), valid = valid_of(col, a.x.cols, 16);
  const uint8_t* from = a.x.at(row, col);
  const auto each = [&](const auto& use) {
    for_each_ahead<kTileRowsPerLane>(
        [&](int i) {
          return load_operands<In>(a, from + kTileRowStep * i * a.x.row_stride,
                                   kTileRowStep * i < rows ? valid : 0);
        },
        [&](int i, const Loaded<In>& loaded) {
          const Elements16<f32> y = activated(a, loaded);
          store_to_tile(tile, tile_row + kTileRowStep * i, y);
          use(i, y);
        });
  };
  if constexpr (by_rows)
    quantize_each_row<f32, kTileRowStep>(format, out, dropped_mantissa, row, group, rows, valid,
                                         each);
  else
    each([](int, const Elements16<f32>&) {});
  __syncthreads();
  quantize_tile_columns<f32, false>(format, tile, a.x.rows, a.x.cols, transposed, dropped_mantissa,
                                    row_group, group, NoColumnSums());
}

#define KERNEL(In)                                                                                 \
  extern "C" __global__ void __launch_bounds__(32 * kRowWarps) activate_1x128_##In(                \
      Operands a, Sink out, EitherFp8 format, uint32_t dropped_mantissa, uint32_t groups) {        \
    activate_rows<In>(a, out, format, dropped_mantissa, groups);                                   \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(kTileThreads, 2) activate_1x128_t_##In(             \
      Operands a, Sink transposed, EitherFp8 format, uint32_t dropped_mantissa, uint32_t groups) { \
    activate_tile<In, false>(a, {}, transposed, format, dropped_mantissa, groups);                 \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(kTileThreads, 2)                                    \
      activate_1x128_dual_##In(Operands a, Sink out, Sink transposed, EitherFp8 format,            \
                               uint32_t dropped_mantissa, uint32_t groups) {                       \
    activate_tile<In, true>(a, out, transposed, format, dropped_mantissa, groups);                 \
  }
TORCHEXT_INPUTS(KERNEL)
#undef KERNEL

}  // namespace torchext::quantizers

namespace torchext {

void activate_cuda(Device& device, const ActivationView& x, const QuantizeOptions& options,
                   const QuantizedView* row, const QuantizedView* transposed, Buffers buffers) {
  using namespace quantizers;
  if (x.rows == 0 || x.cols == 0) return;
  const Operands operands = operands_of(x);
  const EitherFp8 format{options.e5m2};
  const uint32_t dropped = options.pow2_scale ? kMantissa : 0;
  const int64_t groups = ceil_div(x.cols, kScaleGroup);
  if (transposed == nullptr) {
    const int64_t tiles = ceil_div(x.rows, kRowsPerWarp) * groups;
    const LaunchConfig config{grid_of(tiles, kRowWarps), {32 * kRowWarps}};
#define LAUNCH(In)                                                                        \
  if (x.dtype == In::kDtype)                                                              \
    return device.launch(TORCHEXT_KERNEL(activate_1x128_##In), config, buffers, operands, \
                         sink_of(*row), format, dropped, groups);
    TORCHEXT_INPUTS(LAUNCH)
#undef LAUNCH
  }
  LaunchConfig config{grid_of(ceil_div(x.rows, kScaleGroup) * groups, 1), {kTileThreads}};
  config.shared_bytes = uint32_t(kTile * kTile * sizeof(float));
#define LAUNCH(In)                                                                             \
  if (x.dtype == In::kDtype) {                                                                 \
    if (row == nullptr)                                                                        \
      return device.launch(TORCHEXT_KERNEL(activate_1x128_t_##In), config, buffers, operands,  \
                           sink_of(*transposed), format, dropped, groups);                     \
    return device.launch(TORCHEXT_KERNEL(activate_1x128_dual_##In), config, buffers, operands, \
                         sink_of(*row), sink_of(*transposed), format, dropped, groups);        \
  }
  TORCHEXT_INPUTS(LAUNCH)
#undef LAUNCH
}

}  // namespace torchext
