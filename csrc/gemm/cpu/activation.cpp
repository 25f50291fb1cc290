// Implements activation.h: activations in FP32, as vector code, then 1x128 quantization.
#include "activation.h"

#include <algorithm>

#include "../../cpu/kernels.h"
#include "../../runtime/cpu.h"
#include "../../runtime/formats.h"

namespace torchext {
namespace {

// e^x to about one unit in the last place; NaN stays NaN. It is 2^n e^r with |r| <= ln(2) / 2. The
// polynomials of this file were fitted for it, to minimize the largest error. 2^n is computed as
// two powers of two, since n goes down to -150.
float exponential(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding and subtracting it rounds to an integer
  constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
  x = std::min(std::max(x, -104.0f), 89.0f);
  const float n = x * 0x1.715476p0f + kRound - kRound;
  const float r = x - n * kLn2High - n * kLn2Low;
  float p = 0x1.6a24dcp-10f;
  p = p * r + 0x1.123a5cp-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.55549p-3f;
  p = p * r + 0x1.fffffcp-2f;
  const float y = p * r * r + r + 1.0f;
  const int whole = int(n), half = whole / 2;
  return y * float_of(uint32_t(127 + half) << 23) * float_of(uint32_t(127 + whole - half) << 23);
}

float sigmoid(float x) {
  return 1.0f / (1.0f + exponential(-x));
}

// 1 - erf(z) for z >= 0, as t e^(P(t) - z^2) with t = 1 / (1 + 0.47 z).
float complementary_error(float z) {
  const float t = 1.0f / (1.0f + 0.47f * z);
  float p = 0.178485796f;
  p = p * t - 0.948476791f;
  p = p * t + 1.97634411f;
  p = p * t - 1.93929887f;
  p = p * t + 0.892103374f;
  p = p * t - 0.400704563f;
  p = p * t + 0.188747481f;
  p = p * t + 0.379490584f;
  p = p * t + 1.00071704f;
  p = p * t - 1.32740808f;
  return t * exponential(p - z * z);
}

struct GELU {
  // x times the mass of the normal distribution below x; for x > 0, one minus the mass above x.
  static float apply(float x) {
    const float tail = 0.5f * complementary_error(std::abs(x) * 0x1.6a09e6p-1f);
    const uint32_t mass = select(x < 0, bits_of(tail), bits_of(1.0f - tail));
    return x * float_of(mass);
  }
};

struct GELUTanh {
  static float apply(float x) {  // (1 + tanh u) / 2 = sigmoid(2 u)
    return x * sigmoid(0x1.988454p0f * (x + 0x1.6e4e26p-5f * x * x * x));
  }
};

struct ReLU2 {
  static float apply(float x) {
    const float positive = std::max(x, 0.0f);  // keeps NaN
    return positive * positive;
  }
};

template <class Function>
struct Activate {
  static void run(const Sums& sums, int64_t rows, int64_t cols) {
    const float* __restrict bias = sums.bias;
    for (int64_t i = 0; i < rows; ++i) {
      float* __restrict x = sums.x + i * sums.stride;
      for (int64_t j = 0; j < cols; ++j) x[j] = Function::apply(x[j] + bias[j]);
    }
  }
};

struct ActivateSwiGLU {
  static void run(const Sums& sums, int64_t rows, int64_t cols) {
    const float* __restrict bias = sums.bias, * __restrict up_bias = sums.up_bias;
    for (int64_t i = 0; i < rows; ++i) {
      float* __restrict gate = sums.x + i * sums.stride;
      const float* __restrict up = sums.up + i * sums.stride;
      for (int64_t j = 0; j < cols; ++j) {
        const float x = gate[j] + bias[j];
        gate[j] = x * sigmoid(x) * (up[j] + up_bias[j]);
      }
    }
  }
};

}  // namespace

void activate_and_quantize_cpu(const GemmProblem& p, const Sums& sums, int64_t row, int64_t rows,
                               int64_t col, int64_t cols) {
  switch (p.activation) {
    case Activation::kNone:
      break;
    case Activation::kSwiGLU:
      run_vectorized<ActivateSwiGLU>(sums, rows, cols);
      break;
    case Activation::kGELU:
      run_vectorized<Activate<GELU>>(sums, rows, cols);
      break;
    case Activation::kGELUTanh:
      run_vectorized<Activate<GELUTanh>>(sums, rows, cols);
      break;
    case Activation::kReLU2:
      run_vectorized<Activate<ReLU2>>(sums, rows, cols);
  }
  const bool e5m2 = p.out_dtype == ScalarType::Float8_e5m2;
  const auto quantize = cpu::kernels().quantize[cpu::dtype_index(ScalarType::Float)][e5m2].groups;
  uint8_t* data = static_cast<uint8_t*>(p.out) + row * p.out_stride + col;
  float* scale = p.out_scale + row + col / kScaleGroup * p.out_scale_column_block;
  for (int64_t j = 0; j < cols; j += kScaleGroup)
    quantize(sums.x + j, sums.stride, int(rows), int(std::min(kScaleGroup, cols - j)),
             cpu::dropped_mantissa({e5m2, p.pow2_scale}), data + j, p.out_stride,
             scale + j / kScaleGroup * p.out_scale_column_block, 1, cpu::Ahead(), false);
}

}  // namespace torchext
