// Implements linear.h on the host entries of the quantizers and of fp8_gemm_nt.
#include "linear.h"

#include "../gemm/gemm.h"
#include "../quantize/quantize.h"
#include "../runtime/check.h"

namespace torchext {
namespace {

constexpr const char* kLayer = "torchext.nn.Linear";

enum class Granularity : int64_t { kBlockwise, kRowwise, kTensorwise };

struct Quantizer {
  Granularity granularity;
  bool pow2_scale;

  Quantizer(int64_t granularity, bool pow2_scale)
      : granularity(static_cast<Granularity>(granularity)), pow2_scale(pow2_scale) {
    TORCHEXT_CHECK_VALUE(0 <= granularity && granularity <= 2, kLayer,
                         ": granularity must be 0 (blockwise), 1 (rowwise) or 2 (tensorwise) (got ",
                         granularity, "); call torchext.nn.Linear instead of its op");
  }

  // An input or a gradient [..., K], with scales along K.
  std::tuple<Tensor, Tensor> activation(const Tensor& x, ScalarType dtype) const {
    const Tensor rows = fold_rows(x) ? x : torch::stable::contiguous(x);
    if (granularity == Granularity::kBlockwise) return quantize_1x128(rows, dtype, pow2_scale);
    return coarse(rows, dtype);
  }

  // An input or a gradient [..., K] as [K, M], with scales along M.
  std::tuple<Tensor, Tensor> transposed_activation(const Tensor& x, ScalarType dtype) const {
    const Tensor rows = fold_rows(x) ? x : torch::stable::contiguous(x);
    if (granularity == Granularity::kBlockwise) return quantize_1x128_t(rows, dtype, pow2_scale);
    const int64_t columns = x.size(x.dim() - 1);
    int64_t count = 1;
    for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) count *= x.size(dim);
    const Tensor matrix = x.dim() == 2 ? x : torch::stable::reshape(x, {count, columns});
    return coarse(torch::stable::transpose(matrix, 0, 1), dtype);
  }

  // A weight [N, K], or its transpose.
  std::tuple<Tensor, Tensor> weight(const Tensor& w, ScalarType dtype) const {
    if (granularity == Granularity::kBlockwise) return quantize_128x128(w, dtype, pow2_scale);
    return coarse(w, dtype);
  }

 private:
  std::tuple<Tensor, Tensor> coarse(const Tensor& x, ScalarType dtype) const {
    return granularity == Granularity::kRowwise ? quantize_rowwise(x, dtype, pow2_scale)
                                                : quantize_tensorwise(x, dtype, pow2_scale);
  }
};

void check_wide(const char* name, const Tensor& x) {
  TORCHEXT_CHECK_TYPE(is_wide(x.scalar_type()), kLayer, ": ", name,
                      " must be torch.float32, torch.bfloat16 or torch.float16 (got ",
                      dtype_name(x.scalar_type()), "); convert it with .to()");
}

void check(const char* name, const Tensor& x, int64_t columns, const Tensor& other) {
  TORCHEXT_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == columns, kLayer, ": ", name,
                 " must have shape [..., ", columns, "] beside an operand of shape ",
                 shape_string(other), " (got ", shape_string(x), ")");
  check_wide(name, x);
}

void check_weight(const Tensor& weight) {
  TORCHEXT_CHECK(weight.dim() == 2, kLayer,
                 ": weight must have shape [out_features, in_features] (got ", shape_string(weight),
                 ")");
  check_wide("weight", weight);
}

}  // namespace

Tensor linear(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
              int64_t granularity, ScalarType input_dtype, ScalarType weight_dtype, ScalarType,
              bool pow2_scale, std::optional<ScalarType> out_dtype) {
  check_weight(weight);
  check("input", input, weight.size(1), weight);
  TORCHEXT_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), kLayer,
                 ": bias must have shape [", weight.size(0),
                 "], a value for each row of weight (got ", shape_string(*bias), ")");
  const Quantizer quantizer(granularity, pow2_scale);
  const auto [x, x_scale] = quantizer.activation(input, input_dtype);
  const auto [w, w_scale] = quantizer.weight(weight, weight_dtype);
  return fp8_gemm_nt(x, x_scale, w, w_scale, bias, out_dtype.value_or(input.scalar_type()), 0);
}

Tensor linear_dgrad(const Tensor& dy, const Tensor& weight, int64_t granularity,
                    ScalarType weight_dtype, ScalarType grad_dtype, bool pow2_scale,
                    ScalarType out_dtype) {
  check_weight(weight);
  check("gradient", dy, weight.size(0), weight);
  const Quantizer quantizer(granularity, pow2_scale);
  const auto [rows, rows_scale] = quantizer.activation(dy, grad_dtype);
  const auto [w_t, w_t_scale] =
      quantizer.weight(torch::stable::transpose(weight, 0, 1), weight_dtype);
  return fp8_gemm_nt(rows, rows_scale, w_t, w_t_scale, std::nullopt, out_dtype, 0);
}

Tensor linear_wgrad(const Tensor& dy, const Tensor& input, int64_t granularity,
                    ScalarType input_dtype, ScalarType grad_dtype, bool pow2_scale,
                    ScalarType out_dtype) {
  TORCHEXT_CHECK(dy.dim() >= 1 && input.dim() >= 1, kLayer,
                 ": gradient and input must have at least one dimension each (got ",
                 shape_string(dy), " and ", shape_string(input), ")");
  const Quantizer quantizer(granularity, pow2_scale);
  const auto [dy_t, dy_t_scale] = quantizer.transposed_activation(dy, grad_dtype);
  const auto [x_t, x_t_scale] = quantizer.transposed_activation(input, input_dtype);
  return fp8_gemm_nt(dy_t, dy_t_scale, x_t, x_t_scale, std::nullopt, out_dtype, 0);
}

}  // namespace torchext
