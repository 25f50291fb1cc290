// How CPU kernels of quantization walk through a matrix. They call
// ../cpu/kernels.h for parts of x that fit in a cache: runs of a row, or tiles of
// at most 128 x 128, which are read in place if columns are contiguous and
// gathered otherwise. Everything that depends on a part is computed while it is
// in cache, so that x is read from memory once (for one scale of the whole
// tensor: twice).
//
// Rows are shared among threads in strips: scales lie M-major, so that 16 rows
// fill a cache line.
#include <atomic>

#include "../cpu/quantize_tiles.h"
#include "quantize.h"

namespace torchext {
namespace {

using namespace cpu;

constexpr int kStripRows = 16;
constexpr int kChunkGroups = 64;  // scale groups of a row that are handled at once
constexpr int kGroupsAhead = 32;  // how far ahead a row is fetched; may reach into the next row

MatrixView transposed_view(const MatrixView& x) {
  return {x.data, x.dtype, x.cols, x.rows, x.col_stride, x.row_stride};
}

// Reads tiles of x, in place if columns are contiguous. A producer (../cpu/quantize_tiles.h).
class TileReader {
 public:
  struct Scratch {
    alignas(64) uint8_t gathered[kTile * kTile * 4];
  };
  const ScalarType dtype;

  TileReader(const MatrixView& x, const Kernels& kernels)
      : dtype(x.dtype), x_(x), kernels_(kernels), size_(element_size(x.dtype)) {}

  Tile operator()(Scratch& scratch, const TilePosition& at, const TilePosition& next) const {
    const uint8_t* from = data(at);
    if (x_.col_stride == 1) return {from, x_.row_stride, at.rows, at.cols, ahead(next)};
    if (x_.row_stride == 1) {
      const auto transpose = size_ == 2 ? kernels_.transpose16 : kernels_.transpose32;
      transpose(from, x_.col_stride, at.cols, at.rows, scratch.gathered);
    } else if (size_ == 2) {
      gather<uint16_t>(from, at, scratch.gathered);
    } else {
      gather<uint32_t>(from, at, scratch.gathered);
    }
    return {scratch.gathered, kTile, at.rows, at.cols, ahead(next)};
  }

 private:
  const uint8_t* data(const TilePosition& at) const {
    return static_cast<const uint8_t*>(x_.data) +
           (at.row * x_.row_stride + at.col * x_.col_stride) * size_;
  }

  Ahead ahead(const TilePosition& at) const {
    if (x_.col_stride == 1) return {data(at), x_.row_stride * size_, at.rows, int(at.cols * size_)};
    if (x_.row_stride == 1) return {data(at), x_.col_stride * size_, at.cols, int(at.rows * size_)};
    return {};
  }

  template <class Bits>
  void gather(const void* from, const TilePosition& at, void* to) const {
    const auto* x = static_cast<const Bits*>(from);
    for (int r = 0; r < at.rows; ++r)
      for (int c = 0; c < at.cols; ++c)
        static_cast<Bits*>(to)[r * kTile + c] = x[r * x_.row_stride + c * x_.col_stride];
  }

  const MatrixView& x_;
  const Kernels& kernels_;
  const int64_t size_;
};

// ---- 1x128 groups ----

// Strips of up to kStripRows rows and kChunkGroups groups.
class Strips {
 public:
  Strips(int64_t rows, int64_t cols)
      : rows_(rows),
        groups_(ceil_div(cols, kTile)),
        strip_rows_(std::clamp<int64_t>(rows / kStripRows, 1, kStripRows)),
        chunks_(ceil_div(groups_, kChunkGroups)) {}
  int64_t count() const { return ceil_div(rows_, strip_rows_) * chunks_; }
  int64_t elements() const {
    return strip_rows_ * std::min<int64_t>(groups_, kChunkGroups) * kTile;
  }

  // Calls body(row, rows, group, groups) for strips [begin, end).
  template <class Body>
  void for_each(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / chunks_ * strip_rows_, group = i % chunks_ * kChunkGroups;
      body(row, int(std::min(strip_rows_, rows_ - row)), group,
           int(std::min<int64_t>(kChunkGroups, groups_ - group)));
    }
  }

 private:
  int64_t rows_, groups_, strip_rows_, chunks_;
};

// Groups along rows, whose elements are contiguous.
void quantize_contiguous_groups(const QuantizeTask& task, const MatrixView& x,
                                const QuantizedView& out) {
  const bool stream = should_stream(out.data, out.data_stride, x.rows);
  const Strips strips(x.rows, x.cols);
  const int64_t size = task.element_size;
  in_parallel(strips.count(), strips.elements(), task.all, [&](int64_t begin, int64_t end) {
    alignas(kLine) float scales[kChunkGroups][kStripRows];
    strips.for_each(begin, end, [&](int64_t row, int rows, int64_t group, int groups) {
      const int64_t col = group * kTile, cols = std::min(groups * kTile + col, x.cols) - col;
      const int whole = int(cols / kTile), rest = int(cols % kTile);
      const auto* from = static_cast<const uint8_t*>(x.data) + (row * x.row_stride + col) * size;
      uint8_t* to = data_at(out, row, col);
      const auto down = [&](int g, int group_cols, bool stream_group) {
        task.quantize.groups(from + g * kTile * size, x.row_stride, rows, group_cols,
                             task.dropped_mantissa, to + g * kTile, out.data_stride, scales[g], 1,
                             Ahead(), stream_group);
      };
      // Kernels take the groups 16 at a time: as many as possible in one call.
      if (whole >= rows) {
        const int64_t pitch = kTile * size;
        for (int i = 0; i < rows; ++i) {
          const uint8_t* x_row = from + i * x.row_stride * size;
          const Ahead ahead{x_row + kGroupsAhead * pitch, pitch, whole, int(pitch)};
          task.quantize.groups(x_row, kTile, whole, kTile, task.dropped_mantissa,
                               to + i * out.data_stride, kTile, scales[0] + i, kStripRows, ahead,
                               stream);
        }
      } else {
        for (int g = 0; g < whole; ++g) down(g, kTile, stream);
      }
      if (rest) down(whole, rest, false);
      for (int g = 0; g < groups; ++g)
        store_scales(scales[g], rows, &scale_at(out, row, group + g), stream);
    });
  });
}

// Groups along rows, along columns, or both, by tiles.
void quantize_tiles(const QuantizeOptions& options, const MatrixView& x, const QuantizedView* row,
                    const QuantizedView* transposed) {
  quantize_produced_groups(x.rows, x.cols, options, TileReader(x, kernels()), row, transposed,
                           nullptr);
}

// Groups along rows.
void quantize_row_groups(const QuantizeOptions& options, const MatrixView& x,
                         const QuantizedView& out) {
  if (x.col_stride == 1) return quantize_contiguous_groups(QuantizeTask(x.dtype, options), x, out);
  // The rows of x are columns in memory. Walk along these.
  quantize_tiles(options, transposed_view(x), nullptr, &out);
}

// ---- 128x128 blocks ----

void quantize_blocks(const QuantizeTask& task, const MatrixView& x, const QuantizedView& out,
                     uint8_t* transposed, int64_t transposed_stride) {
  const bool stream = should_stream(out.data, out.data_stride, x.rows);
  const bool stream_t = should_stream(transposed, transposed_stride, x.cols);
  const TileReader reader(x, task.all);
  for_each_tile<TileReader::Scratch>(
      TileOrder(x.rows, x.cols, kTile, transposed != nullptr), task.all,
      [&](TileReader::Scratch& scratch, const TilePosition& at, const TilePosition& next) {
        const Tile tile = reader(scratch, at, next);
        const auto [row, col] = std::pair(at.row, at.col);
        const uint32_t largest = task.quantize.amax(tile.data, tile.stride, tile.rows, tile.cols);
        const float scale = task.quantize.scale(largest, task.dropped_mantissa);
        scale_at(out, row / kTile, col / kTile) = scale;
        const auto encode = [&](uint8_t* to, int64_t to_stride, bool stream_rows) {
          task.quantize.encode(tile.data, tile.stride, tile.rows, tile.cols, scale, to, to_stride,
                               tile.ahead, stream_rows);
        };
        uint8_t* to = data_at(out, row, col);
        if (!transposed) return encode(to, out.data_stride, stream);
        alignas(64) uint8_t codes[kTile * kTile];
        encode(codes, kTile, false);
        task.all.copy8(codes, tile.rows, tile.cols, to, out.data_stride, stream);
        task.all.transpose8(codes, tile.rows, tile.cols, transposed + col * transposed_stride + row,
                            transposed_stride, stream_t);
      });
}

// ---- one scale for each row ----

void quantize_contiguous_rows(const QuantizeTask& task, const MatrixView& x,
                              const QuantizedView& out) {
  const bool stream = should_stream(out.data, out.data_stride, x.rows);
  const int64_t size = task.element_size;
  in_parallel(x.rows, x.cols, task.all, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const auto* from = static_cast<const uint8_t*>(x.data) + row * x.row_stride * size;
      const float scale =
          task.quantize.scale(task.quantize.amax(from, 0, 1, x.cols), task.dropped_mantissa);
      scale_at(out, row, 0) = scale;
      task.quantize.encode(from, 0, 1, x.cols, scale, data_at(out, row, 0), 0, Ahead(), stream);
    }
  });
}

const uint8_t* row_of(const Tile& tile, int i, const QuantizeTask& task) {
  return static_cast<const uint8_t*>(tile.data) + i * tile.stride * task.element_size;
}

// The tiles of 128 rows are gathered twice. The second time finds x in a cache.
void quantize_strided_rows(const QuantizeTask& task, const MatrixView& x,
                           const QuantizedView& out) {
  const TileReader reader(x, task.all);
  const TileOrder order(x.rows, x.cols, kTile, false);
  in_parallel(ceil_div(x.rows, kTile), x.cols * kTile, task.all, [&](int64_t begin, int64_t end) {
    TileReader::Scratch scratch;
    for (int64_t row = begin * kTile; row < std::min(end * kTile, x.rows); row += kTile) {
      uint32_t largest[kTile] = {};
      for (int64_t col = 0; col < x.cols; col += kTile) {
        const Tile tile = reader(scratch, order.at(row / kTile, col / kTile), {});
        for (int i = 0; i < tile.rows; ++i)
          largest[i] =
              std::max(largest[i], task.quantize.amax(row_of(tile, i, task), 0, 1, tile.cols));
      }
      float scales[kTile];
      for (int i = 0; i < kTile; ++i)
        scales[i] = task.quantize.scale(largest[i], task.dropped_mantissa);
      for (int64_t col = 0; col < x.cols; col += kTile) {
        const Tile tile = reader(scratch, order.at(row / kTile, col / kTile), {});
        for (int i = 0; i < tile.rows; ++i) {
          task.quantize.encode(row_of(tile, i, task), 0, 1, tile.cols, scales[i],
                               data_at(out, row + i, col), 0, Ahead(), false);
          scale_at(out, row + i, 0) = scales[i];
        }
      }
    }
  });
}

// ---- one scale for the whole tensor ----

// Calls body(data, cols, row, col) for runs of contiguous elements, shared
// among threads.
template <class Body>
void for_each_run(const MatrixView& x, const QuantizeTask& task, const Body& body) {
  const int64_t size = task.element_size, run = kChunkGroups * kTile;
  if (x.col_stride == 1) {
    const int64_t runs = ceil_div(x.cols, run);
    return in_parallel(
        x.rows * runs, std::min(x.cols, run), task.all, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / runs, col = i % runs * run;
            body(static_cast<const uint8_t*>(x.data) + (row * x.row_stride + col) * size,
                 std::min(run, x.cols - col), row, col);
          }
        });
  }
  const TileReader reader(x, task.all);
  for_each_tile<TileReader::Scratch>(
      TileOrder(x.rows, x.cols, kTile, false), task.all,
      [&](TileReader::Scratch& scratch, const TilePosition& at, const TilePosition& next) {
        const Tile tile = reader(scratch, at, next);
        for (int i = 0; i < tile.rows; ++i)
          body(row_of(tile, i, task), tile.cols, at.row + i, at.col);
      });
}

// A matrix without gaps as one row, if the FP8 data have none either.
MatrixView flattened(const MatrixView& x) {
  const bool whole = x.col_stride == 1 && (x.row_stride == x.cols || x.rows == 1);
  return whole && x.cols % 16 == 0 ? MatrixView{x.data, x.dtype, 1, x.rows * x.cols, 0, 1} : x;
}

void quantize_whole(const QuantizeTask& task, const MatrixView& x, const QuantizedView& out) {
  const bool stream = x.col_stride == 1 && should_stream(out.data, out.data_stride, x.rows);
  std::atomic<uint32_t> largest{0};
  for_each_run(x, task, [&](const uint8_t* data, int64_t cols, int64_t, int64_t) {
    const uint32_t amax = task.quantize.amax(data, 0, 1, cols);
    uint32_t before = largest.load(std::memory_order_relaxed);
    while (before < amax && !largest.compare_exchange_weak(before, amax)) {
    }
  });
  {
    const DefaultFloatingPoint environment;
    *out.scale = task.quantize.scale(largest, task.dropped_mantissa);
  }
  const float scale = *out.scale;
  for_each_run(x, task, [&](const uint8_t* data, int64_t cols, int64_t row, int64_t col) {
    task.quantize.encode(data, 0, 1, cols, scale, data_at(out, row, col), 0, Ahead(), stream);
  });
}

}  // namespace

void quantize_groups_cpu(const MatrixView& x, const QuantizeOptions& options,
                         const QuantizedView* row, const QuantizedView* transposed) {
  if (!transposed)
    quantize_row_groups(options, x, *row);
  else if (!row)
    quantize_row_groups(options, transposed_view(x), *transposed);
  else if (x.col_stride != 1 && x.row_stride == 1)
    quantize_tiles(options, transposed_view(x), transposed, row);
  else
    quantize_tiles(options, x, row, transposed);
}

void quantize_groups_bias_grad_cpu(const MatrixView& x, const QuantizeOptions& options,
                                   const QuantizedView& row, const QuantizedView& transposed,
                                   float* bias_grad) {
  quantize_produced_groups(x.rows, x.cols, options, TileReader(x, kernels()), &row, &transposed,
                           bias_grad);
}

void quantize_blocks_cpu(const MatrixView& x, const QuantizeOptions& options,
                         const QuantizedView& out, void* transposed_data,
                         int64_t transposed_stride) {
  quantize_blocks(QuantizeTask(x.dtype, options), x, out, static_cast<uint8_t*>(transposed_data),
                  transposed_stride);
}

void quantize_rowwise_cpu(const MatrixView& x, const QuantizeOptions& options,
                          const QuantizedView& out) {
  const QuantizeTask task(x.dtype, options);
  if (x.col_stride == 1)
    quantize_contiguous_rows(task, x, out);
  else
    quantize_strided_rows(task, x, out);
}

void quantize_tensorwise_cpu(const MatrixView& x, const QuantizeOptions& options,
                             const QuantizedView& out) {
  const QuantizeTask task(x.dtype, options);
  const MatrixView flat = flattened(x);
  QuantizedView view = out;
  if (flat.rows != x.rows) view.data_stride = flat.cols;
  quantize_whole(task, flat, view);
}

void dequantize_cpu(const DequantizeView& v) {
  const Kernels& kernels = cpu::kernels();
  const auto kernel = kernels.dequantize[v.e5m2][dtype_index(v.y_dtype)];
  const int64_t size = element_size(v.y_dtype);
  const bool stream = should_stream(v.y, v.y_stride * size, v.rows);
  const Strips strips(v.rows, v.cols);
  in_parallel(strips.count(), strips.elements(), kernels, [&](int64_t begin, int64_t end) {
    float scales[kStripRows][kChunkGroups];
    uint8_t gathered[kChunkGroups * kTile];
    strips.for_each(begin, end, [&](int64_t row, int rows, int64_t group, int groups) {
      const int64_t col = group * kTile, cols = std::min(groups * kTile + col, v.cols) - col;
      int64_t scale_row[kStripRows];
      for (int i = 0; i < rows; ++i) scale_row[i] = (row + i) / v.row_group * v.scale_row_stride;
      for (int g = 0; g < groups; ++g) {
        const float* scale = v.scale + (col + g * kTile) / v.col_group * v.scale_col_stride;
        for (int i = 0; i < rows; ++i) scales[i][g] = scale[scale_row[i]];
      }
      for (int i = 0; i < rows; ++i) {
        const auto* data = static_cast<const uint8_t*>(v.data) + (row + i) * v.data_row_stride +
                           col * v.data_col_stride;
        if (v.data_col_stride != 1) {
          for (int64_t j = 0; j < cols; ++j) gathered[j] = data[j * v.data_col_stride];
          data = gathered;
        }
        kernel(data, cols, scales[i],
               static_cast<uint8_t*>(v.y) + ((row + i) * v.y_stride + col) * size, stream);
      }
    });
  });
}

}  // namespace torchext
