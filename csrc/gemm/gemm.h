// FP8 GEMMs: host entry points of the ops, which check, allocate and dispatch (gemm.cpp,
// grouped.cpp, fused.cpp; they share operands.cpp), and what the CPU kernels (cpu/) and the
// CUDA launchers (sm90/launch.cpp, mma/launch.cpp) implement. Numbers: docs/numerics.md.
#pragma once

#include <optional>
#include <tuple>

#include "../runtime/activation.h"
#include "../runtime/device.h"

namespace torchext {

// ---- ops ----
Tensor fp8_gemm_nt(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                   std::optional<Tensor> bias, std::optional<ScalarType> out_dtype,
                   int64_t num_sms);
void fp8_gemm_nt_out(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                     Tensor out, bool accumulate, std::optional<Tensor> bias, int64_t num_sms);

Tensor m_grouped_fp8_gemm_nt_contiguous(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                        const Tensor& b_scale, std::optional<Tensor> offsets,
                                        std::optional<Tensor> group_ids, std::optional<Tensor> bias,
                                        std::optional<ScalarType> out_dtype, int64_t num_sms);
void m_grouped_fp8_gemm_nt_contiguous_out(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                          const Tensor& b_scale, std::optional<Tensor> offsets,
                                          std::optional<Tensor> group_ids, Tensor out,
                                          bool accumulate, std::optional<Tensor> bias,
                                          int64_t num_sms);
Tensor m_grouped_fp8_gemm_nt_masked(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                    const Tensor& b_scale, const Tensor& masked_m,
                                    int64_t expected_m, std::optional<Tensor> bias,
                                    std::optional<ScalarType> out_dtype, int64_t num_sms);
void m_grouped_fp8_gemm_nt_masked_out(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                      const Tensor& b_scale, const Tensor& masked_m,
                                      int64_t expected_m, Tensor out, bool accumulate,
                                      std::optional<Tensor> bias, int64_t num_sms);
Tensor k_grouped_fp8_gemm_nt(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                             const Tensor& b_scale, const Tensor& offsets,
                             std::optional<ScalarType> out_dtype, int64_t num_sms);
void k_grouped_fp8_gemm_nt_out(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                               const Tensor& b_scale, const Tensor& offsets, Tensor out,
                               bool accumulate, int64_t num_sms);

std::tuple<Tensor, Tensor> fp8_gemm_nt_swiglu_quantize(const Tensor& a, const Tensor& a_scale,
                                                       const Tensor& b, const Tensor& b_scale,
                                                       std::optional<Tensor> bias,
                                                       std::optional<ScalarType> dtype,
                                                       bool pow2_scale, int64_t num_sms);
std::tuple<Tensor, Tensor> fp8_gemm_nt_gelu_quantize(const Tensor& a, const Tensor& a_scale,
                                                     const Tensor& b, const Tensor& b_scale,
                                                     bool tanh_approximation,
                                                     std::optional<Tensor> bias,
                                                     std::optional<ScalarType> dtype,
                                                     bool pow2_scale, int64_t num_sms);
std::tuple<Tensor, Tensor> fp8_gemm_nt_relu2_quantize(const Tensor& a, const Tensor& a_scale,
                                                      const Tensor& b, const Tensor& b_scale,
                                                      std::optional<Tensor> bias,
                                                      std::optional<ScalarType> dtype,
                                                      bool pow2_scale, int64_t num_sms);

// ---- kernels ----
// Which elements of a and of b share a scale. kRowwise covers tensor-wise scales, too: a stride of
// 0 repeats the only scale.
enum class Granularity {
  k1D2D,     // a: 1x128, b: 128x128
  k1D1D,     // a: 1x128, b: 1x128
  kRowwise,  // a, b: one scale for each row (or one for all); applied once, after all of K
};

// Which rows of `a` are multiplied by which matrix of `b`. Groups may have any length, including
// zero. Rows of `out` that belong to no group stay as they were. The CPU kernel refuses an index
// that is out of range. CUDA kernels cannot report it, but must not access memory outside a, b and
// out.
enum class Grouping {
  kNone,     // no groups
  kOffsets,  // group g: rows [group_index[g - 1], group_index[g]) of a; later rows have no group
  kRowIds,   // row r of a belongs to group group_index[r], or to none if this is negative
  kCounts,   // group g: the first group_index[g] of rows [g, g + 1) * group_rows of a
  kAlongK,   // out[g]: a sum over columns [group_index[g - 1], group_index[g]) of a and b
};

// The part of a problem that kernels on every device read; launchers pass it on unchanged. Strides
// count elements.
struct GemmTensors {
  Granularity granularity;
  ScalarType a_dtype, b_dtype, out_dtype;  // a_dtype may be wide: then a has no scale
  const void* a;
  int64_t a_stride;  // between rows; columns are contiguous
  const void* b;     // M-grouped: [groups * n, k], group after group
  int64_t b_stride;
  // The scale of a[m, k] is a_scale[m * a_scale_row + k / 128 * a_scale_k_block]; that of b[n, k]
  // likewise, with n / 128 in place of n for 1D2D. b_scale_group, M-grouped: to the next group.
  int64_t a_scale_k_block;
  const float *a_scale, *b_scale;
  int64_t a_scale_row, b_scale_row, b_scale_k_block, b_scale_group;
  const void* bias;  // [n] or, M-grouped, [groups, n], contiguous; or nullptr
  ScalarType bias_dtype;
  void* out;
  int64_t out_stride;  // between rows
  bool accumulate;     // out += product (+ bias), the sum in FP32 and rounded once

  Grouping grouping;
  const int32_t* group_index;  // on the device of a; see Grouping
  int64_t out_group_stride;    // kAlongK: from out[g] to out[g + 1]

  // Applied to the product in FP32. The result is quantized 1x128 into `out`, FP8 data [m,
  // out_columns]. SwiGLU: columns [0, n / 2) of the product are the gate, the rest is up.
  Activation activation;
  // With an activation: the scale of out[m, c] is out_scale[m + c / 128 * out_scale_column_block].
  float* out_scale;
  int64_t out_scale_column_block;
  bool pow2_scale;
};

// A checked problem; the leading dimensions of `a` are folded into m.
struct GemmProblem : GemmTensors {
  const char* op;         // for errors
  int64_t m, n, k;        // n: rows of b; for SwiGLU those of gate and up
  int num_sms;            // 0: all
  int64_t groups = 1;     // 1 without grouping
  int64_t group_rows;     // kCounts: m / groups
  int64_t expected_rows;  // rows of a group, to choose a kernel; 0: unknown
};

// Columns of out. SwiGLU computes each from two columns of the product.
inline int64_t out_columns(const GemmProblem& p) {
  return is_gated(p.activation) ? p.n / 2 : p.n;
}

void fp8_gemm_cpu(const GemmProblem& problem);
// Launchers, in CUDA builds only: the first for Path::sm90, the second for every other path.
void fp8_gemm_nt_sm90(Device& device, const GemmProblem& problem,
                      std::initializer_list<Buffer> buffers);
void fp8_gemm_nt_mma(Device& device, Path path, const GemmProblem& problem,
                     std::initializer_list<Buffer> buffers);

}  // namespace torchext
