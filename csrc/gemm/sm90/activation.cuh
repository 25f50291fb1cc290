// The epilogue of products that are activated and quantized on the way out: a thread of a quad
// holds a quarter of a group of 128 columns in FP32, so that four lanes find its largest magnitude,
// and quantize it as quantize_1x128 does. FP8 leaves by TMA, scales from registers.
#pragma once

#include "../../device/numbers.cuh"
#include "epilogue.cuh"

namespace torchext::sm90 {

using quantizers::divide, quantizers::GroupScale, quantizers::kMantissa, quantizers::scale_of;

// Within a few units in the last place (docs/numerics.md): exp by ex2.approx, a quotient by
// div.approx.
__device__ __forceinline__ float times_sigmoid(float x, float argument) {
  return __fdividef(x, 1.0f + __expf(-argument));
}

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kGELU:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::kGELUTanh:  // (1 + tanh(u)) / 2 is the sigmoid of 2 u
      return times_sigmoid(x, 1.5957691f * fmaf(0.044715f * x * x, x, x));
    default: {  // a NaN stays one
      const float positive = x < 0 ? 0 : x;
      return positive * positive;
    }
  }
}

template <class L>
__device__ __forceinline__ void activate_and_store(const GemmParams& p, Shared<L>& shared,
                                                   const Work& work, const Fragment& at,
                                                   float (&total)[L::kBlocks][L::kRegisters]) {
  const uint32_t row = first_row_of<L>(work, at, 0) + at.row();
  float (&y)[L::kRegisters] = total[0];
  uint32_t largest[2] = {};
#pragma unroll
  for (int i = 0; i < L::kRegisters; ++i) {
    if constexpr (L::kGated)
      y[i] = times_sigmoid(y[i], y[i]) * total[L::kBlocks - 1][i];
    else
      y[i] = activate(p.activation, y[i]);
    // Behind the last column there is none, though a gate's tile holds the first rows of up there.
    if (work.n + at.column() + i / 4 * 8 + i % 2 < p.n)
      largest[i / 2 % 2] = max(largest[i / 2 % 2], __float_as_uint(y[i]) & 0x7fffffff);
  }
  const bool e5m2 = p.out_dtype == ScalarType::Float8_e5m2;
  GroupScale scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    largest[h] = max(largest[h], __shfl_xor_sync(~0u, largest[h], 1));
    largest[h] = max(largest[h], __shfl_xor_sync(~0u, largest[h], 2));
    scale[h] = scale_of(largest[h], e5m2 ? 57344.0f : 448.0f, p.pow2_scale ? kMantissa : 0);
    // The other CTA of a pair may have a tile that lies behind the last column.
    if (at.lane % 4 == 0 && row + 8 * h < work.m_end && work.n < p.n)
      p.out_scale[row + 8 * h + work.n / kGroup * p.out_scale_group] = scale[h].scale;
  }
  TmaStore<L> by_tma{shared.store[at.warpgroup]};
  by_tma.send(p, work, at, work.n, first_row_of<L>(work, at, 0), [&](uint32_t box) {
#pragma unroll
    for (int i = 0; i < L::kRegisters; i += 2) {
      const GroupScale& s = scale[i / 2 % 2];
      const float low = divide(y[i] * s.lift, s), high = divide(y[i + 1] * s.lift, s);
      const uint16_t pair = e5m2 ? ptx::cvt_rn_satfinite_e5m2x2_f32(high, low)
                                 : ptx::cvt_rn_satfinite_e4m3x2_f32(high, low);
      const uint32_t r = at.row() + i / 2 % 2 * 8, c = at.column() + i / 4 * 8;
      ptx::st_shared_u16(box + r * kSwizzleBytes + ((c / 16) ^ (r % 8)) * 16 + c % 16, pair);
    }
  });
}

}  // namespace torchext::sm90
