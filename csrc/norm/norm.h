// Norms fused with quantization: host entry points of the ops (norm.cpp: check, allocate,
// dispatch), and what the CPU kernels (norm_cpu.cpp) and CUDA launchers (cuda/) implement. RMSNorm
// and LayerNorm share all code: RMSNorm is LayerNorm with a mean of 0.
//
// FP32 results are the same bits everywhere, because every sum has one order and no product is
// fused with an addition. The order of a sum over a row is the "pairwise sum": segments of
// kSegment elements; within a segment, neighbors are added, then neighbors of these sums, and so
// on, where a missing element counts as +0; the segments' sums are added to +0 one after another.
// Numbers: docs/numerics.md.
#pragma once

#include <optional>
#include <tuple>

#include "../runtime/device.h"
#include "../runtime/views.h"

namespace torchext {

constexpr int kSegment = 512;  // elements of a row whose pairwise sum is a tree

// ---- ops ----
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_quantize_1x128(
    const Tensor& x, const Tensor& weight, double eps, std::optional<Tensor> residual,
    bool unit_offset, std::optional<ScalarType> dtype, bool pow2_scale, bool return_normed);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_quantize_1x128_dual(
    const Tensor& x, const Tensor& weight, double eps, std::optional<Tensor> residual,
    bool unit_offset, std::optional<ScalarType> dtype, bool pow2_scale, bool return_normed);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_quantize_1x128(
    const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, double eps,
    std::optional<Tensor> residual, bool unit_offset, std::optional<ScalarType> dtype,
    bool pow2_scale, bool return_normed);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
layer_norm_quantize_1x128_dual(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                               double eps, std::optional<Tensor> residual, bool unit_offset,
                               std::optional<ScalarType> dtype, bool pow2_scale,
                               bool return_normed);
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& weight, const Tensor& rstd,
                                             std::optional<Tensor> residual_grad, bool unit_offset);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_backward_quantize_1x128_dual(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd,
    std::optional<Tensor> residual_grad, bool unit_offset, std::optional<ScalarType> dtype,
    bool pow2_scale);
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x,
                                                       const Tensor& weight, const Tensor& mean,
                                                       const Tensor& rstd,
                                                       std::optional<Tensor> residual_grad,
                                                       bool unit_offset);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
layer_norm_backward_quantize_1x128_dual(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                        const Tensor& mean, const Tensor& rstd,
                                        std::optional<Tensor> residual_grad, bool unit_offset,
                                        std::optional<ScalarType> dtype, bool pow2_scale);

// ---- kernels ----

// One value for each column. `data` is nullptr if there is none.
struct VectorView {
  const void* data;
  ScalarType dtype;
  int64_t stride;  // elements
};

// h = x + residual, rounded to x's dtype, or x if there is no residual. mean = sum of h / K, or 0
// for RMSNorm; rstd = 1 / sqrt(sum of (h - mean)^2 / K + eps). The normed values are
// y = ((h - mean) * rstd) * w + bias in FP32, where w is the weight or, with unit_offset, 1 + weight.
// If `normed` is asked for, y is then rounded to x's dtype.
struct NormView {
  MatrixView x;
  MatrixView residual;  // of x's dtype and sizes; data is nullptr if there is none
  void* sum;            // h: contiguous rows of x's dtype; nullptr if there is no residual
  void* normed;         // y: contiguous rows of x's dtype; nullptr if not asked for
  VectorView weight, bias;
  bool unit_offset;
  float eps;
  float *mean, *rstd;  // one for each row; mean is nullptr for RMSNorm
};

// Writes h, y, mean and rstd, quantizes y with 1x128 scales into `row` and, unless it is nullptr, the
// transpose of y into `transposed`.
void norm_quantize_cpu(const NormView& norm, const QuantizeOptions& options,
                       const QuantizedView& row, const QuantizedView* transposed);

// The memory behind a NormView and its outputs. Tensors that a call does not have repeat others.
struct NormTensors {
  const Tensor &x, &residual, &weight, &bias, &sum, &normed, &mean, &rstd, &data, &scale, &data_t,
      &scale_t;
};
void norm_quantize_cuda(Device& device, const NormView& norm, const QuantizeOptions& options,
                        const QuantizedView& row, const QuantizedView* transposed,
                        const NormTensors& tensors);

// FP32 values of rows, `stride` elements apart. `data` is nullptr if there are none.
struct RowValuesView {
  const float* data;
  int64_t stride;
};

// The gradient of a norm. With x_hat = (x - mean) * rstd and g_w = grad * w, in FP32:
// dx = rstd * ((g_w - mean of g_w) - x_hat * mean of g_w x_hat) + residual_grad, rounded once, to x's
// dtype; RMSNorm subtracts no mean of g_w. dweight and dbias are the sums over rows of grad * x_hat and
// of grad, in the order of ../cpu/quantize_tiles.h. The means are pairwise sums divided by K.
struct NormBackwardView {
  MatrixView grad, x;
  MatrixView residual_grad;  // data is nullptr if there is none; all three have one dtype
  VectorView weight;
  bool unit_offset;
  RowValuesView mean, rstd;  // no mean: RMSNorm
  void* dx;                  // contiguous rows of x's dtype
  float *dweight, *dbias;    // dbias is nullptr for RMSNorm
};

// Also quantizes dx both ways, unless `row` and `transposed` are nullptr.
void norm_backward_cpu(const NormBackwardView& norm, const QuantizeOptions& options,
                       const QuantizedView* row, const QuantizedView* transposed);

// The memory behind a NormBackwardView. `sums` has sums of 128 rows each: FP32, of shape [1 (RMSNorm)
// or 2, ceil(rows / 128), columns]. Tensors that a call does not have repeat others.
struct NormBackwardTensors {
  const Tensor &grad, &x, &residual_grad, &weight, &mean, &rstd, &dx, &dweight, &dbias, &sums,
      &data, &scale, &data_t, &scale_t;
};
void norm_backward_cuda(Device& device, const NormBackwardView& norm,
                        const QuantizeOptions& options, const QuantizedView* row,
                        const QuantizedView* transposed, const NormBackwardTensors& tensors);

}  // namespace torchext
