// Number formats of the tensor cores and of PTX `cvt`: f16, bf16, tf32, e4m3, e5m2, ue8m0.
//
// Decoding is exact. Encoding follows the PTX ISA's section on `cvt`: the rounding modes that PTX
// offers, `.satfinite` (overflow and infinity become the largest finite value of the same sign, NaN
// stays NaN), `.relu` (negative results, -0 among them, become +0) and canonical NaNs with a clear
// sign bit. Only `.ftz` is left to the caller, because it is a property of the f32 operand.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace torchext::sim {

enum class NumberFormat { f32, tf32, f16, bf16, e4m3, e5m2 };

constexpr int size_in_bytes(NumberFormat format) {
  switch (format) {
    case NumberFormat::f32:
    case NumberFormat::tf32:
      return 4;
    case NumberFormat::f16:
    case NumberFormat::bf16:
      return 2;
    case NumberFormat::e4m3:
    case NumberFormat::e5m2:
      return 1;
  }
  return 0;
}

// PTX .rn, .rz, .rm, .rp and (tf32 only) .rna.
enum class Rounding { nearest_even, toward_zero, downward, upward, nearest_away };

struct CvtModifiers {
  Rounding rounding = Rounding::nearest_even;
  bool satfinite = false;
  bool relu = false;
};

constexpr std::uint32_t kCanonicalNanF32 = 0x7fffffff;
constexpr std::uint16_t kCanonicalNanF16 = 0x7fff;
constexpr std::uint16_t kCanonicalNanBf16 = 0x7fff;
constexpr std::uint8_t kCanonicalNanFp8 = 0x7f;  // of e4m3 and of e5m2
constexpr std::uint8_t kNanUe8m0 = 0xff;

inline float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t bits_from_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// PTX .ftz: a subnormal number becomes a zero of its sign.
inline float flush_subnormal(float value) {
  return std::fabs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value) : value;
}

// All codes of the formats of 8 and 16 bits, as floats. NaN codes decode to the canonical f32 NaN.
struct DecodeTables {
  float e4m3[256];
  float e5m2[256];
  float f16[65536];
};
extern const DecodeTables kDecodeTables;

inline float e4m3_to_float(std::uint8_t code) {
  return kDecodeTables.e4m3[code];
}
inline float e5m2_to_float(std::uint8_t code) {
  return kDecodeTables.e5m2[code];
}
inline float f16_to_float(std::uint16_t code) {
  return kDecodeTables.f16[code];
}

// Keeps the payload of a NaN, as a shift does. PTX `cvt.f32.bf16` differs only in NaN codes.
inline float bf16_to_float(std::uint16_t code) {
  return float_from_bits(static_cast<std::uint32_t>(code) << 16);
}

// 2^(code - 127); code 255 is NaN. 2^-127 is subnormal in f32 and bf16 and is exact in both.
inline float ue8m0_to_float(std::uint8_t code) {
  if (code == kNanUe8m0) return float_from_bits(kCanonicalNanF32);
  return float_from_bits(code == 0 ? 0x00400000u : static_cast<std::uint32_t>(code) << 23);
}

// The source is a double so that one rounding serves cvt from f16, f32 and f64 alike: each of them
// is exact in a double.
std::uint16_t encode_f16(double value, CvtModifiers modifiers = {});
std::uint16_t encode_bf16(double value, CvtModifiers modifiers = {});
// f32 bits whose low 13 bits are zero (except in the canonical NaN).
std::uint32_t encode_tf32(double value, CvtModifiers modifiers = {});
// f64 -> f32 with PTX's four rounding modes.
std::uint32_t encode_f32(double value, CvtModifiers modifiers = {});
// For these two, PTX has only .rn.satfinite. Without satfinite, overflow is NaN in e4m3 (which has
// no infinity) and infinity in e5m2.
std::uint8_t encode_e4m3(double value, CvtModifiers modifiers = {Rounding::nearest_even, true});
std::uint8_t encode_e5m2(double value, CvtModifiers modifiers = {Rounding::nearest_even, true});
// The power of two below (.rz) or above (.rp) |value|; the sign is ignored.
std::uint8_t encode_ue8m0(double value, CvtModifiers modifiers);

}  // namespace torchext::sim
