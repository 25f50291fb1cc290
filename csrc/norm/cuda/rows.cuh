// One pass over rows for RMSNorm and LayerNorm: adds the residual, finds mean and rstd and, if asked,
// quantizes the normed values with 1x128 scales. A CTA has eight warps; one, two, four or eight of
// them share a row:
//
//   load     Each lane loads up to kHeld chunks of 16 elements of x and of the residual, adds them,
//            stores the sum and keeps it in registers. In rows longer than 8,192 elements, further
//            chunks are loaded again wherever they are needed.
//   reduce   Warps write the sums of segments to shared memory, meet at __syncthreads, and each thread
//            adds those of its row. LayerNorm does so twice: for the mean, then for the deviation.
//   store    Each lane norms its chunks; if asked, rounds and stores them; quantizes and stores them.
//            Eight lanes share a scale.
//
// Contract: warps_per_row divides kWarps, and is kWarps if a lane cannot hold its part of a row.
// Rows of the outputs start at multiples of 16 bytes.
#pragma once

#include <type_traits>

#include "../../device/quantize_groups.cuh"
#include "norm.cuh"

namespace torchext::norms {

constexpr int kHeld = 2;  // chunks of 16 elements that a lane holds

struct NoOutput {};

// Format: that of the quantized values, or NoOutput to write the sum, mean and rstd alone. `whole`:
// rows are aligned, and their last chunk is full.
template <class In, bool whole, class Format>
__device__ void norm_row(Format format, const Norm& norm, const Sink& out,
                         uint32_t dropped_mantissa, int warps_per_row) {
  __shared__ float segments[kWarps * kHeld];
  const Place place(norm.x.rows, norm.x.cols, warps_per_row);
  const bool adds = norm.residual.data != nullptr;

  const auto load_sum = [&](int64_t col) {
    const Elements16<In> e = place.load<In, whole>(norm.x, col);
    return adds ? added(e, place.load<In, whole>(norm.residual, col)) : e;
  };
  const auto store_sum = [&](int64_t col, const Elements16<In>& e) {
    const int count = place.valid<whole>(col);
    if (adds && count > 0)
      store_elements16<In>(norm.sum + place.row * norm.stride + col * (4 / In::kPerWord),
                           whole || norm.aligned, count, e);
  };

  Elements16<In> held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    held[i] = place.load<In, whole>(norm.x, place.first_col + i * place.step);
  if (adds) {
    Elements16<In> residual[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      residual[i] = place.load<In, whole>(norm.residual, place.first_col + i * place.step);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      held[i] = added(held[i], residual[i]);
      store_sum(place.first_col + i * place.step, held[i]);
    }
#pragma unroll 1
    for (int64_t i = kHeld; place.segment_col + i * place.step < place.cols; ++i)
      store_sum(place.first_col + i * place.step, load_sum(place.first_col + i * place.step));
  }

  float mean = 0, sum;
  if (norm.mean != nullptr) {
    mean = __fdiv_rn(row_sum<kHeld>(
                         segments, place, [&](int i) { return widened(held[i]); },
                         [&](int64_t col) { return widened(load_sum(col)); }),
                     float(norm.x.cols));
    __syncthreads();  // the segments have been read
    const auto terms = [&](int64_t col, const Elements16<In>& e) {
      return squared_deviations(e, mean, place.valid<whole>(col));
    };
    sum = row_sum<kHeld>(
        segments, place, [&](int i) { return terms(place.first_col + i * place.step, held[i]); },
        [&](int64_t col) { return terms(col, load_sum(col)); });
  } else {
    sum = row_sum<kHeld>(
        segments, place, [&](int i) { return squares(held[i]); },
        [&](int64_t col) { return squares(load_sum(col)); });
  }
  const float rstd = reciprocal_deviation(sum, norm.x.cols, norm.eps);
  if (place.lane == 0 && place.row < norm.x.rows) {
    norm.rstd[place.row] = rstd;
    if (norm.mean != nullptr) norm.mean[place.row] = mean;
  }

  if constexpr (!std::is_same_v<Format, NoOutput>) {
    uint8_t* to = out.at(place.row, 0);
    const bool shifts = norm.bias.data != nullptr;
    // All lanes of a warp take part in each step, since they exchange magnitudes. Held chunks move
    // up, so that one copy of the code serves all of them: two copies take too many registers.
#pragma unroll 1
    for (int64_t i = 0; place.segment_col + i * place.step < place.cols; ++i) {
      const int64_t col = place.first_col + i * place.step;
      const int count = place.valid<whole>(col);
      const Values16 factors = load_factors16(norm.weight, norm.unit_offset, col, count);
      const Values16 shift = shifts ? load_vector16(norm.bias, col, count) : Values16{};
      Elements16<f32> y =
          normed(i < kHeld ? held[0] : load_sum(col), mean, rstd, factors, shift, shifts, count);
#pragma unroll
      for (int j = 1; j < kHeld; ++j) held[j - 1] = held[j];
      if (norm.normed != nullptr && count > 0)
        y = store_rounded<In>(norm.normed + place.row * norm.stride + col * (4 / In::kPerWord),
                              whole || norm.aligned, count, y);
      const uint32_t largest = reduce_magnitudes<f32>(magnitudes(y), 8);
      const GroupScale scale = scale_in(format, amax_bits<f32>(largest), dropped_mantissa);
      if (count == 0) continue;
      store16(to + col, whole ? 16 : count,
              quantize_in<f32>(format, [&](int j) { return y.at(j); }, scale));
      if (threadIdx.x % 8 == 0) *out.scale_at(place.row, col / kScaleGroup) = scale.scale;
    }
  }
}

template <class In, class Format>
__device__ void norm_rows(Format format, const Norm& norm, const Sink& out,
                          uint32_t dropped_mantissa, int warps_per_row) {
  if (norm.aligned && norm.x.cols % 16 == 0)
    norm_row<In, true>(format, norm, out, dropped_mantissa, warps_per_row);
  else
    norm_row<In, false>(format, norm, out, dropped_mantissa, warps_per_row);
}

}  // namespace torchext::norms
