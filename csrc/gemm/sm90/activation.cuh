// The epilogue that applies an activation and quantizes. Four neighboring lanes hold the 128
// columns of a row, one scale group of the output, in FP32. Together they find its largest
// magnitude; then each quantizes its values as quantize_1x128 does. TMA stores the FP8 data; one
// lane of the four stores the scale.
#pragma once

#include "../../device/activations.cuh"
#include "../../device/numbers.cuh"
#include "epilogue.cuh"

namespace torchext::sm90 {

using quantizers::divide, quantizers::fp8_max, quantizers::GroupScale, quantizers::kMantissa,
    quantizers::scale_of;

// Stores a box of FP8 data byte by byte, for a number of columns that TMA cannot store.
template <class L>
__device__ void store_box_directly(const GemmParams& p, const Work& work, const ThreadCoord& at,
                                   const uint8_t* box) {
  const uint32_t first = first_row_of<L>(work, at, 0);
  const uint32_t columns = work.n < p.n ? min(p.n - work.n, uint32_t(kSwizzleBytes)) : 0;
  for (uint32_t i = at.thread(); i < 64 * kSwizzleBytes; i += 128) {
    const uint32_t r = i / kSwizzleBytes, c = i % kSwizzleBytes;
    if (first + r >= work.m_end || c >= columns) continue;
    const uint32_t at_box = r * kSwizzleBytes + ((c / 16) ^ (r % 8)) * 16 + c % 16;
    static_cast<uint8_t*>(p.out)[out_offset(p, work, first + r) + work.n + c] = box[at_box];
  }
}

template <class L>
__device__ __forceinline__ void activate_and_store(const GemmParams& p, Shared<L>& shared,
                                                   const Work& work, const ThreadCoord& at,
                                                   float (&total)[L::kBlocks][L::kRegisters]) {
  const uint32_t row = first_row_of<L>(work, at, 0) + at.row();
  float (&y)[L::kRegisters] = total[0];
  uint32_t largest[2] = {};
#pragma unroll
  for (int i = 0; i < L::kRegisters; ++i) {
    if constexpr (L::kGated)
      y[i] = swiglu_approximate(y[i], total[L::kBlocks - 1][i]);
    else
      y[i] = activate_approximate(p.activation, y[i]);
    // Columns past the last do not count: in a gate's tile they hold the first rows of up.
    if (work.n + at.column() + at.column_of(i) < p.n)
      largest[i / 2 % 2] = max(largest[i / 2 % 2], __float_as_uint(y[i]) & 0x7fffffff);
  }
  const bool e5m2 = p.out_dtype == ScalarType::Float8_e5m2;
  GroupScale scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    largest[h] = max(largest[h], __shfl_xor_sync(~0u, largest[h], 1));
    largest[h] = max(largest[h], __shfl_xor_sync(~0u, largest[h], 2));
    scale[h] = scale_of(largest[h], fp8_max(e5m2), p.pow2_scale ? kMantissa : 0);
    // In a pair, the second CTA's tile may lie past the last column.
    if (at.lane % 4 == 0 && row + 8 * h < work.m_end && work.n < p.n)
      p.out_scale[row + 8 * h + work.n / kScaleGroup * p.out_scale_column_block] = scale[h].scale;
  }
  TmaStore<L::kStoreBoxes> store{shared.store[at.warpgroup]};
  const uint8_t* ready = store.filled(at, [&](uint32_t box) {
#pragma unroll
    for (int i = 0; i < L::kRegisters; i += 2) {
      const GroupScale& s = scale[i / 2 % 2];
      const float low = divide(y[i] * s.lift, s), high = divide(y[i + 1] * s.lift, s);
      const uint16_t pair = pack_fp8(e5m2, high, low);
      const uint32_t r = at.row() + at.row_of(i), c = at.column() + at.column_of(i);
      ptx::st_shared_u16(box + r * kSwizzleBytes + ((c / 16) ^ (r % 8)) * 16 + c % 16, pair);
    }
  });
  if (p.out_by_tma)
    store.send(OutTarget{p, work}, at, work.n, first_row_of<L>(work, at, 0), ready);
  else
    store_box_directly<L>(p, work, at, ready);
}

}  // namespace torchext::sm90
