// Host entries of the GEMM ops that apply an activation and quantize. Their results have the layout
// of quantize_1x128.
#include "../runtime/check.h"
#include "../runtime/layout.h"
#include "operands.h"

namespace torchext {
namespace {

using Quantized = std::tuple<Tensor, Tensor>;

Quantized activated(const GemmCall& call, Activation activation, std::optional<ScalarType> dtype,
                    bool pow2_scale) {
  GemmProblem p = check_operands(call, Grouping::kNone);
  const bool gated = activation == Activation::kSwiGLU;
  TORCHEXT_CHECK_VALUE(!gated || p.n % 2 == 0, call.op,
                       ": b must have an even number of rows, those of the gate and then those of "
                       "up (got ",
                       shape_string(call.b), ")");
  p.activation = activation;
  p.pow2_scale = pow2_scale;
  p.out_dtype = check_fp8_dtype(call.op, dtype);
  const int64_t width = gated ? p.n / 2 : p.n;
  std::vector<int64_t> sizes = sizes_of(call.a);
  sizes.back() = width;
  const Tensor data = empty_data(sizes, p.out_dtype, call.a);
  const Tensor scale = empty_group_scale(sizes, call.a);
  p.out = data.data_ptr();
  p.out_stride = round_up(width, 16);
  p.out_scale = static_cast<float*>(scale.data_ptr());
  p.out_scale_column_block = round_up(p.m, 4);
  run(call, p, data, nullptr, &scale);
  return {data, scale};
}

}  // namespace

Quantized fp8_gemm_nt_swiglu_quantize(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                      const Tensor& b_scale, std::optional<Tensor> bias,
                                      std::optional<ScalarType> dtype, bool pow2_scale,
                                      int64_t num_sms) {
  const GemmCall call{"fp8_gemm_nt_swiglu_quantize", a, a_scale, b, b_scale, bias, num_sms};
  return activated(call, Activation::kSwiGLU, dtype, pow2_scale);
}

Quantized fp8_gemm_nt_gelu_quantize(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                    const Tensor& b_scale, bool tanh_approximation,
                                    std::optional<Tensor> bias, std::optional<ScalarType> dtype,
                                    bool pow2_scale, int64_t num_sms) {
  const GemmCall call{"fp8_gemm_nt_gelu_quantize", a, a_scale, b, b_scale, bias, num_sms};
  return activated(call, tanh_approximation ? Activation::kGELUTanh : Activation::kGELU, dtype,
                   pow2_scale);
}

Quantized fp8_gemm_nt_relu2_quantize(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                     const Tensor& b_scale, std::optional<Tensor> bias,
                                     std::optional<ScalarType> dtype, bool pow2_scale,
                                     int64_t num_sms) {
  const GemmCall call{"fp8_gemm_nt_relu2_quantize", a, a_scale, b, b_scale, bias, num_sms};
  return activated(call, Activation::kReLU2, dtype, pow2_scale);
}

}  // namespace torchext
