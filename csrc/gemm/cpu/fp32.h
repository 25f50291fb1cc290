// Instructions for Loops that multiply in FP32, on vectors of kLanes_ floats (a GNU extension:
// the compiler chooses the instructions). Include it after the level's pragma.
#pragma once

#include "loops.h"

namespace torchext::cpu_gemm {

// Codes of a small format in 32-bit lanes to FP32: SmallFloat::to_float for vectors.
template <class Number, class Floats, class Words>
inline Floats to_floats(Words code) {
  constexpr uint32_t kUnit = uint32_t(151 - Number::kExponentBias - Number::kFraction) << 23;
  const Words magnitude = code & (Number::kSign - 1);
  const Words normal =
      (magnitude << (23 - Number::kFraction)) + (uint32_t(127 - Number::kExponentBias) << 23);
  const Words unit = Words{} + kUnit;
  const Words subnormal = Words(Floats(unit + magnitude) - Floats(unit));
  const Words is_subnormal = Words(magnitude < (1u << Number::kFraction));
  const Words is_special = Words(magnitude >= Number::kSpecialCode);
  const Words finite = (is_subnormal & subnormal) | (~is_subnormal & normal);
  return Floats(finite | (is_special & kInfinityBits) |
                (code & Number::kSign) << (32 - 8 * sizeof(typename Number::Bits)));
}

template <int kLanes>
struct Lanes;
template <>
struct Lanes<4> {
  typedef float Floats __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
};
template <>
struct Lanes<8> {
  typedef float Floats __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(32)));
};
template <>
struct Lanes<16> {
  typedef float Floats __attribute__((vector_size(64)));
  typedef uint32_t Words __attribute__((vector_size(64)));
};

// Level_ only makes the type, and so the code that it instantiates, unique to a level.
template <class Level_, int kLanes_, int kVectors_, int kTileRows_>
struct FP32 {
  static constexpr int kLanes = kLanes_, kVectors = kVectors_, kTileRows = kTileRows_;
  static constexpr int kPair = 1, kPanel = kLanes * kVectors, kChunk = 8;
  using Element = float;
  using Step = float;
  using Vector = typename Lanes<kLanes_>::Floats;
  using Words = typename Lanes<kLanes_>::Words;
  using Operands = Vector;

  static Vector load(const float* x) { return load_floats(x); }
  static Vector load_floats(const float* x) {
    Vector v;
    std::memcpy(&v, x, sizeof v);
    return v;
  }
  static void store_floats(float* x, Vector v) { std::memcpy(x, &v, sizeof v); }
  static Vector broadcast(const float* x) { return *x - Vector{}; }
  static Vector dot(Vector sum, Vector a, Vector b) { return a * b + sum; }
  static Vector add_scaled(Vector total, Vector sum, float a_scale, Vector b_scale) {
    return sum * (a_scale * b_scale) + total;
  }

  static bool pack_tile(const Operand&, const Rows&, int64_t, int, float*) { return false; }

  template <class Number>
  static void widen(const void* row, int64_t column, int count, float* out) {
    const auto* from = static_cast<const typename Number::Bits*>(row) + column;
    for (int i = 0; i < count; ++i) out[i] = Number::to_float(from[i]);
  }

  static float pack_row(const Operand& a, int64_t row, int64_t column, int count, float* steps) {
    const int64_t first = row * a.stride + column;
    switch (a.format) {
      case Format::e4m3:
        widen<E4M3>(a.data, first, count, steps);
        break;
      case Format::e5m2:
        widen<E5M2>(a.data, first, count, steps);
        break;
      case Format::bf16:
        widen<BFloat16>(a.data, first, count, steps);
        break;
      case Format::fp16:
        widen<Half>(a.data, first, count, steps);
        break;
      case Format::fp32:
        widen<Float>(a.data, first, count, steps);
    }
    std::fill(steps + count, steps + Depth::kSegment, 0.0f);
    return 1;
  }

  template <class Number>
  static void pack_vector(const uint8_t* rows, int64_t stride, int count, int depth, float* out) {
    for (int k = 0; k < depth; k += 4) {
      Words codes = {};  // four codes of K in every lane
      const int size = depth - k < 4 ? depth - k : 4;
      for (int lane = 0; lane < count; ++lane) {
        uint32_t code = 0;
        if (size == 4)
          std::memcpy(&code, rows + lane * stride + k, 4);
        else
          std::memcpy(&code, rows + lane * stride + k, size);
        codes[lane] = code;
      }
      for (int i = 0; i < 4; ++i)
        store_floats(out + (k + i) * kPanel,
                     to_floats<Number, Vector>((codes >> (8 * i)) & Words(Words{} + 0xff)));
    }
  }

  static void pack_panel(const Operand& b, int64_t row, int rows, int64_t column, int depth,
                         float* out) {
    for (int v = 0; v < kVectors; ++v) {
      const int count = std::min(kLanes, rows - v * kLanes);
      const auto* from =
          static_cast<const uint8_t*>(b.data) + (row + v * kLanes) * b.stride + column;
      if (b.format == Format::e5m2)
        pack_vector<E5M2>(from, b.stride, count, depth, out + v * kLanes);
      else
        pack_vector<E4M3>(from, b.stride, count, depth, out + v * kLanes);
    }
  }
};

}  // namespace torchext::cpu_gemm
