// Norms on a CPU, as producers of tiles for the quantizers' walk (../cpu/quantize_tiles.h). A thread
// gets whole rows of tiles: it first adds the residual and finds mean and rstd of these rows, which it
// reads from memory; then it norms their tiles, whose elements are still in a cache.
#include <cmath>
#include <vector>

#include "../cpu/quantize_tiles.h"
#include "cpu/kernels.h"
#include "norm.h"

namespace torchext {
namespace {

using cpu::kTile;

// A vector in FP32, plus `offset` unless that is 0; empty if there is none.
std::vector<float> widened(const VectorView& vector, int64_t count, float offset) {
  if (vector.data == nullptr) return {};
  const DefaultFloatingPoint environment;
  std::vector<float> values(static_cast<size_t>(count));
  with_wide_format(vector.dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* from = static_cast<const typename Format::Bits*>(vector.data);
    for (int64_t i = 0; i < count; ++i) {
      const float value = Format::to_float(from[i * vector.stride]);
      values[size_t(i)] = offset != 0 ? offset + value : value;
    }
  });
  return values;
}

// Rows in memory with contiguous columns.
struct Rows {
  const uint8_t* data;
  int64_t pitch;  // bytes
};

// Some rows of x: in place if their columns are contiguous, else gathered into `memory`.
Rows contiguous(const MatrixView& x, int64_t first, int64_t count, std::vector<uint8_t>& memory) {
  const int64_t size = element_size(x.dtype), pitch = x.cols * size;
  const auto* from = static_cast<const uint8_t*>(x.data) + first * x.row_stride * size;
  if (x.col_stride == 1) return {from, x.row_stride * size};
  memory.resize(size_t(count * pitch));
  for (int64_t row = 0; row < count; ++row)
    for (int64_t col = 0; col < x.cols; ++col)
      std::memcpy(memory.data() + row * pitch + col * size,
                  from + (row * x.row_stride + col * x.col_stride) * size, size_t(size));
  return {memory.data(), pitch};
}

// Produces tiles of normed values.
struct NormedTiles {
  struct Scratch {
    alignas(64) float tile[kTile * kTile];
    std::vector<uint8_t> x, residual;  // gathered rows
    Rows h;                            // from row `first` on
    int64_t first;
  };
  ScalarType dtype = ScalarType::Float;

  explicit NormedTiles(const NormView& view)
      : norm(view),
        rows(norms::kernels().rows[cpu::dtype_index(view.x.dtype)]),
        factors(widened(view.weight, view.x.cols, view.unit_offset ? 1.0f : 0.0f)),
        shifts(widened(view.bias, view.x.cols, 0)) {}

  void prepare(Scratch& scratch, int64_t first, int64_t count) const {
    const int64_t cols = norm.x.cols, pitch = cols * element_size(norm.x.dtype);
    const Rows x = contiguous(norm.x, first, count, scratch.x);
    scratch.h = x;
    scratch.first = first;
    if (norm.residual.data != nullptr) {
      const Rows residual = contiguous(norm.residual, first, count, scratch.residual);
      auto* sum = static_cast<uint8_t*>(norm.sum) + first * pitch;
      scratch.h = {sum, pitch};
      for (int64_t i = 0; i < count; ++i) {
        rows.add(x.data + i * x.pitch, residual.data + i * residual.pitch, cols, sum + i * pitch);
        find_statistics(first + i, sum + i * pitch);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) find_statistics(first + i, x.data + i * x.pitch);
    }
  }

  cpu::Tile operator()(Scratch& scratch, const cpu::TilePosition& at,
                       const cpu::TilePosition& next) const {
    const int64_t size = element_size(norm.x.dtype);
    const auto part = [&](const cpu::TilePosition& tile) {
      return scratch.h.data + (tile.row - scratch.first) * scratch.h.pitch + tile.col * size;
    };
    const uint8_t* h = part(at);
    for (int i = 0; i < at.rows; ++i) {
      float* y = scratch.tile + i * kTile;
      rows.normalize(h + i * scratch.h.pitch, at.cols,
                     norm.mean != nullptr ? norm.mean[at.row + i] : 0, norm.rstd[at.row + i],
                     factors.data() + at.col, shifts.empty() ? nullptr : shifts.data() + at.col, y);
      if (norm.normed != nullptr)
        rows.round(y, at.cols,
                   static_cast<uint8_t*>(norm.normed) +
                       ((at.row + i) * norm.x.cols + at.col) * element_size(norm.x.dtype));
    }
    if (next.rows == 0) return {scratch.tile, kTile, at.rows, at.cols, {}};
    return {scratch.tile,
            kTile,
            at.rows,
            at.cols,
            {part(next), scratch.h.pitch, next.rows, int(next.cols * size)}};
  }

  // Computes and stores mean and rstd of a row.
  void find_statistics(int64_t row, const uint8_t* h) const {
    const int64_t n = norm.x.cols;
    float sum;
    if (norm.mean != nullptr) {
      const float mean = norm.mean[row] = rows.sum(h, n) / float(n);
      sum = rows.sum_squared_deviations(h, n, mean);
    } else {
      sum = rows.sum_squares(h, n);
    }
    norm.rstd[row] = 1.0f / std::sqrt(sum / float(n) + norm.eps);
  }

  const NormView& norm;
  const norms::RowKernels& rows;
  const std::vector<float> factors, shifts;  // no shifts: no bias
};

// The gradient of a norm, a row of tiles at a time.
class Backward {
 public:
  struct Scratch {
    cpu::RunSums dweight, dbias;
    cpu::TransposedTile transposed;
    std::vector<uint8_t> of_grad, of_x, of_residual;  // gathered rows
    Rows grad, x, residual;                           // from row `first` on
    int64_t first;
    float weighted[kTile], products[kTile];  // means of g_w and of g_w * x_hat
  };

  explicit Backward(const NormBackwardView& view)
      : norm_(view),
        size_(element_size(view.x.dtype)),
        rows_(norms::kernels().rows[cpu::dtype_index(view.x.dtype)]),
        factors_(widened(view.weight, view.x.cols, view.unit_offset ? 1.0f : 0.0f)),
        dweight_(view.x.rows, view.x.cols),
        dbias_(view.dbias ? view.x.rows : 0, view.x.cols) {}

  void prepare(Scratch& scratch, int64_t first, int64_t count) const {
    const int64_t cols = norm_.x.cols;
    scratch.first = first;
    scratch.grad = contiguous(norm_.grad, first, count, scratch.of_grad);
    scratch.x = contiguous(norm_.x, first, count, scratch.of_x);
    if (norm_.residual_grad.data != nullptr)
      scratch.residual = contiguous(norm_.residual_grad, first, count, scratch.of_residual);
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* grad = scratch.grad.data + i * scratch.grad.pitch;
      scratch.weighted[i] =
          norm_.mean.data ? rows_.sum_weighted(grad, factors_.data(), cols) / float(cols) : 0;
      scratch.products[i] =
          rows_.sum_products(grad, scratch.x.data + i * scratch.x.pitch, factors_.data(), cols,
                             mean(first + i), rstd(first + i)) /
          float(cols);
    }
  }

  // Computes a tile of dx, which lies in the result, and the sums of the tile's columns.
  cpu::Tile compute(Scratch& scratch, const cpu::TilePosition& at) {
    auto* dx = static_cast<uint8_t*>(norm_.dx) + (at.row * norm_.x.cols + at.col) * size_;
    const auto part = [&](const Rows& rows, int i) {
      return rows.data + (at.row - scratch.first + i) * rows.pitch + at.col * size_;
    };
    scratch.dweight.clear();
    if (norm_.dbias != nullptr) scratch.dbias.clear();
    for (int i = 0; i < at.rows; ++i) {
      const int64_t row = at.row + i, of_row = row - scratch.first;
      rows_.gradient(part(scratch.grad, i), part(scratch.x, i), factors_.data() + at.col, at.cols,
                     mean(row), rstd(row), scratch.weighted[of_row], scratch.products[of_row],
                     norm_.residual_grad.data ? part(scratch.residual, i) : nullptr,
                     dx + i * norm_.x.cols * size_, scratch.dweight.at[i / 16],
                     norm_.dbias != nullptr ? scratch.dbias.at[i / 16] : nullptr);
    }
    dweight_.add(&scratch.dweight, at);
    if (norm_.dbias != nullptr) dbias_.add(&scratch.dbias, at);
    return {dx, norm_.x.cols, at.rows, at.cols, {}};
  }

  void finish() const {
    dweight_.finish(norm_.dweight, cpu::kernels());
    if (norm_.dbias != nullptr) dbias_.finish(norm_.dbias, cpu::kernels());
  }

 private:
  float mean(int64_t row) const {
    return norm_.mean.data ? norm_.mean.data[row * norm_.mean.stride] : 0;
  }
  float rstd(int64_t row) const { return norm_.rstd.data[row * norm_.rstd.stride]; }

  const NormBackwardView& norm_;
  const int64_t size_;
  const norms::RowKernels& rows_;
  const std::vector<float> factors_;
  cpu::ColumnSums dweight_, dbias_;
};

}  // namespace

void norm_quantize_cpu(const NormView& norm, const QuantizeOptions& options,
                       const QuantizedView& row, const QuantizedView* transposed) {
  const NormedTiles producer(norm);
  if (norm.x.cols > 0)
    return cpu::quantize_produced_groups(norm.x.rows, norm.x.cols, options, producer, &row,
                                         transposed, nullptr);
  for (int64_t i = 0; i < norm.x.rows; ++i) producer.find_statistics(i, nullptr);
}

void norm_backward_cpu(const NormBackwardView& norm, const QuantizeOptions& options,
                       const QuantizedView* row, const QuantizedView* transposed) {
  Backward backward(norm);
  const cpu::QuantizeTask task(norm.x.dtype, options);
  const cpu::GroupWriter writer(task, norm.x.rows, norm.x.cols, row, transposed);
  const cpu::TileOrder order(norm.x.rows, norm.x.cols, kTile, transposed != nullptr);
  cpu::for_each_row_of_tiles<Backward::Scratch>(
      order, task.all,
      [&](Backward::Scratch& scratch, int64_t first, int64_t count) {
        backward.prepare(scratch, first, count);
      },
      [&](Backward::Scratch& scratch, const cpu::TilePosition& at, const cpu::TilePosition&) {
        writer.write(backward.compute(scratch, at), at.row, at.col, scratch.transposed);
      });
  backward.finish();
}

}  // namespace torchext
