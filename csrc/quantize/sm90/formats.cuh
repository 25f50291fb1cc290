// The element formats of the quantisers. An input format says how 32-bit words hold its elements
// and how magnitudes are compared without leaving those words (as integers: NaN and Inf come out
// largest); an output format packs FP32 values into FP8. The type names are the suffixes of kernel
// names.
#pragma once

#include "../../../ptx/isa/convert.h"
#include "../quantize.h"
#include "numbers.cuh"

namespace torchext::sm90 {

struct bf16 {
  static constexpr ScalarType kDtype = ScalarType::BFloat16;
  static constexpr int kPerWord = 2;
  static constexpr bool kLifts = true;  // scales below 2^-64 occur
  static constexpr uint32_t kMagnitude = 0x7fff7fff;

  static __device__ float element(uint32_t word, int i) {
    return float_of(i == 0 ? word << 16 : word & 0xffff0000);
  }
  static __device__ uint32_t larger(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
  static __device__ uint32_t pack(float high, float low) {
    return ptx::cvt_rn_bf16x2_f32(high, low);
  }
};

struct f16 {
  static constexpr ScalarType kDtype = ScalarType::Half;
  static constexpr int kPerWord = 2;
  static constexpr bool kLifts = false;
  static constexpr uint32_t kMagnitude = 0x7fff7fff;

  static __device__ float element(uint32_t word, int i) {
    return ptx::cvt_f32_f16(uint16_t(i == 0 ? word : word >> 16));
  }
  static __device__ uint32_t larger(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
  static __device__ uint32_t pack(float high, float low) {
    return ptx::cvt_rn_f16x2_f32(high, low);
  }
};

struct f32 {
  static constexpr ScalarType kDtype = ScalarType::Float;
  static constexpr int kPerWord = 1;
  static constexpr bool kLifts = true;
  static constexpr uint32_t kMagnitude = 0x7fffffff;

  static __device__ float element(uint32_t word, int) { return float_of(word); }
  static __device__ uint32_t larger(uint32_t a, uint32_t b) { return max(a, b); }
};

struct e4m3 {
  static constexpr bool kE5m2 = false;
  static constexpr float kMax = 448.0f;

  static __device__ uint16_t pack(float high, float low) {
    return ptx::cvt_rn_satfinite_e4m3x2_f32(high, low);
  }
  static __device__ uint32_t unpack_f16x2(uint16_t pair) { return ptx::cvt_rn_f16x2_e4m3x2(pair); }
};

struct e5m2 {
  static constexpr bool kE5m2 = true;
  static constexpr float kMax = 57344.0f;

  static __device__ uint16_t pack(float high, float low) {
    return ptx::cvt_rn_satfinite_e5m2x2_f32(high, low);
  }
  static __device__ uint32_t unpack_f16x2(uint16_t pair) { return ptx::cvt_rn_f16x2_e5m2x2(pair); }
};

// 16 consecutive elements of a row: what a lane handles at a time.
template <class In>
struct Elements16 {
  static constexpr int kWords = 16 / In::kPerWord;
  uint32_t words[kWords];

  __device__ float at(int i) const {
    return In::element(words[i / In::kPerWord], i % In::kPerWord);
  }
};

// Magnitudes are reduced word by word (each position within the word by itself), then
// `amax_bits` takes the FP32 bits of the largest position.
template <class In>
__device__ uint32_t magnitudes(const Elements16<In>& e) {
  uint32_t largest = 0;
#pragma unroll
  for (uint32_t word : e.words) largest = In::larger(largest, word & In::kMagnitude);
  return largest;
}

template <class In>
__device__ uint32_t amax_bits(uint32_t magnitudes) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < In::kPerWord; ++i)
    largest = max(largest, bits_of(In::element(magnitudes, i)));
  return largest;
}

// Over the `lanes` neighbouring lanes (a power of two) that share a group; all of them get it.
template <class In>
__device__ uint32_t reduce_magnitudes(uint32_t magnitudes, int lanes) {
#pragma unroll
  for (int distance = 1; distance < lanes; distance *= 2)
    magnitudes = In::larger(magnitudes, __shfl_xor_sync(~0u, magnitudes, distance));
  return magnitudes;
}

template <class Out>
__device__ uint32_t pack4(float x0, float x1, float x2, float x3) {
  return Out::pack(x1, x0) | uint32_t(Out::pack(x3, x2)) << 16;
}

template <class In, class Out>
__device__ uint4 quantize16(const Elements16<In>& e, const GroupScale& scale) {
  uint32_t packed[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = divide<In::kLifts>(e.at(4 * i + j), scale);
    packed[i] = pack4<Out>(x[0], x[1], x[2], x[3]);
  }
  return {packed[0], packed[1], packed[2], packed[3]};
}

}  // namespace torchext::sm90

// Every (input, output) pair for which a quantiser exists.
#define TORCHEXT_SM90_QUANTIZERS(APPLY)                           \
  APPLY(bf16, e4m3) APPLY(f16, e4m3) APPLY(f32, e4m3)             \
  APPLY(bf16, e5m2) APPLY(f16, e5m2) APPLY(f32, e5m2)
