// Host entry of the ops for mixtures of experts: checks the arguments, lays out the outputs, and
// runs the CPU or the CUDA kernel. Layouts of quantized outputs: torchext/ops/__init__.py.
#include <algorithm>

#include "checks.h"

namespace torchext {
namespace {

// Choices that a CTA of moe_route takes, and the most CTAs that it uses.
constexpr int64_t kChoicesPerCta = 2048, kMaxRouteCtas = 64;

}  // namespace

std::tuple<Tensor, Tensor> moe_route(const Tensor& ids, int64_t num_experts, int64_t num_sms) {
  constexpr const char* kOp = "moe_route";
  const int64_t count = check_ids(kOp, ids);
  TORCHEXT_CHECK_VALUE(num_experts >= 1 && num_experts <= kMaxExperts, kOp,
                       ": num_experts must be from 1 to ", kMaxExperts, " (got ", num_experts, ")");
  const int sms = check_num_sms(kOp, num_sms);
  const Tensor slots = empty_rows(ids.size(0), ids.size(1), ScalarType::Int, ids);
  const Tensor offsets = empty_strided({num_experts}, {1}, ScalarType::Int, ids);
  if (count == 0) {
    torch::stable::zero_(const_cast<Tensor&>(offsets));
    return {slots, offsets};
  }
  const RouteView view{ids.size(0),
                       ids.size(1),
                       ids.data_ptr(),
                       ids.scalar_type() == ScalarType::Long,
                       ids.stride(0),
                       ids.stride(1),
                       num_experts,
                       static_cast<int32_t*>(slots.data_ptr()),
                       static_cast<int32_t*>(offsets.data_ptr())};
  Device* device = device_for(ids, kOp);
  if (device == nullptr) {
    route_cpu(view);
  } else if constexpr (kBuiltWithCuda) {
    const int64_t most = sms == 0 ? kMaxRouteCtas : std::min<int64_t>(sms, kMaxRouteCtas);
    const int64_t ctas = std::min(most, ceil_div(count, kChoicesPerCta));
    const Tensor counts =
        empty_strided({ctas, num_experts + 1}, {num_experts + 1, 1}, ScalarType::Int, ids);
    route_cuda(*device, view, int(ctas), static_cast<int32_t*>(counts.data_ptr()),
               reads(ids, "ids"));
  }
  return {slots, offsets};
}

std::tuple<Tensor, Tensor> moe_permute_quantize_1x128(const Tensor& x, const Tensor& slots,
                                                      std::optional<int64_t> rows,
                                                      std::optional<ScalarType> dtype,
                                                      bool pow2_scale, int64_t num_sms) {
  constexpr const char* kOp = "moe_permute_quantize_1x128";
  const MatrixView view = check_matrix(kOp, "x", "[T, K]", x);
  ChoicesView choices = check_slots(kOp, slots, std::nullopt, view.rows, "x", x);
  choices.rows = check_rows(kOp, rows, choices);
  const QuantizeOptions options{check_fp8_dtype(kOp, dtype) == ScalarType::Float8_e5m2, pow2_scale};
  const int sms = check_num_sms(kOp, num_sms);
  const QuantizedOutput out =
      empty_quantized_groups({choices.rows, view.cols}, choices.rows, options, x);
  Device* device = device_for(x, kOp);
  if (device == nullptr) {
    check_range(kOp, choices);
    permute_quantize_cpu(view, choices, options, out.view);
  } else if constexpr (kBuiltWithCuda) {
    permute_quantize_cuda(*device, view, choices, options, out.view, sms,
                          {reads(x, "x"), reads(slots, "slots"), writes(out.data, "data"),
                           writes(out.scale, "scale")});
  }
  return {out.data, out.scale};
}

Tensor moe_permute(const Tensor& x, const Tensor& slots, std::optional<Tensor> weights,
                   std::optional<int64_t> rows, int64_t num_sms) {
  constexpr const char* kOp = "moe_permute";
  const MatrixView view = check_matrix(kOp, "x", "[T, K]", x);
  ChoicesView choices = check_slots(kOp, slots, weights, view.rows, "x", x);
  choices.rows = check_rows(kOp, rows, choices);
  const int sms = check_num_sms(kOp, num_sms);
  const Tensor y = empty_rows(choices.rows, view.cols, x.scalar_type(), x);
  Device* device = device_for(x, kOp);
  if (device == nullptr) {
    check_range(kOp, choices);
    permute_cpu(view, choices, y.data_ptr());
  } else if constexpr (kBuiltWithCuda) {
    permute_cuda(*device, view, choices, y.data_ptr(), sms,
                 {reads(x, "x"), reads(slots, "slots"),
                  reads(weights ? *weights : slots, "weights"), writes(y, "y")});
  }
  return y;
}

Tensor moe_combine(const Tensor& y, const Tensor& slots, std::optional<Tensor> weights,
                   std::optional<Tensor> residual, std::optional<ScalarType> out_dtype,
                   int64_t num_sms) {
  constexpr const char* kOp = "moe_combine";
  CombineView view{};
  view.y = check_matrix(kOp, "y", "[rows, K]", y);
  view.choices = check_slots(kOp, slots, weights, -1, "y", y);
  view.choices.rows = view.y.rows;
  const int64_t tokens = view.choices.tokens, cols = view.y.cols;
  if (residual) {
    view.residual = check_matrix(kOp, "residual", "[T, K]", *residual);
    TORCHEXT_CHECK_TYPE(residual->scalar_type() == y.scalar_type(), kOp,
                        ": residual must have the dtype of y, ", dtype_name(y.scalar_type()),
                        " (got ", dtype_name(residual->scalar_type()),
                        "); convert it with .to(y.dtype)");
    TORCHEXT_CHECK_VALUE(view.residual.rows == tokens && view.residual.cols == cols, kOp,
                         ": residual must have shape [T, K] = [", tokens, ", ", cols, "] (got ",
                         shape_string(*residual), "); pass one row for each token");
    check_device(kOp, "residual", *residual, "y", y);
  }
  view.out_dtype = out_dtype.value_or(y.scalar_type());
  TORCHEXT_CHECK_TYPE(is_wide(view.out_dtype), kOp,
                      ": out_dtype must be torch.bfloat16, torch.float16 or torch.float32 (got ",
                      dtype_name(view.out_dtype), ")");
  const int sms = check_num_sms(kOp, num_sms);
  const Tensor out = empty_rows(tokens, cols, view.out_dtype, y);
  view.out = out.data_ptr();
  Device* device = device_for(y, kOp);
  if (device == nullptr) {
    check_range(kOp, view.choices);
    combine_cpu(view);
  } else if constexpr (kBuiltWithCuda) {
    combine_cuda(
        *device, view, sms,
        {reads(y, "y"), reads(slots, "slots"), reads(weights ? *weights : slots, "weights"),
         reads(residual ? *residual : y, "residual"), writes(out, "out")});
  }
  return out;
}

}  // namespace torchext
