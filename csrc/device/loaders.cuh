// Loads FP32 values from arrays whose wide dtype (FP32, BF16 or FP16) is known only at run time.
#pragma once

#include "../runtime/tensor.h"
#include "conversions.cuh"

namespace torchext {

// Calls body(load), where load(data, i) reads element i of an array of `dtype` as FP32: one branch
// for all the loads in `body`.
template <class Body>
__device__ __forceinline__ void with_loader(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::Float)
    body([](const void* data, int64_t i) { return static_cast<const float*>(data)[i]; });
  else if (dtype == ScalarType::BFloat16)
    body([](const void* data, int64_t i) {
      return ptx::cvt_f32_bf16(static_cast<const uint16_t*>(data)[i]);
    });
  else
    body([](const void* data, int64_t i) {
      return ptx::cvt_f32_f16(static_cast<const uint16_t*>(data)[i]);
    });
}

// Packs two FP32 values as BF16, or as FP16 for every other dtype; `low` is in the low half.
__device__ __forceinline__ uint32_t pack_16bit(ScalarType dtype, float low, float high) {
  return dtype == ScalarType::BFloat16 ? pack_bf16(high, low) : pack_f16(high, low);
}

}  // namespace torchext
