// FP8 matrix products: host entry points of the ops (gemm.cpp: check, allocate, dispatch), and what
// the CPU kernel (gemm_cpu.cpp) and CUDA launchers (sm90/) implement. Numbers: docs/numerics.md.
#pragma once

#include <optional>

#include "../runtime/device.h"

namespace torchext {

// ---- ops ----
Tensor fp8_gemm_nt(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                   std::optional<Tensor> bias, std::optional<ScalarType> out_dtype,
                   int64_t num_sms);
void fp8_gemm_nt_out(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                     Tensor out, bool accumulate, std::optional<Tensor> bias, int64_t num_sms);

// ---- kernels ----
// How scales meet the product. Row-wise covers tensor-wise: a stride of 0 repeats the one scale.
enum class Granularity {
  k1D2D,     // a: 1x128, b: 128x128
  k1D1D,     // a: 1x128, b: 1x128
  kRowwise,  // a: one scale a row (or one in all), b likewise; applied once, after all of K
};

// A checked problem, leading dimensions of `a` folded into m. Strides in elements.
struct GemmProblem {
  int64_t m, n, k;
  Granularity granularity;
  ScalarType a_dtype, b_dtype, out_dtype;
  const void* a;
  int64_t a_stride;  // between rows; columns are contiguous
  const void* b;
  int64_t b_stride;
  const float* a_scale;  // scale of a[m, k]: a_scale[m * a_scale_row + (k / 128) * a_scale_group]
  int64_t a_scale_row, a_scale_group;
  const float* b_scale;  // of b[n, k]; 1D2D: row n / 128, else row n
  int64_t b_scale_row, b_scale_group;
  const void* bias;  // [n] or nullptr
  ScalarType bias_dtype;
  void* out;
  int64_t out_stride;
  bool accumulate;  // out += product (+ bias), the sum in FP32 and rounded once
  int num_sms;      // 0: all
};

// `like`: any CPU tensor; scratch memory is allocated as torch allocates it.
void fp8_gemm_nt_cpu(const GemmProblem& problem, const Tensor& like);
void fp8_gemm_nt_sm90(Device& device, const GemmProblem& problem,
                      std::initializer_list<Buffer> buffers);

}  // namespace torchext
