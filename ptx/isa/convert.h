// FP32 to FP8 and back, two at a time (PTX ISA "cvt"; PTX 7.8, sm_89; sm_80 lacks it). Rounding is
// to nearest even; .satfinite clamps to the largest finite value, keeps the sign of zero and turns
// NaN into 0x7f. Where a target lacks an instruction, csrc/device/conversions.cuh computes its
// result with integer arithmetic.
#pragma once

#include "common.h"

namespace ptx {

// The low byte is `low`, the high byte `high`.
TORCHEXT_PTX uint16_t cvt_rn_satfinite_e4m3x2_f32(float high, float low) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

TORCHEXT_PTX uint16_t cvt_rn_satfinite_e5m2x2_f32(float high, float low) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

// Two packed e4m3 values to two packed f16 values; exact. (An e5m2 is the upper byte of an f16.)
TORCHEXT_PTX uint32_t cvt_rn_f16x2_e4m3x2(uint16_t packed) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(packed));
  return halves;
}

// Two FP32 values to packed 16-bit ones (PTX 7.0, sm_80); the low half is `low`. NaN becomes the
// canonical NaN 0x7fff.
TORCHEXT_PTX uint32_t cvt_rn_bf16x2_f32(float high, float low) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

TORCHEXT_PTX uint32_t cvt_rn_f16x2_f32(float high, float low) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// One FP32 value to f16, on every architecture. NaN becomes 0x7fff.
TORCHEXT_PTX uint16_t cvt_rn_f16_f32(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

TORCHEXT_PTX float cvt_f32_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Helper, a shift: a bf16 is the upper half of an FP32.
TORCHEXT_PTX float cvt_f32_bf16(uint16_t bits) {
  return __uint_as_float(uint32_t(bits) << 16);
}

}  // namespace ptx
