// The products of torchext.nn.Linear, each with the quantization of its operands, as one op: what
// graphs (torch.export, torch.fx, TorchScript) hold, and what torch.func's transforms and DTensor
// see, of a layer. Eager layers and torch.compile call the quantizers and the product themselves
// (torchext/ops/linear_function.py): they keep what forward has quantized for backward.
#pragma once

#include <optional>

#include "../runtime/tensor.h"

namespace torchext {

// `granularity` is an index of torchext.recipe.GRANULARITIES: 0 blockwise, 1 rowwise, 2 tensorwise.

// input [..., K] times weight [N, K], plus bias [N] -> [..., N] of out_dtype, or of input's dtype.
Tensor linear(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
              int64_t granularity, ScalarType input_dtype, ScalarType weight_dtype,
              ScalarType grad_dtype, bool pow2_scale, std::optional<ScalarType> out_dtype);
// dy [..., N] times weight [N, K], transposed -> [..., K].
Tensor linear_dgrad(const Tensor& dy, const Tensor& weight, int64_t granularity,
                    ScalarType weight_dtype, ScalarType grad_dtype, bool pow2_scale,
                    ScalarType out_dtype);
// dy [..., N] and input [..., K], both transposed, summed over all their rows -> [N, K].
Tensor linear_wgrad(const Tensor& dy, const Tensor& input, int64_t granularity,
                    ScalarType input_dtype, ScalarType grad_dtype, bool pow2_scale,
                    ScalarType out_dtype);

}  // namespace torchext
