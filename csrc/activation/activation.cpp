// Host entry of the activations: checks the operands, lays out the outputs, and runs the CPU or the
// CUDA kernel. Layouts: torchext/ops/__init__.py.
#include "activation.h"

#include <string>

#include "../runtime/check.h"
#include "../runtime/quantized_output.h"

namespace torchext {
namespace {

// A Kind has what distinguishes the ops of a family.
struct Kind {
  const char* op;
  const char* operand;  // the argument's name
  Function function;
  bool gated;
};

Function gelu(bool tanh_approximation) {
  return tanh_approximation ? Function::kGELUTanh : Function::kGELU;
}

QuantizeOptions options_of(const char* op, OptionalDtype dtype, bool pow2_scale) {
  return {check_fp8_dtype(op, dtype) == ScalarType::Float8_e5m2, pow2_scale};
}

FoldedRows check_rows(const char* op, const char* name, const Tensor& x) {
  TORCHEXT_CHECK_VALUE(x.dim() >= 1, op, ": ", name, " must have shape [..., ",
                       "columns] (got a 0-dimensional tensor); give it a dimension with ", name,
                       ".reshape(1)");
  const auto rows = fold_rows(x);
  TORCHEXT_CHECK_VALUE(rows.has_value(), op, ": the leading dimensions of ", name,
                       " must fold into one row stride (got shape ", shape_string(x), ", strides ",
                       stride_string(x), "); pass ", name, ".contiguous()");
  return *rows;
}

// The operands of an activation, with no scale yet.
ActivationView check_operands(const Kind& kind, const Tensor& x) {
  const FoldedRows rows = check_rows(kind.op, kind.operand, x);
  const int64_t last = x.dim() - 1, columns = x.size(last);
  TORCHEXT_CHECK_VALUE(!kind.gated || columns % 2 == 0, kind.op, ": ", kind.operand,
                       " must have an even number of columns, as many gates as ups (got ",
                       shape_string(x), "); concatenate gates and ups along the last dimension");
  return {x.data_ptr(),
          x.scalar_type(),
          rows.count,
          kind.gated ? columns / 2 : columns,
          rows.stride,
          x.stride(last),
          kind.function,
          kind.gated,
          nullptr,
          0,
          0};
}

ActivationView check_wide_operands(const Kind& kind, const Tensor& x) {
  TORCHEXT_CHECK_TYPE(is_wide(x.scalar_type()), kind.op, ": ", kind.operand,
                      " must be torch.bfloat16, torch.float16 or torch.float32 (got ",
                      dtype_name(x.scalar_type()), "); convert it with .to() first");
  return check_operands(kind, x);
}

std::vector<int64_t> with_columns(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = columns;
  return sizes;
}

// Quantizes the activation, its transpose, or both.
void activate(const Kind& kind, const Tensor& x, const ActivationView& view,
              const QuantizeOptions& options, const QuantizedOutput* row,
              const QuantizedOutput* transposed) {
  if (view.rows == 0 || view.cols == 0) return;
  const QuantizedView* row_view = row ? &row->view : nullptr;
  const QuantizedView* transposed_view = transposed ? &transposed->view : nullptr;
  Device* device = device_for(x, kind.op);
  if (device == nullptr) return activate_cpu(view, options, row_view, transposed_view);
  if constexpr (kBuiltWithCuda) {
    const QuantizedOutput& first = row ? *row : *transposed;
    const QuantizedOutput& last = transposed ? *transposed : *row;
    activate_cuda(*device, view, options, row_view, transposed_view,
                  {reads(x, kind.operand), writes(first.data, "data"), writes(first.scale, "scale"),
                   writes(last.data, "data_t"), writes(last.scale, "scale_t")});
  }
}

Pair quantize_activation(const Kind& kind, const Tensor& x, OptionalDtype dtype, bool pow2_scale) {
  const ActivationView view = check_wide_operands(kind, x);
  const QuantizeOptions options = options_of(kind.op, dtype, pow2_scale);
  const QuantizedOutput row =
      empty_quantized_groups(with_columns(x, view.cols), view.rows, options, x);
  activate(kind, x, view, options, &row, nullptr);
  return {row.data, row.scale};
}

Pair quantize_activation_t(const Kind& kind, const Tensor& x, OptionalDtype dtype,
                           bool pow2_scale) {
  const ActivationView view = check_wide_operands(kind, x);
  const QuantizeOptions options = options_of(kind.op, dtype, pow2_scale);
  const QuantizedOutput transposed =
      empty_quantized_groups({view.cols, view.rows}, view.cols, options, x);
  activate(kind, x, view, options, nullptr, &transposed);
  return {transposed.data, transposed.scale};
}

Dual quantize_activation_dual(const Kind& kind, const Tensor& x, OptionalDtype dtype,
                              bool pow2_scale) {
  const ActivationView view = check_wide_operands(kind, x);
  const QuantizeOptions options = options_of(kind.op, dtype, pow2_scale);
  const QuantizedOutput row =
      empty_quantized_groups(with_columns(x, view.cols), view.rows, options, x);
  const QuantizedOutput transposed =
      empty_quantized_groups({view.cols, view.rows}, view.cols, options, x);
  activate(kind, x, view, options, &row, &transposed);
  return {row.data, row.scale, transposed.data, transposed.scale};
}

void check_device(const Kind& kind, const char* name, const Tensor& tensor, const Tensor& x) {
  TORCHEXT_CHECK_VALUE(
      tensor.is_cpu() == x.is_cpu() && tensor.get_device_index() == x.get_device_index(), kind.op,
      ": ", name, " must be on the device of ", kind.operand, "; move it there with .to(",
      kind.operand, ".device)");
}

// The operands that backward takes: wide, or FP8 with their scales.
ActivationView check_saved_operands(const Kind& kind, const Tensor& x,
                                    const std::optional<Tensor>& scale) {
  if (!is_fp8(x.scalar_type())) {
    TORCHEXT_CHECK_VALUE(!scale.has_value(), kind.op, ": ", kind.operand,
                         "_scale must be None for operands that are not FP8 (got ", kind.operand,
                         " in ", dtype_name(x.scalar_type()), ")");
    return check_wide_operands(kind, x);
  }
  ActivationView view = check_operands(kind, x);
  TORCHEXT_CHECK_VALUE(scale.has_value(), kind.op, ": ", kind.operand, "_scale must be given for ",
                       kind.operand, " in ", dtype_name(x.scalar_type()),
                       "; pass the 1x128 scales of quantize_1x128");
  TORCHEXT_CHECK_TYPE(scale->scalar_type() == ScalarType::Float, kind.op, ": ", kind.operand,
                      "_scale must be torch.float32 (got ", dtype_name(scale->scalar_type()), ")");
  check_device(kind, (std::string(kind.operand) + "_scale").c_str(), *scale, x);
  const std::vector<int64_t> sizes = with_columns(x, ceil_div(x.size(x.dim() - 1), kScaleGroup));
  TORCHEXT_CHECK_VALUE(sizes_of(*scale) == sizes, kind.op, ": ", kind.operand,
                       "_scale must have one scale for each 128 columns of a row of ", kind.operand,
                       ", ", shape_string(x), " (got ", shape_string(*scale),
                       "); pass the 1x128 scales of quantize_1x128");
  const FoldedRows rows =
      check_rows(kind.op, (std::string(kind.operand) + "_scale").c_str(), *scale);
  view.scale = static_cast<const float*>(scale->data_ptr());
  view.scale_row_stride = rows.stride;
  view.scale_col_stride = scale->stride(scale->dim() - 1);
  return view;
}

MatrixView check_grad(const Kind& kind, const Tensor& grad, const Tensor& x,
                      const ActivationView& view) {
  TORCHEXT_CHECK_TYPE(is_wide(grad.scalar_type()), kind.op,
                      ": grad must be torch.bfloat16, torch.float16 or torch.float32 (got ",
                      dtype_name(grad.scalar_type()), "); convert it with .to() first");
  TORCHEXT_CHECK_TYPE(is_fp8(view.dtype) || grad.scalar_type() == view.dtype, kind.op,
                      ": grad must have the dtype of ", kind.operand, ", ", dtype_name(view.dtype),
                      " (got ", dtype_name(grad.scalar_type()), "); convert it with .to() first");
  check_device(kind, "grad", grad, x);
  const std::vector<int64_t> sizes = with_columns(x, view.cols);
  TORCHEXT_CHECK_VALUE(sizes_of(grad) == sizes, kind.op,
                       ": grad must have the shape of the activation of ", kind.operand, " ",
                       shape_string(x), ", which has ", view.cols, " columns (got ",
                       shape_string(grad), ")");
  const FoldedRows rows = check_rows(kind.op, "grad", grad);
  return {grad.data_ptr(), grad.scalar_type(), rows.count,
          view.cols,       rows.stride,        grad.stride(grad.dim() - 1)};
}

Gradients quantize_gradient(const Kind& kind, const Tensor& grad, const Tensor& x,
                            const std::optional<Tensor>& x_scale, bool bias_grad,
                            OptionalDtype activation_dtype, OptionalDtype dtype, bool pow2_scale) {
  TORCHEXT_CHECK_VALUE(x.dim() >= 1, kind.op, ": ", kind.operand,
                       " must have shape [..., columns] (got a 0-dimensional tensor); give it a "
                       "dimension with ",
                       kind.operand, ".reshape(1)");
  const ActivationView view = check_saved_operands(kind, x, x_scale);
  const MatrixView grad_view = check_grad(kind, grad, x, view);
  ActivationGradient out{};
  out.options = options_of(kind.op, dtype, pow2_scale);
  out.activation_options = out.options;
  if (activation_dtype) out.activation_options = options_of(kind.op, activation_dtype, pow2_scale);
  const int64_t cols = view.operand_cols();
  const QuantizedOutput row = empty_quantized_groups(sizes_of(x), view.rows, out.options, x);
  const QuantizedOutput transposed =
      empty_quantized_groups({cols, view.rows}, cols, out.options, x);
  // An op cannot return None: what is not asked for has no elements.
  const Tensor sums = empty_strided({bias_grad ? cols : 0}, {1}, ScalarType::Float, x);
  const QuantizedOutput activation_t =
      activation_dtype
          ? empty_quantized_groups({view.cols, view.rows}, view.cols, out.activation_options, x)
          : empty_quantized_groups({0, 0}, 0, out.activation_options, x);
  const Gradients outputs{row.data, row.scale,         transposed.data,   transposed.scale,
                          sums,     activation_t.data, activation_t.scale};
  if (view.rows == 0 || view.cols == 0) {
    if (bias_grad) torch::stable::fill_(const_cast<Tensor&>(sums), 0.0);
    return outputs;
  }
  out.row = row.view;
  out.transposed = transposed.view;
  const int64_t row_tiles = ceil_div(view.rows, kScaleGroup);
  const Tensor partial_sums =
      empty_strided({bias_grad ? row_tiles : 0, cols}, {cols, 1}, ScalarType::Float, x);
  if (bias_grad) {
    out.bias_grad = static_cast<float*>(sums.data_ptr());
    out.partial_sums = static_cast<float*>(partial_sums.data_ptr());
  }
  if (activation_dtype) out.activation_t = &activation_t.view;
  Device* device = device_for(x, kind.op);
  if (device == nullptr) {
    activation_gradient_cpu(grad_view, view, out);
  } else if constexpr (kBuiltWithCuda) {
    activation_gradient_cuda(
        *device, grad_view, view, out,
        {reads(grad, "grad"), reads(x, kind.operand),
         reads(x_scale ? *x_scale : x, "scale of the operands"), writes(row.data, "data"),
         writes(row.scale, "scale"), writes(transposed.data, "data_t"),
         writes(transposed.scale, "scale_t"), writes(sums, "bias_grad"),
         writes(partial_sums, "partial sums"), writes(activation_t.data, "activation_t"),
         writes(activation_t.scale, "activation_scale_t")});
  }
  return outputs;
}

}  // namespace

Pair silu_mul_quantize_1x128(const Tensor& gate_up, OptionalDtype dtype, bool pow2_scale) {
  return quantize_activation({"silu_mul_quantize_1x128", "gate_up", Function::kSiLU, true}, gate_up,
                             dtype, pow2_scale);
}

Pair silu_mul_quantize_1x128_t(const Tensor& gate_up, OptionalDtype dtype, bool pow2_scale) {
  return quantize_activation_t({"silu_mul_quantize_1x128_t", "gate_up", Function::kSiLU, true},
                               gate_up, dtype, pow2_scale);
}

Dual silu_mul_quantize_1x128_dual(const Tensor& gate_up, OptionalDtype dtype, bool pow2_scale) {
  return quantize_activation_dual(
      {"silu_mul_quantize_1x128_dual", "gate_up", Function::kSiLU, true}, gate_up, dtype,
      pow2_scale);
}

Pair gelu_mul_quantize_1x128(const Tensor& gate_up, bool tanh_approximation, OptionalDtype dtype,
                             bool pow2_scale) {
  return quantize_activation({"gelu_mul_quantize_1x128", "gate_up", gelu(tanh_approximation), true},
                             gate_up, dtype, pow2_scale);
}

Pair gelu_mul_quantize_1x128_t(const Tensor& gate_up, bool tanh_approximation, OptionalDtype dtype,
                               bool pow2_scale) {
  return quantize_activation_t(
      {"gelu_mul_quantize_1x128_t", "gate_up", gelu(tanh_approximation), true}, gate_up, dtype,
      pow2_scale);
}

Dual gelu_mul_quantize_1x128_dual(const Tensor& gate_up, bool tanh_approximation,
                                  OptionalDtype dtype, bool pow2_scale) {
  return quantize_activation_dual(
      {"gelu_mul_quantize_1x128_dual", "gate_up", gelu(tanh_approximation), true}, gate_up, dtype,
      pow2_scale);
}

Pair gelu_quantize_1x128(const Tensor& x, bool tanh_approximation, OptionalDtype dtype,
                         bool pow2_scale) {
  return quantize_activation({"gelu_quantize_1x128", "x", gelu(tanh_approximation), false}, x,
                             dtype, pow2_scale);
}

Pair gelu_quantize_1x128_t(const Tensor& x, bool tanh_approximation, OptionalDtype dtype,
                           bool pow2_scale) {
  return quantize_activation_t({"gelu_quantize_1x128_t", "x", gelu(tanh_approximation), false}, x,
                               dtype, pow2_scale);
}

Dual gelu_quantize_1x128_dual(const Tensor& x, bool tanh_approximation, OptionalDtype dtype,
                              bool pow2_scale) {
  return quantize_activation_dual(
      {"gelu_quantize_1x128_dual", "x", gelu(tanh_approximation), false}, x, dtype, pow2_scale);
}

Pair relu2_quantize_1x128(const Tensor& x, OptionalDtype dtype, bool pow2_scale) {
  return quantize_activation({"relu2_quantize_1x128", "x", Function::kReLU2, false}, x, dtype,
                             pow2_scale);
}

Pair relu2_quantize_1x128_t(const Tensor& x, OptionalDtype dtype, bool pow2_scale) {
  return quantize_activation_t({"relu2_quantize_1x128_t", "x", Function::kReLU2, false}, x, dtype,
                               pow2_scale);
}

Dual relu2_quantize_1x128_dual(const Tensor& x, OptionalDtype dtype, bool pow2_scale) {
  return quantize_activation_dual({"relu2_quantize_1x128_dual", "x", Function::kReLU2, false}, x,
                                  dtype, pow2_scale);
}

Gradients silu_mul_backward_quantize_1x128_dual(const Tensor& grad, const Tensor& gate_up,
                                                std::optional<Tensor> gate_up_scale, bool bias_grad,
                                                OptionalDtype activation_dtype, OptionalDtype dtype,
                                                bool pow2_scale) {
  return quantize_gradient(
      {"silu_mul_backward_quantize_1x128_dual", "gate_up", Function::kSiLU, true}, grad, gate_up,
      gate_up_scale, bias_grad, activation_dtype, dtype, pow2_scale);
}

Gradients gelu_mul_backward_quantize_1x128_dual(const Tensor& grad, const Tensor& gate_up,
                                                std::optional<Tensor> gate_up_scale,
                                                bool tanh_approximation, bool bias_grad,
                                                OptionalDtype activation_dtype, OptionalDtype dtype,
                                                bool pow2_scale) {
  return quantize_gradient(
      {"gelu_mul_backward_quantize_1x128_dual", "gate_up", gelu(tanh_approximation), true}, grad,
      gate_up, gate_up_scale, bias_grad, activation_dtype, dtype, pow2_scale);
}

Gradients gelu_backward_quantize_1x128_dual(const Tensor& grad, const Tensor& x,
                                            std::optional<Tensor> x_scale, bool tanh_approximation,
                                            bool bias_grad, OptionalDtype activation_dtype,
                                            OptionalDtype dtype, bool pow2_scale) {
  return quantize_gradient(
      {"gelu_backward_quantize_1x128_dual", "x", gelu(tanh_approximation), false}, grad, x, x_scale,
      bias_grad, activation_dtype, dtype, pow2_scale);
}

Gradients relu2_backward_quantize_1x128_dual(const Tensor& grad, const Tensor& x,
                                             std::optional<Tensor> x_scale, bool bias_grad,
                                             OptionalDtype activation_dtype, OptionalDtype dtype,
                                             bool pow2_scale) {
  return quantize_gradient({"relu2_backward_quantize_1x128_dual", "x", Function::kReLU2, false},
                           grad, x, x_scale, bias_grad, activation_dtype, dtype, pow2_scale);
}

}  // namespace torchext
