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
        both(dtype == ScalarType::BFloat16 ? all.both[options.e5m2] : nullptr),
        dropped_mantissa(cpu::dropped_mantissa(options)),
        element_size(dtype == ScalarType::Float ? 4 : 2) {}
  const Kernels& all;
  const QuantizeKernels& quantize;
  bool (*const columns)(const float*, int64_t, int, uint32_t, uint8_t*, float*, const Ahead&);
  const QuantizeBothKernel both;
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
      if (write_both(tile, row, col)) return;
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
  // False if there is no kernel that does both for this tile.
  bool write_both(const Tile& tile, int64_t row, int64_t col) const {
    if (task_.both == nullptr || tile.cols != kTile) return false;
    alignas(kLine) float scales[kTile], scales_t[kTile];
    if (!task_.both(static_cast<const uint16_t*>(tile.data), tile.stride, tile.rows,
                    task_.dropped_mantissa, data_at(*row_, row, col), row_->data_stride, scales,
                    stream_, data_at(*transposed_, col, row), transposed_->data_stride, scales_t,
                    stream_t_, tile.ahead))
      return false;
    store_scales(scales, tile.rows, &scale_at(*row_, row, col / kTile), stream_);
    store_scales(scales_t, kTile, &scale_at(*transposed_, col, row / kTile), stream_t_);
    return true;
  }

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

// The sums of the runs of a tile. They begin as -0, which changes no sum.
struct RunSums {
  alignas(64) float at[8][kTile];

  void clear() { std::fill_n(at[0], 8 * kTile, -0.0f); }
};

// The sums of a tile's columns from those of its runs.
struct SumRuns {
  static void run(RunSums* runs, int rows, int cols, float* __restrict sums) {
    for (int i = rows / 16; i < 8; ++i)
      for (int j = 0; j < kTile; ++j) runs->at[i][j] += 0.0f;
    const auto& r = runs->at;
    for (int j = 0; j < cols; ++j)
      sums[j] =
          ((r[0][j] + r[1][j]) + (r[2][j] + r[3][j])) + ((r[4][j] + r[5][j]) + (r[6][j] + r[7][j]));
  }
};

// Adds the rows of a tile of a wide dtype to the sums of its runs.
struct AddRows {
  static void run(const Tile& tile, ScalarType dtype, RunSums* runs) {
    with_wide_format(dtype, [&](auto format) {
      using Format = decltype(format);
      for (int r = 0; r < tile.rows; ++r) {
        const auto* from = static_cast<const typename Format::Bits*>(tile.data) + r * tile.stride;
        float* __restrict to = runs->at[r / 16];
        for (int j = 0; j < tile.cols; ++j) to[j] += Format::to_float(from[j]);
      }
    });
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

  // One of these is called once for each tile, by any thread.
  void add(const Tile& tile, ScalarType dtype, const TilePosition& at) {
    RunSums runs;
    runs.clear();
    run_vectorized<AddRows>(tile, dtype, &runs);
    add(&runs, at);
  }
  void add(RunSums* runs, const TilePosition& at) {
    float* sums = sums_.data() + at.row / kTile * cols_ + at.col;
    run_vectorized<SumRuns>(runs, at.rows, at.cols, sums);
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
// nullptr, gets the FP32 sums over rows. The matrix must have elements.
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
    if (column_sums) sums.add(tile, producer.dtype, at);
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
