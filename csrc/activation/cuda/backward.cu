// The gradient of an activation with respect to its operands, quantized with 1x128 scales along rows
// and along columns from one read, with what backward also wants of the same operands: the sums of
// the gradient over its rows, and the activation itself quantized along columns.
// device/quantize_groups.cuh has the contract and the map.
//
// A CTA makes up to three tiles of 128 x 128, one after another: of the gradient of the gates, of
// the gradient of the ups, and of the activation. All read the same operands; the second and the
// third find them in L2.
//
// Columns of the gradient are numbered as those of the operands: `x.cols` gates, then as many ups.
// If x.cols is no multiple of 16, a lane's 16 columns may have both.
#include "operands.cuh"

namespace torchext::quantizers {

struct Backward {
  Operands operands;  // `x` may be FP8
  const float* scale;
  int64_t scale_row_stride, scale_col_stride;
  bool e5m2;  // the operands' FP8 format
  Source grad;

  __device__ float scale_at(int64_t row, int64_t col) const {
    return __ldg(scale + row * scale_row_stride + col / kScaleGroup * scale_col_stride);
  }
};

struct Outputs {
  Sink row, transposed;
  ColumnSums sums;    // data may be nullptr
  Sink activation_t;  // data may be nullptr
  EitherFp8 format, activation_format;
  uint32_t dropped_mantissa, activation_dropped_mantissa;
};

// The columns of a lane in one tile: `valid` columns of the operands from `col` on, of which those
// from number `wrap` on are ups, and begin again at the first.
struct LaneColumns {
  int64_t col;
  int valid, wrap;
  uint32_t ups;  // bit i: column i is an up
};

__device__ inline LaneColumns lane_columns(const Operands& a, int64_t out_col, bool activation) {
  if (activation || !a.gated) return {out_col, valid_of(out_col, a.x.cols, 16), 16, 0};
  const int valid = valid_of(out_col, 2 * a.x.cols, 16);
  if (out_col >= a.x.cols) return {out_col - a.x.cols, valid, 16, 0xffff};
  const int wrap = valid_of(out_col, a.x.cols, 16);
  return {out_col, valid, wrap, wrap < 16 ? 0xffffu << wrap & 0xffff : 0};
}

// Elements [first, valid) of 16, element by element; the others are zero.
template <class In>
__device__ void load_some(Elements16<In>& e, const uint8_t* address, int64_t stride, int first,
                          int valid) {
  constexpr int kBytes = 4 / In::kPerWord;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i < first || i >= valid) continue;
    const uint8_t* at = address + i * stride;
    uint32_t bits;
    if constexpr (kBytes == 1)
      bits = __ldg(at);
    else if constexpr (kBytes == 2)
      bits = __ldg(reinterpret_cast<const uint16_t*>(at));
    else
      bits = __ldg(reinterpret_cast<const uint32_t*>(at));
    e.words[i / In::kPerWord] |= bits << i % In::kPerWord * 8 * kBytes;
  }
}

// The lane's columns of a row that begins at `row`.
template <class In>
__device__ Elements16<In> load_columns(const Source& x, const uint8_t* row, const LaneColumns& c,
                                       bool exists) {
  const uint8_t* address = row + c.col * x.col_stride;
  const int valid = exists ? c.valid : 0;
  if (c.wrap == 16) return load16<In>(address, x.col_stride, x.aligned, valid);
  Elements16<In> e = {};
  load_some(e, address, x.col_stride, 0, min(valid, c.wrap));
  load_some(e, row - c.wrap * x.col_stride, x.col_stride, c.wrap, valid);
  return e;
}

template <class In, class Grad>
struct LoadedBackward {
  Elements16<Grad> grad;
  Elements16<In> gate, up;
  float gate_scale, up_scale;  // of FP8 operands that are aligned
};

template <class In, class Grad>
__device__ LoadedBackward<In, Grad> load_backward(const Backward& b, int64_t row,
                                                  const LaneColumns& c) {
  const Operands& a = b.operands;
  const bool exists = row < a.x.rows;
  LoadedBackward<In, Grad> loaded;
  loaded.grad = load_columns<Grad>(b.grad, b.grad.at(row, 0), c, exists);
  loaded.gate = load_columns<In>(a.x, a.x.at(row, 0), c, exists);
  loaded.up = {};
  if (a.gated) loaded.up = load_columns<In>(a.x, a.x.at(row, 0) + a.up_offset, c, exists);
  loaded.gate_scale = loaded.up_scale = 0;
  if constexpr (std::is_same_v<In, fp8>) {
    if (a.x.aligned && exists && c.valid > 0) {
      loaded.gate_scale = b.scale_at(row, c.col);
      if (a.gated) loaded.up_scale = b.scale_at(row, a.x.cols + c.col);
    }
  }
  return loaded;
}

// The FP32 values of 16 operands; those of FP8 from column `first` of row `row` on.
template <class In>
__device__ void expand(const Backward&, const Elements16<In>& e, float, int64_t, int64_t,
                       const LaneColumns&, float (&values)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) values[i] = e.at(i);
}

__device__ inline void expand(const Backward& b, const Elements16<fp8>& e, float scale, int64_t row,
                              int64_t first, const LaneColumns& c, float (&values)[16]) {
  const auto unpack = [&](auto format) {
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      float pair[2];
      format.unpack(uint16_t(e.words[i / 4] >> i % 4 * 8), pair);
      values[i] = pair[0];
      values[i + 1] = pair[1];
    }
  };
  if (b.e5m2)
    unpack(e5m2());
  else
    unpack(e4m3());
  if (b.operands.x.aligned) {
#pragma unroll
    for (int i = 0; i < 16; ++i) values[i] = multiply(values[i], scale);
  } else if (row < b.operands.x.rows) {
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (i < c.valid)
        values[i] =
            multiply(values[i], b.scale_at(row, first + (i < c.wrap ? c.col + i : i - c.wrap)));
  }
}

template <class In, class Grad>
__device__ Elements16<f32> gradient(const Backward& b, const LoadedBackward<In, Grad>& loaded,
                                    int64_t row, const LaneColumns& c, bool activation) {
  const Operands& a = b.operands;
  float gate[16];
  expand(b, loaded.gate, loaded.gate_scale, row, 0, c, gate);
  // These factors multiply the function's value or slope.
  float factor[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) factor[i] = activation ? 1.0f : loaded.grad.at(i);
  if (a.gated) {
    float up[16];
    expand(b, loaded.up, loaded.up_scale, row, a.x.cols, c, up);
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (!(c.ups >> i & 1)) factor[i] = multiply(factor[i], up[i]);
  }
  Elements16<f32> y;
  with_curve(a.function, [&](auto curve) {
    if (activation || c.ups != 0) {
#pragma unroll
      for (int i = 0; i < 16; ++i) y.words[i] = bits_of(multiply(curve.value(gate[i]), factor[i]));
    }
    if (!activation && c.ups != 0xffff) {
#pragma unroll
      for (int i = 0; i < 16; ++i)
        if (!(c.ups >> i & 1)) y.words[i] = bits_of(multiply(curve.slope(gate[i]), factor[i]));
    }
  });
  return y;
}

template <class In, class Grad>
__device__ void backward_tile(const Backward& b, const Outputs& out, uint32_t groups) {
  extern __shared__ uint4 tile[];
  const Operands& a = b.operands;
  const uint32_t row_group = blockIdx.x / groups;
  const int64_t out_cols = a.gated ? 2 * a.x.cols : a.x.cols;
  const int tile_row = threadIdx.x / 8;
  const int64_t row = int64_t(row_group) * kTile + tile_row;
  const int rows = valid_of(row, a.x.rows, kTile);
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const bool activation = pass == 2;
    const uint32_t group = blockIdx.x % groups + (pass == 1 ? groups : 0);
    if (pass == 1 && (!a.gated || group * kScaleGroup >= out_cols)) continue;
    if (activation && out.activation_t.data == nullptr) continue;
    const LaneColumns c = lane_columns(a, group * kScaleGroup + threadIdx.x % 8 * 16, activation);
    const EitherFp8 format = activation ? out.activation_format : out.format;
    const uint32_t dropped = activation ? out.activation_dropped_mantissa : out.dropped_mantissa;
    quantize_each_row<f32, kTileRowStep>(
        format, out.row, dropped, row, group, activation ? 0 : rows, c.valid, [&](const auto& use) {
#pragma unroll 1
          for (int i = 0; i < kTileRowsPerLane; ++i) {
            const int64_t of_lane = row + kTileRowStep * i;
            const Elements16<f32> y =
                gradient(b, load_backward<In, Grad>(b, of_lane, c), of_lane, c, activation);
            store_to_tile(tile, tile_row + kTileRowStep * i, y);
            use(i, y);
          }
        });
    __syncthreads();
    quantize_tile_columns<f32, false>(format, tile, a.x.rows, activation ? a.x.cols : out_cols,
                                      activation ? out.activation_t : out.transposed, dropped,
                                      row_group, group,
                                      activation ? ColumnSums{nullptr, 0} : out.sums);
    __syncthreads();  // the next tile takes this one's place
  }
}

// FP32 operands need more registers than two CTAs of an SM can have.
#define KERNEL(In, Grad)                                                                \
  extern "C" __global__ void __launch_bounds__(kTileThreads, In::kPerWord == 1 ? 1 : 2) \
      activation_gradient_##In##_##Grad(Backward b, Outputs out, uint32_t groups) {     \
    backward_tile<In, Grad>(b, out, groups);                                            \
  }
#define KERNELS(Grad) KERNEL(Grad, Grad) KERNEL(fp8, Grad)
TORCHEXT_INPUTS(KERNELS)
#undef KERNELS
#undef KERNEL

extern "C" __global__ void sum_row_tiles_of_gradient(const float* partial, uint32_t row_tiles,
                                                     uint32_t cols, float* sums) {
  sum_row_tiles(partial, row_tiles, cols, sums);
}

}  // namespace torchext::quantizers

namespace torchext {

void activation_gradient_cuda(Device& device, const MatrixView& grad, const ActivationView& x,
                              const ActivationGradient& out, Buffers buffers) {
  using namespace quantizers;
  const int64_t cols = x.operand_cols(), row_tiles = ceil_div(x.rows, kScaleGroup);
  const int64_t groups = ceil_div(x.cols, kScaleGroup);
  Backward backward{operands_of(x),
                    x.scale,
                    x.scale_row_stride,
                    x.scale_col_stride,
                    x.dtype == ScalarType::Float8_e5m2,
                    source_of(grad)};
  // A lane of the ups reads the gradient from a column that is x.cols before its own.
  if (x.gated) backward.grad.aligned &= x.cols * element_size(grad.dtype) % 16 == 0;
  // A lane's 16 FP8 operands have one scale only if the ups begin at a multiple of 16.
  if (is_fp8(x.dtype)) backward.operands.x.aligned &= x.cols % 16 == 0;
  float* sums = row_tiles == 1 ? out.bias_grad : out.partial_sums;
  const Outputs outputs{sink_of(out.row),
                        sink_of(out.transposed),
                        {out.bias_grad == nullptr ? nullptr : sums, cols},
                        out.activation_t == nullptr ? Sink{} : sink_of(*out.activation_t),
                        {out.options.e5m2},
                        {out.activation_options.e5m2},
                        out.options.pow2_scale ? kMantissa : 0,
                        out.activation_options.pow2_scale ? kMantissa : 0};
  LaunchConfig config{grid_of(row_tiles * groups, 1), {kTileThreads}};
  config.shared_bytes = uint32_t(kTile * kTile * sizeof(float));
#define LAUNCH(In, Grad)                                                                         \
  if (grad.dtype == Grad::kDtype && is_fp8(x.dtype) == std::is_same_v<In, fp8>)                  \
    device.launch(TORCHEXT_KERNEL(activation_gradient_##In##_##Grad), config, buffers, backward, \
                  outputs, groups);
#define LAUNCHES(Grad) LAUNCH(Grad, Grad) LAUNCH(fp8, Grad)
  TORCHEXT_INPUTS(LAUNCHES)
#undef LAUNCHES
#undef LAUNCH
  if (out.bias_grad == nullptr || row_tiles == 1) return;
  const size_t sums_bytes = size_t(cols) * sizeof(float);
  device.launch(TORCHEXT_KERNEL(sum_row_tiles_of_gradient),
                {grid_of(cols, kTileThreads), {kTileThreads}},
                {{out.partial_sums, size_t(row_tiles) * sums_bytes, Access::read, "partial sums"},
                 {out.bias_grad, sums_bytes, Access::write, "bias_grad"}},
                out.partial_sums, row_tiles, cols, out.bias_grad);
}

}  // namespace torchext
