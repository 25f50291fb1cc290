// Implements layout.h.
#include "layout.h"

#include <functional>
#include <numeric>

#include "check.h"

namespace torchext {

ScalarType check_fp8_dtype(const char* op, std::optional<ScalarType> dtype) {
  const ScalarType fp8 = dtype.value_or(ScalarType::Float8_e4m3fn);
  TORCHEXT_CHECK_TYPE(is_fp8(fp8), op,
                      ": dtype must be torch.float8_e4m3fn (None) or torch.float8_e5m2 (got ",
                      dtype_name(fp8), ")");
  return fp8;
}

std::vector<int64_t> sizes_of(const Tensor& x) {
  return {x.sizes().begin(), x.sizes().end()};
}

std::vector<int64_t> folded_strides(const std::vector<int64_t>& sizes, int64_t row,
                                    int64_t column) {
  std::vector<int64_t> strides(sizes.size(), column);
  for (int64_t i = int64_t(sizes.size()) - 2; i >= 0; --i) {
    strides[i] = row;
    row *= sizes[i];
  }
  return strides;
}

Tensor empty_data(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  return empty_strided(sizes, folded_strides(sizes, round_up(sizes.back(), 16), 1), dtype, like);
}

Tensor empty_group_scale(std::vector<int64_t> sizes, const Tensor& like) {
  const int64_t rows =
      std::accumulate(sizes.begin(), sizes.end() - 1, int64_t(1), std::multiplies<int64_t>());
  sizes.back() = ceil_div(sizes.back(), kScaleGroup);
  return empty_strided(sizes, folded_strides(sizes, 1, round_up(rows, 4)), ScalarType::Float, like);
}

}  // namespace torchext
