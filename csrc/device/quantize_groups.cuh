// Quantizes with 1x128 scales what a kernel has loaded or computed, 16 elements of a row at a time:
// along rows, along columns with a transposed result, or both ways. Every kernel that has whole
// scale groups of rows in its lanes uses it.
//
// Contract: the static assert below ties eight lanes to a scale group. Rows of the outputs start at
// multiples of 16 bytes.
//
// A kernel passes `each`: each(use) calls use(i, elements) for i = 0, 1, ..., once for each row of
// the lane; `elements` are Elements16<Value>, zero beyond the edges of the matrix.
//
// Along rows, every warp works by itself on 16 rows of one column of scale groups. Eight lanes share
// a scale group, 16 elements each. With 16 rows, the scales, which are M-major in memory, are stored
// in whole sectors.
//
// Kernels that transpose give each CTA a tile of 128 x 128. Its warps all do the same:
//
//   row pass     Take the tile by rows, as above, and write it to shared memory. If asked, also
//                quantize the rows and store them.
//   column pass  After __syncthreads, read the tile by columns. A thread takes 16 rows of 4
//                columns; eight neighboring lanes share the scale groups of these columns. Packing
//                FP8 down a column transposes it. If asked, also sum the columns.
//
// Shared memory is permuted in units of 16 bytes, so that neither pass meets a bank conflict.
#pragma once

#include <type_traits>

#include "matrix.cuh"

namespace torchext::quantizers {

static_assert(kScaleGroup == 8 * 16, "eight lanes of 16 elements share a group");

// ---- output formats that are known at compile time (e4m3, e5m2), or only at run time ----

struct EitherFp8 {
  bool e5m2;
};

template <class Out>
__device__ GroupScale scale_in(Out, uint32_t amax_bits, uint32_t dropped_mantissa) {
  return scale_of(amax_bits, Out::kMax, dropped_mantissa);
}

__device__ inline GroupScale scale_in(EitherFp8 out, uint32_t amax_bits,
                                      uint32_t dropped_mantissa) {
  if (out.e5m2) return scale_of(amax_bits, e5m2::kMax, dropped_mantissa);
  return scale_of(amax_bits, e4m3::kMax, dropped_mantissa);
}

// quantize16 for values x(i) of elements of format In.
template <class In, class Out, class Value>
__device__ uint4 quantize_in(Out, Value x, const GroupScale& s) {
  return quantize16<In, Out>(x, s);
}

template <class In, class Value>
__device__ uint4 quantize_in(EitherFp8 out, Value x, const GroupScale& s) {
  float quotients[16];
  if (In::kLifts && s.lift != 1.0f) {
#pragma unroll
    for (int i = 0; i < 16; ++i) quotients[i] = divide(x(i) * s.lift, s);
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) quotients[i] = divide(x(i), s);
  }
  uint32_t packed[4];
  const auto pack = [&](auto format) {
#pragma unroll
    for (int i = 0; i < 16; i += 4)
      packed[i / 4] = format.pack(quotients[i + 1], quotients[i]) |
                      uint32_t(format.pack(quotients[i + 3], quotients[i + 2])) << 16;
  };
  if (out.e5m2)
    pack(e5m2());
  else
    pack(e4m3());
  return {packed[0], packed[1], packed[2], packed[3]};
}

// ---- along rows ----
constexpr int kRowWarps = 4;  // of a CTA
constexpr int kRowsPerLane = 4;
constexpr int kRowsPerWarp = 4 * kRowsPerLane;

// Quantizes the lane's rows `row`, row + step, ..., of which the first `rows` / step exist, and of
// its 16 columns of group `group` the first `valid`.
template <class Value, int step, class Format, class Each>
__device__ void quantize_each_row(Format format, const Sink& out, uint32_t dropped_mantissa,
                                  int64_t row, uint32_t group, int rows, int valid,
                                  const Each& each) {
  uint8_t* to = out.at(row, group * kScaleGroup + threadIdx.x % 8 * 16);
  float* scale_to = out.scale_at(row, group);
  each([&](int i, const Elements16<Value>& e) {
    const uint32_t largest = reduce_magnitudes<Value>(magnitudes(e), 8);
    const GroupScale scale = scale_in(format, amax_bits<Value>(largest), dropped_mantissa);
    store16(to + step * i * out.data_stride, step * i < rows ? valid : 0,
            quantize_in<Value>(format, [&](int j) { return e.at(j); }, scale));
    if (threadIdx.x % 8 == 0 && step * i < rows)
      scale_to[step * i * out.scale_row_stride] = scale.scale;
  });
}

// ---- along columns, or both ways ----
constexpr int kTileThreads = 256;
constexpr int kTile = int(kScaleGroup);
constexpr int kTileRowStep = kTileThreads / 8;  // between rows of a lane
constexpr int kTileRowsPerLane = kTile / kTileRowStep;

// `columns` neighboring elements of a row.
template <class In, int columns>
struct alignas(4 * columns / In::kPerWord) Columns {
  uint32_t words[columns / In::kPerWord];
};

// A tile in shared memory.
template <class In>
struct Tile {
  static constexpr int kChunks = kTile / In::kPerWord / 4;  // of 16 bytes, in a row

  // Index of a chunk. Eight lanes access shared memory together: in the row pass lane j writes
  // chunk 2j (4j for FP32) of a row, in the column pass it reads row 16j. Both meet different
  // banks.
  static __device__ int offset(int row, int chunk) {
    return row * kChunks + (chunk ^ (chunk >> 3) ^ (row >> 4));
  }
};

// Writes a lane's 16 elements of a row of the tile.
template <class Value>
__device__ void store_to_tile(uint4* tile, int tile_row, const Elements16<Value>& e) {
  const int lane = threadIdx.x % 8;
#pragma unroll
  for (int j = 0; j < Elements16<Value>::kWords; j += 4)
    tile[Tile<Value>::offset(tile_row, (lane * Elements16<Value>::kWords + j) / 4)] = {
        e.words[j], e.words[j + 1], e.words[j + 2], e.words[j + 3]};
}

// Where the sums of a tile's columns go: a matrix of one row for each row of tiles.
struct ColumnSums {
  float* data;
  int64_t stride;
};
struct NoColumnSums {};

// Adds the sums of the tiles of each column, the first tile's first. Each thread has one column.
__device__ inline void sum_row_tiles(const float* partial, uint32_t row_tiles, uint32_t cols,
                                     float* sums) {
  const uint32_t col = blockIdx.x * blockDim.x + threadIdx.x;
  if (col >= cols) return;
  float sum = partial[col];
#pragma unroll 4
  for (uint32_t i = 1; i < row_tiles; ++i) sum = __fadd_rn(sum, partial[int64_t(i) * cols + col]);
  sums[col] = sum;
}

// Quantizes the columns of the tile in shared memory. `rows` and `cols` are those of the matrix;
// `interior`: the tile does not reach over its edges. The order of a sum is fixed: 16 rows one after
// another, then these eight partial sums in pairs.
template <class Value, bool interior, class Format, class Sums>
__device__ void quantize_tile_columns(Format format, const uint4* tile, int64_t rows, int64_t cols,
                                      const Sink& transposed, uint32_t dropped_mantissa,
                                      uint32_t row_group, uint32_t group, const Sums& sums) {
  constexpr int kColumns = 4;
  constexpr int kWords = kColumns / Value::kPerWord;
  const int lane = threadIdx.x % 8;                 // takes rows 16 * lane + [0, 16)
  const int tile_col = threadIdx.x / 8 * kColumns;  // of these columns
  Columns<Value, kColumns> e[16];
  const int word = tile_col / Value::kPerWord;
  const uint32_t* from =
      reinterpret_cast<const uint32_t*>(tile + Tile<Value>::offset(16 * lane, word / 4)) + word % 4;
#pragma unroll
  for (int i = 0; i < 16; ++i)
    e[i] = *reinterpret_cast<const Columns<Value, kColumns>*>(from + i * Tile<Value>::kChunks * 4);

  uint32_t largest[kWords] = {};
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
#pragma unroll
    for (int i = 0; i < 16; ++i)
      largest[j] = Value::larger(largest[j], e[i].words[j] & Value::kMagnitude);
    largest[j] = reduce_magnitudes<Value>(largest[j], 8);
  }
  // Each lane computes the scale of one of the four columns.
  uint32_t my_largest = 0;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const float amax = Value::element(largest[c / Value::kPerWord], c % Value::kPerWord);
    my_largest = lane % kColumns == c ? bits_of(amax) : my_largest;
  }
  const GroupScale my_scale = scale_in(format, my_largest, dropped_mantissa);

  const int64_t row = int64_t(row_group) * kTile + 16 * lane;
  const int64_t col = int64_t(group) * kTile + tile_col;
  const int valid = interior ? 16 : valid_of(row, rows, 16);
  const int valid_cols = interior ? kColumns : valid_of(col, cols, kColumns);
  if (lane < valid_cols) *transposed.scale_at(col + lane, row_group) = my_scale.scale;
  if constexpr (std::is_same_v<Sums, ColumnSums>) {
    float my_sum = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const auto at = [&](int i) {
        return Value::element(e[i].words[c / Value::kPerWord], c % Value::kPerWord);
      };
      float sum = at(0);
#pragma unroll
      for (int i = 1; i < 16; ++i) sum = __fadd_rn(sum, at(i));
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2)
        sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, distance));
      my_sum = lane == c ? sum : my_sum;
    }
    if (sums.data != nullptr && lane < valid_cols)
      sums.data[row_group * sums.stride + col + lane] = my_sum;
  }
  uint8_t* to = transposed.at(col, row);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const GroupScale scale = from_lane<Value>(my_scale, c, 8);
    store16(to + c * transposed.data_stride, c < valid_cols ? valid : 0,
            quantize_in<Value>(
                format,
                [&](int i) {
                  return Value::element(e[i].words[c / Value::kPerWord], c % Value::kPerWord);
                },
                scale));
  }
}

}  // namespace torchext::quantizers
