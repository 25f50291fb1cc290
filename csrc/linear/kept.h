// The form in which a compiled linear layer keeps its quantized matrices between forward and
// backward, and the product that reads it.
//
// In between a hook may copy what is kept (offloading to the CPU, say), by its sizes or by dense
// strides, while the backward graph was compiled for the strides that it had. So a matrix is kept
// as contiguous tensors: data with rows padded to 16 bytes, scales transposed. The quantizers
// return them so, beside what forward reads; torch's partitioner would move an op, or a view, that
// only backward needs into the backward graph, and keep what is before it.
#pragma once

#include <optional>
#include <tuple>

#include "../runtime/tensor.h"

namespace torchext {

// x [..., K] quantized along K, and along M to be kept: (data, scale, kept, kept_scale), where
// `kept` is [K, round_up(M, 16)]. `granularity`: 0 for 1x128 groups, kept_scale
// [ceil(M / 128), round_up(K, 4)]; 1 for rows, [1, K]; 2 for all, [1, 1].
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_kept(const Tensor& x, int64_t granularity,
                                                         std::optional<ScalarType> dtype,
                                                         bool pow2_scale);

// x [N, K] in 128x128 blocks: (data, scale, kept), where `kept` is [K, round_up(N, 16)]; `scale` is
// its scale too, transposed already.
std::tuple<Tensor, Tensor, Tensor> quantize_128x128_kept(const Tensor& x,
                                                         std::optional<ScalarType> dtype,
                                                         bool pow2_scale);

// fp8_gemm_nt of a [..., K] and the matrix [N, K] that is kept as b [N, round_up(K, 16)] and
// b_scale.
Tensor fp8_gemm_nt_kept(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                        const Tensor& b_scale, std::optional<ScalarType> out_dtype);

}  // namespace torchext
