// The arithmetic of a quantizer: scales, and quotients that round to FP8 as true division does.
// Every kernel that quantizes uses it. It is also standard C++, so that
// tests/quantize/cuda_numbers.cpp can check the claims below on the host. Numbers:
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

namespace torchext::quantizers {

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

// A scale, and what dividing by it takes.
struct GroupScale {
  float scale;       // as stored: NaN for a group that holds NaN or Inf
  float lift;        // factor of x before division: 2^64 if the remainder might underflow, else 1
  float divisor;     // scale * lift, at least 2^-64
  float reciprocal;  // RN(1 / divisor)
};

constexpr uint32_t kMantissa = 0x007fffff;

// The largest finite FP8 value.
TORCHEXT_NUMBERS constexpr float fp8_max(bool e5m2) {
  return e5m2 ? 57344.0f : 448.0f;
}

// Computes the other members from s.scale.
TORCHEXT_NUMBERS void set_divisor(GroupScale& s) {
  s.lift = s.scale < 0x1p-64f ? 0x1p64f : 1.0f;
  s.divisor = s.scale * s.lift;
  s.reciprocal = 1.0f / s.divisor;
}

// The scale of values whose largest magnitude has the FP32 bits `amax_bits`; compared as bits, NaN
// and Inf are the largest of all. The scale is RN(amax / fp8_max), at least the smallest normal
// FP32. It is then rounded up until the bits `dropped_mantissa` are zero: 0 keeps it, kMantissa
// makes it a power of two. fp8_max is 448 or 57344, both 7 * 2^n. For these divisors, amax times
// the reciprocal with one correction is the correctly rounded quotient, for every FP32 amax.
TORCHEXT_NUMBERS GroupScale scale_of(uint32_t amax_bits, float fp8_max, uint32_t dropped_mantissa) {
  constexpr float kSmallestNormal = 0x1p-126f;
  const float amax = float_of(amax_bits);
  const float estimate = amax * (1.0f / fp8_max);
  const float quotient = fmaf(-fmaf(estimate, fp8_max, -amax), 1.0f / fp8_max, estimate);
  const uint32_t bits = bits_of(fmaxf(quotient, kSmallestNormal));
  GroupScale s;
  s.scale = float_of((bits + dropped_mantissa) & ~dropped_mantissa);
  if (amax_bits == 0) s.scale = 1.0f;
  if (amax_bits >= 0x7f800000) s.scale = float_of(0x7fc00000);
  set_divisor(s);
  return s;
}

// lifted_x / divisor, which is x / scale, by one correction with the remainder (Markstein).
// Rounding the result to FP8 gives the same code as rounding the correctly rounded FP32 quotient.
// The remainder is computed negated, which keeps the sign of a zero. NaN if the scale is NaN.
TORCHEXT_NUMBERS float divide(float lifted_x, const GroupScale& s) {
  const float quotient = lifted_x * s.reciprocal;
  const float negated_remainder = fmaf(quotient, s.divisor, -lifted_x);
  return fmaf(-negated_remainder, s.reciprocal, quotient);
}

}  // namespace torchext::quantizers
