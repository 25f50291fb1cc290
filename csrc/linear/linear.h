// The GEMMs of torchext.nn.Linear as ops, each with the quantization of its operands. Graphs
// (torch.export, torch.fx, TorchScript) contain these ops, and torch.func's transforms and DTensor
// see them. Eager layers and torch.compile call the quantizers and the GEMM themselves
// (torchext/ops/linear_function.py), since they keep for backward what forward has quantized.
#pragma once

#include <optional>

#include "../runtime/tensor.h"

namespace torchext {

// `granularity` is an index of torchext.recipe.GRANULARITIES: 0 blockwise, 1 rowwise, 2 tensorwise.

// fprop: input [..., K] @ weight [N, K].T + bias [N] -> [..., N] in out_dtype, or in input's dtype.
Tensor linear(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
              int64_t granularity, ScalarType input_dtype, ScalarType weight_dtype,
              ScalarType grad_dtype, bool pow2_scale, std::optional<ScalarType> out_dtype);
// dgrad: dy [..., N] @ weight [N, K] -> [..., K].
Tensor linear_dgrad(const Tensor& dy, const Tensor& weight, int64_t granularity,
                    ScalarType weight_dtype, ScalarType grad_dtype, bool pow2_scale,
                    ScalarType out_dtype);
// wgrad: dy [..., N].T @ input [..., K], with leading dimensions folded into rows -> [N, K].
Tensor linear_wgrad(const Tensor& dy, const Tensor& input, int64_t granularity,
                    ScalarType input_dtype, ScalarType grad_dtype, bool pow2_scale,
                    ScalarType out_dtype);

}  // namespace torchext
