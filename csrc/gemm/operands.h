// What all GEMM ops have in common: the checks of their arguments, and how they run. The shapes of
// the scales determine the granularity.
#pragma once

#include "gemm.h"

namespace torchext {

// The arguments that all GEMM ops have.
struct GemmCall {
  const char* op;  // its name, for errors
  const Tensor &a, &a_scale, &b, &b_scale;
  const std::optional<Tensor>& bias;
  int64_t num_sms;
};

// Scales as [batch, row, scale group of K]. A stride of 0 repeats the only scale.
struct Scale {
  const float* data;
  int64_t batches, rows, groups;
  int64_t batch_stride, row_stride, group_stride;
};

// Checks dtype and layout of an FP8 operand, the argument `name`.
void check_operand(const char* op, const char* name, const Tensor& tensor, const FoldedRows& rows);
// Checks the dtype of scales. They are one batch: leading dimensions are folded into rows.
Scale check_scale(const char* op, const char* name, const Tensor& scale);
// Checks that 1x128 scales are M-major.
void check_m_major(const char* op, const char* name, const Tensor& tensor, const Scale& scale);
// These set the fields of p.
void check_bias(const GemmCall& call, GemmProblem& p);
void check_num_sms(const GemmCall& call, GemmProblem& p);

// Checks the operands and returns the problem, still without the start of its groups and its
// output. M-grouped: b is [G, N, K].
GemmProblem check_operands(const GemmCall& call, Grouping grouping);

// Checks `index`, the argument `name`, which must have `length` elements, and sets p.group_index.
void check_group_index(const GemmCall& call, GemmProblem& p, const char* name, const Tensor& index,
                       int64_t length);

// out_dtype, or bfloat16 if there is none.
ScalarType check_out_dtype(const GemmCall& call, std::optional<ScalarType> out_dtype);

// Checks `out` and sets it in p, with its dtype, strides and accumulate. `sizes` is the shape that
// it must have, `shape` describes that shape in words.
void check_out(const GemmCall& call, GemmProblem& p, const Tensor& out, bool accumulate,
               const std::vector<int64_t>& sizes, const std::string& shape);

// Allocates a contiguous output of that shape and sets it in p.
Tensor empty_out(const GemmCall& call, GemmProblem& p, const std::vector<int64_t>& sizes,
                 ScalarType dtype);

// Runs the CPU or the CUDA kernel. `index` and `out_scale` are the tensors that p.group_index and
// p.out_scale point into.
void run(const GemmCall& call, const GemmProblem& p, const Tensor& out,
         const Tensor* index = nullptr, const Tensor* out_scale = nullptr);

bool same_device(const Tensor& x, const Tensor& y);

}  // namespace torchext
