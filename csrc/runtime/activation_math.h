// Activation functions and their derivatives in FP32, with the same bits on every CPU and GPU.
//
// The rules that give the same bits: only operations that IEEE 754 rounds correctly (fused
// multiply-add, +, *, /); where a product is added, the multiply-add is written out, so that no
// compiler may choose; no function of a math library. On a CPU, loops over these functions become
// vector code. A machine without fused multiply-add (x86-64 before AVX2) computes it in software,
// slowly. Polynomials were fitted to minimize the largest relative error. Errors:
// docs/numerics.md.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TORCHEXT_MATH __host__ __device__ __forceinline__
#else
#define TORCHEXT_MATH inline
#endif

namespace torchext::activation_math {

// The activations of one operand; a gated activation is value(gate) * up.
enum class Function { kSiLU, kGELU, kGELUTanh, kReLU2 };

TORCHEXT_MATH float fma(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

TORCHEXT_MATH float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

TORCHEXT_MATH float subtract(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

TORCHEXT_MATH float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __frcp_rn(x);
#else
  return 1.0f / x;
#endif
}

TORCHEXT_MATH uint32_t bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t result;
  std::memcpy(&result, &value, sizeof result);
  return result;
#endif
}

TORCHEXT_MATH float from_bits(uint32_t value) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(value);
#else
  float result;
  std::memcpy(&result, &value, sizeof result);
  return result;
#endif
}

// condition ? a : b. On a CPU by arithmetic: GCC does not vectorize what it moves into a branch.
TORCHEXT_MATH float select(bool condition, float a, float b) {
#ifdef __CUDA_ARCH__
  return condition ? a : b;
#else
  const uint32_t mask = -uint32_t(condition);
  return from_bits((bits(a) & mask) | (bits(b) & ~mask));
#endif
}

// min(max(x, least), most); NaN stays NaN.
TORCHEXT_MATH float clamp(float x, float least, float most) {
  x = select(x < least, least, x);
  return select(x > most, most, x);
}

// e^x as a product, which is 0 for x < -87.7 and Inf for x > 88.4.
struct Exponential {
  float significand, power;  // between 0.7 and 1.42; a power of two, 0 or Inf
};

// x = n ln(2) + r with |r| <= ln(2) / 2; the significand is e^r. The sum `shifted` rounds n to an
// integer and has n + 127, the biased exponent of 2^n, in its low bits.
TORCHEXT_MATH Exponential exponential(float x) {
  constexpr float kShift = 0x1.8p23f + 127;
  x = clamp(x, -88.0f, 89.0f);
  const float shifted = fma(x, 0x1.715476p0f, kShift);
  const float n = subtract(shifted, kShift);
  float r = fma(n, -0x1.62e43p-1f, x);
  r = fma(n, 0x1.05c61p-29f, r);
  float p = 0x1.6a24dcp-10f;
  p = fma(p, r, 0x1.123a5cp-7f);
  p = fma(p, r, 0x1.5558f2p-5f);
  p = fma(p, r, 0x1.55549p-3f);
  p = fma(p, r, 0x1.fffffcp-2f);
  p = fma(p, r, 1.0f);
  return {fma(p, r, 1.0f), from_bits(bits(shifted) << 23)};
}

TORCHEXT_MATH float sigmoid(float x) {
  const Exponential e = exponential(-x);
  return reciprocal(fma(e.significand, e.power, 1.0f));
}

// The standard normal distribution: its mass below x, and e^(-x^2 / 2).
struct Normal {
  float mass, exponential;
};

// The mass beyond |x| is t Q(t) e^(-x^2 / 2) with t = 1 / (1 + 0.4 |x| / sqrt(2)).
TORCHEXT_MATH Normal normal(float x) {
  const Exponential e = exponential(multiply(multiply(-0.5f, x), x));
  const float density = multiply(e.significand, e.power);
  const float t = reciprocal(fma(0x1.21a186p-2f, select(x < 0, -x, x), 1.0f));
  float q = 0x1.4b92a6p-6f;
  q = fma(q, t, -0x1.178adcp-4f);
  q = fma(q, t, 0x1.3742ccp-5f);
  q = fma(q, t, 0x1.8e4008p-5f);
  q = fma(q, t, 0x1.2c1af4p-5f);
  q = fma(q, t, 0x1.91d05ap-4f);
  q = fma(q, t, 0x1.9bf90ep-4f);
  q = fma(q, t, 0x1.cff7dep-4f);
  q = fma(q, t, 0x1.ce1612p-4f);
  q = multiply(q, t);
  return {select(x < 0, multiply(q, density), fma(-q, density, 1.0f)), density};
}

// ---- activations: value(x), and slope(x) = d value / dx ----

template <Function>
struct Curve;

template <>
struct Curve<Function::kSiLU> {
  static TORCHEXT_MATH float value(float x) { return multiply(x, sigmoid(x)); }
  static TORCHEXT_MATH float slope(float x) {
    const float s = sigmoid(x);
    return multiply(s, fma(x, subtract(1.0f, s), 1.0f));
  }
};

template <>
struct Curve<Function::kGELU> {
  static TORCHEXT_MATH float value(float x) { return multiply(x, normal(x).mass); }
  static TORCHEXT_MATH float slope(float x) {
    const Normal n = normal(x);
    return fma(x, multiply(0x1.988454p-2f, n.exponential), n.mass);  // 1 / sqrt(2 pi)
  }
};

// (1 + tanh u) / 2 = sigmoid(2 u), where 2 u = x (a + b x^2).
template <>
struct Curve<Function::kGELUTanh> {
  static constexpr float kA = 0x1.988454p0f, kB = 0x1.2444f2p-4f, kThreeB = 0x1.b6676cp-3f;

  static TORCHEXT_MATH float value(float x) {
    return multiply(x, sigmoid(multiply(x, fma(kB, multiply(x, x), kA))));
  }
  // Beyond 64 the slope is 0 or 1. The clamp keeps x^2 and x^3 finite.
  static TORCHEXT_MATH float slope(float x) {
    x = clamp(x, -64.0f, 64.0f);
    const float square = multiply(x, x);
    const float s = sigmoid(multiply(x, fma(kB, square, kA)));
    return multiply(s, fma(multiply(x, fma(kThreeB, square, kA)), subtract(1.0f, s), 1.0f));
  }
};

template <>
struct Curve<Function::kReLU2> {
  static TORCHEXT_MATH float positive(float x) { return select(x < 0, 0.0f, x); }  // keeps NaN
  static TORCHEXT_MATH float value(float x) { return multiply(positive(x), positive(x)); }
  static TORCHEXT_MATH float slope(float x) { return multiply(2.0f, positive(x)); }
};

}  // namespace torchext::activation_math
