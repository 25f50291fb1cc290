// The inner loops of norms on a CPU. Each instruction set compiles the same loops (loops.h) in a file
// of its own; kernels() picks one at run time, and norm_cpu.cpp calls it for rows.
//
// The caller has set the default floating-point environment. Elements are contiguous.
#pragma once

#include "../../runtime/cpu_level.h"
#include "../norm.h"

namespace torchext::norms {

// Kernels for one dtype of x.
struct RowKernels {
  // sum = x + residual, rounded to the dtype.
  void (*add)(const void* x, const void* residual, int64_t n, void* sum);
  // The pairwise sums (../norm.h) of h, of h^2 and of (h - mean)^2.
  float (*sum)(const void* h, int64_t n);
  float (*sum_squares)(const void* h, int64_t n);
  float (*sum_squared_deviations)(const void* h, int64_t n, float mean);
  // y = ((h - mean) * rstd) * w + bias; nothing is added if bias is nullptr.
  void (*normalize)(const void* h, int64_t n, float mean, float rstd, const float* w,
                    const float* bias, float* y);
  // rounded = y in the dtype, and y = rounded.
  void (*round)(float* y, int64_t n, void* rounded);

  // For the gradient, with h_hat = (h - mean) * rstd and g_w = g * w: the pairwise sums of g_w and of
  // g_w * h_hat.
  float (*sum_weighted)(const void* g, const float* w, int64_t n);
  float (*sum_products)(const void* g, const void* h, const float* w, int64_t n, float mean,
                        float rstd);
  // dx = rstd * ((g_w - first) - h_hat * second) + residual_grad, rounded to the dtype; nothing is
  // added if residual_grad is nullptr. Adds g * h_hat to dweight, and g to dbias unless it is nullptr.
  void (*gradient)(const void* g, const void* h, const float* w, int64_t n, float mean, float rstd,
                   float first, float second, const void* residual_grad, void* dx, float* dweight,
                   float* dbias);
};

struct Kernels {
  RowKernels rows[3];  // BF16, FP16, FP32
};

const Kernels& kernels();

extern const Kernels portable_kernels;
#ifdef TORCHEXT_X86_LEVELS
extern const Kernels avx2_kernels, avx512_kernels;
#endif

}  // namespace torchext::norms
