// What the kernels of norms share: their operands as kernels see them, and the pairwise sum
// (../norm.h). Every operation rounds to nearest by its own instruction, so that
// the compiler fuses none.
#pragma once

#include "../../device/matrix.cuh"
#include "../norm.h"

namespace torchext::norms {

using namespace quantizers;

// One value for each column; `data` may be nullptr.
struct Vector {
  const uint8_t* data;
  int64_t stride;  // bytes
  ScalarType dtype;
  bool aligned;  // contiguous, and starts at a multiple of 16 bytes
};

// The operands of NormView.
struct Norm {
  Source x, residual;     // residual.data is nullptr if there is none
  uint8_t *sum, *normed;  // normed is nullptr if not asked for
  int64_t stride;         // bytes between rows of sum and of normed
  bool aligned;           // rows of all four can be accessed in units of 16 bytes
  Vector weight, bias;
  bool unit_offset;
  float eps;
  float *mean, *rstd;
};

// The first `valid` of 16 elements from column `col`, a multiple of 16; the others are 0.
__device__ inline Values16 load_vector16(const Vector& v, int64_t col, int valid) {
  const uint8_t* address = v.data + col * v.stride;
  if (v.dtype == ScalarType::BFloat16)
    return widened(load16<bf16>(address, v.stride, v.aligned, valid));
  if (v.dtype == ScalarType::Half) return widened(load16<f16>(address, v.stride, v.aligned, valid));
  return widened(load16<f32>(address, v.stride, v.aligned, valid));
}

// The factors of 16 columns: the weight, or 1 + weight.
__device__ inline Values16 load_factors16(const Vector& weight, bool unit_offset, int64_t col,
                                          int valid) {
  Values16 w = load_vector16(weight, col, valid);
  if (unit_offset) {
#pragma unroll
    for (int i = 0; i < 16; ++i) w.at[i] = __fadd_rn(1.0f, w.at[i]);
  }
  return w;
}

// x + residual, rounded to the format.
template <class In>
__device__ Elements16<In> added(const Elements16<In>& x, const Elements16<In>& residual) {
  Values16 sum;
#pragma unroll
  for (int i = 0; i < 16; ++i) sum.at[i] = __fadd_rn(x.at(i), residual.at(i));
  return narrowed<In>(sum);
}

// Stores the first `valid` of 16 FP32 elements, rounded to the format, and returns them as rounded.
template <class In>
__device__ Elements16<f32> store_rounded(uint8_t* address, bool aligned, int valid,
                                         const Elements16<f32>& y) {
  const Elements16<In> rounded = narrowed<In>(widened(y));
  store_elements16<In>(address, aligned, valid, rounded);
  Elements16<f32> values;
#pragma unroll
  for (int i = 0; i < 16; ++i) values.words[i] = bits_of(rounded.at(i));
  return values;
}

// The sum of 16 values: neighbors, then neighbors of these sums, and so on.
__device__ inline float pairwise_sum(Values16 v) {
#pragma unroll
  for (int count = 8; count > 0; count /= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) v.at[i] = __fadd_rn(v.at[2 * i], v.at[2 * i + 1]);
  }
  return v.at[0];
}

// The sum over a segment, of which each lane of the warp holds 16 elements; all lanes get it.
__device__ inline float segment_sum(const Values16& v) {
  static_assert(kSegment == 32 * 16, "a warp holds a segment");
  float sum = pairwise_sum(v);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2)
    sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, distance));
  return sum;
}

// The part of a row that a thread handles. A CTA has kWarps warps; `warps_per_row` of them share a
// row. A lane takes 16 elements of every `step`; a warp's 32 chunks are a segment.
constexpr int kWarps = 8;

struct Place {
  int warps_per_row, warp, first_warp, lane, step;
  int64_t row, cols;               // no columns if the row does not exist
  int64_t first_col, segment_col;  // of the lane's, and of the warp's, first chunk

  __device__ Place(int64_t rows, int64_t columns, int warps_of_a_row)
      : warps_per_row(warps_of_a_row),
        warp(threadIdx.x / 32),
        first_warp(warp & -warps_per_row),
        lane(threadIdx.x - 32 * first_warp),
        step(kSegment * warps_per_row),
        row(int64_t(blockIdx.x) * (kWarps / warps_per_row) + first_warp / warps_per_row),
        cols(row < rows ? columns : 0),
        first_col(lane * 16),
        segment_col(int64_t(warp - first_warp) * kSegment) {}

  // How many of the 16 elements from column `col` exist. `whole`: all or none.
  template <bool whole>
  __device__ int valid(int64_t col) const {
    return whole ? (col < cols ? 16 : 0) : valid_of(col, cols, 16);
  }

  template <class In, bool whole>
  __device__ Elements16<In> load(const Source& x, int64_t col) const {
    const uint8_t* address = x.at(row, col);
    if constexpr (whole)
      return col < cols ? load16<In>(address, 0, true, 16) : Elements16<In>{};
    else
      return load16<In>(address, x.col_stride, x.aligned, valid<false>(col));
  }
};

// The pairwise sum over the row, of `held` chunks of each lane and of those after them: held_terms(i)
// and later_terms(col) give a chunk's 16 terms, +0 where elements are missing. All threads of a row
// get the sum. All warps of the CTA share the row if there are later chunks. `segments` is shared
// memory that no thread still reads.
template <int held, class HeldTerms, class LaterTerms>
__device__ float row_sum(float (&segments)[kWarps * held], const Place& place,
                         const HeldTerms& held_terms, const LaterTerms& later_terms) {
  // Segment j of the row is chunk j / warps_per_row of warp j % warps_per_row.
  float* of_row = segments + place.first_warp * held;
  const auto keep = [&](int i, const Values16& terms) {
    const float sum = segment_sum(terms);
    if (threadIdx.x % 32 == 0)
      of_row[i * place.warps_per_row + place.warp - place.first_warp] = sum;
  };
  float sum = 0;
  const auto add = [&](int64_t col) {  // the segments from column `col`
    const int64_t left = (place.cols - col + kSegment - 1) / kSegment;
    const int count = int(min(left, int64_t(held * place.warps_per_row)));
    for (int j = 0; j < count; ++j) sum = __fadd_rn(sum, of_row[j]);
  };
#pragma unroll
  for (int i = 0; i < held; ++i) keep(i, held_terms(i));
  __syncthreads();
  add(0);
#pragma unroll 1
  for (int64_t col = held * place.step; col < place.cols; col += held * place.step) {
    __syncthreads();  // the sums have been read
#pragma unroll 1
    for (int i = 0; i < held; ++i) keep(i, later_terms(col + place.first_col + i * place.step));
    __syncthreads();
    add(col);
  }
  return sum;
}

template <class In>
__device__ Values16 squares(const Elements16<In>& e) {
  Values16 v;
#pragma unroll
  for (int i = 0; i < 16; ++i) v.at[i] = __fmul_rn(e.at(i), e.at(i));
  return v;
}

// (h - mean)^2 of the first `valid` elements, and +0.
template <class In>
__device__ Values16 squared_deviations(const Elements16<In>& h, float mean, int valid) {
  Values16 v;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float deviation = __fsub_rn(h.at(i), mean);
    v.at[i] = i < valid ? __fmul_rn(deviation, deviation) : 0.0f;
  }
  return v;
}

// 1 / sqrt(sum / count + eps).
__device__ inline float reciprocal_deviation(float sum, int64_t count, float eps) {
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, float(count)), eps)));
}

// The normed values y of 16 columns, as FP32 elements; +0 beyond the first `valid`. `shift` is the
// bias, if there is one.
template <class In>
__device__ Elements16<f32> normed(const Elements16<In>& h, float mean, float rstd,
                                  const Values16& factors, const Values16& shift, bool shifts,
                                  int valid) {
  Elements16<f32> y;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float value = __fmul_rn(__fmul_rn(__fsub_rn(h.at(i), mean), rstd), factors.at[i]);
    if (shifts) value = __fadd_rn(value, shift.at[i]);
    y.words[i] = i < valid ? bits_of(value) : 0;
  }
  return y;
}

// ---- host ----

inline Vector vector_of(const VectorView& v) {
  return {static_cast<const uint8_t*>(v.data), v.stride * element_size(v.dtype), v.dtype,
          v.stride == 1 && is_aligned(v.data, 0)};
}

inline Norm operands_of(const NormView& view) {
  Norm norm{};
  norm.x = source_of(view.x);
  norm.aligned = norm.x.aligned;
  norm.stride = view.x.cols * element_size(view.x.dtype);
  if (view.residual.data) {
    norm.residual = source_of(view.residual);
    norm.sum = static_cast<uint8_t*>(view.sum);
    norm.aligned = norm.aligned && norm.residual.aligned && is_aligned(view.sum, norm.stride);
  }
  if (view.normed) {
    norm.normed = static_cast<uint8_t*>(view.normed);
    norm.aligned = norm.aligned && is_aligned(view.normed, norm.stride);
  }
  norm.weight = vector_of(view.weight);
  if (view.bias.data) norm.bias = vector_of(view.bias);
  norm.unit_offset = view.unit_offset;
  norm.eps = view.eps;
  norm.mean = view.mean;
  norm.rstd = view.rstd;
  return norm;
}

// The fewest warps that hold a row in `held` chunks of each lane, or all of the CTA's.
inline int warps_per_row_of(int64_t cols, int held) {
  int warps = 1;
  while (warps < kWarps && cols > int64_t(warps) * kSegment * held) warps *= 2;
  return warps;
}

}  // namespace torchext::norms
