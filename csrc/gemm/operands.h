// What all GEMM ops check of their arguments, and how they run. The granularity is read off the
// shapes of the scales.
#pragma once

#include "gemm.h"

namespace torchext {

// The arguments that all of them have.
struct GemmCall {
  const char* op;  // its name, for errors
  const Tensor &a, &a_scale, &b, &b_scale;
  const std::optional<Tensor>& bias;
  int64_t num_sms;
};

// Everything of the problem but where its groups begin and its output. Of M-grouped products, b is
// [G, N, K].
GemmProblem check_operands(const GemmCall& call, Grouping grouping);

// Sets p.group_index to `index`, an argument called `name` of `length` elements.
void check_group_index(const GemmCall& call, GemmProblem& p, const char* name, const Tensor& index,
                       int64_t length);

// out_dtype, or bfloat16.
ScalarType check_out_dtype(const GemmCall& call, std::optional<ScalarType> out_dtype);

// Sets out, its dtype and strides, and accumulate. `sizes` is the shape that `out` must have,
// `shape` the same in words.
void check_out(const GemmCall& call, GemmProblem& p, const Tensor& out, bool accumulate,
               const std::vector<int64_t>& sizes, const std::string& shape);

// A new output of that shape, contiguous, in p.
Tensor empty_out(const GemmCall& call, GemmProblem& p, const std::vector<int64_t>& sizes,
                 ScalarType dtype);

// Runs the CPU or the CUDA kernel. `index` and `out_scale`: what p.group_index and p.out_scale
// point into.
void run(const GemmCall& call, const GemmProblem& p, const Tensor& out,
         const Tensor* index = nullptr, const Tensor* out_scale = nullptr);

bool same_device(const Tensor& x, const Tensor& y);

}  // namespace torchext
