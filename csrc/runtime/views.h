// How host code describes a matrix and its quantized form to a kernel, on a CPU or a GPU. These are
// plain structs; the code that fills them has checked the tensors that they point into.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace torchext {

// A matrix in a wide dtype. Leading dimensions have been folded into `rows`.
struct MatrixView {
  const void* data;
  ScalarType dtype;
  int64_t rows, cols;
  int64_t row_stride, col_stride;  // elements
};

// Destination of FP8 data and its scales, both indexed [row, column] with strides in elements.
// `data` rows are round_up(cols, 16) bytes apart and contiguous.
struct QuantizedView {
  void* data;
  int64_t data_stride;  // bytes between rows
  float* scale;
  int64_t scale_row_stride, scale_col_stride;
};

struct QuantizeOptions {
  bool e5m2;
  bool pow2_scale;
};

}  // namespace torchext
