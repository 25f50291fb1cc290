// Quantizes with one scale for the whole tensor, in three launches on one stream:
//
//   zero_amax              one thread zeroes the amax.
//   amax_*                 Every warp loads tiles of 2048 elements of a row and keeps the largest
//                          magnitude; a CTA's warps meet at __syncthreads; one thread then
//                          merges its CTA's result into the amax by atomicMax on FP32 bits, which
//                          gives the same result in any order.
//   quantize_tensorwise_*  Every warp reads the amax, then loads, quantizes and stores one tile.
//                          The grid takes tiles from the last to the first, since the reduction has
//                          left the end of the input in L2.
//
// Contract: rows of the output start at multiples of 16 bytes.
#include "../../device/matrix.cuh"
#include "../quantize.h"

namespace torchext::quantizers {

constexpr int kWarps = 8;
constexpr int kChunks = 4;  // chunks of 16 elements that a lane loads of a tile
constexpr int kTile = kChunks * 32 * 16;

struct Tiles {
  uint32_t count, per_row;
};

// The position of a chunk of 16 elements, and how many of them exist.
struct Chunk {
  int64_t row, col;
  int valid;
};

// `whole`: rows are aligned, and their last chunk is full.
template <bool whole>
__device__ Chunk chunk_of(const Source& x, const Tiles& tiles, uint32_t tile, int i) {
  Chunk c;
  c.row = tile / tiles.per_row;
  c.col = int64_t(tile % tiles.per_row) * kTile + i * 512 + threadIdx.x % 32 * 16;
  c.valid = whole ? (c.col < x.cols ? 16 : 0) : valid_of(c.col, x.cols, 16);
  return c;
}

template <class In, bool whole>
__device__ Elements16<In> load(const Source& x, const Chunk& c) {
  const uint8_t* address = x.at(c.row, c.col);
  if constexpr (whole)
    return c.valid ? load16<In>(address, 0, true, 16) : Elements16<In>{};
  else
    return load16<In>(address, x.col_stride, x.aligned, c.valid);
}

extern "C" __global__ void zero_amax(uint32_t* amax) {
  *amax = 0;
}

template <class In, bool whole>
__device__ uint32_t largest_of(const Source& x, const Tiles& tiles) {
  uint32_t largest = 0;
#pragma unroll 1
  for (uint32_t tile = blockIdx.x * kWarps + threadIdx.x / 32; tile < tiles.count;
       tile += gridDim.x * kWarps)
    for_each_loaded<In, kChunks, whole>(
        [&](int i) { return load<In, whole>(x, chunk_of<whole>(x, tiles, tile, i)); },
        [&](int, const Elements16<In>& e) { largest = In::larger(largest, magnitudes(e)); });
  return largest;
}

template <class In>
__device__ void reduce_amax(const Source& x, const Tiles& tiles, uint32_t* amax) {
  __shared__ uint32_t warp_largest[kWarps];
  uint32_t largest = x.aligned && x.cols % 16 == 0 ? largest_of<In, true>(x, tiles)
                                                   : largest_of<In, false>(x, tiles);
  largest = amax_bits<In>(reduce_magnitudes<In>(largest, 32));
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kWarps; ++i) largest = max(largest, warp_largest[i]);
  atomicMax(amax, largest);
}

template <class In, class Out, bool whole>
__device__ void quantize_tile(const Source& x, const Sink& out, uint32_t amax,
                              uint32_t dropped_mantissa, const Tiles& tiles, uint32_t tile) {
  for_each_loaded<In, kChunks, whole>(
      [&](int i) { return load<In, whole>(x, chunk_of<whole>(x, tiles, tile, i)); },
      [&](int i, const Elements16<In>& e) {
        const GroupScale scale = scale_of(amax, Out::kMax, dropped_mantissa);
        const Chunk c = chunk_of<whole>(x, tiles, tile, i);
        if (c.row == 0 && c.col == 0) *out.scale = scale.scale;
        if (c.valid != 0)
          store16(out.at(c.row, c.col), whole ? 16 : c.valid, quantize16<In, Out>(e, scale));
      });
}

template <class In, class Out>
__device__ void quantize_tensorwise(const Source& x, const Sink& out, const uint32_t* amax,
                                    uint32_t dropped_mantissa, const Tiles& tiles) {
  const uint32_t position = blockIdx.x * kWarps + threadIdx.x / 32;
  if (position >= tiles.count) return;
  const uint32_t tile = tiles.count - 1 - position;
  if (x.aligned && x.cols % 16 == 0)
    quantize_tile<In, Out, true>(x, out, *amax, dropped_mantissa, tiles, tile);
  else
    quantize_tile<In, Out, false>(x, out, *amax, dropped_mantissa, tiles, tile);
}

#define KERNEL(In)                                          \
  extern "C" __global__ void __launch_bounds__(32 * kWarps) \
      amax_##In(Source x, Tiles tiles, uint32_t* amax) {    \
    reduce_amax<In>(x, tiles, amax);                        \
  }
TORCHEXT_INPUTS(KERNEL)
#undef KERNEL

#define KERNEL(In, Out)                                                                       \
  extern "C" __global__ void __launch_bounds__(32 * kWarps) quantize_tensorwise_##In##_##Out( \
      Source x, Sink out, const uint32_t* amax, uint32_t dropped_mantissa, Tiles tiles) {     \
    quantize_tensorwise<In, Out>(x, out, amax, dropped_mantissa, tiles);                      \
  }
TORCHEXT_QUANTIZERS(KERNEL)
#undef KERNEL

}  // namespace torchext::quantizers

namespace torchext {

void quantize_tensorwise_cuda(Device& device, const MatrixView& view,
                              const QuantizeOptions& options, const QuantizedView& out,
                              uint32_t* amax_bits, Buffers buffers) {
  using namespace quantizers;
  if (view.rows == 0 || view.cols == 0) return;
  const uint32_t dropped = options.pow2_scale ? kMantissa : 0;
  MatrixView x = view;
  if (x.col_stride == 1 && x.row_stride == x.cols && out.data_stride == x.cols) {
    x.cols *= x.rows;  // one long row
    x.rows = 1;
  }
  const int64_t tiles_per_row = ceil_div(x.cols, kTile);
  const LaunchConfig config{grid_of(x.rows * tiles_per_row, kWarps), {32 * kWarps}};
  const Tiles tiles{uint32_t(x.rows * tiles_per_row), uint32_t(tiles_per_row)};
  LaunchConfig reduction = config;
  reduction.grid.x = std::min(config.grid.x, 4 * uint32_t(device.properties().sm_count));

  device.launch(TORCHEXT_KERNEL(zero_amax), {{1}, {1}}, buffers, amax_bits);
#define LAUNCH(In)           \
  if (x.dtype == In::kDtype) \
    device.launch(TORCHEXT_KERNEL(amax_##In), reduction, buffers, source_of(x), tiles, amax_bits);
  TORCHEXT_INPUTS(LAUNCH)
#undef LAUNCH
#define LAUNCH(In, Out)                                                                      \
  if (x.dtype == In::kDtype && options.e5m2 == Out::kE5m2)                                   \
    return device.launch(TORCHEXT_KERNEL(quantize_tensorwise_##In##_##Out), config, buffers, \
                         source_of(x), sink_of(out), amax_bits, dropped, tiles);
  TORCHEXT_QUANTIZERS(LAUNCH)
#undef LAUNCH
}

}  // namespace torchext
