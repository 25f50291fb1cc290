// Every op of torchext, in one list: its schema, and the host function that checks its arguments,
// allocates its outputs and runs its CPU kernel, its CUDA kernel or, under torchext.sim.simulate,
// its CUDA kernel on the PTX simulator. Fake kernels and gradients: torchext/_dispatch.

#include "gemm/gemm.h"
#include "linear/kept.h"
#include "linear/linear.h"
#include "quantize/quantize.h"

namespace {

using torch::stable::detail::StableLibrary;

// Defines an op that has a gradient, or writes into an argument, and its twin that torch's autograd
// does not see (torchext/_dispatch/autograd.py). The twin's arguments may be positional, where the
// schema language allows it: a keyword argument costs a quarter of a microsecond.
void def_with_twin(StableLibrary& m, const std::string& schema) {
  m.def(schema.c_str());
  std::string twin = "_" + schema;
  if (twin.find(".out(") == std::string::npos) twin.erase(twin.find(" *,"), 3);
  m.def(twin.c_str());
}

}  // namespace

STABLE_TORCH_LIBRARY(torchext, m) {
  // (data, scale): `scale` is the FP32 multiplier that dequantizes. dtype=None is float8_e4m3fn.
  m.def(
      "quantize_1x128(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
      " -> (Tensor data, Tensor scale)");
  m.def(
      "quantize_1x128_t(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
      " -> (Tensor data_t, Tensor scale_t)");
  m.def(
      "quantize_1x128_dual(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
      " -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t)");
  m.def(
      "quantize_128x128(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
      " -> (Tensor data, Tensor scale)");
  m.def(
      "quantize_128x128_dual(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
      " -> (Tensor data, Tensor scale, Tensor data_t)");
  m.def(
      "quantize_rowwise(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
      " -> (Tensor data, Tensor scale)");
  m.def(
      "quantize_tensorwise(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
      " -> (Tensor data, Tensor scale)");
  def_with_twin(m, "dequantize(Tensor data, Tensor scale, *, ScalarType out_dtype) -> Tensor");

  // D[M, N] = A[M, K] @ B[N, K].T; the granularity comes from the scales' shapes.
  def_with_twin(
      m,
      "fp8_gemm_nt(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *, Tensor? bias=None,"
      " ScalarType? out_dtype=None, int num_sms=0) -> Tensor");
  def_with_twin(
      m,
      "fp8_gemm_nt.out(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *, Tensor(a!) out,"
      " bool accumulate=False, Tensor? bias=None, int num_sms=0) -> ()");

  // Quantizers and product for the form that a compiled linear layer keeps for backward
  // (linear/kept.h).
  m.def(
      "_quantize_kept(Tensor x, int granularity, *, ScalarType? dtype=None, bool pow2_scale=False)"
      " -> (Tensor data, Tensor scale, Tensor kept, Tensor kept_scale)");
  m.def(
      "_quantize_128x128_kept(Tensor x, *, ScalarType? dtype=None, bool pow2_scale=False)"
      " -> (Tensor data, Tensor scale, Tensor kept)");
  m.def(
      "_fp8_gemm_nt_kept(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *,"
      " ScalarType? out_dtype=None) -> Tensor");

  // Groups of rows of a, each with its own matrix of b [G, N, K]: runs of rows that end at offsets
  // [G], or the rows that group_ids [M] gives a group. One of the two must be given.
  def_with_twin(
      m,
      "m_grouped_fp8_gemm_nt_contiguous(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale,"
      " Tensor? offsets=None, *, Tensor? group_ids=None, Tensor? bias=None,"
      " ScalarType? out_dtype=None, int num_sms=0) -> Tensor");
  def_with_twin(
      m,
      "m_grouped_fp8_gemm_nt_contiguous.out(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale,"
      " Tensor? offsets=None, *, Tensor? group_ids=None, Tensor(a!) out, bool accumulate=False,"
      " Tensor? bias=None, int num_sms=0) -> ()");
  // a [G, M, K]: of group g, its first masked_m[g] rows.
  def_with_twin(
      m,
      "m_grouped_fp8_gemm_nt_masked(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale,"
      " Tensor masked_m, *, int expected_m=0, Tensor? bias=None, ScalarType? out_dtype=None,"
      " int num_sms=0) -> Tensor");
  def_with_twin(
      m,
      "m_grouped_fp8_gemm_nt_masked.out(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale,"
      " Tensor masked_m, *, int expected_m=0, Tensor(a!) out, bool accumulate=False,"
      " Tensor? bias=None, int num_sms=0) -> ()");
  // Groups of columns of a and b that end at offsets [G] -> [G, M, N].
  m.def(
      "k_grouped_fp8_gemm_nt(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets, *,"
      " ScalarType? out_dtype=None, int num_sms=0) -> Tensor");
  def_with_twin(m,
                "k_grouped_fp8_gemm_nt.out(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale,"
                " Tensor offsets, *, Tensor(a!) out, bool accumulate=False, int num_sms=0) -> ()");

  // quantize_1x128(activation(fp8_gemm_nt(...))), with FP32 in between.
  m.def(
      "fp8_gemm_nt_swiglu_quantize(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *,"
      " Tensor? bias=None, ScalarType? dtype=None, bool pow2_scale=False, int num_sms=0)"
      " -> (Tensor data, Tensor scale)");
  m.def(
      "fp8_gemm_nt_gelu_quantize(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *,"
      " bool tanh_approximation=False, Tensor? bias=None, ScalarType? dtype=None,"
      " bool pow2_scale=False, int num_sms=0) -> (Tensor data, Tensor scale)");
  m.def(
      "fp8_gemm_nt_relu2_quantize(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *,"
      " Tensor? bias=None, ScalarType? dtype=None, bool pow2_scale=False, int num_sms=0)"
      " -> (Tensor data, Tensor scale)");

  // The products of torchext.nn.Linear, from what is not quantized yet.
  m.def(
      "_linear(Tensor input, Tensor weight, Tensor? bias, int granularity, ScalarType input_dtype,"
      " ScalarType weight_dtype, ScalarType grad_dtype, bool pow2_scale,"
      " ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "_linear_dgrad(Tensor dy, Tensor weight, int granularity, ScalarType weight_dtype,"
      " ScalarType grad_dtype, bool pow2_scale, ScalarType out_dtype) -> Tensor");
  m.def(
      "_linear_wgrad(Tensor dy, Tensor input, int granularity, ScalarType input_dtype,"
      " ScalarType grad_dtype, bool pow2_scale, ScalarType out_dtype) -> Tensor");
}

namespace {

void impl_with_twin(StableLibrary& m, const std::string& name,
                    void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
  m.impl(name.c_str(), kernel);
  m.impl(("_" + name).c_str(), kernel);
}

void register_kernels(StableLibrary& m) {
  m.impl("quantize_1x128", TORCH_BOX(&torchext::quantize_1x128));
  m.impl("quantize_1x128_t", TORCH_BOX(&torchext::quantize_1x128_t));
  m.impl("quantize_1x128_dual", TORCH_BOX(&torchext::quantize_1x128_dual));
  m.impl("quantize_128x128", TORCH_BOX(&torchext::quantize_128x128));
  m.impl("quantize_128x128_dual", TORCH_BOX(&torchext::quantize_128x128_dual));
  m.impl("quantize_rowwise", TORCH_BOX(&torchext::quantize_rowwise));
  m.impl("quantize_tensorwise", TORCH_BOX(&torchext::quantize_tensorwise));
  impl_with_twin(m, "dequantize", TORCH_BOX(&torchext::dequantize));
  impl_with_twin(m, "fp8_gemm_nt", TORCH_BOX(&torchext::fp8_gemm_nt));
  impl_with_twin(m, "fp8_gemm_nt.out", TORCH_BOX(&torchext::fp8_gemm_nt_out));
  m.impl("_quantize_kept", TORCH_BOX(&torchext::quantize_kept));
  m.impl("_quantize_128x128_kept", TORCH_BOX(&torchext::quantize_128x128_kept));
  m.impl("_fp8_gemm_nt_kept", TORCH_BOX(&torchext::fp8_gemm_nt_kept));
  impl_with_twin(m, "m_grouped_fp8_gemm_nt_contiguous",
                 TORCH_BOX(&torchext::m_grouped_fp8_gemm_nt_contiguous));
  impl_with_twin(m, "m_grouped_fp8_gemm_nt_contiguous.out",
                 TORCH_BOX(&torchext::m_grouped_fp8_gemm_nt_contiguous_out));
  impl_with_twin(m, "m_grouped_fp8_gemm_nt_masked",
                 TORCH_BOX(&torchext::m_grouped_fp8_gemm_nt_masked));
  impl_with_twin(m, "m_grouped_fp8_gemm_nt_masked.out",
                 TORCH_BOX(&torchext::m_grouped_fp8_gemm_nt_masked_out));
  m.impl("k_grouped_fp8_gemm_nt", TORCH_BOX(&torchext::k_grouped_fp8_gemm_nt));
  impl_with_twin(m, "k_grouped_fp8_gemm_nt.out", TORCH_BOX(&torchext::k_grouped_fp8_gemm_nt_out));
  m.impl("fp8_gemm_nt_swiglu_quantize", TORCH_BOX(&torchext::fp8_gemm_nt_swiglu_quantize));
  m.impl("fp8_gemm_nt_gelu_quantize", TORCH_BOX(&torchext::fp8_gemm_nt_gelu_quantize));
  m.impl("fp8_gemm_nt_relu2_quantize", TORCH_BOX(&torchext::fp8_gemm_nt_relu2_quantize));
  m.impl("_linear", TORCH_BOX(&torchext::linear));
  m.impl("_linear_dgrad", TORCH_BOX(&torchext::linear_dgrad));
  m.impl("_linear_wgrad", TORCH_BOX(&torchext::linear_wgrad));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchext, CPU, m) {
  register_kernels(m);
}
STABLE_TORCH_LIBRARY_IMPL(torchext, CUDA, m) {
  register_kernels(m);
}
