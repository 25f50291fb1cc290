// The shapes and strides of quantised tensors, as torchext/_layout.py states them, and the dtypes
// that they may have.
#pragma once

#include <optional>

#include "../runtime/tensor.h"

namespace torchext {

// The FP8 dtype that an op's `dtype` argument stands for.
ScalarType check_fp8_dtype(const char* op, std::optional<ScalarType> dtype);

// Strides of x's leading dimensions folded into rows `row` apart, then `column`.
std::vector<int64_t> folded_strides(const Tensor& x, int64_t row, int64_t column);

// x's shape but for the last dimension.
std::vector<int64_t> with_columns(const Tensor& x, int64_t columns);

// FP8 data [..., columns] for the rows of x, round_up(columns, 16) bytes apart.
Tensor empty_data(const Tensor& x, int64_t columns, ScalarType dtype);

// Scales [..., ceil(columns / 128)] for the `rows` rows of x, M-major.
Tensor empty_group_scale(const Tensor& x, int64_t rows, int64_t columns);

}  // namespace torchext
