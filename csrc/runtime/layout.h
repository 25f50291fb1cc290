// The shapes and strides of quantized tensors, as torchext/_dispatch/layout.py states them, and the
// dtypes that they may have.
#pragma once

#include <optional>

#include "tensor.h"

namespace torchext {

// The FP8 dtype that an op's `dtype` argument stands for.
ScalarType check_fp8_dtype(const char* op, std::optional<ScalarType> dtype);

std::vector<int64_t> sizes_of(const Tensor& x);

// Strides of a tensor [..., columns] whose leading dimensions fold into rows `row` elements apart,
// and whose columns are `column` elements apart.
std::vector<int64_t> folded_strides(const std::vector<int64_t>& sizes, int64_t row, int64_t column);

// FP8 data of these sizes, with rows round_up(columns, 16) bytes apart.
Tensor empty_data(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like);

// M-major 1x128 scales [..., ceil(columns / 128)] for data of these sizes.
Tensor empty_group_scale(std::vector<int64_t> sizes, const Tensor& like);

}  // namespace torchext
