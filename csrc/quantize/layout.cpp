// Implements layout.h.
#include "layout.h"

#include "../runtime/check.h"

namespace torchext {

ScalarType check_fp8_dtype(const char* op, std::optional<ScalarType> dtype) {
  const ScalarType fp8 = dtype.value_or(ScalarType::Float8_e4m3fn);
  TORCHEXT_CHECK_TYPE(is_fp8(fp8), op,
                      ": dtype must be torch.float8_e4m3fn (None) or torch.float8_e5m2 (got ",
                      dtype_name(fp8), ")");
  return fp8;
}

std::vector<int64_t> folded_strides(const Tensor& x, int64_t row, int64_t column) {
  std::vector<int64_t> strides(x.dim(), column);
  for (int64_t i = x.dim() - 2; i >= 0; --i) {
    strides[i] = row;
    row *= x.size(i);
  }
  return strides;
}

std::vector<int64_t> with_columns(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  return sizes;
}

Tensor empty_data(const Tensor& x, int64_t columns, ScalarType dtype) {
  return empty_strided(with_columns(x, columns), folded_strides(x, round_up(columns, 16), 1), dtype,
                       x);
}

Tensor empty_group_scale(const Tensor& x, int64_t rows, int64_t columns) {
  return empty_strided(with_columns(x, ceil_div(columns, kGroup)),
                       folded_strides(x, 1, round_up(rows, 4)), ScalarType::Float, x);
}

}  // namespace torchext
