// The part of torch that the op library uses, over LibTorch's stable ABI: tensors, dtypes,
// allocation with explicit strides, and calls into ATen through the dispatcher.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "dtype.h"

#ifdef __CUDA_ARCH__
namespace torch::stable {
class Tensor {
 public:
  void* data_ptr() const;
};
}  // namespace torch::stable
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#endif

namespace torchext {

using torch::stable::Tensor;

constexpr int64_t kScaleGroup = 128;  // elements of a row that share a 1x128 scale; a promotion's K

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

const char* dtype_name(ScalarType dtype);
int64_t element_size(ScalarType dtype);
std::string shape_string(const Tensor& tensor);
std::string stride_string(const Tensor& tensor);

inline bool is_fp8(ScalarType dtype) {
  return dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e5m2;
}
inline bool is_wide(ScalarType dtype) {  // dtypes that quantizers read and GEMMs write
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float;
}

// An uninitialized tensor on the device of `like`.
Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType dtype, const Tensor& like);

// Folds all dimensions but the last into rows: their number, and the stride between them in
// elements. A 1-D tensor has one row. Returns nullopt if the strides do not allow it.
struct FoldedRows {
  int64_t count, stride;
};
std::optional<FoldedRows> fold_rows(const Tensor& tensor);

// Bytes from data_ptr() to the end of the last element: the memory that a kernel may access.
int64_t extent_bytes(const Tensor& tensor);

}  // namespace torchext
