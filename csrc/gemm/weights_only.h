// The weights-only product (w8a16): a wide operand times an FP8 weight. Numbers: docs/numerics.md.
#pragma once

#include <optional>

#include "../runtime/tensor.h"

namespace torchext {

// x @ dequantize(weight).T (+ bias), in x's dtype.
Tensor fp8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                  std::optional<Tensor> bias, int64_t num_sms);

}  // namespace torchext
