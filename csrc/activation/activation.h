// Activations fused with quantization, and their gradients: host entry points of the ops
// (activation.cpp: check, allocate, dispatch), and what the CPU kernels (cpu/) and CUDA launchers
// (cuda/) implement. FP32 lies between activation and quantizer. Numbers: docs/numerics.md.
#pragma once

#include <optional>
#include <tuple>

#include "../runtime/activation_math.h"
#include "../runtime/device.h"
#include "../runtime/views.h"

namespace torchext {

using activation_math::Function;
using OptionalDtype = std::optional<ScalarType>;
using Buffers = std::initializer_list<Buffer>;

// ---- ops ----
using Pair = std::tuple<Tensor, Tensor>;
using Dual = std::tuple<Tensor, Tensor, Tensor, Tensor>;
// data, scale, data_t, scale_t, bias_grad, activation_t, activation_scale_t
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Pair silu_mul_quantize_1x128(const Tensor& gate_up, OptionalDtype dtype, bool pow2_scale);
Pair silu_mul_quantize_1x128_t(const Tensor& gate_up, OptionalDtype dtype, bool pow2_scale);
Dual silu_mul_quantize_1x128_dual(const Tensor& gate_up, OptionalDtype dtype, bool pow2_scale);
Pair gelu_mul_quantize_1x128(const Tensor& gate_up, bool tanh_approximation, OptionalDtype dtype,
                             bool pow2_scale);
Pair gelu_mul_quantize_1x128_t(const Tensor& gate_up, bool tanh_approximation, OptionalDtype dtype,
                               bool pow2_scale);
Dual gelu_mul_quantize_1x128_dual(const Tensor& gate_up, bool tanh_approximation,
                                  OptionalDtype dtype, bool pow2_scale);
Pair gelu_quantize_1x128(const Tensor& x, bool tanh_approximation, OptionalDtype dtype,
                         bool pow2_scale);
Pair gelu_quantize_1x128_t(const Tensor& x, bool tanh_approximation, OptionalDtype dtype,
                           bool pow2_scale);
Dual gelu_quantize_1x128_dual(const Tensor& x, bool tanh_approximation, OptionalDtype dtype,
                              bool pow2_scale);
Pair relu2_quantize_1x128(const Tensor& x, OptionalDtype dtype, bool pow2_scale);
Pair relu2_quantize_1x128_t(const Tensor& x, OptionalDtype dtype, bool pow2_scale);
Dual relu2_quantize_1x128_dual(const Tensor& x, OptionalDtype dtype, bool pow2_scale);

Gradients silu_mul_backward_quantize_1x128_dual(const Tensor& grad, const Tensor& gate_up,
                                                std::optional<Tensor> gate_up_scale, bool bias_grad,
                                                OptionalDtype activation_dtype, OptionalDtype dtype,
                                                bool pow2_scale);
Gradients gelu_mul_backward_quantize_1x128_dual(const Tensor& grad, const Tensor& gate_up,
                                                std::optional<Tensor> gate_up_scale,
                                                bool tanh_approximation, bool bias_grad,
                                                OptionalDtype activation_dtype, OptionalDtype dtype,
                                                bool pow2_scale);
Gradients gelu_backward_quantize_1x128_dual(const Tensor& grad, const Tensor& x,
                                            std::optional<Tensor> x_scale, bool tanh_approximation,
                                            bool bias_grad, OptionalDtype activation_dtype,
                                            OptionalDtype dtype, bool pow2_scale);
Gradients relu2_backward_quantize_1x128_dual(const Tensor& grad, const Tensor& x,
                                             std::optional<Tensor> x_scale, bool bias_grad,
                                             OptionalDtype activation_dtype, OptionalDtype dtype,
                                             bool pow2_scale);

// ---- kernels ----

// The operands of an activation: `cols` gates, followed if `gated` by as many ups in the same row.
struct ActivationView {
  const void* data;
  ScalarType dtype;  // wide, or FP8 with 1x128 scales
  int64_t rows, cols;
  int64_t row_stride, col_stride;  // elements
  Function function;
  bool gated;
  const float* scale;  // of FP8 data
  int64_t scale_row_stride, scale_col_stride;

  int64_t operand_cols() const { return gated ? 2 * cols : cols; }
};

// Quantizes the activation with 1x128 scales into `row`, and its transpose into `transposed`. Either
// may be nullptr. x is wide.
void activate_cpu(const ActivationView& x, const QuantizeOptions& options, const QuantizedView* row,
                  const QuantizedView* transposed);
void activate_cuda(Device& device, const ActivationView& x, const QuantizeOptions& options,
                   const QuantizedView* row, const QuantizedView* transposed, Buffers buffers);

// The gradient with respect to the operands, quantized both ways, from the gradient of the
// activation. Beside it, what is not nullptr of: its sums over the rows, and the quantized transpose
// of the activation.
struct ActivationGradient {
  QuantizedView row, transposed;
  QuantizeOptions options;
  float* bias_grad;
  float* partial_sums;  // workspace, [ceil(rows / 128), x.operand_cols()]
  const QuantizedView* activation_t;
  QuantizeOptions activation_options;
};
void activation_gradient_cpu(const MatrixView& grad, const ActivationView& x,
                             const ActivationGradient& out);
void activation_gradient_cuda(Device& device, const MatrixView& grad, const ActivationView& x,
                              const ActivationGradient& out, Buffers buffers);

}  // namespace torchext
