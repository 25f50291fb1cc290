// Walks through tokens and their choices, for the kernels that move rows (permute.cu, combine.cu).
//
// Contract: a warp takes 512 columns of one token at a time, 16 to a lane, and keeps them in registers
// while it writes or adds the rows of the token's choices. A grid of any size does all of the work, so
// a launch with num_sms CTAs occupies at most so many SMs.
#pragma once

#include "../../device/matrix.cuh"
#include "../moe.h"

namespace torchext::moe {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int64_t kColumns = 512;  // that a warp takes at a time

// Calls body(token, col) for the lane's columns col to col + 15 of every token; all lanes of a warp
// have the same token.
template <class Body>
__device__ void for_each_token(int64_t tokens, int64_t cols, const Body& body) {
  const int64_t chunks = (cols + kColumns - 1) / kColumns;
  const int64_t step = int64_t(gridDim.x) * kWarps;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; i < tokens * chunks; i += step)
    body(i / chunks, i % chunks * kColumns + threadIdx.x % 32 * 16);
}

// The choices of tokens, as kernels read them.
struct Choices : ChoicesView {
  // The row of a choice, or a negative number.
  __device__ int64_t row(int64_t token, int64_t choice) const {
    const int64_t at = token * slots.token_stride + choice * slots.choice_stride;
    const int64_t row = __ldg(slots.data + at);
    return row < rows ? row : -1;
  }
  __device__ float weight(int64_t token, int64_t choice) const {
    if (weights.data == nullptr) return 1.0f;
    return __ldg(weights.data + token * weights.token_stride + choice * weights.choice_stride);
  }
};

inline LaunchConfig config_of(int64_t tokens, int64_t cols, int num_sms) {
  const int64_t ctas = ceil_div(tokens * ceil_div(cols, kColumns), kWarps);
  TORCHEXT_CHECK(ctas <= INT32_MAX, "launch for ", tokens, " tokens: too large");
  return {{uint32_t(num_sms == 0 ? ctas : ctas < num_sms ? ctas : num_sms)}, {kThreads}};
}

// Contiguous rows of a wide dtype.
struct Rows {
  uint8_t* data;
  int64_t stride;  // bytes
  bool aligned;    // rows start at multiples of 16 bytes
};

inline Rows rows_of(void* data, int64_t cols, ScalarType dtype) {
  const int64_t stride = cols * element_size(dtype);
  return {static_cast<uint8_t*>(data), stride, quantizers::is_aligned(data, stride)};
}

}  // namespace torchext::moe
