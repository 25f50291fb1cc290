// Element formats as types, and 16 elements of a row in registers. An input format says how 32-bit
// words hold its elements and how to compare magnitudes within those words. The comparison is of
// integers, which makes Inf and NaN the largest. An output format packs FP32 values into FP8. The
// type names are the suffixes of kernel names.
#pragma once

#include "../runtime/tensor.h"
#include "conversions.cuh"
#include "numbers.cuh"

namespace torchext::quantizers {

struct bf16 {
  static constexpr ScalarType kDtype = ScalarType::BFloat16;
  static constexpr int kPerWord = 2;
  static constexpr bool kLifts =
      true;  // scales can be so small that x must be lifted (numbers.cuh)
  static constexpr uint32_t kMagnitude = 0x7fff7fff;

  static __device__ float element(uint32_t word, int i) {
    return float_of(i == 0 ? word << 16 : word & 0xffff0000);
  }
  static __device__ uint32_t larger(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
  static __device__ uint32_t pack(float high, float low) { return pack_bf16(high, low); }
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
  static __device__ uint32_t pack(float high, float low) { return pack_f16(high, low); }
};

struct f32 {
  static constexpr ScalarType kDtype = ScalarType::Float;
  static constexpr int kPerWord = 1;
  static constexpr bool kLifts = true;
  static constexpr uint32_t kMagnitude = 0x7fffffff;

  static __device__ float element(uint32_t word, int) { return float_of(word); }
  static __device__ uint32_t larger(uint32_t a, uint32_t b) { return max(a, b); }
};

// FP8 data of either format, as loads see it.
struct fp8 {
  static constexpr int kPerWord = 4;
};

struct e4m3 {
  static constexpr bool kE5m2 = false;
  static constexpr float kMax = fp8_max(kE5m2);

  static __device__ uint16_t pack(float high, float low) { return pack_e4m3(high, low); }
  static __device__ void unpack(uint16_t pair, float (&values)[2]) { unpack_e4m3(pair, values); }
};

struct e5m2 {
  static constexpr bool kE5m2 = true;
  static constexpr float kMax = fp8_max(kE5m2);

  static __device__ uint16_t pack(float high, float low) { return pack_e5m2(high, low); }
  static __device__ void unpack(uint16_t pair, float (&values)[2]) { unpack_e5m2(pair, values); }
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

// 16 FP32 values of neighboring columns.
struct Values16 {
  float at[16];
};

template <class In>
__device__ Values16 widened(const Elements16<In>& e) {
  Values16 v;
#pragma unroll
  for (int i = 0; i < 16; ++i) v.at[i] = e.at(i);
  return v;
}

// Rounds to the format.
template <class In>
__device__ Elements16<In> narrowed(const Values16& v) {
  Elements16<In> e;
#pragma unroll
  for (int i = 0; i < Elements16<In>::kWords; ++i) {
    if constexpr (In::kPerWord == 2)
      e.words[i] = In::pack(v.at[2 * i + 1], v.at[2 * i]);
    else
      e.words[i] = bits_of(v.at[i]);
  }
  return e;
}

// The largest magnitudes of 16 elements, one for each position within a word; `amax_bits` then
// gives the FP32 bits of the largest of these positions.
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

// Reduces magnitudes over the `lanes` neighboring lanes (a power of two) that share a scale; all of
// them get the result.
template <class In>
__device__ uint32_t reduce_magnitudes(uint32_t magnitudes, int lanes) {
#pragma unroll
  for (int distance = 1; distance < lanes; distance *= 2)
    magnitudes = In::larger(magnitudes, __shfl_xor_sync(~0u, magnitudes, distance));
  return magnitudes;
}

// The scale that lane number `lane` of `lanes` neighboring lanes computed.
template <class In>
__device__ GroupScale from_lane(const GroupScale& s, int lane, int lanes) {
  return {__shfl_sync(~0u, s.scale, lane, lanes),
          In::kLifts ? __shfl_sync(~0u, s.lift, lane, lanes) : 1.0f,
          __shfl_sync(~0u, s.divisor, lane, lanes), __shfl_sync(~0u, s.reciprocal, lane, lanes)};
}

// Quantizes the 16 values x(i), which have been multiplied by s.lift, to FP8.
template <class Out, class Value>
__device__ uint4 divide16(Value x, const GroupScale& s) {
  uint32_t packed[4];
#pragma unroll
  for (int i = 0; i < 16; i += 4)
    packed[i / 4] = Out::pack(divide(x(i + 1), s), divide(x(i), s)) |
                    uint32_t(Out::pack(divide(x(i + 3), s), divide(x(i + 2), s))) << 16;
  return {packed[0], packed[1], packed[2], packed[3]};
}

// Quantizes the 16 values x(i), which come from elements of format In, to FP8.
template <class In, class Out, class Value>
__device__ uint4 quantize16(Value x, const GroupScale& s) {
  if (In::kLifts && s.lift != 1.0f) return divide16<Out>([&](int i) { return x(i) * s.lift; }, s);
  return divide16<Out>(x, s);
}

template <class In, class Out>
__device__ uint4 quantize16(const Elements16<In>& e, const GroupScale& s) {
  return quantize16<In, Out>([&](int i) { return e.at(i); }, s);
}

}  // namespace torchext::quantizers

// Every input, and every (input, output) pair, for which a quantizer exists.
// clang-format off
#define TORCHEXT_INPUTS(APPLY) APPLY(bf16) APPLY(f16) APPLY(f32)
#define TORCHEXT_QUANTIZERS(APPLY)               \
  APPLY(bf16, e4m3) APPLY(f16, e4m3) APPLY(f32, e4m3) \
  APPLY(bf16, e5m2) APPLY(f16, e5m2) APPLY(f32, e5m2)
// clang-format on
