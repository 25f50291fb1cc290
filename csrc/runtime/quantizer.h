// The arithmetic of a quantizer on the host; csrc/device/numbers.cuh and formats.cuh are its GPU
// version, with the same bits. The portable quantizers use it, those of other levels for what is
// rare, and the GEMM's quantizing epilogues; csrc/cpu/loops.h has faster forms of the same
// arithmetic. Contract: called in the default floating-point environment. Numbers: docs/numerics.md.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "formats.h"
#include "views.h"

namespace torchext::cpu {

constexpr uint8_t kNaN8 = 0x7f;  // in both formats

// A format's magnitudes as signed integers. These are ordered like the values, with Inf and NaN
// last. They are signed because more machines have a vector maximum of signed than of unsigned
// integers.
template <class In>
using Magnitude = std::make_signed_t<typename In::Bits>;

template <class In>
Magnitude<In> magnitude(typename In::Bits bits) {
  return Magnitude<In>(bits & (typename In::Bits(-1) >> 1));
}

// The scale of a group whose largest magnitude is `largest`. To round it up to a power of two is to
// round its bits up to a multiple of the lowest bit that is not in `dropped_mantissa`.
template <class In, class Out>
float scale_of(Magnitude<In> largest, uint32_t dropped_mantissa) {
  const float amax = In::to_float(typename In::Bits(largest));
  const float scale = std::max(amax / Out::kMax, FLT_MIN);
  uint32_t bits = (bits_of(scale) + dropped_mantissa) & ~dropped_mantissa;
  bits = select(largest == 0, bits_of(1.0f), bits);
  bits = select(bits_of(amax) >= kInfinityBits, kNaNBits, bits);
  return float_of(bits);
}

// Calls body(n); for whole scale groups, body is compiled with n as a constant.
template <class Body>
auto with_count(int n, const Body& body) {
  return n == kScaleGroup ? body(std::integral_constant<int, int(kScaleGroup)>()) : body(n);
}

template <class In>
Magnitude<In> largest_magnitude(const typename In::Bits* x, int n) {
  return with_count(n, [x](auto count) {
    Magnitude<In> largest = 0;
    for (int i = 0; i < count; ++i) largest = std::max(largest, magnitude<In>(x[i]));
    return largest;
  });
}

// data = x / scale in FP8. Nothing needs to saturate: since no |x| exceeds amax, no quotient
// exceeds the largest FP8 value by half a place or more.
template <class In, class Out>
void encode(const typename In::Bits* __restrict x, int n, float scale, uint8_t* __restrict data) {
  if (scale != scale) {
    std::memset(data, kNaN8, n);
    return;
  }
  with_count(n, [=](auto count) {
    for (int i = 0; i < count; ++i) data[i] = Out::encode_finite(In::to_float(x[i]) / scale);
  });
}

// One group of a row: at most 128 elements, which share a scale. Returns the scale.
template <class In, class Out>
float quantize_group(const typename In::Bits* x, int n, uint32_t dropped_mantissa, uint8_t* data) {
  const float scale = scale_of<In, Out>(largest_magnitude<In>(x, n), dropped_mantissa);
  encode<In, Out>(x, n, scale, data);
  return scale;
}

}  // namespace torchext::cpu
