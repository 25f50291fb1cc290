// Host entry of the norm ops: checks the arguments, lays out the outputs, and runs the CPU or the
// CUDA kernel. Layouts of quantized outputs: torchext/ops/__init__.py.
#include "norm.h"

#include <cmath>

#include "../runtime/check.h"
#include "../runtime/layout.h"
#include "../runtime/quantized_output.h"

namespace torchext {
namespace {

void check_wide(const char* op, const char* name, const Tensor& tensor) {
  TORCHEXT_CHECK_TYPE(is_wide(tensor.scalar_type()), op, ": ", name,
                      " must be torch.bfloat16, torch.float16 or torch.float32 (got ",
                      dtype_name(tensor.scalar_type()), "); convert it with .to() first");
}

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  TORCHEXT_CHECK_VALUE(
      tensor.is_cpu() == x.is_cpu() && tensor.get_device_index() == x.get_device_index(), op, ": ",
      name, " must be on the device of x; move it there with .to(x.device)");
}

// A view of `tensor`, called `name` in messages, as a matrix.
MatrixView matrix_of(const char* op, const char* name, const Tensor& tensor) {
  check_wide(op, name, tensor);
  TORCHEXT_CHECK_VALUE(tensor.dim() >= 1, op, ": ", name,
                       " must have shape [..., K] (got a 0-dimensional tensor); give it a "
                       "dimension with ",
                       name, ".reshape(1)");
  const auto rows = fold_rows(tensor);
  TORCHEXT_CHECK_VALUE(rows.has_value(), op, ": the leading dimensions of ", name,
                       " must fold into one row stride (got shape ", shape_string(tensor),
                       ", strides ", stride_string(tensor), "); pass ", name, ".contiguous()");
  const int64_t last = tensor.dim() - 1;
  return {tensor.data_ptr(), tensor.scalar_type(), rows->count,
          tensor.size(last), rows->stride,         tensor.stride(last)};
}

// A view of `tensor`, which must have the shape, dtype and device of x.
MatrixView matrix_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  check_wide(op, name, tensor);
  TORCHEXT_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), op, ": ", name,
                      " must have the dtype of x, ", dtype_name(x.scalar_type()), " (got ",
                      dtype_name(tensor.scalar_type()), "); convert it with .to(x.dtype)");
  TORCHEXT_CHECK_VALUE(sizes_of(tensor) == sizes_of(x), op, ": ", name,
                       " must have the shape of x, ", shape_string(x), " (got ",
                       shape_string(tensor), "); expand it with .expand_as(x).contiguous()");
  check_device(op, name, tensor, x);
  return matrix_of(op, name, tensor);
}

VectorView vector_of(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  check_wide(op, name, tensor);
  const int64_t columns = x.size(x.dim() - 1);
  TORCHEXT_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == columns, op, ": ", name,
                       " must have shape [K] = [", columns, "] (got ", shape_string(tensor),
                       "); reshape it with .reshape(", columns, ")");
  check_device(op, name, tensor, x);
  return {tensor.data_ptr(), tensor.scalar_type(), tensor.stride(0)};
}

float check_eps(const char* op, double eps) {
  TORCHEXT_CHECK_VALUE(std::isfinite(float(eps)) && eps >= 0, op,
                       ": eps must be a finite FP32 number >= 0 (got ", eps, ")");
  return float(eps);
}

// One FP32 value for each row of x: the leading dimensions of x, contiguous.
Tensor empty_row_values(const Tensor& x) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = 1;
  std::vector<int64_t> strides = folded_strides(sizes, 1, 1);
  sizes.pop_back();
  strides.pop_back();
  return empty_strided(sizes, strides, ScalarType::Float, x);
}

Tensor empty_contiguous(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  return empty_strided(sizes, folded_strides(sizes, sizes.back(), 1), dtype, like);
}

struct Result {
  QuantizedOutput row;
  std::optional<QuantizedOutput> transposed;
  Tensor mean, rstd, sum, normed;  // of RMSNorm, `mean` is rstd
};

// The arguments of all forward ops; `centers`: LayerNorm.
Result norm_quantize(const char* op, bool centers, bool dual, const Tensor& x, const Tensor& weight,
                     const std::optional<Tensor>& bias, double eps,
                     const std::optional<Tensor>& residual, bool unit_offset,
                     std::optional<ScalarType> dtype, bool pow2_scale, bool return_normed) {
  NormView norm{};
  norm.x = matrix_of(op, "x", x);
  norm.weight = vector_of(op, "weight", weight, x);
  if (bias) norm.bias = vector_of(op, "bias", *bias, x);
  norm.unit_offset = unit_offset;
  norm.eps = check_eps(op, eps);
  if (residual) norm.residual = matrix_like(op, "residual", *residual, x);
  const QuantizeOptions options{check_fp8_dtype(op, dtype) == ScalarType::Float8_e5m2, pow2_scale};

  const int64_t rows = norm.x.rows, cols = norm.x.cols;
  const Tensor rstd = empty_row_values(x);
  const Tensor mean = centers ? empty_row_values(x) : rstd;
  const auto like_x = [&](bool exists) {
    return empty_contiguous(exists ? sizes_of(x) : std::vector<int64_t>{0}, x.scalar_type(), x);
  };
  const Tensor sum = like_x(residual.has_value()), normed = like_x(return_normed);
  Result result{
      empty_quantized_groups(sizes_of(x), rows, options, x), std::nullopt, mean, rstd, sum, normed};
  if (dual) result.transposed = empty_quantized_groups({cols, rows}, cols, options, x);
  if (rows == 0) return result;
  norm.rstd = static_cast<float*>(rstd.data_ptr());
  if (centers) norm.mean = static_cast<float*>(mean.data_ptr());
  if (residual) norm.sum = sum.data_ptr();
  if (return_normed) norm.normed = normed.data_ptr();

  const QuantizedOutput& row = result.row;
  const QuantizedOutput& last = dual ? *result.transposed : row;
  const QuantizedView* transposed = dual ? &last.view : nullptr;
  Device* device = device_for(x, op);
  if (device == nullptr) {
    norm_quantize_cpu(norm, options, row.view, transposed);
  } else if constexpr (kBuiltWithCuda) {
    norm_quantize_cuda(*device, norm, options, row.view, transposed,
                       {x, residual ? *residual : x, weight, bias ? *bias : weight,
                        residual ? sum : rstd, return_normed ? normed : row.data, mean, rstd,
                        row.data, row.scale, last.data, last.scale});
  }
  return result;
}

// A view of one FP32 value for each row of x.
RowValuesView row_values_of(const char* op, const char* name, const Tensor& values,
                            const Tensor& x) {
  TORCHEXT_CHECK_TYPE(values.scalar_type() == ScalarType::Float, op, ": ", name,
                      " must be torch.float32 (got ", dtype_name(values.scalar_type()),
                      "); pass the one that the forward op returned");
  std::vector<int64_t> leading = sizes_of(x);
  leading.pop_back();
  TORCHEXT_CHECK_VALUE(sizes_of(values) == leading, op, ": ", name,
                       " must have the shape of x without its last dimension (got ",
                       shape_string(values), " for x ", shape_string(x),
                       "); pass the one that the forward op returned");
  check_device(op, name, values, x);
  int64_t stride = 0, count = 1;
  for (int64_t i = values.dim() - 1; i >= 0; --i) {
    const int64_t size = values.size(i);
    if (size == 1) continue;
    if (count == 1) stride = values.stride(i);
    TORCHEXT_CHECK_VALUE(count * size == 0 || values.stride(i) == count * stride, op, ": ", name,
                         " must have dimensions that fold into one (got shape ",
                         shape_string(values), ", strides ", stride_string(values), "); pass ",
                         name, ".contiguous()");
    count *= size;
  }
  return {static_cast<const float*>(values.data_ptr()), stride};
}

struct Gradients {
  Tensor dx, dweight, dbias;  // of RMSNorm, dbias is dweight
  std::optional<QuantizedOutput> row, transposed;
};

// The arguments of all backward ops; `mean`: LayerNorm; `quantizes`: dx both ways.
Gradients norm_backward(const char* op, bool quantizes, const Tensor& grad, const Tensor& x,
                        const Tensor& weight, const std::optional<Tensor>& mean, const Tensor& rstd,
                        const std::optional<Tensor>& residual_grad, bool unit_offset,
                        std::optional<ScalarType> dtype, bool pow2_scale) {
  NormBackwardView norm{};
  norm.x = matrix_of(op, "x", x);
  norm.grad = matrix_like(op, "grad", grad, x);
  norm.weight = vector_of(op, "weight", weight, x);
  norm.unit_offset = unit_offset;
  if (mean) norm.mean = row_values_of(op, "mean", *mean, x);
  norm.rstd = row_values_of(op, "rstd", rstd, x);
  if (residual_grad) norm.residual_grad = matrix_like(op, "residual_grad", *residual_grad, x);
  const QuantizeOptions options{check_fp8_dtype(op, dtype) == ScalarType::Float8_e5m2, pow2_scale};

  const int64_t rows = norm.x.rows, cols = norm.x.cols;
  const Tensor dx = empty_contiguous(sizes_of(x), x.scalar_type(), x);
  const auto column_values = [&] { return empty_strided({cols}, {1}, ScalarType::Float, x); };
  const Tensor dweight = column_values(), dbias = mean ? column_values() : dweight;
  Gradients result{dx, dweight, dbias, std::nullopt, std::nullopt};
  if (quantizes) {
    result.row = empty_quantized_groups(sizes_of(x), rows, options, x);
    result.transposed = empty_quantized_groups({cols, rows}, cols, options, x);
  }
  if (cols == 0) return result;
  if (rows == 0) {
    torch::stable::zero_(result.dweight);
    if (mean) torch::stable::zero_(result.dbias);
    return result;
  }
  norm.dx = dx.data_ptr();
  norm.dweight = static_cast<float*>(dweight.data_ptr());
  if (mean) norm.dbias = static_cast<float*>(dbias.data_ptr());

  const QuantizedView* row = quantizes ? &result.row->view : nullptr;
  const QuantizedView* transposed = quantizes ? &result.transposed->view : nullptr;
  Device* device = device_for(x, op);
  if (device == nullptr) {
    norm_backward_cpu(norm, options, row, transposed);
  } else if constexpr (kBuiltWithCuda) {
    const int64_t blocks = ceil_div(rows, kScaleGroup);
    const Tensor sums = empty_contiguous({mean ? 2 : 1, blocks, cols}, ScalarType::Float, x);
    norm_backward_cuda(
        *device, norm, options, row, transposed,
        {grad, x, residual_grad ? *residual_grad : x, weight, mean ? *mean : rstd, rstd, dx,
         dweight, dbias, sums, quantizes ? result.row->data : dx,
         quantizes ? result.row->scale : dx, quantizes ? result.transposed->data : dx,
         quantizes ? result.transposed->scale : dx});
  }
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_quantize_1x128(
    const Tensor& x, const Tensor& weight, double eps, std::optional<Tensor> residual,
    bool unit_offset, std::optional<ScalarType> dtype, bool pow2_scale, bool return_normed) {
  const Result r = norm_quantize("rms_norm_quantize_1x128", false, false, x, weight, std::nullopt,
                                 eps, residual, unit_offset, dtype, pow2_scale, return_normed);
  return {r.row.data, r.row.scale, r.rstd, r.sum, r.normed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_quantize_1x128_dual(
    const Tensor& x, const Tensor& weight, double eps, std::optional<Tensor> residual,
    bool unit_offset, std::optional<ScalarType> dtype, bool pow2_scale, bool return_normed) {
  const Result r =
      norm_quantize("rms_norm_quantize_1x128_dual", false, true, x, weight, std::nullopt, eps,
                    residual, unit_offset, dtype, pow2_scale, return_normed);
  return {r.row.data, r.row.scale, r.transposed->data, r.transposed->scale, r.rstd,
          r.sum,      r.normed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_quantize_1x128(
    const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, double eps,
    std::optional<Tensor> residual, bool unit_offset, std::optional<ScalarType> dtype,
    bool pow2_scale, bool return_normed) {
  const Result r = norm_quantize("layer_norm_quantize_1x128", true, false, x, weight, bias, eps,
                                 residual, unit_offset, dtype, pow2_scale, return_normed);
  return {r.row.data, r.row.scale, r.mean, r.rstd, r.sum, r.normed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
layer_norm_quantize_1x128_dual(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                               double eps, std::optional<Tensor> residual, bool unit_offset,
                               std::optional<ScalarType> dtype, bool pow2_scale,
                               bool return_normed) {
  const Result r = norm_quantize("layer_norm_quantize_1x128_dual", true, true, x, weight, bias, eps,
                                 residual, unit_offset, dtype, pow2_scale, return_normed);
  return {r.row.data, r.row.scale, r.transposed->data, r.transposed->scale, r.mean, r.rstd,
          r.sum,      r.normed};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& weight, const Tensor& rstd,
                                             std::optional<Tensor> residual_grad,
                                             bool unit_offset) {
  const Gradients g = norm_backward("rms_norm_backward", false, grad, x, weight, std::nullopt, rstd,
                                    residual_grad, unit_offset, std::nullopt, false);
  return {g.dx, g.dweight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_backward_quantize_1x128_dual(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd,
    std::optional<Tensor> residual_grad, bool unit_offset, std::optional<ScalarType> dtype,
    bool pow2_scale) {
  const Gradients g =
      norm_backward("rms_norm_backward_quantize_1x128_dual", true, grad, x, weight, std::nullopt,
                    rstd, residual_grad, unit_offset, dtype, pow2_scale);
  return {g.dx, g.dweight, g.row->data, g.row->scale, g.transposed->data, g.transposed->scale};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x,
                                                       const Tensor& weight, const Tensor& mean,
                                                       const Tensor& rstd,
                                                       std::optional<Tensor> residual_grad,
                                                       bool unit_offset) {
  const Gradients g = norm_backward("layer_norm_backward", false, grad, x, weight, mean, rstd,
                                    residual_grad, unit_offset, std::nullopt, false);
  return {g.dx, g.dweight, g.dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
layer_norm_backward_quantize_1x128_dual(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                        const Tensor& mean, const Tensor& rstd,
                                        std::optional<Tensor> residual_grad, bool unit_offset,
                                        std::optional<ScalarType> dtype, bool pow2_scale) {
  const Gradients g =
      norm_backward("layer_norm_backward_quantize_1x128_dual", true, grad, x, weight, mean, rstd,
                    residual_grad, unit_offset, dtype, pow2_scale);
  return {
      g.dx, g.dweight, g.dbias, g.row->data, g.row->scale, g.transposed->data, g.transposed->scale};
}

}  // namespace torchext
