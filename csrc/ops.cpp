// Every op of torchext, in one table: its schema, its host function, and whether it has an alias.
// The host function checks the arguments, allocates the outputs and runs the CPU kernel, the CUDA
// kernel or, under torchext.sim.simulate, the CUDA kernel on the PTX simulator. All else that torch
// must know of an op (fake kernel, gradient, ...) is in its declaration in torchext/ops.

#include <cstring>
#include <string>

#include "activation/activation.h"
#include "gemm/gemm.h"
#include "gemm/weights_only.h"
#include "linear/kept.h"
#include "linear/linear.h"
#include "moe/moe.h"
#include "norm/norm.h"
#include "quantize/quantize.h"

namespace {

using torch::stable::detail::StableLibrary;

struct Op {
  const char* schema;
  void (*kernel)(StableIValue*, uint64_t, uint64_t);
  bool has_alias = false;

  std::string name() const { return std::string(schema, std::strchr(schema, '(')); }
};

// An op that has a gradient, or writes into an argument, also has a below-autograd alias: the same
// kernel under the name with an underscore in front (torchext/_dispatch/autograd.py).
constexpr bool kHasAlias = true;

// clang-format off
const Op kOps[] = {
    // (data, scale): `scale` is the FP32 multiplier that dequantizes. dtype=None is float8_e4m3fn.
    {"quantize_1x128(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False) -> (Tensor data,"
     " Tensor scale)",
     TORCH_BOX(&torchext::quantize_1x128)},
    {"quantize_1x128_t(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
     " -> (Tensor data_t, Tensor scale_t)",
     TORCH_BOX(&torchext::quantize_1x128_t)},
    {"quantize_1x128_dual(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
     " -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t)",
     TORCH_BOX(&torchext::quantize_1x128_dual)},
    // And the FP32 sums over rows.
    {"quantize_1x128_dual_bias_grad(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
     " -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t, Tensor bias_grad)",
     TORCH_BOX(&torchext::quantize_1x128_dual_bias_grad)},
    {"quantize_128x128(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
     " -> (Tensor data, Tensor scale)",
     TORCH_BOX(&torchext::quantize_128x128)},
    {"quantize_128x128_dual(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
     " -> (Tensor data, Tensor scale, Tensor data_t)",
     TORCH_BOX(&torchext::quantize_128x128_dual)},
    {"quantize_rowwise(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
     " -> (Tensor data, Tensor scale)",
     TORCH_BOX(&torchext::quantize_rowwise)},
    {"quantize_tensorwise(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
     " -> (Tensor data, Tensor scale)",
     TORCH_BOX(&torchext::quantize_tensorwise)},
    {"dequantize(Tensor data, Tensor scale, *, ScalarType out_dtype) -> Tensor",
     TORCH_BOX(&torchext::dequantize), kHasAlias},

    // quantize_1x128(value(gate) * up), or quantize_1x128(value(x)), with FP32 in between.
    {"silu_mul_quantize_1x128(Tensor gate_up, *, ScalarType? dtype=None,"
     " bool pow2_scale=False) -> (Tensor data, Tensor scale)",
     TORCH_BOX(&torchext::silu_mul_quantize_1x128)},
    {"silu_mul_quantize_1x128_t(Tensor gate_up, *, ScalarType? dtype=None,"
     " bool pow2_scale=False) -> (Tensor data_t, Tensor scale_t)",
     TORCH_BOX(&torchext::silu_mul_quantize_1x128_t)},
    {"silu_mul_quantize_1x128_dual(Tensor gate_up, *, ScalarType? dtype=None,"
     " bool pow2_scale=False) -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t)",
     TORCH_BOX(&torchext::silu_mul_quantize_1x128_dual)},
    {"gelu_mul_quantize_1x128(Tensor gate_up, *, bool tanh_approximation=False,"
     " ScalarType? dtype=None, bool pow2_scale=False) -> (Tensor data, Tensor scale)",
     TORCH_BOX(&torchext::gelu_mul_quantize_1x128)},
    {"gelu_mul_quantize_1x128_t(Tensor gate_up, *, bool tanh_approximation=False,"
     " ScalarType? dtype=None, bool pow2_scale=False) -> (Tensor data_t, Tensor scale_t)",
     TORCH_BOX(&torchext::gelu_mul_quantize_1x128_t)},
    {"gelu_mul_quantize_1x128_dual(Tensor gate_up, *, bool tanh_approximation=False,"
     " ScalarType? dtype=None, bool pow2_scale=False) -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t)",
     TORCH_BOX(&torchext::gelu_mul_quantize_1x128_dual)},
    {"gelu_quantize_1x128(Tensor x, *, bool tanh_approximation=False,"
     " ScalarType? dtype=None, bool pow2_scale=False) -> (Tensor data, Tensor scale)",
     TORCH_BOX(&torchext::gelu_quantize_1x128)},
    {"gelu_quantize_1x128_t(Tensor x, *, bool tanh_approximation=False,"
     " ScalarType? dtype=None, bool pow2_scale=False) -> (Tensor data_t, Tensor scale_t)",
     TORCH_BOX(&torchext::gelu_quantize_1x128_t)},
    {"gelu_quantize_1x128_dual(Tensor x, *, bool tanh_approximation=False,"
     " ScalarType? dtype=None, bool pow2_scale=False) -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t)",
     TORCH_BOX(&torchext::gelu_quantize_1x128_dual)},
    {"relu2_quantize_1x128(Tensor x, *, ScalarType? dtype=None,"
     " bool pow2_scale=False) -> (Tensor data, Tensor scale)",
     TORCH_BOX(&torchext::relu2_quantize_1x128)},
    {"relu2_quantize_1x128_t(Tensor x, *, ScalarType? dtype=None,"
     " bool pow2_scale=False) -> (Tensor data_t, Tensor scale_t)",
     TORCH_BOX(&torchext::relu2_quantize_1x128_t)},
    {"relu2_quantize_1x128_dual(Tensor x, *, ScalarType? dtype=None,"
     " bool pow2_scale=False) -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t)",
     TORCH_BOX(&torchext::relu2_quantize_1x128_dual)},

    // The gradient with respect to the operands of such an activation, quantized both ways; its sums
    // over rows; and the activation, quantized transposed. Operands may be FP8, with 1x128 scales.
    {"silu_mul_backward_quantize_1x128_dual(Tensor grad, Tensor gate_up, *,"
     " Tensor? gate_up_scale=None, bool bias_grad=False,"
     " ScalarType? activation_dtype=None, ScalarType? dtype=None, bool pow2_scale=False)"
     " -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t, Tensor bias_grad,"
     " Tensor activation_t, Tensor activation_scale_t)",
     TORCH_BOX(&torchext::silu_mul_backward_quantize_1x128_dual)},
    {"gelu_mul_backward_quantize_1x128_dual(Tensor grad, Tensor gate_up, *,"
     " Tensor? gate_up_scale=None, bool tanh_approximation=False, bool bias_grad=False,"
     " ScalarType? activation_dtype=None, ScalarType? dtype=None, bool pow2_scale=False)"
     " -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t, Tensor bias_grad,"
     " Tensor activation_t, Tensor activation_scale_t)",
     TORCH_BOX(&torchext::gelu_mul_backward_quantize_1x128_dual)},
    {"gelu_backward_quantize_1x128_dual(Tensor grad, Tensor x, *,"
     " Tensor? x_scale=None, bool tanh_approximation=False, bool bias_grad=False,"
     " ScalarType? activation_dtype=None, ScalarType? dtype=None, bool pow2_scale=False)"
     " -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t, Tensor bias_grad,"
     " Tensor activation_t, Tensor activation_scale_t)",
     TORCH_BOX(&torchext::gelu_backward_quantize_1x128_dual)},
    {"relu2_backward_quantize_1x128_dual(Tensor grad, Tensor x, *,"
     " Tensor? x_scale=None, bool bias_grad=False,"
     " ScalarType? activation_dtype=None, ScalarType? dtype=None, bool pow2_scale=False)"
     " -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t, Tensor bias_grad,"
     " Tensor activation_t, Tensor activation_scale_t)",
     TORCH_BOX(&torchext::relu2_backward_quantize_1x128_dual)},
    // quantize_1x128 of a norm of x + residual, with FP32 in between.
    {"rms_norm_quantize_1x128(Tensor x, Tensor weight, float eps, *, Tensor? residual=None,"
     " bool unit_offset=False, ScalarType? dtype=None, bool pow2_scale=False,"
     " bool return_normed=False)"
     " -> (Tensor data, Tensor scale, Tensor rstd, Tensor new_residual, Tensor normed)",
     TORCH_BOX(&torchext::rms_norm_quantize_1x128)},
    {"rms_norm_quantize_1x128_dual(Tensor x, Tensor weight, float eps, *, Tensor? residual=None,"
     " bool unit_offset=False, ScalarType? dtype=None, bool pow2_scale=False,"
     " bool return_normed=False) -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t,"
     " Tensor rstd, Tensor new_residual, Tensor normed)",
     TORCH_BOX(&torchext::rms_norm_quantize_1x128_dual)},
    {"layer_norm_quantize_1x128(Tensor x, Tensor weight, Tensor? bias, float eps, *,"
     " Tensor? residual=None, bool unit_offset=False, ScalarType? dtype=None,"
     " bool pow2_scale=False, bool return_normed=False) -> (Tensor data, Tensor scale,"
     " Tensor mean, Tensor rstd, Tensor new_residual, Tensor normed)",
     TORCH_BOX(&torchext::layer_norm_quantize_1x128)},
    {"layer_norm_quantize_1x128_dual(Tensor x, Tensor weight, Tensor? bias, float eps, *,"
     " Tensor? residual=None, bool unit_offset=False, ScalarType? dtype=None,"
     " bool pow2_scale=False, bool return_normed=False) -> (Tensor data, Tensor scale,"
     " Tensor data_t, Tensor scale_t, Tensor mean, Tensor rstd, Tensor new_residual,"
     " Tensor normed)",
     TORCH_BOX(&torchext::layer_norm_quantize_1x128_dual)},
    // The gradients of a norm's input and parameters, from that of its result. dweight, dbias: FP32.
    {"rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, *,"
     " Tensor? residual_grad=None, bool unit_offset=False) -> (Tensor dx, Tensor dweight)",
     TORCH_BOX(&torchext::rms_norm_backward)},
    {"rms_norm_backward_quantize_1x128_dual(Tensor grad, Tensor x, Tensor weight, Tensor rstd, *,"
     " Tensor? residual_grad=None, bool unit_offset=False, ScalarType? dtype=None,"
     " bool pow2_scale=False) -> (Tensor dx, Tensor dweight, Tensor data, Tensor scale,"
     " Tensor data_t, Tensor scale_t)",
     TORCH_BOX(&torchext::rms_norm_backward_quantize_1x128_dual)},
    {"layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, *,"
     " Tensor? residual_grad=None, bool unit_offset=False)"
     " -> (Tensor dx, Tensor dweight, Tensor dbias)",
     TORCH_BOX(&torchext::layer_norm_backward)},
    {"layer_norm_backward_quantize_1x128_dual(Tensor grad, Tensor x, Tensor weight, Tensor mean,"
     " Tensor rstd, *, Tensor? residual_grad=None, bool unit_offset=False, ScalarType? dtype=None,"
     " bool pow2_scale=False) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor data,"
     " Tensor scale, Tensor data_t, Tensor scale_t)",
     TORCH_BOX(&torchext::layer_norm_backward_quantize_1x128_dual)},

    // D[M, N] = A[M, K] @ B[N, K].T; the granularity comes from the scales' shapes.
    {"fp8_gemm_nt(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *, Tensor? bias=None,"
     " ScalarType? out_dtype=None, int num_sms=0) -> Tensor",
     TORCH_BOX(&torchext::fp8_gemm_nt), kHasAlias},
    {"fp8_gemm_nt.out(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *, Tensor(a!) out,"
     " bool accumulate=False, Tensor? bias=None, int num_sms=0) -> ()",
     TORCH_BOX(&torchext::fp8_gemm_nt_out), kHasAlias},

    // x @ dequantize(weight).T for an x that is not quantized; the result has x's dtype.
    {"fp8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, *,"
     " int num_sms=0) -> Tensor",
     TORCH_BOX(&torchext::fp8_linear), kHasAlias},

    // Quantizers and product for the form that a compiled linear layer keeps for backward
    // (linear/kept.h).
    {"_quantize_kept(Tensor x, int granularity, *, ScalarType? dtype=None, bool pow2_scale=False)"
     " -> (Tensor data, Tensor scale, Tensor kept, Tensor kept_scale)",
     TORCH_BOX(&torchext::quantize_kept)},
    {"_quantize_128x128_kept(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
     " -> (Tensor data, Tensor scale, Tensor kept)",
     TORCH_BOX(&torchext::quantize_128x128_kept)},
    {"_fp8_gemm_nt_kept(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *,"
     " ScalarType? out_dtype=None) -> Tensor",
     TORCH_BOX(&torchext::fp8_gemm_nt_kept)},

    // Groups of rows of a, each with its own matrix of b [G, N, K]: runs of rows that end at offsets
    // [G], or the rows that group_ids [M] gives a group. One of the two must be given.
    {"m_grouped_fp8_gemm_nt_contiguous(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale,"
     " Tensor? offsets=None, *, Tensor? group_ids=None, Tensor? bias=None,"
     " ScalarType? out_dtype=None, int num_sms=0) -> Tensor",
     TORCH_BOX(&torchext::m_grouped_fp8_gemm_nt_contiguous), kHasAlias},
    {"m_grouped_fp8_gemm_nt_contiguous.out(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale,"
     " Tensor? offsets=None, *, Tensor? group_ids=None, Tensor(a!) out, bool accumulate=False,"
     " Tensor? bias=None, int num_sms=0) -> ()",
     TORCH_BOX(&torchext::m_grouped_fp8_gemm_nt_contiguous_out), kHasAlias},

    // a [G, M, K]: of group g, its first masked_m[g] rows.
    {"m_grouped_fp8_gemm_nt_masked(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale,"
     " Tensor masked_m, *, int expected_m=0, Tensor? bias=None, ScalarType? out_dtype=None,"
     " int num_sms=0) -> Tensor",
     TORCH_BOX(&torchext::m_grouped_fp8_gemm_nt_masked), kHasAlias},
    {"m_grouped_fp8_gemm_nt_masked.out(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale,"
     " Tensor masked_m, *, int expected_m=0, Tensor(a!) out, bool accumulate=False,"
     " Tensor? bias=None, int num_sms=0) -> ()",
     TORCH_BOX(&torchext::m_grouped_fp8_gemm_nt_masked_out), kHasAlias},

    // Groups of columns of a and b that end at offsets [G] -> [G, M, N].
    {"k_grouped_fp8_gemm_nt(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets,"
     " *, ScalarType? out_dtype=None, int num_sms=0) -> Tensor",
     TORCH_BOX(&torchext::k_grouped_fp8_gemm_nt)},
    {"k_grouped_fp8_gemm_nt.out(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale,"
     " Tensor offsets, *, Tensor(a!) out, bool accumulate=False, int num_sms=0) -> ()",
     TORCH_BOX(&torchext::k_grouped_fp8_gemm_nt_out), kHasAlias},

    // The row of each choice of an expert, where each expert's rows end, tokens in the rows of their
    // choices, and the sum of each token's rows.
    {"moe_route(Tensor ids, int num_experts, *, int num_sms=0) -> (Tensor slots, Tensor offsets)",
     TORCH_BOX(&torchext::moe_route)},
    {"moe_permute_quantize_1x128(Tensor x, Tensor slots, int? rows=None, *,"
     " ScalarType? dtype=None, bool pow2_scale=False, int num_sms=0)"
     " -> (Tensor data, Tensor scale)",
     TORCH_BOX(&torchext::moe_permute_quantize_1x128)},
    {"moe_permute(Tensor x, Tensor slots, Tensor? weights=None, int? rows=None, *, int num_sms=0)"
     " -> Tensor",
     TORCH_BOX(&torchext::moe_permute), kHasAlias},
    {"moe_combine(Tensor y, Tensor slots, Tensor? weights=None, *, Tensor? residual=None,"
     " ScalarType? out_dtype=None, int num_sms=0) -> Tensor",
     TORCH_BOX(&torchext::moe_combine), kHasAlias},
    // Tokens as rows of a message to other ranks, and such rows in the rows of their choices.
    {"moe_pack_1x128(Tensor x, Tensor slots, Tensor? ids=None, Tensor? weights=None,"
     " int? rows=None, *, ScalarType? dtype=None, bool pow2_scale=False, int num_sms=0)"
     " -> Tensor message",
     TORCH_BOX(&torchext::moe_pack_1x128)},
    // A SymInt, so that a compiled graph serves any number of columns.
    {"moe_unpack_1x128(Tensor message, Tensor slots, Tensor offsets, SymInt columns,"
     " int? rows=None, *, bool header=True, ScalarType? dtype=None, int num_sms=0)"
     " -> (Tensor data, Tensor scale, Tensor weight)",
     TORCH_BOX(&torchext::moe_unpack_1x128)},

    // quantize_1x128(activation(fp8_gemm_nt(...))), with FP32 in between.
    {"fp8_gemm_nt_swiglu_quantize(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *,"
     " Tensor? bias=None, ScalarType? dtype=None, bool pow2_scale=False, int num_sms=0)"
     " -> (Tensor data, Tensor scale)",
     TORCH_BOX(&torchext::fp8_gemm_nt_swiglu_quantize)},
    {"fp8_gemm_nt_gelu_quantize(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *,"
     " bool tanh_approximation=False, Tensor? bias=None, ScalarType? dtype=None,"
     " bool pow2_scale=False, int num_sms=0) -> (Tensor data, Tensor scale)",
     TORCH_BOX(&torchext::fp8_gemm_nt_gelu_quantize)},
    {"fp8_gemm_nt_relu2_quantize(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *,"
     " Tensor? bias=None, ScalarType? dtype=None, bool pow2_scale=False, int num_sms=0)"
     " -> (Tensor data, Tensor scale)",
     TORCH_BOX(&torchext::fp8_gemm_nt_relu2_quantize)},

    // The products of torchext.nn.Linear, from what is not quantized yet.
    {"_linear(Tensor input, Tensor weight, Tensor? bias, int granularity, ScalarType input_dtype,"
     " ScalarType weight_dtype, ScalarType grad_dtype, bool pow2_scale,"
     " ScalarType? out_dtype=None) -> Tensor",
     TORCH_BOX(&torchext::linear)},
    {"_linear_dgrad(Tensor dy, Tensor weight, int granularity, ScalarType weight_dtype,"
     " ScalarType grad_dtype, bool pow2_scale, ScalarType out_dtype) -> Tensor",
     TORCH_BOX(&torchext::linear_dgrad)},
    {"_linear_wgrad(Tensor dy, Tensor input, int granularity, ScalarType input_dtype,"
     " ScalarType grad_dtype, bool pow2_scale, ScalarType out_dtype) -> Tensor",
     TORCH_BOX(&torchext::linear_wgrad)},
};
// clang-format on

// An alias takes its arguments by position where the schema language allows it: a keyword argument
// costs a quarter of a microsecond. An argument that is written to must stay a keyword.
std::string alias_schema(const Op& op) {
  std::string schema = std::string("_") + op.schema;
  if (op.name().find(".out") == std::string::npos) schema.erase(schema.find(" *,"), 3);
  return schema;
}

void register_kernels(StableLibrary& m) {
  for (const Op& op : kOps) {
    m.impl(op.name().c_str(), op.kernel);
    if (op.has_alias) m.impl(("_" + op.name()).c_str(), op.kernel);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(torchext, m) {
  for (const Op& op : kOps) {
    m.def(op.schema);
    if (op.has_alias) m.def(alias_schema(op).c_str());
  }
}
STABLE_TORCH_LIBRARY_IMPL(torchext, CPU, m) {
  register_kernels(m);
}
STABLE_TORCH_LIBRARY_IMPL(torchext, CUDA, m) {
  register_kernels(m);
}
