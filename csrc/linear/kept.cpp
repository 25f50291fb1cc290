// Implements kept.h on the host entries of the quantizers and of fp8_gemm_nt.
#include "kept.h"

#include <algorithm>

#include "../gemm/gemm.h"
#include "../quantize/quantize.h"
#include "../runtime/check.h"

namespace torchext {
namespace {

// A view of the memory of `tensor`, made without a call into the dispatcher.
Tensor reinterpret(const Tensor& tensor, const std::vector<int64_t>& sizes,
                   const std::vector<int64_t>& strides) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), int64_t(sizes.size()),
                                                        sizes.data(), strides.data(),
                                                        tensor.storage_offset(), &handle));
  return Tensor(handle);
}

// x [rows, columns] as a contiguous tensor [rows, round_up(columns, unit)]. It shares the memory of
// x if x is that tensor already; otherwise it is a copy, with zeros in the added columns.
Tensor padded(const Tensor& x, int64_t unit) {
  const int64_t rows = x.size(0), columns = x.size(1), pitch = round_up(columns, unit);
  const std::vector<int64_t> strides{std::max<int64_t>(pitch, 1), 1};
  if (pitch == columns && x.numel() > 0 && x.stride(1) == 1 && (rows == 1 || x.stride(0) == pitch))
    return reinterpret(x, {rows, columns}, strides);
  Tensor out = empty_strided({rows, pitch}, strides, x.scalar_type(), x);
  torch::stable::zero_(out);
  Tensor inner = reinterpret(out, {rows, columns}, strides);
  torch::stable::copy_(inner, x);
  return out;
}

Tensor padded_data(const Tensor& data) {
  return padded(data, 16);
}

Tensor transposed(const Tensor& x) {
  return reinterpret(x, {x.size(1), x.size(0)}, {x.stride(1), x.stride(0)});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_kept(const Tensor& x, int64_t granularity,
                                                         std::optional<ScalarType> dtype,
                                                         bool pow2_scale) {
  if (granularity == 0) {
    const auto [data, scale, data_t, scale_t] = quantize_1x128_dual(x, dtype, pow2_scale);
    return {data, scale, padded_data(data_t), padded(transposed(scale_t), 4)};
  }
  const auto quantize = granularity == 1 ? quantize_rowwise : quantize_tensorwise;
  const auto [data, scale] = quantize(x, dtype, pow2_scale);  // checks that rows fold
  const auto rows = fold_rows(x);
  const int64_t last = x.dim() - 1;
  const Tensor x_t = reinterpret(x, {x.size(last), rows->count}, {x.stride(last), rows->stride});
  const auto [data_t, scale_t] = quantize(x_t, dtype, pow2_scale);
  return {data, scale, padded_data(data_t), padded(transposed(scale_t), 1)};
}

std::tuple<Tensor, Tensor, Tensor> quantize_128x128_kept(const Tensor& x,
                                                         std::optional<ScalarType> dtype,
                                                         bool pow2_scale) {
  const auto [data, scale, data_t] = quantize_128x128_dual(x, dtype, pow2_scale);
  return {data, scale, padded_data(data_t)};
}

Tensor fp8_gemm_nt_kept(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                        const Tensor& b_scale, std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "_fp8_gemm_nt_kept";
  TORCHEXT_CHECK_VALUE(a.dim() >= 1 && b.dim() == 2 && b_scale.dim() == 2, kOp,
                       ": b and b_scale must be matrices (got a ", shape_string(a), ", b ",
                       shape_string(b), ", b_scale ", shape_string(b_scale), ")");
  const int64_t n = b.size(0), k = a.size(a.dim() - 1);
  TORCHEXT_CHECK_VALUE(b.size(1) == round_up(k, 16), kOp, ": b must have ", round_up(k, 16),
                       " columns, a's ", k, " padded to 16 (got ", b.size(1), ")");
  const int64_t scale_rows = std::min(b_scale.size(1), n);  // without their padding
  return fp8_gemm_nt(
      a, a_scale, reinterpret(b, {n, k}, {b.stride(0), b.stride(1)}),
      reinterpret(b_scale, {scale_rows, b_scale.size(0)}, {b_scale.stride(1), b_scale.stride(0)}),
      std::nullopt, out_dtype, 0);
}

}  // namespace torchext
