// Quantized outputs of ops.
#pragma once

#include "layout.h"
#include "views.h"

namespace torchext {

// A quantized tensor, and a kernel's view of it.
struct QuantizedOutput {
  Tensor data, scale;
  QuantizedView view;
};

// Uninitialized, of shape `sizes`, which is `rows` rows.
inline QuantizedOutput empty_quantized_groups(const std::vector<int64_t>& sizes, int64_t rows,
                                              const QuantizeOptions& options, const Tensor& like) {
  const ScalarType dtype = options.e5m2 ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
  const Tensor data = empty_data(sizes, dtype, like), scale = empty_group_scale(sizes, like);
  return {data,
          scale,
          {data.data_ptr(), round_up(sizes.back(), 16), static_cast<float*>(scale.data_ptr()), 1,
           round_up(rows, 4)}};
}

}  // namespace torchext
