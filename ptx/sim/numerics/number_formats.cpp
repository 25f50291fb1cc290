// The encoders of number_formats.h: one rounding routine, and the NaN, infinity and overflow of
// each format.
#include "number_formats.h"

#include <cmath>
#include <limits>

namespace torchext::sim {
namespace {

std::uint64_t bits_of(double value) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The layout of a binary format: sign, exponent field, fraction.
struct Layout {
  int fraction_bits;
  int min_exponent;          // of the smallest normal number
  std::uint32_t max_finite;  // code of the largest finite value
  std::uint32_t overflow;    // code of infinity, or of NaN where there is no infinity
  std::uint32_t nan;
  int sign_shift;
};

constexpr Layout kF32{23, -126, 0x7f7fffff, 0x7f800000, kCanonicalNanF32, 31};
constexpr Layout kTf32{10, -126, 0x3fbff, 0x3fc00, 0x3ffff, 18};
constexpr Layout kBf16{7, -126, 0x7f7f, 0x7f80, kCanonicalNanBf16, 15};
constexpr Layout kF16{10, -14, 0x7bff, 0x7c00, kCanonicalNanF16, 15};
constexpr Layout kE5m2{2, -14, 0x7b, 0x7c, kCanonicalNanFp8, 7};
constexpr Layout kE4m3{3, -6, 0x7e, 0x7f, kCanonicalNanFp8, 7};

bool rounds_away(Rounding rounding, bool negative, bool odd, int against_half) {
  switch (rounding) {
    case Rounding::nearest_even:
      return against_half > 0 || (against_half == 0 && odd);
    case Rounding::nearest_away:
      return against_half >= 0;
    case Rounding::toward_zero:
      return false;
    case Rounding::downward:
      return negative;
    case Rounding::upward:
      return !negative;
  }
  return false;
}

std::uint32_t encode(double value, const Layout& layout, CvtModifiers modifiers) {
  if (std::isnan(value)) return layout.nan;
  const bool negative = std::signbit(value);
  if (negative && modifiers.relu) return 0;
  const std::uint32_t sign = negative ? 1u << layout.sign_shift : 0;
  const std::uint32_t overflow = modifiers.satfinite             ? sign | layout.max_finite
                                 : layout.overflow == layout.nan ? layout.nan
                                                                 : sign | layout.overflow;
  if (std::isinf(value)) return overflow;
  if (value == 0) return sign;

  int exponent = static_cast<int>(bits_of(value) >> 52 & 0x7ff) - 1023;
  std::uint64_t significand = bits_of(value) & ((std::uint64_t{1} << 52) - 1);
  if (exponent == -1023) {
    exponent = -1022;  // subnormal in f64: rounds like zero in every format here
  } else {
    significand |= std::uint64_t{1} << 52;
  }
  // Below min_exponent, the unit in the last place no longer shrinks.
  const int unit = (exponent > layout.min_exponent ? exponent : layout.min_exponent);
  const int drop = 52 - layout.fraction_bits + (unit - exponent);
  std::uint64_t kept = drop > 62 ? 0 : significand >> drop;
  int against_half = -1;  // sign of (dropped part - half a unit)
  bool inexact = true;
  if (drop <= 62) {
    const std::uint64_t dropped = significand - (kept << drop);
    const std::uint64_t half = std::uint64_t{1} << (drop - 1);
    against_half = dropped > half ? 1 : dropped == half ? 0 : -1;
    inexact = dropped != 0;
  }
  if (inexact && rounds_away(modifiers.rounding, negative, kept & 1, against_half)) ++kept;

  // Adding to the exponent field carries a significand of all ones into the next binade.
  const std::uint64_t code =
      kept + (static_cast<std::uint64_t>(unit - layout.min_exponent) << layout.fraction_bits);
  if (code <= layout.max_finite) return sign | static_cast<std::uint32_t>(code);
  // Rounding toward zero, or away from this infinity, stops at the largest finite value.
  const bool stops = modifiers.rounding == Rounding::toward_zero ||
                     (modifiers.rounding == Rounding::downward && !negative) ||
                     (modifiers.rounding == Rounding::upward && negative);
  return stops ? sign | layout.max_finite : overflow;
}

template <class Code>
float decode(Code code, const Layout& layout) {
  const std::uint32_t magnitude = code & ((1u << layout.sign_shift) - 1);
  const bool negative = code >> layout.sign_shift & 1;
  float value;
  if (magnitude > layout.max_finite) {
    if (magnitude != layout.overflow || layout.overflow == layout.nan) {
      return float_from_bits(kCanonicalNanF32);
    }
    value = std::numeric_limits<float>::infinity();
  } else {
    const std::uint32_t field = magnitude >> layout.fraction_bits;
    const std::uint32_t fraction = magnitude & ((1u << layout.fraction_bits) - 1);
    const std::uint32_t significand = field == 0 ? fraction : fraction | 1u << layout.fraction_bits;
    const int unit = layout.min_exponent + (field == 0 ? 0 : static_cast<int>(field) - 1);
    value = std::ldexp(static_cast<float>(significand), unit - layout.fraction_bits);
  }
  return negative ? -value : value;
}

DecodeTables make_decode_tables() {
  DecodeTables tables;
  for (std::uint32_t code = 0; code < 256; ++code) {
    tables.e4m3[code] = decode(code, kE4m3);
    tables.e5m2[code] = decode(code, kE5m2);
  }
  for (std::uint32_t code = 0; code < 65536; ++code) tables.f16[code] = decode(code, kF16);
  return tables;
}

}  // namespace

const DecodeTables kDecodeTables = make_decode_tables();

std::uint32_t encode_f32(double value, CvtModifiers modifiers) {
  return encode(value, kF32, modifiers);
}

std::uint32_t encode_tf32(double value, CvtModifiers modifiers) {
  const std::uint32_t code = encode(value, kTf32, modifiers);
  return code == kTf32.nan ? kCanonicalNanF32 : code << 13;
}

std::uint16_t encode_f16(double value, CvtModifiers modifiers) {
  return static_cast<std::uint16_t>(encode(value, kF16, modifiers));
}

std::uint16_t encode_bf16(double value, CvtModifiers modifiers) {
  return static_cast<std::uint16_t>(encode(value, kBf16, modifiers));
}

std::uint8_t encode_e4m3(double value, CvtModifiers modifiers) {
  return static_cast<std::uint8_t>(encode(value, kE4m3, modifiers));
}

std::uint8_t encode_e5m2(double value, CvtModifiers modifiers) {
  return static_cast<std::uint8_t>(encode(value, kE5m2, modifiers));
}

std::uint8_t encode_ue8m0(double value, CvtModifiers modifiers) {
  if (std::isnan(value)) return kNanUe8m0;
  const std::uint8_t overflow = modifiers.satfinite ? 0xfe : kNanUe8m0;
  if (std::isinf(value)) return overflow;
  int exponent;  // |value| = m * 2^exponent with m in [1/2, 1)
  const double m = std::frexp(std::fabs(value), &exponent);
  if (m == 0) return 0;
  int code = exponent - 1 + 127;
  if (modifiers.rounding == Rounding::upward && m != 0.5) ++code;
  if (code < 0) return 0;
  return code > 0xfe ? overflow : static_cast<std::uint8_t>(code);
}

}  // namespace torchext::sim
