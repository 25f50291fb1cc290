// Quantizes with 1x128 scales: along rows (quantize_1x128), along columns with a transposed result
// (quantize_1x128_t), or both from one read (quantize_1x128_dual).
//
// Contract: the static assert below ties eight lanes to a scale group. Rows of the outputs start at
// multiples of 16 bytes.
//
// Along rows, every warp works by itself: it loads 16 rows of one column of scale groups, finds
// their scales, quantizes and stores. Eight lanes share a scale group, 16 elements each. With 16
// rows, the scales, which are M-major in memory, are stored in whole sectors.
//
// The kernels that transpose give each CTA a tile of 128 x 128. Its warps all do the same:
//
//   row pass     Load the tile by rows, as above, and write the input to shared memory. Dual: also
//                quantize the rows and store them.
//   column pass  After __syncthreads, read the tile by columns. A thread takes 16 rows of 4
//                columns; eight neighboring lanes share the scale groups of these columns. Packing
//                FP8 down a column transposes it.
//
// Shared memory is permuted in units of 16 bytes, so that neither pass meets a bank conflict.
#include "../../device/matrix.cuh"
#include "../quantize.h"

namespace torchext::quantizers {

static_assert(kScaleGroup == 8 * 16, "eight lanes of 16 elements share a group");

// ---- along rows ----
constexpr int kWarps = 4;
constexpr int kRowsPerLane = 4;
constexpr int kRowsPerWarp = 4 * kRowsPerLane;

// `interior`: all of the warp's rows and columns exist and are aligned.
template <class In, class Out, bool interior>
__device__ void quantize_rows(const Source& x, const Sink& out, uint32_t dropped_mantissa,
                              int64_t row, uint32_t group) {
  const int64_t col = group * kScaleGroup + threadIdx.x % 8 * 16;
  const int rows = interior ? kRowsPerWarp : valid_of(row, x.rows, kRowsPerWarp);
  const int valid = interior ? 16 : valid_of(col, x.cols, 16);

  const uint8_t* from = x.at(row, col);
  uint8_t* to = out.at(row, col);
  float* scale_to = out.scale_at(row, group);
  for_each_loaded<In, kRowsPerLane, interior>(
      [&](int i) {
        return load16<In>(from + 4 * i * x.row_stride, x.col_stride, interior || x.aligned,
                          4 * i < rows ? valid : 0);
      },
      [&](int i, const Elements16<In>& e) {
        const uint32_t largest = reduce_magnitudes<In>(magnitudes(e), 8);
        const GroupScale scale = scale_of(amax_bits<In>(largest), Out::kMax, dropped_mantissa);
        store16(to + 4 * i * out.data_stride, 4 * i < rows ? valid : 0,
                quantize16<In, Out>(e, scale));
        if (threadIdx.x % 8 == 0 && 4 * i < rows)
          scale_to[4 * i * out.scale_row_stride] = scale.scale;
      });
}

template <class In, class Out>
__device__ void quantize_1x128(const Source& x, const Sink& out, uint32_t dropped_mantissa,
                               uint32_t groups) {
  const uint32_t tile = blockIdx.x * kWarps + threadIdx.x / 32;
  const uint32_t group = tile % groups;
  const int64_t first_row = int64_t(tile / groups) * kRowsPerWarp;
  const int64_t row = first_row + threadIdx.x % 32 / 8;
  if (x.aligned && first_row + kRowsPerWarp <= x.rows && (group + 1) * kScaleGroup <= x.cols)
    quantize_rows<In, Out, true>(x, out, dropped_mantissa, row, group);
  else
    quantize_rows<In, Out, false>(x, out, dropped_mantissa, row, group);
}

#define KERNEL(In, Out)                                                                  \
  extern "C" __global__ void __launch_bounds__(32 * kWarps) quantize_1x128_##In##_##Out( \
      Source x, Sink out, uint32_t dropped_mantissa, uint32_t groups) {                  \
    quantize_1x128<In, Out>(x, out, dropped_mantissa, groups);                           \
  }
TORCHEXT_QUANTIZERS(KERNEL)
#undef KERNEL

// ---- along columns, or both ways ----
constexpr int kTileThreads = 256;
constexpr int kTile = int(kScaleGroup);

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

template <class In, class Out, bool by_rows, bool interior>
__device__ void quantize_group_tile(const Source& x, const Sink& out, const Sink& transposed,
                                    uint32_t dropped_mantissa, uint32_t row_group, uint32_t group) {
  extern __shared__ uint4 tile[];
  {
    constexpr int kPasses = kTile / (kTileThreads / 8);
    const int lane = threadIdx.x % 8, tile_row = threadIdx.x / 8;
    const int64_t row = int64_t(row_group) * kTile + tile_row;
    const int64_t col = group * kScaleGroup + lane * 16;
    const int rows = interior ? kTile : valid_of(row, x.rows, kTile);
    const int valid = interior ? 16 : valid_of(col, x.cols, 16);

    const uint8_t* from = x.at(row, col);
    uint8_t* to = out.at(row, col);
    float* scale_to = out.scale_at(row, group);
    for_each_loaded<In, kPasses, interior>(
        [&](int i) {
          return load16<In>(from + 32 * i * x.row_stride, x.col_stride, interior || x.aligned,
                            32 * i < rows ? valid : 0);
        },
        [&](int i, const Elements16<In>& e) {
#pragma unroll
          for (int j = 0; j < Elements16<In>::kWords; j += 4)
            tile[Tile<In>::offset(tile_row + 32 * i, (lane * Elements16<In>::kWords + j) / 4)] = {
                e.words[j], e.words[j + 1], e.words[j + 2], e.words[j + 3]};
          if constexpr (by_rows) {
            const uint32_t largest = reduce_magnitudes<In>(magnitudes(e), 8);
            const GroupScale scale = scale_of(amax_bits<In>(largest), Out::kMax, dropped_mantissa);
            store16(to + 32 * i * out.data_stride, 32 * i < rows ? valid : 0,
                    quantize16<In, Out>(e, scale));
            if (lane == 0 && 32 * i < rows) scale_to[32 * i * out.scale_row_stride] = scale.scale;
          }
        });
  }
  __syncthreads();

  constexpr int kColumns = 4;
  constexpr int kWords = kColumns / In::kPerWord;
  const int lane = threadIdx.x % 8;                 // takes rows 16 * lane + [0, 16)
  const int tile_col = threadIdx.x / 8 * kColumns;  // of these columns
  Columns<In, kColumns> e[16];
  const int word = tile_col / In::kPerWord;
  const uint32_t* from =
      reinterpret_cast<const uint32_t*>(tile + Tile<In>::offset(16 * lane, word / 4)) + word % 4;
#pragma unroll
  for (int i = 0; i < 16; ++i)
    e[i] = *reinterpret_cast<const Columns<In, kColumns>*>(from + i * Tile<In>::kChunks * 4);

  uint32_t largest[kWords] = {};
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
#pragma unroll
    for (int i = 0; i < 16; ++i)
      largest[j] = In::larger(largest[j], e[i].words[j] & In::kMagnitude);
    largest[j] = reduce_magnitudes<In>(largest[j], 8);
  }
  // Each lane computes the scale of one of the four columns.
  uint32_t my_largest = 0;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const float amax = In::element(largest[c / In::kPerWord], c % In::kPerWord);
    my_largest = lane % kColumns == c ? bits_of(amax) : my_largest;
  }
  const GroupScale my_scale = scale_of(my_largest, Out::kMax, dropped_mantissa);

  const int64_t row = int64_t(row_group) * kTile + 16 * lane;
  const int64_t col = int64_t(group) * kTile + tile_col;
  const int valid = interior ? 16 : valid_of(row, x.rows, 16);
  const int cols = interior ? kColumns : valid_of(col, x.cols, kColumns);
  if (lane < cols) *transposed.scale_at(col + lane, row_group) = my_scale.scale;
  uint8_t* to = transposed.at(col, row);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const GroupScale scale = from_lane<In>(my_scale, c, 8);
    store16(to + c * transposed.data_stride, c < cols ? valid : 0,
            quantize16<In, Out>(
                [&](int i) { return In::element(e[i].words[c / In::kPerWord], c % In::kPerWord); },
                scale));
  }
}

template <class In, class Out, bool by_rows>
__device__ void quantize_1x128_tile(const Source& x, const Sink& out, const Sink& transposed,
                                    uint32_t dropped_mantissa, uint32_t groups) {
  const uint32_t group = blockIdx.x % groups;
  const uint32_t row_group = blockIdx.x / groups;
  if (x.aligned && (row_group + 1) * kScaleGroup <= x.rows && (group + 1) * kScaleGroup <= x.cols)
    quantize_group_tile<In, Out, by_rows, true>(x, out, transposed, dropped_mantissa, row_group,
                                                group);
  else
    quantize_group_tile<In, Out, by_rows, false>(x, out, transposed, dropped_mantissa, row_group,
                                                 group);
}

#define KERNEL(In, Out)                                                                   \
  extern "C" __global__ void __launch_bounds__(kTileThreads, In::kPerWord == 2 ? 4 : 2)   \
      quantize_1x128_t_##In##_##Out(Source x, Sink transposed, uint32_t dropped_mantissa, \
                                    uint32_t groups) {                                    \
    quantize_1x128_tile<In, Out, false>(x, {}, transposed, dropped_mantissa, groups);     \
  }                                                                                       \
  extern "C" __global__ void __launch_bounds__(kTileThreads, In::kPerWord == 2 ? 4 : 2)   \
      quantize_1x128_dual_##In##_##Out(Source x, Sink out, Sink transposed,               \
                                       uint32_t dropped_mantissa, uint32_t groups) {      \
    quantize_1x128_tile<In, Out, true>(x, out, transposed, dropped_mantissa, groups);     \
  }
TORCHEXT_QUANTIZERS(KERNEL)
#undef KERNEL

}  // namespace torchext::quantizers

namespace torchext {

void quantize_groups_cuda(Device& device, const MatrixView& x, const QuantizeOptions& options,
                          const QuantizedView* row, const QuantizedView* transposed,
                          Buffers buffers) {
  using namespace quantizers;
  if (x.rows == 0 || x.cols == 0) return;
  const Source source = source_of(x);
  const uint32_t dropped = options.pow2_scale ? kMantissa : 0;
  const int64_t groups = ceil_div(x.cols, kScaleGroup);
  if (transposed == nullptr) {
    const int64_t tiles = ceil_div(x.rows, kRowsPerWarp) * groups;
    const LaunchConfig config{grid_of(tiles, kWarps), {32 * kWarps}};
#define LAUNCH(In, Out)                                                                         \
  if (x.dtype == In::kDtype && options.e5m2 == Out::kE5m2)                                      \
    return device.launch(TORCHEXT_KERNEL(quantize_1x128_##In##_##Out), config, buffers, source, \
                         sink_of(*row), dropped, groups);
    TORCHEXT_QUANTIZERS(LAUNCH)
#undef LAUNCH
  }
  LaunchConfig config{grid_of(ceil_div(x.rows, kScaleGroup) * groups, 1), {kTileThreads}};
  config.shared_bytes = uint32_t(kTile * kTile * element_size(x.dtype));
#define LAUNCH(In, Out)                                                                      \
  if (x.dtype == In::kDtype && options.e5m2 == Out::kE5m2) {                                 \
    if (row == nullptr)                                                                      \
      return device.launch(TORCHEXT_KERNEL(quantize_1x128_t_##In##_##Out), config, buffers,  \
                           source, sink_of(*transposed), dropped, groups);                   \
    return device.launch(TORCHEXT_KERNEL(quantize_1x128_dual_##In##_##Out), config, buffers, \
                         source, sink_of(*row), sink_of(*transposed), dropped, groups);      \
  }
  TORCHEXT_QUANTIZERS(LAUNCH)
#undef LAUNCH
}

}  // namespace torchext
