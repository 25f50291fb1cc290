// The CPU kernels of activations: each computes FP32 tiles, which cpu/quantize_tiles.h quantizes while
// they are in a cache. They work on 128 columns of a row at a time, so that a branch on the dtype or
// the function costs little, and one vector loop serves all of a kind.
#include <cstring>

#include "../../cpu/quantize_tiles.h"
#include "../activation.h"

namespace torchext {
namespace {

using activation_math::Curve;
using activation_math::multiply;
using namespace cpu;

struct alignas(64) Row {
  float at[kTile];
};

struct alignas(64) FloatTile {
  float data[kTile * kTile];
};

template <class Format>
void load_row(const void* data, int64_t first, int64_t stride, int cols, Row& row) {
  const auto* x = static_cast<const typename Format::Bits*>(data) + first;
  if (stride == 1 && cols == kTile) {
    for (int j = 0; j < kTile; ++j) row.at[j] = Format::to_float(x[j]);
  } else {
    for (int j = 0; j < cols; ++j) row.at[j] = Format::to_float(x[j * stride]);
  }
}

// Elements first, first + stride, ... of an array as FP32.
void load_row(const void* data, ScalarType dtype, int64_t first, int64_t stride, int cols,
              Row& row) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return load_row<BFloat16>(data, first, stride, cols, row);
    case ScalarType::Half:
      return load_row<Half>(data, first, stride, cols, row);
    case ScalarType::Float8_e4m3fn:
      return load_row<E4M3>(data, first, stride, cols, row);
    case ScalarType::Float8_e5m2:
      return load_row<E5M2>(data, first, stride, cols, row);
    default:
      return load_row<Float>(data, first, stride, cols, row);
  }
}

// Operands of row `row` from column `col` on, of which the ups begin at x.cols; dequantized.
void load_operands(const ActivationView& x, int64_t row, int64_t col, int cols, Row& values) {
  load_row(x.data, x.dtype, row * x.row_stride + col * x.col_stride, x.col_stride, cols, values);
  if (x.scale == nullptr) return;
  const float* scales = x.scale + row * x.scale_row_stride;
  for (int j = 0; j < cols;) {
    const int64_t group = (col + j) / kScaleGroup;
    const int end = int(std::min<int64_t>(cols, (group + 1) * kScaleGroup - col));
    const float scale = scales[group * x.scale_col_stride];
    for (; j < end; ++j) values.at[j] = multiply(values.at[j], scale);
  }
}

template <class Body>
void with_curve(Function function, const Body& body) {
  switch (function) {
    case Function::kSiLU:
      return body(Curve<Function::kSiLU>());
    case Function::kGELU:
      return body(Curve<Function::kGELU>());
    case Function::kGELUTanh:
      return body(Curve<Function::kGELUTanh>());
    default:
      return body(Curve<Function::kReLU2>());
  }
}

// A part of one array that a tile reads.
Ahead ahead_of(const void* data, ScalarType dtype, int64_t row_stride, int64_t col_stride,
               const TilePosition& at, int64_t col) {
  if (col_stride != 1) return {};
  const int64_t size = element_size(dtype);
  return {static_cast<const uint8_t*>(data) + (at.row * row_stride + col) * size, row_stride * size,
          at.rows, int(at.cols * size)};
}

struct ActivateTile {
  static void run(const ActivationView& x, const TilePosition& at, const Ahead& gates,
                  const Ahead& ups, float* tile) {
    Row gate{}, up{};
    for (int i = 0; i < at.rows; ++i) {
      gates.fetch(i);
      ups.fetch(i);
      float* __restrict y = tile + i * kTile;
      load_operands(x, at.row + i, at.col, at.cols, gate);
      with_curve(x.function, [&](auto curve) {
        for (int j = 0; j < kTile; ++j) y[j] = curve.value(gate.at[j]);
      });
      if (!x.gated) continue;
      load_operands(x, at.row + i, x.cols + at.col, at.cols, up);
      for (int j = 0; j < kTile; ++j) y[j] = multiply(y[j], up.at[j]);
    }
  }
};

// A producer (cpu/quantize_tiles.h).
struct Activation {
  using Scratch = FloatTile;
  static constexpr ScalarType dtype = ScalarType::Float;
  const ActivationView& x;

  Tile operator()(Scratch& scratch, const TilePosition& at, const TilePosition& next) const {
    const Ahead gates = ahead(next, next.col);
    const Ahead ups = x.gated ? ahead(next, x.cols + next.col) : Ahead();
    run_vectorized<ActivateTile>(x, at, gates, ups, static_cast<float*>(scratch.data));
    return {scratch.data, kTile, at.rows, at.cols, {}};
  }

  Ahead ahead(const TilePosition& at, int64_t col) const {
    return ahead_of(x.data, x.dtype, x.row_stride, x.col_stride, at, col);
  }
};

// Where a kernel writes the tiles that it computes, with rows kTile apart; nullptr: not computed.
struct GradientTiles {
  float *gate, *up, *activation;
};

// The gradients of `at.cols` columns of the gates from at.col on, of the ups that belong to them, and
// the activation, all from one read.
struct GradientTile {
  static void run(const MatrixView& grad, const ActivationView& x, const TilePosition& at,
                  const GradientTiles& to) {
    Row gate{}, up{}, dy{}, value{}, slope{}, result{};
    const bool values = to.up || to.activation;
    const auto store = [&](float* tile, int i) {
      std::memcpy(tile + i * kTile, result.at, size_t(at.cols) * sizeof(float));
    };
    for (int i = 0; i < at.rows; ++i) {
      const int64_t row = at.row + i;
      load_operands(x, row, at.col, at.cols, gate);
      if (x.gated && (to.gate || to.activation))
        load_operands(x, row, x.cols + at.col, at.cols, up);
      load_row(grad.data, grad.dtype, row * grad.row_stride + at.col * grad.col_stride,
               grad.col_stride, at.cols, dy);
      with_curve(x.function, [&](auto curve) {
        if (!values) {
          for (int j = 0; j < kTile; ++j) slope.at[j] = curve.slope(gate.at[j]);
        } else if (!to.gate) {
          for (int j = 0; j < kTile; ++j) value.at[j] = curve.value(gate.at[j]);
        } else {  // in one loop, what both have in common is computed once
          for (int j = 0; j < kTile; ++j) {
            value.at[j] = curve.value(gate.at[j]);
            slope.at[j] = curve.slope(gate.at[j]);
          }
        }
      });
      if (to.gate) {
        if (x.gated) {
          for (int j = 0; j < kTile; ++j)
            result.at[j] = multiply(slope.at[j], multiply(dy.at[j], up.at[j]));
        } else {
          for (int j = 0; j < kTile; ++j) result.at[j] = multiply(slope.at[j], dy.at[j]);
        }
        store(to.gate, i);
      }
      if (to.up) {
        for (int j = 0; j < kTile; ++j) result.at[j] = multiply(value.at[j], dy.at[j]);
        store(to.up, i);
      }
      if (to.activation) {
        if (x.gated) {
          for (int j = 0; j < kTile; ++j) result.at[j] = multiply(value.at[j], up.at[j]);
        } else {
          result = value;
        }
        store(to.activation, i);
      }
    }
  }
};

// Quantizes the tiles of a gradient, and sums its columns.
class GradientWriter {
 public:
  GradientWriter(const ActivationGradient& out, const ActivationView& x)
      : task_(ScalarType::Float, out.options),
        writer_(task_, x.rows, x.operand_cols(), &out.row, &out.transposed),
        sums_(out.bias_grad ? x.rows : 0, x.operand_cols()),
        bias_grad_(out.bias_grad) {}

  void write(const FloatTile& tile, const TilePosition& at, TransposedTile& memory) {
    const Tile values{tile.data, kTile, at.rows, at.cols, {}};
    if (bias_grad_) sums_.add(values, ScalarType::Float, at);
    writer_.write(values, at.row, at.col, memory);
  }

  void finish() const {
    if (bias_grad_) sums_.finish(bias_grad_, task_.all);
  }

  const Kernels& kernels() const { return task_.all; }

 private:
  const QuantizeTask task_;
  const GroupWriter writer_;
  ColumnSums sums_;
  float* bias_grad_;
};

struct GradientScratch {
  FloatTile gate, up, activation;
  TransposedTile transposed;
};

}  // namespace

void activate_cpu(const ActivationView& x, const QuantizeOptions& options, const QuantizedView* row,
                  const QuantizedView* transposed) {
  quantize_produced_groups(x.rows, x.cols, options, Activation{x}, row, transposed, nullptr);
}

void activation_gradient_cpu(const MatrixView& grad, const ActivationView& x,
                             const ActivationGradient& out) {
  GradientWriter writer(out, x);
  const QuantizeTask task(ScalarType::Float, out.activation_options);
  const GroupWriter activation(task, x.rows, x.cols, nullptr, out.activation_t);
  // If the ups begin in the middle of a group, one tile of the gradient has both kinds.
  const bool mixed = x.gated && x.cols % kScaleGroup != 0;
  const TileOrder order(x.rows, x.cols, kTile, true);
  for_each_tile<GradientScratch>(
      order, writer.kernels(),
      [&](GradientScratch& scratch, const TilePosition& at, const TilePosition&) {
        const GradientTiles tiles{mixed ? nullptr : scratch.gate.data,
                                  mixed || !x.gated ? nullptr : scratch.up.data,
                                  out.activation_t ? scratch.activation.data : nullptr};
        if (!mixed || out.activation_t) run_vectorized<GradientTile>(grad, x, at, tiles);
        if (!mixed) writer.write(scratch.gate, at, scratch.transposed);
        if (!mixed && x.gated)
          writer.write(scratch.up, {at.row, x.cols + at.col, at.rows, at.cols}, scratch.transposed);
        if (out.activation_t)
          activation.write({scratch.activation.data, kTile, at.rows, at.cols, {}}, at.row, at.col,
                           scratch.transposed);
      });
  if (mixed) {
    const TileOrder both(x.rows, 2 * x.cols, kTile, true);
    for_each_tile<GradientScratch>(
        both, writer.kernels(),
        [&](GradientScratch& scratch, const TilePosition& at, const TilePosition&) {
          const int gates = int(std::clamp<int64_t>(x.cols - at.col, 0, at.cols));
          float* tile = scratch.gate.data;
          if (gates > 0)
            run_vectorized<GradientTile>(grad, x, TilePosition{at.row, at.col, at.rows, gates},
                                         GradientTiles{tile, nullptr, nullptr});
          if (gates < at.cols)
            run_vectorized<GradientTile>(
                grad, x, TilePosition{at.row, at.col + gates - x.cols, at.rows, at.cols - gates},
                GradientTiles{nullptr, tile + gates, nullptr});
          writer.write(scratch.gate, at, scratch.transposed);
        });
  }
  writer.finish();
}

}  // namespace torchext
