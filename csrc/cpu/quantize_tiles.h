// Quantizes tiles of at most 128 x 128 while they are in a cache, along rows, along columns, or both:
// tiles of a matrix in memory, or tiles that a fused kernel produces (quantize_produced_groups).
//
// A producer is an object that all threads call. It has
//
//     struct Scratch;    what a thread needs to produce a tile, at least a buffer; not initialized
//     ScalarType dtype;  of its tiles
//     Tile operator()(Scratch&, const TilePosition& position, const TilePosition& next) const;
//
// and returns a tile in its scratch memory or in place. While it produces, it may fetch what the tile
// `next` will need. Or it returns this in Tile::ahead: the kernels then fetch while they quantize. A
// producer that also has
//
//     void prepare(Scratch&, int64_t row, int64_t rows) const;
//
// produces whole rows of tiles on one thread: prepare is called before each, with its rows.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "walk.h"

#ifdef TORCHEXT_X86_LEVELS
#include <xmmintrin.h>
#endif

namespace torchext::cpu {

// At most 128 x 128 elements, with contiguous columns, and what to fetch while they are quantized.
struct Tile {
  const void* data;
  int64_t stride;  // elements
  int rows, cols;
  Ahead ahead;
};

inline uint8_t* data_at(const QuantizedView& out, int64_t row, int64_t col) {
  return static_cast<uint8_t*>(out.data) + row * out.data_stride + col;
}

inline float& scale_at(const QuantizedView& out, int64_t row, int64_t col) {
  return out.scale[row * out.scale_row_stride + col * out.scale_col_stride];
}

// The kernels and options for an input's dtype.
struct QuantizeTask {
  QuantizeTask(ScalarType dtype, const QuantizeOptions& options)
      : all(kernels()),
        quantize(all.quantize[dtype_index(dtype)][options.e5m2]),
        columns(all.columns[options.e5m2]),
        dropped_mantissa(cpu::dropped_mantissa(options)),
        element_size(dtype == ScalarType::Float ? 4 : 2) {}
  const Kernels& all;
  const QuantizeKernels& quantize;
  bool (*const columns)(const float*, int64_t, int, uint32_t, uint8_t*, float*, const Ahead&);
  const uint32_t dropped_mantissa;
  const int64_t element_size;
};

// Writes scales that lie one after another. Streams whole cache lines, if asked to.
inline void store_scales(const float* from, int n, float* to, [[maybe_unused]] bool stream) {
  int i = 0;
#ifdef TORCHEXT_X86_LEVELS
  if (stream && reinterpret_cast<uintptr_t>(to) % kLine == 0)
    for (; i < n / 16 * 16; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
#endif
  if (i < n) std::memcpy(to + i, from + i, size_t(n - i) * sizeof(float));
}

// Memory for the transpose of a tile.
struct TransposedTile {
  alignas(64) uint8_t data[kTile * kTile * 4];
};

// Quantizes tiles of a matrix of rows x cols, with groups along rows into `row`, and with groups along
// columns into `transposed`. Either may be nullptr.
class GroupWriter {
 public:
  GroupWriter(const QuantizeTask& task, int64_t rows, int64_t cols, const QuantizedView* row,
              const QuantizedView* transposed)
      : task_(task),
        row_(row),
        transposed_(transposed),
        stream_(row && should_stream(row->data, row->data_stride, rows)),
        stream_t_(transposed && should_stream(transposed->data, transposed->data_stride, cols)) {}

  void write(const Tile& tile, int64_t row, int64_t col, TransposedTile& memory) const {
    if (row_ && transposed_) {
      const Ahead& all = tile.ahead;
      const int half = all.bytes / 2;
      write_rows(tile, {all.data, all.pitch, all.rows, half}, row, col, *row_, stream_);
      write_transposed(tile, {all.data + half, all.pitch, all.rows, all.bytes - half}, row, col,
                       memory);
    } else if (row_) {
      write_rows(tile, tile.ahead, row, col, *row_, stream_);
    } else if (transposed_) {
      write_transposed(tile, tile.ahead, row, col, memory);
    }
  }

 private:
  void write_rows(const Tile& tile, const Ahead& ahead, int64_t row, int64_t col,
                  const QuantizedView& out, bool stream) const {
    float scales[kTile];
    task_.quantize.groups(tile.data, tile.stride, tile.rows, tile.cols, task_.dropped_mantissa,
                          data_at(out, row, col), out.data_stride, scales, 1, ahead, stream);
    store_scales(scales, tile.rows, &scale_at(out, row, col / kTile), stream);
  }

  void write_transposed(const Tile& tile, const Ahead& ahead, int64_t row, int64_t col,
                        TransposedTile& memory) const {
    if (task_.element_size == 4 && tile.cols == kTile) {
      alignas(kLine) float scales[kTile];
      if (task_.columns(static_cast<const float*>(tile.data), tile.stride, tile.rows,
                        task_.dropped_mantissa, memory.data, scales, ahead)) {
        task_.all.transpose8(memory.data, tile.rows, kTile, data_at(*transposed_, col, row),
                             transposed_->data_stride, stream_t_);
        return store_scales(scales, kTile, &scale_at(*transposed_, col, row / kTile), stream_t_);
      }
    }
    const auto transpose = task_.element_size == 2 ? task_.all.transpose16 : task_.all.transpose32;
    transpose(tile.data, tile.stride, tile.rows, tile.cols, memory.data);
    write_rows({memory.data, kTile, tile.cols, tile.rows, {}}, ahead, col, row, *transposed_,
               stream_t_);
  }

  const QuantizeTask& task_;
  const QuantizedView *row_, *transposed_;
  const bool stream_, stream_t_;
};

// ---- sums of columns ----
//
// FP32 sums in an order that depends on nothing but the number of rows. Within 128 rows, each run of 16
// consecutive rows is summed from its first to its last row, and the sums p0 to p7 of the runs are
// added as ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7)), with +0 for rows that do not exist. The
// sums of each 128 rows are then added from the first to the last. CUDA kernels do the same.

// Adds a tile of FP32 values.
struct SumTile {
  static void run(const float* x, int64_t stride, int rows, int cols, float* __restrict sums) {
    alignas(64) float runs[8][kTile];
    for (int i = 0; i < 8; ++i) {
      const int first = 16 * i, count = std::clamp(rows - first, 0, 16);
      float* __restrict run = runs[i];
      for (int j = 0; j < kTile; ++j) run[j] = 0.0f;
      if (count == 0) continue;
      std::memcpy(run, x + first * stride, size_t(cols) * sizeof(float));
      for (int r = 1; r < count; ++r) {
        const float* from = x + (first + r) * stride;
        for (int j = 0; j < cols; ++j) run[j] += from[j];
      }
      if (count < 16)
        for (int j = 0; j < cols; ++j) run[j] += 0.0f;
    }
    for (int j = 0; j < cols; ++j)
      sums[j] = ((runs[0][j] + runs[1][j]) + (runs[2][j] + runs[3][j])) +
                ((runs[4][j] + runs[5][j]) + (runs[6][j] + runs[7][j]));
  }
};

// Adds the sums of tiles.
struct SumTiles {
  static void run(const float* tiles, int64_t stride, int64_t count, int64_t cols,
                  float* __restrict sums) {
    std::memcpy(sums, tiles, size_t(cols) * sizeof(float));
    for (int64_t i = 1; i < count; ++i) {
      const float* from = tiles + i * stride;
      for (int64_t j = 0; j < cols; ++j) sums[j] += from[j];
    }
  }
};

// Sums of the columns of a matrix of rows x cols, given as tiles of 128 rows in any order.
class ColumnSums {
 public:
  ColumnSums(int64_t rows, int64_t cols)
      : cols_(cols), tiles_(ceil_div(rows, kTile)), sums_(size_t(tiles_ * cols)) {}

  // Called once for each tile, by any thread.
  void add(const float* x, int64_t stride, const TilePosition& at) {
    float* sums = sums_.data() + at.row / kTile * cols_ + at.col;
    run_vectorized<SumTile>(x, stride, at.rows, at.cols, sums);
  }

  // Writes cols() sums. All tiles have been added.
  void finish(float* sums, const Kernels& kernels) const {
    in_parallel(cols_, tiles_, kernels, [&](int64_t begin, int64_t end) {
      run_vectorized<SumTiles>(sums_.data() + begin, cols_, tiles_, end - begin, sums + begin);
    });
  }

 private:
  int64_t cols_, tiles_;
  std::vector<float> sums_;
};

// ---- produced tiles ----

template <class Producer, class = void>
constexpr bool kHasPrepare = false;
template <class Producer>
constexpr bool kHasPrepare<Producer, std::void_t<decltype(&Producer::prepare)>> = true;

// Quantizes the rows x cols values of a producer with 1x128 scales: along rows into `row`, and along
// columns into `transposed`. Either may be nullptr. Each tile is produced once. `column_sums`, if not
// nullptr, gets the FP32 sums over rows; the producer's tiles must then be FP32. The matrix must have
// elements.
template <class Producer>
void quantize_produced_groups(int64_t rows, int64_t cols, const QuantizeOptions& options,
                              const Producer& producer, const QuantizedView* row,
                              const QuantizedView* transposed, float* column_sums) {
  // Without a need of tiles of 128 rows, an FP32 tile of 16 stays in the L1 cache.
  constexpr int kFewRows = 16;
  struct Scratch {
    typename Producer::Scratch producer;
    TransposedTile transposed;
  };
  const QuantizeTask task(producer.dtype, options);
  const GroupWriter writer(task, rows, cols, row, transposed);
  const bool tall = transposed || column_sums;
  const TileOrder order(rows, cols, tall ? kTile : kFewRows, transposed != nullptr);
  ColumnSums sums(column_sums ? rows : 0, cols);
  const auto body = [&](Scratch& scratch, const TilePosition& at, const TilePosition& next) {
    const Tile tile = producer(scratch.producer, at, next);
    if (column_sums) sums.add(static_cast<const float*>(tile.data), tile.stride, at);
    writer.write(tile, at.row, at.col, scratch.transposed);
  };
  if constexpr (kHasPrepare<Producer>) {
    const auto prepare = [&](Scratch& scratch, int64_t first, int64_t count) {
      producer.prepare(scratch.producer, first, count);
    };
    for_each_row_of_tiles<Scratch>(order, task.all, prepare, body);
  } else {
    for_each_tile<Scratch>(order, task.all, body);
  }
  if (column_sums) sums.finish(column_sums, task.all);
}

}  // namespace torchext::cpu
