// CPU kernels of quantization. They walk x in tiles of at most 128 x 128, which they read in place
// if columns are contiguous and gather otherwise. Everything that depends on a tile is computed
// while the tile is in cache, so that x is read from memory once (for one scale of the whole
// tensor: twice).
#include <atomic>

#include "../runtime/cpu.h"
#include "../runtime/formats.h"
#include "../runtime/quantizer.h"
#include "quantize.h"
#include "transpose.h"

namespace torchext {
namespace {

using namespace cpu;

constexpr int kTile = int(kScaleGroup);

// A part of x, at most 128 x 128, with contiguous columns.
template <class In>
struct Tile {
  using Bits = typename In::Bits;
  const Bits* data;
  int64_t stride;
  int rows, cols;
  const Bits* row(int i) const { return data + i * stride; }
};

// How many rows a tile has unless a kernel needs more: one, to walk through memory in order, or as
// many as can be gathered at once.
int64_t fewest_rows(const MatrixView& x) {
  return x.col_stride == 1 ? 1 : kTile;
}

int64_t tile_count(const MatrixView& x, int64_t rows_per_tile) {
  return ceil_div(x.rows, rows_per_tile) * ceil_div(x.cols, kScaleGroup);
}

template <class Bits>
void gather(const Bits* from, int64_t row_stride, int64_t col_stride, int rows, int cols,
            Bits* to) {
  if (row_stride == 1) return transpose(from, col_stride, to, kTile, cols, rows);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) to[r * kTile + c] = from[r * row_stride + c * col_stride];
}

// Calls body(tile, row, col) for tiles [begin, end), counted along rows. Each has 128 columns and
// rows_per_tile rows, or fewer at the edges of x.
template <class In, class Body>
void for_each_tile(const MatrixView& x, int64_t rows_per_tile, int64_t begin, int64_t end,
                   const Body& body) {
  using Bits = typename In::Bits;
  alignas(64) Bits gathered[kTile * kTile];
  const int64_t groups = ceil_div(x.cols, kScaleGroup);
  int64_t row = begin / groups * rows_per_tile, col = begin % groups * kScaleGroup;
  for (int64_t i = begin; i < end; ++i) {
    const int rows = int(std::min(rows_per_tile, x.rows - row));
    const int cols = int(std::min(kScaleGroup, x.cols - col));
    const Bits* from = static_cast<const Bits*>(x.data) + row * x.row_stride + col * x.col_stride;
    if (x.col_stride == 1) {
      body(Tile<In>{from, x.row_stride, rows, cols}, row, col);
    } else {
      gather(from, x.row_stride, x.col_stride, rows, cols, gathered);
      body(Tile<In>{gathered, kTile, rows, cols}, row, col);
    }
    col += kScaleGroup;
    if (col < x.cols) continue;
    col = 0;
    row += rows_per_tile;
  }
}

uint8_t* data_at(const QuantizedView& out, int64_t row, int64_t col) {
  return static_cast<uint8_t*>(out.data) + row * out.data_stride + col;
}

float& scale_at(const QuantizedView& out, int64_t row, int64_t col) {
  return out.scale[row * out.scale_row_stride + col * out.scale_col_stride];
}

// ---- 1x128 groups along rows ----

template <class In, class Out>
void quantize_rows(const Tile<In>& tile, int64_t row, int64_t col, const QuantizedView& out,
                   uint32_t dropped) {
  for (int i = 0; i < tile.rows; ++i) {
    scale_at(out, row + i, col / kScaleGroup) =
        quantize_group<In, Out>(tile.row(i), tile.cols, dropped, data_at(out, row + i, col));
  }
}

template <class In, class Out>
struct RowGroups {
  static void run(const MatrixView& x, const QuantizedView& out, uint32_t dropped, int64_t begin,
                  int64_t end) {
    for_each_tile<In>(x, fewest_rows(x), begin, end,
                      [&](const Tile<In>& tile, int64_t row, int64_t col) {
                        quantize_rows<In, Out>(tile, row, col, out, dropped);
                      });
  }
};

// ---- tiles of 128 x 128: groups along columns, blocks, and transposes ----

// The FP8 values of a tile, which are to be written transposed.
struct EncodedTile {
  alignas(64) uint8_t data[kTile][kTile] = {};

  // to[c, r] = data[r][c]. Writes a few rows of `to` at a time, through a buffer, because rows of
  // `to` that are a power of two apart compete for the same few lines of cache.
  void write_transposed(uint8_t* to, int64_t to_stride, int rows, int cols) const {
    constexpr int kStrip = 16;
    alignas(64) uint8_t strip[kStrip][kTile];
    for (int col = 0; col < cols; col += kStrip) {
      transpose(data[0] + col, kTile, strip[0], kTile, kTile, kStrip);
      for (int i = 0; i < std::min(kStrip, cols - col); ++i)
        std::memcpy(to + (col + i) * to_stride, strip[i], rows);
    }
  }
};

template <class In, class Out>
void quantize_columns(const Tile<In>& tile, int64_t row, int64_t col, const QuantizedView& out,
                      uint32_t dropped, EncodedTile& encoded) {
  Magnitude<In> largest[kTile] = {};
  float scales[kTile];
  with_count(tile.cols, [&](auto cols) {
    for (int i = 0; i < tile.rows; ++i) {
      const auto* __restrict x = tile.row(i);
      for (int j = 0; j < cols; ++j) largest[j] = std::max(largest[j], magnitude<In>(x[j]));
    }
    for (int j = 0; j < cols; ++j) scales[j] = scale_of<In, Out>(largest[j], dropped);
    for (int i = 0; i < tile.rows; ++i) {
      const auto* __restrict x = tile.row(i);
      uint8_t* __restrict to = encoded.data[i];
      for (int j = 0; j < cols; ++j) to[j] = Out::encode_finite(In::to_float(x[j]) / scales[j]);
    }
  });
  for (int j = 0; j < tile.cols; ++j) {
    scale_at(out, col + j, row / kScaleGroup) = scales[j];
    if (scales[j] == scales[j]) continue;
    for (int i = 0; i < tile.rows; ++i) encoded.data[i][j] = kNaN8;
  }
  encoded.write_transposed(data_at(out, col, row), out.data_stride, tile.rows, tile.cols);
}

template <class In, class Out>
struct ColumnGroups {
  // row_out, for the groups along rows of the same x, may be nullptr.
  static void run(const MatrixView& x, const QuantizedView* row_out,
                  const QuantizedView& transposed, uint32_t dropped, int64_t begin, int64_t end) {
    EncodedTile encoded;
    for_each_tile<In>(x, kScaleGroup, begin, end,
                      [&](const Tile<In>& tile, int64_t row, int64_t col) {
                        if (row_out) quantize_rows<In, Out>(tile, row, col, *row_out, dropped);
                        quantize_columns<In, Out>(tile, row, col, transposed, dropped, encoded);
                      });
  }
};

template <class In>
Magnitude<In> largest_in_tile(const Tile<In>& tile) {
  Magnitude<In> largest = 0;
  for (int i = 0; i < tile.rows; ++i)
    largest = std::max(largest, largest_magnitude<In>(tile.row(i), tile.cols));
  return largest;
}

template <class In, class Out>
struct Blocks {
  static void run(const MatrixView& x, const QuantizedView& out, uint8_t* transposed,
                  int64_t transposed_stride, uint32_t dropped, int64_t begin, int64_t end) {
    EncodedTile encoded;
    for_each_tile<In>(x, kScaleGroup, begin, end,
                      [&](const Tile<In>& tile, int64_t row, int64_t col) {
                        const float scale = scale_of<In, Out>(largest_in_tile(tile), dropped);
                        scale_at(out, row / kScaleGroup, col / kScaleGroup) = scale;
                        for (int i = 0; i < tile.rows; ++i) {
                          uint8_t* to = data_at(out, row + i, col);
                          encode<In, Out>(tile.row(i), tile.cols, scale, to);
                          if (transposed) std::memcpy(encoded.data[i], to, tile.cols);
                        }
                        if (transposed)
                          encoded.write_transposed(transposed + col * transposed_stride + row,
                                                   transposed_stride, tile.rows, tile.cols);
                      });
  }
};

// ---- one scale for each row ----

template <class In, class Out>
struct Rows {
  // [begin, end) counts rows of tiles. The second walk along such a row finds it in cache.
  static void run(const MatrixView& x, const QuantizedView& out, uint32_t dropped, int64_t begin,
                  int64_t end) {
    const int64_t groups = ceil_div(x.cols, kScaleGroup), rows_per_tile = fewest_rows(x);
    for (int64_t b = begin; b < end; ++b) {
      Magnitude<In> largest[kTile] = {};
      for_each_tile<In>(x, rows_per_tile, b * groups, (b + 1) * groups,
                        [&](const Tile<In>& tile, int64_t, int64_t) {
                          for (int i = 0; i < tile.rows; ++i)
                            largest[i] =
                                std::max(largest[i], largest_magnitude<In>(tile.row(i), tile.cols));
                        });
      float scales[kTile];
      for (int i = 0; i < kTile; ++i) scales[i] = scale_of<In, Out>(largest[i], dropped);
      for_each_tile<In>(x, rows_per_tile, b * groups, (b + 1) * groups,
                        [&](const Tile<In>& tile, int64_t row, int64_t col) {
                          for (int i = 0; i < tile.rows; ++i) {
                            encode<In, Out>(tile.row(i), tile.cols, scales[i],
                                            data_at(out, row + i, col));
                            scale_at(out, row + i, 0) = scales[i];
                          }
                        });
    }
  }
};

// ---- one scale for the whole tensor ----

template <class In>
struct Amax {
  static void run(const MatrixView& x, std::atomic<Magnitude<In>>* result, int64_t begin,
                  int64_t end) {
    Magnitude<In> largest = 0;
    for_each_tile<In>(x, fewest_rows(x), begin, end, [&](const Tile<In>& tile, int64_t, int64_t) {
      largest = std::max(largest, largest_in_tile(tile));
    });
    Magnitude<In> before = result->load();
    while (before < largest && !result->compare_exchange_weak(before, largest)) {
    }
  }
};

template <class In, class Out>
struct EncodeAll {
  static void run(const MatrixView& x, float scale, const QuantizedView& out, int64_t begin,
                  int64_t end) {
    for_each_tile<In>(
        x, fewest_rows(x), begin, end, [&](const Tile<In>& tile, int64_t row, int64_t col) {
          for (int i = 0; i < tile.rows; ++i)
            encode<In, Out>(tile.row(i), tile.cols, scale, data_at(out, row + i, col));
        });
  }
};

// ---- dequantization ----

template <class In, class Out>
struct Dequantize {
  // [begin, end) counts groups of 128 columns, along rows.
  static void run(const DequantizeView& v, int64_t begin, int64_t end) {
    using Bits = typename Out::Bits;
    const int64_t groups = ceil_div(v.cols, kScaleGroup);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / groups, col = i % groups * kScaleGroup;
      const float scale =
          v.scale[row / v.row_group * v.scale_row_stride + col / v.col_group * v.scale_col_stride];
      const uint8_t* __restrict from =
          static_cast<const uint8_t*>(v.data) + row * v.data_row_stride + col * v.data_col_stride;
      Bits* __restrict to = static_cast<Bits*>(v.y) + row * v.y_stride + col;
      const int cols = int(std::min(kScaleGroup, v.cols - col));
      if (v.data_col_stride == 1) {
        with_count(cols, [=](auto count) {
          for (int j = 0; j < count; ++j) to[j] = Out::from_float(In::to_float(from[j]) * scale);
        });
      } else {
        for (int j = 0; j < cols; ++j)
          to[j] = Out::from_float(In::to_float(from[j * v.data_col_stride]) * scale);
      }
    }
  }
};

// ---- dispatch ----

// Calls body(In(), Out()) for the formats of x and of the output.
template <class Body>
void with_formats(const MatrixView& x, const QuantizeOptions& options, const Body& body) {
  with_wide_format(
      x.dtype, [&](auto in) { with_fp8_format(options.e5m2, [&](auto out) { body(in, out); }); });
}

// The smallest number of tiles that is worth a thread.
int64_t grain(int64_t rows_per_tile) {
  constexpr int64_t kElements = 1 << 15;
  return std::max<int64_t>(1, kElements / (rows_per_tile * kScaleGroup));
}

// Runs the kernel over all tiles of x.
template <class Kernel, class... Arguments>
void run_on_tiles(const MatrixView& x, int64_t rows_per_tile, const Arguments&... arguments) {
  run_parallel<Kernel>(tile_count(x, rows_per_tile), grain(rows_per_tile), x, arguments...);
}

}  // namespace

void quantize_groups_cpu(const MatrixView& x, const QuantizeOptions& options,
                         const QuantizedView* row, const QuantizedView* transposed) {
  with_formats(x, options, [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    const uint32_t dropped = dropped_mantissa(options);
    if (transposed)
      run_on_tiles<ColumnGroups<In, Out>>(x, kScaleGroup, row, *transposed, dropped);
    else
      run_on_tiles<RowGroups<In, Out>>(x, fewest_rows(x), *row, dropped);
  });
}

void quantize_blocks_cpu(const MatrixView& x, const QuantizeOptions& options,
                         const QuantizedView& out, void* transposed_data,
                         int64_t transposed_stride) {
  with_formats(x, options, [&](auto in, auto format) {
    run_on_tiles<Blocks<decltype(in), decltype(format)>>(
        x, kScaleGroup, out, static_cast<uint8_t*>(transposed_data), transposed_stride,
        dropped_mantissa(options));
  });
}

void quantize_rowwise_cpu(const MatrixView& x, const QuantizeOptions& options,
                          const QuantizedView& out) {
  with_formats(x, options, [&](auto in, auto format) {
    const int64_t rows_per_tile = fewest_rows(x);
    run_parallel<Rows<decltype(in), decltype(format)>>(
        ceil_div(x.rows, rows_per_tile),
        ceil_div(grain(rows_per_tile), ceil_div(x.cols, kScaleGroup)), x, out,
        dropped_mantissa(options));
  });
}

void quantize_tensorwise_cpu(const MatrixView& x, const QuantizeOptions& options,
                             const QuantizedView& out) {
  with_formats(x, options, [&](auto in, auto format) {
    using In = decltype(in);
    using Out = decltype(format);
    const DefaultFloatingPoint environment;
    std::atomic<Magnitude<In>> largest{0};
    run_on_tiles<Amax<In>>(x, fewest_rows(x), &largest);
    *out.scale = scale_of<In, Out>(largest, dropped_mantissa(options));
    run_on_tiles<EncodeAll<In, Out>>(x, fewest_rows(x), *out.scale, out);
  });
}

void dequantize_cpu(const DequantizeView& view) {
  with_fp8_format(view.e5m2, [&](auto in) {
    with_wide_format(view.y_dtype, [&](auto out) {
      run_parallel<Dequantize<decltype(in), decltype(out)>>(
          view.rows * ceil_div(view.cols, kScaleGroup), grain(1), view);
    });
  });
}

}  // namespace torchext
