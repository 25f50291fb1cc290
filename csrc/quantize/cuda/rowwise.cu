// Quantizes with one scale for each row. A CTA has eight warps; one, two, four or eight of them
// share a row. The warps of a row do the same:
//
//   load     Each lane loads up to four chunks of 16 elements (two before sm_89) and keeps them in
//            registers. It also reads any further chunks of the row, for their largest magnitude
//            only: those of rows longer than 16,384 elements (before sm_89: 8,192).
//   reduce   Warps write their largest magnitudes to shared memory, meet at __syncthreads, and each
//            thread computes its row's scale.
//   store    Each lane quantizes and stores the chunks that it holds; it loads the others again,
//            from L2.
//
// Contract: warps_per_row divides kWarps. Rows of the output start at multiples of 16 bytes.
#include "../../device/matrix.cuh"
#include "../quantize.h"

namespace torchext::quantizers {

constexpr int kWarps = 8;
// How many chunks of 16 elements a lane holds: fewer if converting to FP8 takes registers.
constexpr int kHeld = kHasFp8Conversions ? 4 : 2;

// `whole`: rows are aligned, and their last chunk is full.
template <class In, class Out, bool whole>
__device__ void quantize_row(const Source& x, const Sink& out, uint32_t dropped_mantissa,
                             int warps_per_row) {
  __shared__ uint32_t warp_largest[kWarps];
  const int warp = threadIdx.x / 32;
  const int first_warp = warp & -warps_per_row;  // of this row
  const int lane = threadIdx.x - 32 * first_warp;
  const int step = 32 * warps_per_row * 16;  // elements between a lane's chunks
  const int64_t row = int64_t(blockIdx.x) * (kWarps / warps_per_row) + first_warp / warps_per_row;
  const int64_t cols = row < x.rows ? x.cols : 0;

  const auto valid = [&](int64_t col) {
    return whole ? (col < cols ? 16 : 0) : valid_of(col, cols, 16);
  };
  const auto load = [&](int64_t col) {
    const uint8_t* address = x.at(row, col);
    if constexpr (whole)
      return col < cols ? load16<In>(address, 0, true, 16) : Elements16<In>{};
    else
      return load16<In>(address, x.col_stride, x.aligned, valid(col));
  };

  const int64_t first_col = lane * 16;
  Elements16<In> held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = load(first_col + i * step);
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) largest = In::larger(largest, magnitudes(held[i]));
#pragma unroll 1
  for (int64_t col = first_col + kHeld * step; col < cols; col += step)
    largest = In::larger(largest, magnitudes(load(col)));

  largest = amax_bits<In>(reduce_magnitudes<In>(largest, 32));
  if (threadIdx.x % 32 == 0) warp_largest[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i)
    if ((i & -warps_per_row) == first_warp) largest = max(largest, warp_largest[i]);
  const GroupScale scale = scale_of(largest, Out::kMax, dropped_mantissa);
  if (lane == 0 && row < x.rows) *out.scale_at(row, 0) = scale.scale;

  uint8_t* to = out.at(row, 0);
  const auto store = [&](int64_t col, const Elements16<In>& e) {
    const int count = valid(col);
    if (whole && count == 0) return;
    store16(to + col, whole ? 16 : count, quantize16<In, Out>(e, scale));
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) store(first_col + i * step, held[i]);
#pragma unroll 1
  for (int64_t col = first_col + kHeld * step; col < cols; col += step) store(col, load(col));
}

template <class In, class Out>
__device__ void quantize_rowwise(const Source& x, const Sink& out, uint32_t dropped_mantissa,
                                 int warps_per_row) {
  if (x.aligned && x.cols % 16 == 0)
    quantize_row<In, Out, true>(x, out, dropped_mantissa, warps_per_row);
  else
    quantize_row<In, Out, false>(x, out, dropped_mantissa, warps_per_row);
}

#define KERNEL(In, Out)                                                                    \
  extern "C" __global__ void __launch_bounds__(32 * kWarps) quantize_rowwise_##In##_##Out( \
      Source x, Sink out, uint32_t dropped_mantissa, int warps_per_row) {                  \
    quantize_rowwise<In, Out>(x, out, dropped_mantissa, warps_per_row);                    \
  }
TORCHEXT_QUANTIZERS(KERNEL)
#undef KERNEL

}  // namespace torchext::quantizers

namespace torchext {

void quantize_rowwise_cuda(Device& device, const MatrixView& x, const QuantizeOptions& options,
                           const QuantizedView& out, Buffers buffers) {
  using namespace quantizers;
  if (x.rows == 0) return;
  const uint32_t dropped = options.pow2_scale ? kMantissa : 0;
  int warps_per_row = 1;
  while (warps_per_row < kWarps && x.cols > int64_t(warps_per_row) * 32 * 16 * kHeld)
    warps_per_row *= 2;
  const LaunchConfig config{grid_of(x.rows, kWarps / warps_per_row), {32 * kWarps}};
#define LAUNCH(In, Out)                                                                   \
  if (x.dtype == In::kDtype && options.e5m2 == Out::kE5m2)                                \
    return device.launch(TORCHEXT_KERNEL(quantize_rowwise_##In##_##Out), config, buffers, \
                         source_of(x), sink_of(out), dropped, warps_per_row);
  TORCHEXT_QUANTIZERS(LAUNCH)
#undef LAUNCH
}

}  // namespace torchext
