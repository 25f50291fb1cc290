// Number formats on the host: conversions between FP32 and FP8, FP16 and BF16, written so that a
// compiler turns loops over them into vector code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "dtype.h"

namespace torchext {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// condition ? a : b by arithmetic. If the compiler saw a branch, it might move floating-point
// operations into it, and then not vectorize them.
inline uint32_t select(bool condition, uint32_t a, uint32_t b) {
  const uint32_t mask = -uint32_t(condition);
  return (a & mask) | (b & ~mask);
}

constexpr uint32_t kInfinityBits = 0x7f800000, kNaNBits = 0x7fc00000;  // of FP32

// A format with a sign, an exponent, kMantissa fraction bits and subnormals; Bits holds its codes.
// Codes from kSpecial on, without the sign, are Inf and NaN.
template <class Bits_, int kMantissa, int kBias, uint32_t kSpecial>
struct SmallFloat {
  using Bits = Bits_;
  static constexpr int kFraction = kMantissa, kExponentBias = kBias;
  static constexpr uint32_t kSign = uint32_t(1) << (8 * sizeof(Bits) - 1), kSpecialCode = kSpecial;

  // Rounds to nearest even. For values outside the format's range, the result is meaningless.
  //
  // Trick: add a power of two whose last place is the place at which the format rounds the value.
  // The FPU then rounds, and the low bits of the sum are the significand, hidden bit included.
  static Bits encode_finite(float value) {
    constexpr int kDropped = 23 - kMantissa;
    constexpr uint32_t kLeastExponent = uint32_t(128 - kBias) << 23;  // subnormals share it
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffff;
    // The maximum is of signed integers, which more machines can compare in vectors.
    const uint32_t exponent =
        uint32_t(std::max(int32_t(magnitude), int32_t(kLeastExponent))) & 0x7f800000;
    const uint32_t rounder = exponent + (uint32_t(kDropped) << 23);
    const uint32_t significand = bits_of(float_of(magnitude) + float_of(rounder)) - rounder;
    const uint32_t code = ((exponent - kLeastExponent) >> kDropped) + significand;
    return Bits(code | (bits >> (32 - 8 * sizeof(Bits)) & kSign));
  }

  static float to_float(Bits code) {
    // The last place of kUnit, as an FP32 value, is the last place of the format's subnormals.
    constexpr uint32_t kUnit = uint32_t(151 - kBias - kMantissa) << 23;
    const uint32_t magnitude = code & (kSign - 1);
    const uint32_t normal = (magnitude << (23 - kMantissa)) + (uint32_t(127 - kBias) << 23);
    const uint32_t subnormal = bits_of(float_of(kUnit + magnitude) - float_of(kUnit));
    const uint32_t finite = select(magnitude < (1u << kMantissa), subnormal, normal);
    const uint32_t special = select(magnitude >= kSpecial, kInfinityBits, 0);
    return float_of(finite | special | (code & kSign) << (32 - 8 * sizeof(Bits)));
  }
};

struct E4M3 : SmallFloat<uint8_t, 3, 7, 0x7f> {
  static constexpr float kMax = 448;
};

struct E5M2 : SmallFloat<uint8_t, 2, 15, 0x7c> {
  static constexpr float kMax = 57344;
};

struct Half : SmallFloat<uint16_t, 10, 15, 0x7c00> {
  static Bits from_float(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    constexpr uint32_t kBeyond = 0x47800000;  // 2^16, whose code is that of Inf
    const uint32_t least = uint32_t(std::min(int32_t(magnitude), int32_t(kBeyond)));
    const Bits rounded = encode_finite(float_of(least | (bits & 0x80000000)));
    return Bits(rounded | select(magnitude > kInfinityBits, 0x7e00, 0));
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  static float to_float(Bits code) { return float_of(uint32_t(code) << 16); }

  static Bits from_float(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > kInfinityBits ? Bits(0x7fc0) : Bits(rounded);
  }
};

struct Float {
  using Bits = uint32_t;
  static float to_float(Bits code) { return float_of(code); }
  static Bits from_float(float value) { return bits_of(value); }
};

// Calls body(Format()) for the format of a dtype for which is_wide() is true.
template <class Body>
void with_wide_format(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return body(BFloat16());
    case ScalarType::Half:
      return body(Half());
    default:
      return body(Float());
  }
}

}  // namespace torchext
