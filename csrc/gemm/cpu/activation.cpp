// Implements activation.h: activations in FP32, as vector code, then 1x128 quantization.
#include "activation.h"

#include <algorithm>

#include "../../cpu/kernels.h"
#include "../../runtime/activation_math.h"
#include "../../runtime/cpu.h"
#include "../../runtime/formats.h"

namespace torchext {
namespace {

using activation_math::Curve;
using activation_math::Function;

template <Function function>
struct Activate {
  static void run(const Sums& sums, int64_t rows, int64_t cols) {
    const float* __restrict bias = sums.bias;
    for (int64_t i = 0; i < rows; ++i) {
      float* __restrict x = sums.x + i * sums.stride;
      for (int64_t j = 0; j < cols; ++j) x[j] = Curve<function>::value(x[j] + bias[j]);
    }
  }
};

struct ActivateSwiGLU {
  static void run(const Sums& sums, int64_t rows, int64_t cols) {
    const float* __restrict bias = sums.bias, * __restrict up_bias = sums.up_bias;
    for (int64_t i = 0; i < rows; ++i) {
      float* __restrict gate = sums.x + i * sums.stride;
      const float* __restrict up = sums.up + i * sums.stride;
      for (int64_t j = 0; j < cols; ++j)
        gate[j] = Curve<Function::kSiLU>::value(gate[j] + bias[j]) * (up[j] + up_bias[j]);
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
      run_vectorized<Activate<Function::kGELU>>(sums, rows, cols);
      break;
    case Activation::kGELUTanh:
      run_vectorized<Activate<Function::kGELUTanh>>(sums, rows, cols);
      break;
    case Activation::kReLU2:
      run_vectorized<Activate<Function::kReLU2>>(sums, rows, cols);
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
