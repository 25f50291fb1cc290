// RMSNorm and LayerNorm with quantization: 1x128 scales along rows, from one read of x (rows.cuh), or
// along rows and columns (device/quantize_groups.cuh).
//
// Both ways take two kernels for each chunk of rows: the first adds the residual and finds mean and
// rstd; the second norms tiles of 128 x 128 and quantizes them both ways. A chunk is about one wave of tiles,
// four for each SM, so that the second kernel finds most of it in L2.
#include "rows.cuh"

namespace torchext::norms {

template <class In, bool interior>
__device__ void quantize_normed_tile(EitherFp8 format, const Norm& norm, const Sink& out,
                                     const Sink& transposed, uint32_t dropped_mantissa,
                                     uint32_t row_group, uint32_t group) {
  extern __shared__ uint4 tile[];
  const int tile_row = threadIdx.x / 8;
  const int64_t row = int64_t(row_group) * kTile + tile_row;
  const int64_t col = group * kScaleGroup + threadIdx.x % 8 * 16;
  const int rows = interior ? kTile : valid_of(row, norm.x.rows, kTile);
  const int valid = interior ? 16 : valid_of(col, norm.x.cols, 16);
  const Source& x = norm.x;
  const uint8_t* from = x.at(row, col);
  const bool shifts = norm.bias.data != nullptr;
  const Values16 factors = load_factors16(norm.weight, norm.unit_offset, col, valid);
  const Values16 shift = shifts ? load_vector16(norm.bias, col, valid) : Values16{};
  const auto each = [&](const auto& use) {
    for_each_loaded<In, kTileRowsPerLane, interior>(
        [&](int i) {
          return load16<In>(from + kTileRowStep * i * x.row_stride, x.col_stride,
                            interior || x.aligned, kTileRowStep * i < rows ? valid : 0);
        },
        [&](int i, const Elements16<In>& h) {
          Elements16<f32> y = {};
          if (interior || kTileRowStep * i < rows) {
            const int64_t at = row + kTileRowStep * i;
            const float mean = norm.mean != nullptr ? __ldg(norm.mean + at) : 0.0f;
            y = normed(h, mean, __ldg(norm.rstd + at), factors, shift, shifts, valid);
            if (norm.normed != nullptr)
              y = store_rounded<In>(norm.normed + at * norm.stride + col * (4 / In::kPerWord),
                                    interior || norm.aligned, valid, y);
          }
          store_to_tile(tile, tile_row + kTileRowStep * i, y);
          use(i, y);
        });
  };
  quantize_each_row<f32, kTileRowStep>(format, out, dropped_mantissa, row, group, rows, valid,
                                       each);
  __syncthreads();
  quantize_tile_columns<f32, interior>(format, tile, x.rows, x.cols, transposed, dropped_mantissa,
                                       row_group, group, NoColumnSums());
}

template <class In>
__device__ void quantize_normed_tiles(bool e5m2, const Norm& norm, const Sink& out,
                                      const Sink& transposed, uint32_t dropped_mantissa,
                                      uint32_t groups) {
  const uint32_t group = blockIdx.x % groups, row_group = blockIdx.x / groups;
  const Source& x = norm.x;
  if (norm.aligned && (row_group + 1) * kScaleGroup <= x.rows &&
      (group + 1) * kScaleGroup <= x.cols)
    quantize_normed_tile<In, true>({e5m2}, norm, out, transposed, dropped_mantissa, row_group,
                                   group);
  else
    quantize_normed_tile<In, false>({e5m2}, norm, out, transposed, dropped_mantissa, row_group,
                                    group);
}

// With a least number of CTAs, ptxas does not spill to fit in more of them.
#define KERNEL(In)                                                                       \
  extern "C" __global__ void __launch_bounds__(32 * kWarps, 2) norm_quantize_1x128_##In( \
      Norm norm, Sink out, bool e5m2, uint32_t dropped_mantissa, int warps_per_row) {    \
    norm_rows<In>(EitherFp8{e5m2}, norm, out, dropped_mantissa, warps_per_row);          \
  }                                                                                      \
  extern "C" __global__ void __launch_bounds__(32 * kWarps, 2)                           \
      norm_statistics_##In(Norm norm, int warps_per_row) {                               \
    norm_rows<In>(NoOutput(), norm, {}, 0, warps_per_row);                               \
  }                                                                                      \
  extern "C" __global__ void __launch_bounds__(kTileThreads, 2)                          \
      norm_quantize_1x128_dual_##In(Norm norm, Sink out, Sink transposed, bool e5m2,     \
                                    uint32_t dropped_mantissa, uint32_t groups) {        \
    quantize_normed_tiles<In>(e5m2, norm, out, transposed, dropped_mantissa, groups);    \
  }
TORCHEXT_INPUTS(KERNEL)
#undef KERNEL

namespace {

void skip_rows(MatrixView& x, int64_t rows) {
  if (x.data != nullptr)
    x.data = static_cast<const uint8_t*>(x.data) + rows * x.row_stride * element_size(x.dtype);
}

// `count` rows of a norm, from row `first`.
NormView part_of(NormView norm, int64_t first, int64_t count) {
  skip_rows(norm.x, first);
  skip_rows(norm.residual, first);
  norm.x.rows = norm.residual.rows = count;
  for (void** rows : {&norm.sum, &norm.normed})
    if (*rows != nullptr)
      *rows = static_cast<uint8_t*>(*rows) + first * norm.x.cols * element_size(norm.x.dtype);
  norm.rstd += first;
  if (norm.mean != nullptr) norm.mean += first;
  return norm;
}

// The same norm of the sums, which exist.
NormView of_sums(NormView norm) {
  if (norm.sum == nullptr) return norm;
  norm.x = {norm.sum, norm.x.dtype, norm.x.rows, norm.x.cols, norm.x.cols, 1};
  norm.residual = {};
  return norm;
}

}  // namespace
}  // namespace torchext::norms

namespace torchext {

void norm_quantize_cuda(Device& device, const NormView& norm, const QuantizeOptions& options,
                        const QuantizedView& row, const QuantizedView* transposed,
                        const NormTensors& t) {
  using namespace norms;
  const ScalarType dtype = norm.x.dtype;
  const uint32_t dropped = options.pow2_scale ? kMantissa : 0;
  const int warps = warps_per_row_of(norm.x.cols, kHeld);
  const auto rows_config = [&](int64_t rows) {
    return LaunchConfig{grid_of(rows, kWarps / warps), {32 * kWarps}};
  };
  const Buffer x = reads(t.x, "x"), residual = reads(t.residual, "residual");
  const Buffer weight = reads(t.weight, "weight"), bias = reads(t.bias, "bias");
  const Buffer sum = writes(t.sum, "new_residual"), normed = writes(t.normed, "normed");
  const Buffer mean = writes(t.mean, "mean"), rstd = writes(t.rstd, "rstd");
  const Buffer data = writes(t.data, "data"), scale = writes(t.scale, "scale");
  if (transposed == nullptr) {
#define LAUNCH(In)                                                                            \
  if (dtype == In::kDtype)                                                                    \
    return device.launch(TORCHEXT_KERNEL(norm_quantize_1x128_##In), rows_config(norm.x.rows), \
                         {x, residual, weight, bias, sum, normed, mean, rstd, data, scale},   \
                         operands_of(norm), sink_of(row), options.e5m2, dropped, warps);
    TORCHEXT_INPUTS(LAUNCH)
#undef LAUNCH
  }

  const Buffer data_t = writes(t.data_t, "data_t"), scale_t = writes(t.scale_t, "scale_t");
  const Buffer read_mean = reads(t.mean, "mean"), read_rstd = reads(t.rstd, "rstd");
  const Buffer h = norm.sum ? reads(t.sum, "new_residual") : x;
  const int64_t groups = ceil_div(norm.x.cols, kScaleGroup);
  const int64_t wave = 4 * device.properties().sm_count;  // tiles
  const int64_t chunk = std::max<int64_t>(1, wave / std::max<int64_t>(groups, 1)) * kScaleGroup;
  for (int64_t first = 0; first < norm.x.rows; first += chunk) {
    const int64_t count = std::min(chunk, norm.x.rows - first);
    const NormView part = part_of(norm, first, count);
    QuantizedView of_rows = row, of_columns = *transposed;
    of_rows.data = static_cast<uint8_t*>(row.data) + first * row.data_stride;
    of_rows.scale += first * row.scale_row_stride;
    of_columns.data = static_cast<uint8_t*>(transposed->data) + first;
    of_columns.scale += first / kScaleGroup * transposed->scale_col_stride;
    LaunchConfig tiles{grid_of(ceil_div(count, kScaleGroup) * groups, 1), {kTileThreads}};
    tiles.shared_bytes = uint32_t(kTile * kTile * sizeof(float));
#define LAUNCH(In)                                                                                 \
  if (dtype == In::kDtype) {                                                                       \
    device.launch(TORCHEXT_KERNEL(norm_statistics_##In), rows_config(count),                       \
                  {x, residual, sum, mean, rstd}, operands_of(part), warps);                       \
    if (groups > 0)                                                                                \
      device.launch(TORCHEXT_KERNEL(norm_quantize_1x128_dual_##In), tiles,                         \
                    {h, weight, bias, normed, read_mean, read_rstd, data, scale, data_t, scale_t}, \
                    operands_of(of_sums(part)), sink_of(of_rows), sink_of(of_columns),             \
                    options.e5m2, dropped, groups);                                                \
  }
    TORCHEXT_INPUTS(LAUNCH)
#undef LAUNCH
  }
}

}  // namespace torchext
