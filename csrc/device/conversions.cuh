// Conversions between FP32 and the narrow formats on every architecture. Targets that have the
// instruction use it (FP8: sm_89; pairs of 16-bit values: sm_80); on others, arithmetic gives the
// same bits, NaN included.
#pragma once

#include "ptx/isa/convert.h"

namespace torchext {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
constexpr bool kHasFp8Conversions = false;
#else
constexpr bool kHasFp8Conversions = true;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasPairConversions = false;
#else
constexpr bool kHasPairConversions = true;
#endif

// FP32 to FP8 as cvt.rn.satfinite does. The format has `mantissa` fraction bits; its largest finite
// value has the FP32 bits `largest`. Trick: add a power of two whose last place is the place at
// which the format rounds x. The FPU then rounds, and the low bits of the sum are the significand,
// hidden bit included.
template <int mantissa, int bias, uint32_t largest>
__device__ __forceinline__ uint32_t fp8_code(float x) {
  constexpr int kDropped = 23 - mantissa;
  constexpr uint32_t kLeastExponent = uint32_t(128 - bias) << 23;  // subnormals share it
  const uint32_t bits = __float_as_uint(x);
  const uint32_t magnitude = min(bits & 0x7fffffff, largest);
  const uint32_t exponent = max(magnitude, kLeastExponent) & 0x7f800000;
  const uint32_t rounder = exponent + (uint32_t(kDropped) << 23);
  const uint32_t significand =
      __float_as_uint(__fadd_rn(__uint_as_float(magnitude), __uint_as_float(rounder))) - rounder;
  const uint32_t code = ((exponent - kLeastExponent) >> kDropped) + significand;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7f : code | (bits >> 24 & 0x80);
}

__device__ __forceinline__ uint16_t pack_e4m3(float high, float low) {
  if constexpr (kHasFp8Conversions)
    return ptx::cvt_rn_satfinite_e4m3x2_f32(high, low);
  else
    return uint16_t(fp8_code<3, 7, 0x43e00000>(high) << 8 | fp8_code<3, 7, 0x43e00000>(low));
}

__device__ __forceinline__ uint16_t pack_e5m2(float high, float low) {
  if constexpr (kHasFp8Conversions)
    return ptx::cvt_rn_satfinite_e5m2x2_f32(high, low);
  else
    return uint16_t(fp8_code<2, 15, 0x47600000>(high) << 8 | fp8_code<2, 15, 0x47600000>(low));
}

// Either format.
__device__ __forceinline__ uint16_t pack_fp8(bool e5m2, float high, float low) {
  return e5m2 ? pack_e5m2(high, low) : pack_e4m3(high, low);
}

// Two e4m3 codes to two f16 values that are 2^-8 times theirs. The codes are in the upper bytes of
// the halves of `codes`; the lower bytes are ignored. The factor is the difference of the exponent
// biases, 15 and 7; a subnormal e4m3 becomes a subnormal f16. NaN stays NaN: its magnitude is all
// ones, the only one that carries into bit 14 when one is added to its last place; with bit 14, all
// exponent bits of the f16 are set.
__device__ __forceinline__ uint32_t e4m3_as_f16x2(uint32_t codes) {
  const uint32_t halves = (codes >> 1 & 0x3f803f80) | (codes & 0x80008000);
  return halves | ((halves + 0x00800080) & 0x40004000);
}
constexpr float kE4m3AsF16Unit = 256;  // what the values above must be multiplied by

// e5m2 is the upper byte of f16.
__device__ __forceinline__ uint32_t e5m2_as_f16x2(uint32_t codes) {
  return codes & 0xff00ff00;
}

// Moves the two bytes of a pair into the upper bytes of the two halves of a word.
__device__ __forceinline__ uint32_t spread_pair(uint16_t pair) {
  return __byte_perm(pair, 0, 0x1404);
}

// FP8 to FP32; `values[0]` is the low byte.
__device__ __forceinline__ void unpack_e4m3(uint16_t pair, float (&values)[2]) {
  if constexpr (kHasFp8Conversions) {
    const uint32_t halves = ptx::cvt_rn_f16x2_e4m3x2(pair);
    values[0] = ptx::cvt_f32_f16(uint16_t(halves));
    values[1] = ptx::cvt_f32_f16(uint16_t(halves >> 16));
  } else {
    const uint32_t halves = e4m3_as_f16x2(spread_pair(pair));
    values[0] = ptx::cvt_f32_f16(uint16_t(halves)) * kE4m3AsF16Unit;
    values[1] = ptx::cvt_f32_f16(uint16_t(halves >> 16)) * kE4m3AsF16Unit;
  }
}

__device__ __forceinline__ void unpack_e5m2(uint16_t pair, float (&values)[2]) {
  const uint32_t halves = e5m2_as_f16x2(spread_pair(pair));
  values[0] = ptx::cvt_f32_f16(uint16_t(halves));
  values[1] = ptx::cvt_f32_f16(uint16_t(halves >> 16));
}

__device__ __forceinline__ uint32_t bf16_code(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded;
}

__device__ __forceinline__ uint32_t pack_bf16(float high, float low) {
  if constexpr (kHasPairConversions)
    return ptx::cvt_rn_bf16x2_f32(high, low);
  else
    return bf16_code(high) << 16 | bf16_code(low);
}

__device__ __forceinline__ uint32_t pack_f16(float high, float low) {
  if constexpr (kHasPairConversions)
    return ptx::cvt_rn_f16x2_f32(high, low);
  else
    return uint32_t(ptx::cvt_rn_f16_f32(high)) << 16 | ptx::cvt_rn_f16_f32(low);
}

}  // namespace torchext
