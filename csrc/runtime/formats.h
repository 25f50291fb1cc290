// Number formats on the host: FP8 encoding with round to nearest even and saturation as PTX's
// cvt.rn.satfinite does, decoding by table, the 16-bit formats both ways, and the one definition of
// a scale (docs/numerics.md). Branch-free, so that loops over these vectorise.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace torchext {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr uint32_t kInfinityBits = 0x7f800000, kQuietNan = 0x7fc00000;

// A format by its exponent bias, mantissa bits and largest finite value.
struct E4M3 {
  static constexpr int kBias = 7, kMantissa = 3;
  static constexpr uint32_t kMaxBits = 0x7e;
  static constexpr float kMax = 448;
};
struct E5M2 {
  static constexpr int kBias = 15, kMantissa = 2;
  static constexpr uint32_t kMaxBits = 0x7b;
  static constexpr float kMax = 57344;
};

template <class Format>
inline uint8_t encode_fp8(float value) {
  constexpr int kDropped = 23 - Format::kMantissa;
  constexpr uint32_t kSmallestNormal = uint32_t(127 + 1 - Format::kBias) << 23;
  // Adding this leaves the value, rounded to a multiple of the smallest subnormal, in the low bits.
  constexpr uint32_t kMagic = uint32_t(127 + 1 - Format::kBias + kDropped) << 23;
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  const uint32_t rounded = magnitude + (1u << (kDropped - 1)) - 1 + ((magnitude >> kDropped) & 1);
  const uint32_t normal =
      (rounded >> kDropped) - (uint32_t(127 - Format::kBias) << Format::kMantissa);
  const uint32_t saturated = normal < Format::kMaxBits ? normal : Format::kMaxBits;
  const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(kMagic)) - kMagic;
  const uint32_t finite = magnitude < kSmallestNormal ? subnormal : saturated;
  return uint8_t(magnitude > kInfinityBits ? 0x7f : finite | (bits >> 24 & 0x80));
}

// The value of each of the 256 codes.
template <class Format>
inline const std::array<float, 256>& fp8_table() {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> values;
    for (uint32_t code = 0; code < 256; ++code) {
      const uint32_t magnitude = code & 0x7f, exponent = magnitude >> Format::kMantissa;
      const uint32_t mantissa = magnitude & ((1u << Format::kMantissa) - 1);
      float value;
      if (magnitude > Format::kMaxBits)  // e5m2 has infinities, e4m3fn only NaN
        value = Format::kMantissa == 2 && magnitude == 0x7c ? float_of(kInfinityBits)
                                                            : float_of(kQuietNan);
      else if (exponent == 0)
        value = std::ldexp(float(mantissa), 1 - Format::kBias - Format::kMantissa);
      else
        value = std::ldexp(float(mantissa + (1u << Format::kMantissa)),
                           int(exponent) - Format::kBias - Format::kMantissa);
      values[code] = code & 0x80 ? -value : value;
    }
    return values;
  }();
  return table;
}

// ---- bfloat16 and float16, by their bits; to nearest even; NaN stays NaN ----

inline float float_of_bfloat16(uint16_t bits) {
  return float_of(uint32_t(bits) << 16);
}

inline uint16_t bfloat16_of(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > kInfinityBits ? 0x7fc0 : rounded);
}

inline float float_of_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fff, sign = uint32_t(half & 0x8000) << 16;
  const uint32_t subnormal = bits_of(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t normal = (magnitude << 13) + (uint32_t(127 - 15) << 23);
  const uint32_t special = (magnitude << 13) | kInfinityBits;
  const uint32_t bits = magnitude < 0x0400 ? subnormal : magnitude < 0x7c00 ? normal : special;
  return float_of(bits | sign);
}

inline uint16_t half_of(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  const uint32_t rounded = magnitude + 0x0fff + (magnitude >> 13 & 1);
  const uint32_t normal = (rounded >> 13) - (uint32_t(127 - 15) << 10);
  const uint32_t saturated = normal < 0x7c00 ? normal : 0x7c00;
  constexpr uint32_t kMagic = uint32_t(127 - 1) << 23;  // 0.5: its ulp is 2^-24, half's subnormal
  const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(kMagic)) - kMagic;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : saturated;  // 2^-14
  return uint16_t((magnitude > kInfinityBits ? 0x7e00 : finite) | (bits >> 16 & 0x8000));
}

// The dequantisation scale of a group whose largest |x| has these bits. NaN or Inf gives NaN.
inline float scale_of(uint32_t amax_bits, float fp8_max, bool pow2_scale) {
  if (amax_bits >= kInfinityBits) return float_of(kQuietNan);
  if (amax_bits == 0) return 1;
  constexpr uint32_t kSmallestNormal = 0x00800000;
  uint32_t bits = bits_of(float_of(amax_bits) / fp8_max);
  if (bits < kSmallestNormal) bits = kSmallestNormal;
  if (pow2_scale) bits = (bits + 0x007fffff) & 0x7f800000;  // up, unless it is one already
  return float_of(bits);
}

}  // namespace torchext
