// Gradients of RMSNorm and LayerNorm. For each chunk of rows, about one wave of 128 x 128 tiles:
//
//   rows      As rows.cuh: warps share a row. Each lane loads and keeps its chunks of the gradient and
//             of x, the means are found through shared memory, and dx is stored. In rows longer than
//             8,192 elements, further chunks are loaded again wherever they are needed.
//   columns   A CTA takes 128 rows of 512 columns; a warp sums 16 rows, and the CTA adds the eight sums.
//   quantize  If asked: tiles of dx both ways (device/quantize_groups.cuh).
//
// The second and third kernels find most of what they read in L2. One more kernel adds the sums of all
// blocks of 128 rows, from the first to the last.
#include "../../device/quantize_groups.cuh"
#include "norm.cuh"

namespace torchext::norms {

constexpr int kHeld = 2;  // chunks of 16 elements that a lane holds, of the gradient and of x

struct RowValues {
  const float* data;  // nullptr: 0
  int64_t stride;

  __device__ float at(int64_t row) const {
    return data == nullptr ? 0.0f : __ldg(data + row * stride);
  }
};

// The operands of NormBackwardView.
struct Gradient {
  Source grad, x, residual;  // residual.data is nullptr if there is none
  bool aligned;              // rows of all and of dx can be accessed in units of 16 bytes
  Vector weight;
  bool unit_offset;
  RowValues mean, rstd;
  uint8_t* dx;
  int64_t dx_stride;           // bytes between rows
  float *of_weight, *of_bias;  // sums over 128 rows each; of_bias is nullptr if not asked for
};

// (x - mean) * rstd.
template <class In>
__device__ Values16 standardized(const Elements16<In>& x, float mean, float rstd) {
  Values16 v;
#pragma unroll
  for (int i = 0; i < 16; ++i) v.at[i] = __fmul_rn(__fsub_rn(x.at(i), mean), rstd);
  return v;
}

// Products of the first `valid` elements, and +0.
__device__ inline Values16 products(const Values16& a, const Values16& b, int valid) {
  Values16 v;
#pragma unroll
  for (int i = 0; i < 16; ++i) v.at[i] = i < valid ? __fmul_rn(a.at[i], b.at[i]) : 0.0f;
  return v;
}

template <class In, bool whole>
__device__ void gradient_of_row(const Gradient& g, int warps_per_row) {
  __shared__ float segments[kWarps * kHeld];
  const Place place(g.x.rows, g.x.cols, warps_per_row);
  const bool exists = place.row < g.x.rows, centers = g.mean.data != nullptr;
  const float mean = exists ? g.mean.at(place.row) : 0.0f;
  const float rstd = exists ? g.rstd.at(place.row) : 0.0f;

  Elements16<In> grad[kHeld], x[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    grad[i] = place.load<In, whole>(g.grad, place.first_col + i * place.step);
    x[i] = place.load<In, whole>(g.x, place.first_col + i * place.step);
  }
  const auto weighted = [&](int64_t col, const Elements16<In>& e) {
    const int count = place.valid<whole>(col);
    return products(widened(e), load_factors16(g.weight, g.unit_offset, col, count), count);
  };
  const auto terms = [&](int64_t col, const Elements16<In>& of_grad, const Elements16<In>& of_x) {
    return products(weighted(col, of_grad), standardized(of_x, mean, rstd),
                    place.valid<whole>(col));
  };

  float first = 0;
  if (centers) {
    const float sum = row_sum<kHeld>(
        segments, place, [&](int i) { return weighted(place.first_col + i * place.step, grad[i]); },
        [&](int64_t col) { return weighted(col, place.load<In, whole>(g.grad, col)); });
    first = __fdiv_rn(sum, float(g.x.cols));
    __syncthreads();  // the segments have been read
  }
  const float sum = row_sum<kHeld>(
      segments, place,
      [&](int i) { return terms(place.first_col + i * place.step, grad[i], x[i]); },
      [&](int64_t col) {
        return terms(col, place.load<In, whole>(g.grad, col), place.load<In, whole>(g.x, col));
      });
  const float second = __fdiv_rn(sum, float(g.x.cols));

#pragma unroll 1
  for (int64_t i = 0; place.segment_col + i * place.step < place.cols; ++i) {
    const int64_t col = place.first_col + i * place.step;
    const int count = place.valid<whole>(col);
    const Values16 of_grad =
        weighted(col, i < kHeld ? grad[0] : place.load<In, whole>(g.grad, col));
    Values16 v = standardized(i < kHeld ? x[0] : place.load<In, whole>(g.x, col), mean, rstd);
#pragma unroll
    for (int j = 1; j < kHeld; ++j) {
      grad[j - 1] = grad[j];
      x[j - 1] = x[j];
    }
#pragma unroll
    for (int j = 0; j < 16; ++j)
      v.at[j] =
          __fmul_rn(rstd, __fsub_rn(__fsub_rn(of_grad.at[j], first), __fmul_rn(v.at[j], second)));
    if (g.residual.data != nullptr) {
      const Elements16<In> residual = place.load<In, whole>(g.residual, col);
#pragma unroll
      for (int j = 0; j < 16; ++j) v.at[j] = __fadd_rn(v.at[j], residual.at(j));
    }
    if (count > 0)
      store_elements16<In>(g.dx + place.row * g.dx_stride + col * (4 / In::kPerWord),
                           whole || g.aligned, count, narrowed<In>(v));
  }
}

// ---- sums of columns ----

constexpr int kSumColumns = 32 * 16;  // of a CTA
constexpr int kRunRows = int(kScaleGroup) / kWarps;

// Adds the eight warps' sums of each column, and stores the results.
__device__ inline void store_column_sums(float (&runs)[kWarps][kSumColumns + 32],
                                         const Values16& sums, float* to, int64_t cols,
                                         int64_t first_col) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // 17 places for 16 columns, so that lanes meet different banks.
#pragma unroll
  for (int i = 0; i < 16; ++i) runs[warp][lane * 17 + i] = sums.at[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kSumColumns && first_col + i < cols; i += 32 * kWarps) {
    const int place = i + i / 16;
    float pairs[kWarps / 2];
#pragma unroll
    for (int j = 0; j < kWarps / 2; ++j)
      pairs[j] = __fadd_rn(runs[2 * j][place], runs[2 * j + 1][place]);
    to[first_col + i] = __fadd_rn(__fadd_rn(pairs[0], pairs[1]), __fadd_rn(pairs[2], pairs[3]));
  }
}

template <class In>
__device__ void sum_columns(const Gradient& g, uint32_t column_blocks) {
  __shared__ float runs[kWarps][kSumColumns + 32];
  const int64_t block = blockIdx.x / column_blocks;
  const int64_t first_col = int64_t(blockIdx.x % column_blocks) * kSumColumns;
  const int64_t col = first_col + threadIdx.x % 32 * 16;
  const int64_t row = block * kScaleGroup + threadIdx.x / 32 * kRunRows;
  const int rows = valid_of(row, g.x.rows, kRunRows), valid = valid_of(col, g.x.cols, 16);
  Values16 of_weight = {}, of_bias = {};
#pragma unroll 2
  for (int i = 0; i < rows; ++i) {
    const Elements16<In> grad =
        load16<In>(g.grad.at(row + i, col), g.grad.col_stride, g.grad.aligned, valid);
    const Elements16<In> x = load16<In>(g.x.at(row + i, col), g.x.col_stride, g.x.aligned, valid);
    const Values16 v = standardized(x, g.mean.at(row + i), g.rstd.at(row + i));
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float term = __fmul_rn(grad.at(j), v.at[j]);
      of_weight.at[j] = i == 0 ? term : __fadd_rn(of_weight.at[j], term);
      of_bias.at[j] = i == 0 ? grad.at(j) : __fadd_rn(of_bias.at[j], grad.at(j));
    }
  }
  if (rows < kRunRows) {  // rows that do not exist count as +0
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      of_weight.at[j] = __fadd_rn(of_weight.at[j], 0.0f);
      of_bias.at[j] = __fadd_rn(of_bias.at[j], 0.0f);
    }
  }
  store_column_sums(runs, of_weight, g.of_weight + block * g.x.cols, g.x.cols, first_col);
  if (g.of_bias == nullptr) return;
  __syncthreads();  // the runs have been read
  store_column_sums(runs, of_bias, g.of_bias + block * g.x.cols, g.x.cols, first_col);
}

// sums[col] = the sum over `count` rows of blocks [count, cols].
extern "C" __global__ void __launch_bounds__(256)
    norm_add_column_sums(const float* blocks, float* sums, int64_t count, int64_t cols) {
  const int64_t col = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (col >= cols) return;
  float sum = __ldg(blocks + col);
#pragma unroll 8
  for (int64_t i = 1; i < count; ++i) sum = __fadd_rn(sum, __ldg(blocks + i * cols + col));
  sums[col] = sum;
}

// ---- quantization ----

template <class In, bool interior>
__device__ void quantize_tile(EitherFp8 format, const Source& x, const Sink& out,
                              const Sink& transposed, uint32_t dropped_mantissa, uint32_t row_group,
                              uint32_t group) {
  extern __shared__ uint4 tile[];
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
  quantize_each_row<In, kTileRowStep>(format, out, dropped_mantissa, row, group, rows, valid, each);
  __syncthreads();
  quantize_tile_columns<In, interior>(format, tile, x.rows, x.cols, transposed, dropped_mantissa,
                                      row_group, group, NoColumnSums());
}

#define KERNEL(In)                                                                              \
  extern "C" __global__ void __launch_bounds__(32 * kWarps, In::kPerWord)                       \
      norm_gradient_##In(Gradient g, int warps_per_row) {                                       \
    if (g.aligned && g.x.cols % 16 == 0)                                                        \
      gradient_of_row<In, true>(g, warps_per_row);                                              \
    else                                                                                        \
      gradient_of_row<In, false>(g, warps_per_row);                                             \
  }                                                                                             \
  extern "C" __global__ void __launch_bounds__(32 * kWarps, 2)                                  \
      norm_sum_columns_##In(Gradient g, uint32_t column_blocks) {                               \
    sum_columns<In>(g, column_blocks);                                                          \
  }                                                                                             \
  extern "C" __global__ void __launch_bounds__(kTileThreads, 2)                                 \
      norm_quantize_gradient_##In(Source x, Sink out, Sink transposed, bool e5m2,               \
                                  uint32_t dropped_mantissa, uint32_t groups) {                 \
    const uint32_t group = blockIdx.x % groups, row_group = blockIdx.x / groups;                \
    if (x.aligned && (row_group + 1) * kScaleGroup <= x.rows &&                                 \
        (group + 1) * kScaleGroup <= x.cols)                                                    \
      quantize_tile<In, true>({e5m2}, x, out, transposed, dropped_mantissa, row_group, group);  \
    else                                                                                        \
      quantize_tile<In, false>({e5m2}, x, out, transposed, dropped_mantissa, row_group, group); \
  }
TORCHEXT_INPUTS(KERNEL)
#undef KERNEL

namespace {

// Rows of an operand, from row `first` on.
Source part_of(const MatrixView& x, int64_t first, int64_t count) {
  if (x.data == nullptr) return {};
  MatrixView part = x;
  part.data = static_cast<const uint8_t*>(x.data) + first * x.row_stride * element_size(x.dtype);
  part.rows = count;
  return source_of(part);
}

Gradient part_of(const NormBackwardView& view, float* sums, int64_t first, int64_t count) {
  const int64_t size = element_size(view.x.dtype), cols = view.x.cols;
  Gradient g{};
  g.grad = part_of(view.grad, first, count);
  g.x = part_of(view.x, first, count);
  g.residual = part_of(view.residual_grad, first, count);
  g.dx_stride = cols * size;
  g.dx = static_cast<uint8_t*>(view.dx) + first * g.dx_stride;
  g.aligned = g.grad.aligned && g.x.aligned &&
              (view.residual_grad.data == nullptr || g.residual.aligned) &&
              is_aligned(view.dx, g.dx_stride);
  g.weight = vector_of(view.weight);
  g.unit_offset = view.unit_offset;
  if (view.mean.data != nullptr)
    g.mean = {view.mean.data + first * view.mean.stride, view.mean.stride};
  g.rstd = {view.rstd.data + first * view.rstd.stride, view.rstd.stride};
  const int64_t block = first / kScaleGroup;
  g.of_weight = sums + block * cols;
  if (view.dbias != nullptr) g.of_bias = sums + (ceil_div(view.x.rows, kScaleGroup) + block) * cols;
  return g;
}

}  // namespace
}  // namespace torchext::norms

namespace torchext {

void norm_backward_cuda(Device& device, const NormBackwardView& norm,
                        const QuantizeOptions& options, const QuantizedView* row,
                        const QuantizedView* transposed, const NormBackwardTensors& t) {
  using namespace norms;
  const MatrixView& x = norm.x;
  const uint32_t dropped = options.pow2_scale ? kMantissa : 0;
  const int warps = warps_per_row_of(x.cols, kHeld);
  const int64_t groups = ceil_div(x.cols, kScaleGroup);
  const int64_t column_blocks = ceil_div(x.cols, kSumColumns);
  const int64_t row_blocks = ceil_div(x.rows, kScaleGroup);
  const int64_t wave = 4 * device.properties().sm_count;  // tiles
  const int64_t chunk = std::max<int64_t>(1, wave / groups) * kScaleGroup;
  auto* sums = static_cast<float*>(t.sums.data_ptr());
  const Buffer of_grad = reads(t.grad, "grad"), of_x = reads(t.x, "x");
  const Buffer residual = reads(t.residual_grad, "residual_grad"),
               weight = reads(t.weight, "weight");
  const Buffer mean = reads(t.mean, "mean"), rstd = reads(t.rstd, "rstd");
  const Buffer dx = writes(t.dx, "dx"), of_sums = writes(t.sums, "sums");
  for (int64_t first = 0; first < x.rows; first += chunk) {
    const int64_t count = std::min(chunk, x.rows - first);
    const Gradient g = part_of(norm, sums, first, count);
    const LaunchConfig rows_config{grid_of(count, kWarps / warps), {32 * kWarps}};
    const LaunchConfig columns{grid_of(ceil_div(count, kScaleGroup) * column_blocks, 1),
                               {32 * kWarps}};
    LaunchConfig tiles{grid_of(ceil_div(count, kScaleGroup) * groups, 1), {kTileThreads}};
    tiles.shared_bytes = uint32_t(kTile * kTile * element_size(x.dtype));
    QuantizedView of_rows{}, of_columns{};
    const MatrixView gradient{norm.dx, x.dtype, x.rows, x.cols, x.cols, 1};
    if (row != nullptr) {
      of_rows = *row;
      of_rows.data = static_cast<uint8_t*>(row->data) + first * row->data_stride;
      of_rows.scale += first * row->scale_row_stride;
      of_columns = *transposed;
      of_columns.data = static_cast<uint8_t*>(transposed->data) + first;
      of_columns.scale += first / kScaleGroup * transposed->scale_col_stride;
    }
#define LAUNCH(In)                                                                          \
  if (x.dtype == In::kDtype) {                                                              \
    device.launch(TORCHEXT_KERNEL(norm_gradient_##In), rows_config,                         \
                  {of_grad, of_x, residual, weight, mean, rstd, dx}, g, warps);             \
    device.launch(TORCHEXT_KERNEL(norm_sum_columns_##In), columns,                          \
                  {of_grad, of_x, mean, rstd, of_sums}, g, column_blocks);                  \
    if (row != nullptr)                                                                     \
      device.launch(TORCHEXT_KERNEL(norm_quantize_gradient_##In), tiles,                    \
                    {reads(t.dx, "dx"), writes(t.data, "data"), writes(t.scale, "scale"),   \
                     writes(t.data_t, "data_t"), writes(t.scale_t, "scale_t")},             \
                    part_of(gradient, first, count), sink_of(of_rows), sink_of(of_columns), \
                    options.e5m2, dropped, groups);                                         \
  }
    TORCHEXT_INPUTS(LAUNCH)
#undef LAUNCH
  }
  const LaunchConfig config{grid_of(x.cols, 256), {256}};
  const auto add = [&](const float* blocks, float* to, const Buffer& result) {
    device.launch(TORCHEXT_KERNEL(norm_add_column_sums), config, {reads(t.sums, "sums"), result},
                  blocks, to, row_blocks, x.cols);
  };
  add(sums, norm.dweight, writes(t.dweight, "dweight"));
  if (norm.dbias != nullptr) add(sums + row_blocks * x.cols, norm.dbias, writes(t.dbias, "dbias"));
}

}  // namespace torchext
