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

#include "../cpu/kernels.h"
#include "../runtime/cpu.h"
#include "../runtime/quantizer.h"
#include "quantize.h"

namespace torchext {
namespace {

using namespace cpu;

constexpr int kStripRows = 16;
constexpr int kChunkGroups = 64;            // scale groups of a row that are handled at once
constexpr int64_t kGrain = 1 << 15;         // elements that are worth a thread
constexpr int64_t kStreamBytes = 16 << 20;  // outputs of this size do not stay in a cache
constexpr int64_t kLine = 64;               // bytes of a cache line

// Calls body(begin, end) on torch's threads for parts of [0, count) with at
// least kGrain elements, in the default floating-point environment.
template <class Body>
void in_parallel(int64_t count, int64_t elements, const Kernels& kernels, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(elements, 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const DefaultFloatingPoint environment;
    body(begin, end);
    kernels.fence();
  });
}

// Whether to bypass the cache when writing rows `stride` bytes apart, in parts
// of 128 elements.
bool should_stream(const void* data, int64_t stride, int64_t rows) {
  return rows * stride >= kStreamBytes && stride % kLine == 0 &&
         reinterpret_cast<uintptr_t>(data) % kLine == 0;
}

MatrixView transposed_view(const MatrixView& x) {
  return {x.data, x.dtype, x.cols, x.rows, x.col_stride, x.row_stride};
}

// A part of x, at most 128 x 128, with contiguous columns.
struct Tile {
  const uint8_t* data;
  int64_t stride;  // elements
  int rows, cols;
};

// Reads tiles of x.
class TileReader {
 public:
  TileReader(const MatrixView& x, const Kernels& kernels)
      : x_(x), kernels_(kernels), size_(element_size(x.dtype)) {}

  Tile read(int64_t row, int64_t col) {
    const int rows = rows_at(row), cols = cols_at(col);
    const uint8_t* from = at(row, col);
    if (x_.col_stride == 1) return {from, x_.row_stride, rows, cols};
    if (x_.row_stride == 1) {
      transpose(from, x_.col_stride, cols, rows, gathered_);
    } else if (size_ == 2) {
      gather<uint16_t>(from, rows, cols);
    } else {
      gather<uint32_t>(from, rows, cols);
    }
    return {gathered_, kTile, rows, cols};
  }

  // The transpose of a tile, in memory of this object.
  Tile transposed(const Tile& tile) {
    transpose(tile.data, tile.stride, tile.rows, tile.cols, transposed_);
    return {transposed_, kTile, tile.cols, tile.rows};
  }

  Ahead ahead(int64_t row, int64_t col) const {
    const int rows = rows_at(row), cols = cols_at(col);
    if (x_.col_stride == 1) return {at(row, col), x_.row_stride * size_, rows, int(cols * size_)};
    if (x_.row_stride == 1) return {at(row, col), x_.col_stride * size_, cols, int(rows * size_)};
    return {};
  }

 private:
  int rows_at(int64_t row) const { return int(std::min<int64_t>(kTile, x_.rows - row)); }
  int cols_at(int64_t col) const { return int(std::min<int64_t>(kTile, x_.cols - col)); }
  const uint8_t* at(int64_t row, int64_t col) const {
    return static_cast<const uint8_t*>(x_.data) +
           (row * x_.row_stride + col * x_.col_stride) * size_;
  }

  void transpose(const void* from, int64_t stride, int rows, int cols, void* to) {
    (size_ == 2 ? kernels_.transpose16 : kernels_.transpose32)(from, stride, rows, cols, to);
  }

  template <class Bits>
  void gather(const void* from, int rows, int cols) {
    const auto* x = static_cast<const Bits*>(from);
    auto* to = reinterpret_cast<Bits*>(gathered_);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c) to[r * kTile + c] = x[r * x_.row_stride + c * x_.col_stride];
  }

  const MatrixView& x_;
  const Kernels& kernels_;
  const int64_t size_;
  alignas(64) uint8_t gathered_[kTile * kTile * 4];
  alignas(64) uint8_t transposed_[kTile * kTile * 4];
};

// The order in which tiles are visited: row by row, or row by row within some
// columns, for outputs that lie the other way. Both x and such an output then
// stay within pages that the TLB holds.
class TileOrder {
 public:
  TileOrder(const MatrixView& x, bool output_is_transposed)
      : rows_(ceil_div(x.rows, kTile)),
        cols_(ceil_div(x.cols, kTile)),
        width_(output_is_transposed ? kWidth : cols_) {}
  int64_t count() const { return rows_ * cols_; }
  std::pair<int64_t, int64_t> operator[](int64_t i) const {  // row, column
    const int64_t left = i / (rows_ * width_) * width_, rest = i - left * rows_;
    const int64_t width = std::min(width_, cols_ - left);
    return {rest / width * kTile, (left + rest % width) * kTile};
  }

 private:
  static constexpr int64_t kWidth = 8;
  int64_t rows_, cols_, width_;
};

// Calls body(reader, tile, row, col, ahead) for all tiles of x, shared among
// threads.
template <class Body>
void for_each_tile(const MatrixView& x, const Kernels& kernels, bool output_is_transposed,
                   const Body& body) {
  constexpr int kDistance = 2;  // tiles
  const TileOrder order(x, output_is_transposed);
  in_parallel(order.count(), kTile * kTile, kernels, [&](int64_t begin, int64_t end) {
    TileReader reader(x, kernels);
    for (int64_t i = begin; i < end; ++i) {
      const auto [row, col] = order[i];
      const auto [next_row, next_col] = order[std::min(i + kDistance, end - 1)];
      const Ahead ahead = i + kDistance < end ? reader.ahead(next_row, next_col) : Ahead();
      body(reader, reader.read(row, col), row, col, ahead);
    }
  });
}

uint8_t* data_at(const QuantizedView& out, int64_t row, int64_t col) {
  return static_cast<uint8_t*>(out.data) + row * out.data_stride + col;
}

float& scale_at(const QuantizedView& out, int64_t row, int64_t col) {
  return out.scale[row * out.scale_row_stride + col * out.scale_col_stride];
}

// What kernels need to know beside x.
struct Task {
  Task(const MatrixView& x, const QuantizeOptions& options)
      : all(cpu::kernels()),
        quantize(all.quantize[dtype_index(x.dtype)][options.e5m2]),
        dropped_mantissa(cpu::dropped_mantissa(options)),
        element_size(torchext::element_size(x.dtype)) {}
  const Kernels& all;
  const QuantizeKernels& quantize;
  const uint32_t dropped_mantissa;
  const int64_t element_size;
};

// ---- 1x128 groups ----

// Writes scales that lie one after another. Streams whole cache lines, if asked
// to.
void store_scales(const float* from, int n, float* to, [[maybe_unused]] bool stream) {
  int i = 0;
#ifdef TORCHEXT_X86_LEVELS
  if (stream && reinterpret_cast<uintptr_t>(to) % kLine == 0)
    for (; i < n / 16 * 16; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
#endif
  if (i < n) std::memcpy(to + i, from + i, size_t(n - i) * sizeof(float));
}

// Quantizes the rows of a tile as groups.
void quantize_tile_rows(const Task& task, const Tile& tile, int64_t row, int64_t col,
                        const QuantizedView& out, bool stream, const Ahead& ahead) {
  float scales[kTile];
  task.quantize.groups(tile.data, tile.stride, tile.rows, tile.cols, task.dropped_mantissa,
                       data_at(out, row, col), out.data_stride, scales, 1, ahead, stream);
  store_scales(scales, tile.rows, &scale_at(out, row, col / kTile), stream);
}

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
void quantize_contiguous_groups(const Task& task, const MatrixView& x, const QuantizedView& out) {
  const bool stream = should_stream(out.data, out.data_stride, x.rows);
  const Strips strips(x.rows, x.cols);
  const int64_t size = task.element_size;
  in_parallel(strips.count(), strips.elements(), task.all, [&](int64_t begin, int64_t end) {
    alignas(kLine) float scales[kChunkGroups][kStripRows];
    strips.for_each(begin, end, [&](int64_t row, int rows, int64_t group, int groups) {
      const int64_t col = group * kTile, cols = std::min(groups * kTile + col, x.cols) - col;
      const int whole = int(cols / kTile), rest = int(cols % kTile);
      const auto* from = static_cast<const uint8_t*>(x.data) + (row * x.row_stride + col) * size;
      for (int i = 0; i < rows; ++i, from += x.row_stride * size) {
        uint8_t* to = data_at(out, row + i, col);
        if (whole)
          task.quantize.groups(from, kTile, whole, kTile, task.dropped_mantissa, to, kTile,
                               scales[0] + i, kStripRows, Ahead(), stream);
        if (rest)
          task.quantize.groups(from + whole * kTile * size, kTile, 1, rest, task.dropped_mantissa,
                               to + whole * kTile, kTile, scales[whole] + i, kStripRows, Ahead(),
                               false);
      }
      for (int g = 0; g < groups; ++g)
        store_scales(scales[g], rows, &scale_at(out, row, group + g), stream);
    });
  });
}

// Groups along rows.
void quantize_row_groups(const Task& task, const MatrixView& x, const QuantizedView& out) {
  if (x.col_stride == 1) return quantize_contiguous_groups(task, x, out);
  const bool stream = should_stream(out.data, out.data_stride, x.rows);
  // The rows of x are columns in memory. Walk along these.
  const MatrixView columns = transposed_view(x);
  for_each_tile(
      columns, task.all, true,
      [&](TileReader& reader, const Tile& tile, int64_t row, int64_t col, const Ahead& ahead) {
        quantize_tile_rows(task, reader.transposed(tile), col, row, out, stream, ahead);
      });
}

// Groups along rows and along columns.
void quantize_both_groups(const Task& task, const MatrixView& x, const QuantizedView& out,
                          const QuantizedView& transposed) {
  if (x.col_stride != 1 && x.row_stride == 1)
    return quantize_both_groups(task, transposed_view(x), transposed, out);
  const bool stream = should_stream(out.data, out.data_stride, x.rows);
  const bool stream_t = should_stream(transposed.data, transposed.data_stride, x.cols);
  for_each_tile(
      x, task.all, true,
      [&](TileReader& reader, const Tile& tile, int64_t row, int64_t col, const Ahead& ahead) {
        const int half = ahead.bytes / 2;
        const Ahead first{ahead.data, ahead.pitch, ahead.rows, half};
        const Ahead second{ahead.data + half, ahead.pitch, ahead.rows, ahead.bytes - half};
        quantize_tile_rows(task, tile, row, col, out, stream, first);
        quantize_tile_rows(task, reader.transposed(tile), col, row, transposed, stream_t, second);
      });
}

// ---- 128x128 blocks ----

void quantize_blocks(const Task& task, const MatrixView& x, const QuantizedView& out,
                     uint8_t* transposed, int64_t transposed_stride) {
  const bool stream = should_stream(out.data, out.data_stride, x.rows);
  const bool stream_t = should_stream(transposed, transposed_stride, x.cols);
  for_each_tile(
      x, task.all, transposed != nullptr,
      [&](TileReader&, const Tile& tile, int64_t row, int64_t col, const Ahead& ahead) {
        const uint32_t largest = task.quantize.amax(tile.data, tile.stride, tile.rows, tile.cols);
        const float scale = task.quantize.scale(largest, task.dropped_mantissa);
        scale_at(out, row / kTile, col / kTile) = scale;
        const auto encode = [&](uint8_t* to, int64_t to_stride, bool stream_rows) {
          task.quantize.encode(tile.data, tile.stride, tile.rows, tile.cols, scale, to, to_stride,
                               ahead, stream_rows);
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

void quantize_contiguous_rows(const Task& task, const MatrixView& x, const QuantizedView& out) {
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

// The tiles of 128 rows are gathered twice. The second time finds x in a cache.
void quantize_strided_rows(const Task& task, const MatrixView& x, const QuantizedView& out) {
  const int64_t size = task.element_size;
  in_parallel(ceil_div(x.rows, kTile), x.cols * kTile, task.all, [&](int64_t begin, int64_t end) {
    TileReader reader(x, task.all);
    for (int64_t row = begin * kTile; row < std::min(end * kTile, x.rows); row += kTile) {
      uint32_t largest[kTile] = {};
      for (int64_t col = 0; col < x.cols; col += kTile) {
        const Tile tile = reader.read(row, col);
        for (int i = 0; i < tile.rows; ++i)
          largest[i] = std::max(largest[i],
                                task.quantize.amax(tile.data + i * kTile * size, 0, 1, tile.cols));
      }
      float scales[kTile];
      for (int i = 0; i < kTile; ++i)
        scales[i] = task.quantize.scale(largest[i], task.dropped_mantissa);
      for (int64_t col = 0; col < x.cols; col += kTile) {
        const Tile tile = reader.read(row, col);
        for (int i = 0; i < tile.rows; ++i) {
          task.quantize.encode(tile.data + i * kTile * size, 0, 1, tile.cols, scales[i],
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
void for_each_run(const MatrixView& x, const Kernels& kernels, const Body& body) {
  const int64_t size = element_size(x.dtype), run = kChunkGroups * kTile;
  if (x.col_stride == 1) {
    const int64_t runs = ceil_div(x.cols, run);
    return in_parallel(
        x.rows * runs, std::min(x.cols, run), kernels, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / runs, col = i % runs * run;
            body(static_cast<const uint8_t*>(x.data) + (row * x.row_stride + col) * size,
                 std::min(run, x.cols - col), row, col);
          }
        });
  }
  for_each_tile(x, kernels, false,
                [&](TileReader&, const Tile& tile, int64_t row, int64_t col, const Ahead&) {
                  for (int i = 0; i < tile.rows; ++i)
                    body(tile.data + i * tile.stride * size, tile.cols, row + i, col);
                });
}

// A matrix without gaps as one row, if the FP8 data have none either.
MatrixView flattened(const MatrixView& x) {
  const bool whole = x.col_stride == 1 && (x.row_stride == x.cols || x.rows == 1);
  return whole && x.cols % 16 == 0 ? MatrixView{x.data, x.dtype, 1, x.rows * x.cols, 0, 1} : x;
}

void quantize_whole(const Task& task, const MatrixView& x, const QuantizedView& out) {
  const bool stream = x.col_stride == 1 && should_stream(out.data, out.data_stride, x.rows);
  std::atomic<uint32_t> largest{0};
  for_each_run(x, task.all, [&](const uint8_t* data, int64_t cols, int64_t, int64_t) {
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
  for_each_run(x, task.all, [&](const uint8_t* data, int64_t cols, int64_t row, int64_t col) {
    task.quantize.encode(data, 0, 1, cols, scale, data_at(out, row, col), 0, Ahead(), stream);
  });
}

}  // namespace

void quantize_groups_cpu(const MatrixView& x, const QuantizeOptions& options,
                         const QuantizedView* row, const QuantizedView* transposed) {
  const Task task(x, options);
  if (row && transposed)
    quantize_both_groups(task, x, *row, *transposed);
  else if (row)
    quantize_row_groups(task, x, *row);
  else
    quantize_row_groups(task, transposed_view(x), *transposed);
}

void quantize_blocks_cpu(const MatrixView& x, const QuantizeOptions& options,
                         const QuantizedView& out, void* transposed_data,
                         int64_t transposed_stride) {
  quantize_blocks(Task(x, options), x, out, static_cast<uint8_t*>(transposed_data),
                  transposed_stride);
}

void quantize_rowwise_cpu(const MatrixView& x, const QuantizeOptions& options,
                          const QuantizedView& out) {
  const Task task(x, options);
  if (x.col_stride == 1)
    quantize_contiguous_rows(task, x, out);
  else
    quantize_strided_rows(task, x, out);
}

void quantize_tensorwise_cpu(const MatrixView& x, const QuantizeOptions& options,
                             const QuantizedView& out) {
  const Task task(x, options);
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
