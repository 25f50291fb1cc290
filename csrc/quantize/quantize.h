// Quantization: host entry points of the ops (quantize.cpp: check, allocate, dispatch), and what
// the CPU kernels (quantize_cpu.cpp) and CUDA launchers (cuda/) implement. Numbers:
// docs/numerics.md.
#pragma once

#include <optional>
#include <tuple>

#include "../runtime/device.h"
#include "../runtime/views.h"

namespace torchext {

// ---- ops ----
using OptionalDtype = std::optional<ScalarType>;
std::tuple<Tensor, Tensor> quantize_1x128(const Tensor& x, OptionalDtype dtype, bool pow2_scale);
std::tuple<Tensor, Tensor> quantize_1x128_t(const Tensor& x, OptionalDtype dtype, bool pow2_scale);
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_1x128_dual(const Tensor& x, OptionalDtype dtype,
                                                               bool pow2_scale);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_1x128_dual_bias_grad(
    const Tensor& x, OptionalDtype dtype, bool pow2_scale);
std::tuple<Tensor, Tensor> quantize_128x128(const Tensor& x, OptionalDtype dtype, bool pow2_scale);
std::tuple<Tensor, Tensor, Tensor> quantize_128x128_dual(const Tensor& x, OptionalDtype dtype,
                                                         bool pow2_scale);
std::tuple<Tensor, Tensor> quantize_rowwise(const Tensor& x, OptionalDtype dtype, bool pow2_scale);
std::tuple<Tensor, Tensor> quantize_tensorwise(const Tensor& x, OptionalDtype dtype,
                                               bool pow2_scale);
Tensor dequantize(const Tensor& data, const Tensor& scale, ScalarType out_dtype);

// ---- kernels ----
using Buffers = std::initializer_list<Buffer>;

// Quantizes x with 1x128 scales into `row`, and its transpose with 1x128 scales into `transposed`.
// Either may be nullptr; both come from one read of x.
void quantize_groups_cpu(const MatrixView& x, const QuantizeOptions& options,
                         const QuantizedView* row, const QuantizedView* transposed);
void quantize_groups_cuda(Device& device, const MatrixView& x, const QuantizeOptions& options,
                          const QuantizedView* row, const QuantizedView* transposed,
                          Buffers buffers);

// Does both, and writes the FP32 sums over rows of x into `bias_grad`, in the order of
// ../cpu/quantize_tiles.h. `partial_sums` has x.cols values for each 128 rows.
void quantize_groups_bias_grad_cpu(const MatrixView& x, const QuantizeOptions& options,
                                   const QuantizedView& row, const QuantizedView& transposed,
                                   float* bias_grad);
void quantize_groups_bias_grad_cuda(Device& device, const MatrixView& x,
                                    const QuantizeOptions& options, const QuantizedView& row,
                                    const QuantizedView& transposed, float* bias_grad,
                                    float* partial_sums, Buffers buffers);

// Quantizes 128x128 blocks. Rows of `transposed_data` (nullptr: none) are transposed_stride bytes
// apart.
void quantize_blocks_cpu(const MatrixView& x, const QuantizeOptions& options,
                         const QuantizedView& out, void* transposed_data,
                         int64_t transposed_stride);
void quantize_blocks_cuda(Device& device, const MatrixView& x, const QuantizeOptions& options,
                          const QuantizedView& out, void* transposed_data,
                          int64_t transposed_stride, Buffers buffers);

// Quantizes with one scale for each row.
void quantize_rowwise_cpu(const MatrixView& x, const QuantizeOptions& options,
                          const QuantizedView& out);
void quantize_rowwise_cuda(Device& device, const MatrixView& x, const QuantizeOptions& options,
                           const QuantizedView& out, Buffers buffers);

// Quantizes with one scale for all of x. The CUDA launcher zeroes `amax_bits` (one uint32) and
// reduces the amax into it.
void quantize_tensorwise_cpu(const MatrixView& x, const QuantizeOptions& options,
                             const QuantizedView& out);
void quantize_tensorwise_cuda(Device& device, const MatrixView& x, const QuantizeOptions& options,
                              const QuantizedView& out, uint32_t* amax_bits, Buffers buffers);

// y[row, col] = data[row, col] * scale[row / row_group, col / col_group], rounded to FP32 and then
// to y's dtype.
struct DequantizeView {
  const void* data;
  int64_t data_row_stride, data_col_stride;
  bool e5m2;
  const float* scale;
  int64_t scale_row_stride, scale_col_stride;
  int64_t row_group, col_group;
  void* y;  // contiguous rows, y_stride elements apart
  ScalarType y_dtype;
  int64_t y_stride;
  int64_t rows, cols;
};
void dequantize_cpu(const DequantizeView& view);
void dequantize_cuda(Device& device, const DequantizeView& view, Buffers buffers);

}  // namespace torchext
