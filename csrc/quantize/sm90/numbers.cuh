// The arithmetic of a quantiser, shared by every kernel here and, since it is plain C++, run by the
// host in tests/quantize/sm90_numbers.cpp, which checks the claims below. Numbers:
// docs/numerics.md.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TORCHEXT_NUMBERS __host__ __device__ __forceinline__
#else
#define TORCHEXT_NUMBERS inline
#endif

namespace torchext::sm90 {

TORCHEXT_NUMBERS float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

TORCHEXT_NUMBERS uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// What a scale does to the values that share it.
struct GroupScale {
  float scale;       // as stored: NaN for a group that holds NaN or Inf
  float lift;        // 1, or 2^64 for scales so small that the remainder below would underflow
  float divisor;     // scale * lift, at least 2^-64
  float reciprocal;  // RN(1 / divisor)
};

// The scale of values whose largest magnitude is `amax_bits` (as FP32 bits, so that NaN and Inf are
// the largest of all): RN(amax / fp8_max), at least the smallest normal FP32, optionally rounded up
// to a power of two. fp8_max is 448 or 57344, both 7 * 2^n, for which one correction of the
// product with the reciprocal gives the correctly rounded quotient of every FP32 amax.
TORCHEXT_NUMBERS GroupScale scale_of(uint32_t amax_bits, float fp8_max, bool pow2_scale) {
  constexpr float kSmallestNormal = 0x1p-126f;
  const float amax = float_of(amax_bits);
  const float estimate = amax * (1.0f / fp8_max);
  GroupScale s;
  s.scale = fmaf(-fmaf(estimate, fp8_max, -amax), 1.0f / fp8_max, estimate);
  s.scale = fmaxf(s.scale, kSmallestNormal);
  if (pow2_scale) s.scale = float_of((bits_of(s.scale) + 0x007fffff) & 0xff800000);
  if (amax_bits == 0) s.scale = 1.0f;
  if (amax_bits >= 0x7f800000) s.scale = float_of(0x7fc00000);
  s.lift = s.scale < 0x1p-64f ? 0x1p64f : 1.0f;
  s.divisor = s.scale * s.lift;
  s.reciprocal = 1.0f / s.divisor;
  return s;
}

// x / scale, such that rounding the result to FP8 gives what rounding the correctly rounded FP32
// quotient gives: one correction by the remainder (Markstein). The remainder is taken negated,
// which keeps the sign of a zero. NaN when the scale is. Without `lifts` the caller knows that the
// scale is at least 2^-64.
template <bool lifts>
TORCHEXT_NUMBERS float divide(float x, const GroupScale& s) {
  const float lifted = lifts ? x * s.lift : x;
  const float quotient = lifted * s.reciprocal;
  const float negated_remainder = fmaf(quotient, s.divisor, -lifted);
  return fmaf(-negated_remainder, s.reciprocal, quotient);
}

}  // namespace torchext::sm90
