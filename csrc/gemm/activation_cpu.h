// The quantizing epilogues of the CPU GEMM.
#pragma once

#include "gemm.h"

namespace torchext {

// Adds bias to rows [row, row + rows) and columns [col, col + cols) of the problem's FP32 product,
// applies its activation in place, and quantizes into its output. For SwiGLU, `product` holds
// `cols` columns of the gate and then `cols` columns of up. `bias` begins with column `col`.
void activate_and_quantize_cpu(const GemmProblem& p, float* product, const float* bias, int64_t row,
                               int64_t rows, int64_t col, int64_t cols);

}  // namespace torchext
