// The quantizing epilogues of the CPU GEMM.
#pragma once

#include "../gemm.h"

namespace torchext {

// FP32 sums, rows `stride` apart, and the bias of each column. For SwiGLU, x is the gate.
struct Sums {
  float* x;
  int64_t stride;
  const float* up;  // in the same rows as x
  const float *bias, *up_bias;
};

// Adds bias to rows [row, row + rows) and columns [col, col + cols) of the problem's product, applies
// its activation in place, and quantizes into its output. Runs on the calling thread.
void activate_and_quantize_cpu(const GemmProblem& p, const Sums& sums, int64_t row, int64_t rows,
                               int64_t col, int64_t cols);

}  // namespace torchext
