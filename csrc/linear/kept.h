// The form in which a compiled linear layer keeps its quantized matrices between forward and
// backward, and the GEMM that reads this form.
//
// Between forward and backward, a hook may copy the kept tensors, for example to offload them to
// the CPU. Such copies may have dense strides, but the backward graph was compiled for the strides
// of the originals. So a matrix is kept as contiguous tensors: data with rows padded to 16 bytes,
// scales transposed. The quantizers return these tensors, beside those that forward reads. A
// separate op or view would not do: torch's partitioner would move it into the backward graph,
// since only backward needs it, and keep its input instead.
#pragma once

#include <optional>
#include <tuple>

#include "../runtime/tensor.h"

namespace torchext {

// Quantizes x [..., K] along K, for forward, and along M, to be kept. Returns (data, scale, kept,
// kept_scale); `kept` is [K, round_up(M, 16)]. `granularity` determines the scales and the shape of
// kept_scale:
//   0   1x128         [ceil(M / 128), round_up(K, 4)]
//   1   row-wise      [1, K]
//   2   tensor-wise   [1, 1]
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_kept(const Tensor& x, int64_t granularity,
                                                         std::optional<ScalarType> dtype,
                                                         bool pow2_scale);

// Quantizes x [N, K] in 128x128 blocks. Returns (data, scale, kept), where `kept` is
// [K, round_up(N, 16)]. `scale` also serves as the scales of `kept`, which are kept transposed.
std::tuple<Tensor, Tensor, Tensor> quantize_128x128_kept(const Tensor& x,
                                                         std::optional<ScalarType> dtype,
                                                         bool pow2_scale);

// fp8_gemm_nt of a [..., K] and a kept matrix [N, K]: b is [N, round_up(K, 16)], b_scale its scales
// in the kept form.
Tensor fp8_gemm_nt_kept(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                        const Tensor& b_scale, std::optional<ScalarType> out_dtype);

}  // namespace torchext
