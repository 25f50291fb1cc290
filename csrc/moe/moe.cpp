// Host entry of the ops for mixtures of experts: checks the arguments, lays out the outputs, and
// runs the CPU or the CUDA kernel. Layouts of quantized outputs: torchext/ops/__init__.py.
#include "moe.h"

#include <algorithm>

#include "../runtime/check.h"
#include "../runtime/layout.h"
#include "../runtime/quantized_output.h"

namespace torchext {
namespace {

// Choices that a CTA of moe_route takes, and the most CTAs that it uses.
constexpr int64_t kChoicesPerCta = 2048, kMaxRouteCtas = 64;

int check_num_sms(const char* op, int64_t num_sms) {
  TORCHEXT_CHECK_VALUE(num_sms >= 0 && num_sms <= (1 << 16), op,
                       ": num_sms must be 0 (all SMs) or the number of SMs to use (got ", num_sms,
                       ")");
  return int(num_sms);
}

void check_device(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                  const Tensor& other) {
  TORCHEXT_CHECK_VALUE(
      tensor.is_cpu() == other.is_cpu() && tensor.get_device_index() == other.get_device_index(),
      op, ": ", name, " must be on the device of ", other_name, "; move it there with .to(",
      other_name, ".device)");
}

// A view of `tensor`, called `name` in messages; `letters` says what its sizes are.
MatrixView check_matrix(const char* op, const char* name, const char* letters,
                        const Tensor& tensor) {
  TORCHEXT_CHECK_TYPE(is_wide(tensor.scalar_type()), op, ": ", name,
                      " must be torch.bfloat16, torch.float16 or torch.float32 (got ",
                      dtype_name(tensor.scalar_type()), "); convert it with .to() first");
  TORCHEXT_CHECK_VALUE(tensor.dim() == 2, op, ": ", name, " must have shape ", letters, " (got ",
                       shape_string(tensor), "); fold its leading dimensions with .flatten(0, -2)");
  return {tensor.data_ptr(), tensor.scalar_type(), tensor.size(0),
          tensor.size(1),    tensor.stride(0),     tensor.stride(1)};
}

int64_t check_choices(const char* op, const char* name, const Tensor& tensor) {
  TORCHEXT_CHECK_VALUE(tensor.dim() == 2, op, ": ", name,
                       " must have shape [T, k], the k choices of each token (got ",
                       shape_string(tensor), "); for one choice each, pass ", name, "[:, None]");
  const int64_t count = tensor.size(0) * tensor.size(1);
  TORCHEXT_CHECK_VALUE(count < INT32_MAX, op, ": ", name,
                       " must have fewer than 2**31 elements (got ", count, ")");
  return count;
}

// `like`, called `like_name`, is the other tensor of the call. tokens: T, or -1 if only slots tell.
ChoicesView check_slots(const char* op, const Tensor& slots, const std::optional<Tensor>& weights,
                        int64_t tokens, const char* like_name, const Tensor& like) {
  TORCHEXT_CHECK_TYPE(slots.scalar_type() == ScalarType::Int, op,
                      ": slots must be torch.int32 (got ", dtype_name(slots.scalar_type()),
                      "); pass those that moe_route returned");
  check_choices(op, "slots", slots);
  TORCHEXT_CHECK_VALUE(tokens < 0 || slots.size(0) == tokens, op,
                       ": slots must have shape [T, k] with T = ", tokens, ", the rows of ",
                       like_name, " (got ", shape_string(slots),
                       "); pass those of the same tokens");
  check_device(op, "slots", slots, like_name, like);
  ChoicesView choices{};
  choices.tokens = slots.size(0);
  choices.choices = slots.size(1);
  choices.slots = {static_cast<const int32_t*>(slots.data_ptr()), slots.stride(0), slots.stride(1)};
  if (!weights) return choices;
  TORCHEXT_CHECK_TYPE(weights->scalar_type() == ScalarType::Float, op,
                      ": weights must be torch.float32 (got ", dtype_name(weights->scalar_type()),
                      "); convert them with .float()");
  TORCHEXT_CHECK_VALUE(sizes_of(*weights) == sizes_of(slots), op,
                       ": weights must have the shape of slots, ", shape_string(slots), " (got ",
                       shape_string(*weights), "); pass one for each choice");
  check_device(op, "weights", *weights, like_name, like);
  choices.weights = {static_cast<const float*>(weights->data_ptr()), weights->stride(0),
                     weights->stride(1)};
  return choices;
}

int64_t check_rows(const char* op, std::optional<int64_t> rows, const ChoicesView& choices) {
  const int64_t count = rows.value_or(choices.tokens * choices.choices);
  TORCHEXT_CHECK_VALUE(count >= 0 && count < INT32_MAX, op,
                       ": rows must be the number of rows of the result, or None for one for each "
                       "choice (got ",
                       count, ")");
  return count;
}

// A GPU cannot raise: its kernels ignore slots beyond the rows.
void check_range(const char* op, const ChoicesView& choices) {
  for (int64_t token = 0; token < choices.tokens; ++token)
    for (int64_t choice = 0; choice < choices.choices; ++choice)
      TORCHEXT_CHECK_VALUE(choices.slots(token, choice) < choices.rows, op,
                           ": slots must be below the number of rows, ", choices.rows, " (got ",
                           choices.slots(token, choice),
                           "); pass those that moe_route returned for these rows");
}

Tensor empty_rows(int64_t rows, int64_t cols, ScalarType dtype, const Tensor& like) {
  return empty_strided({rows, cols}, folded_strides({rows, cols}, cols, 1), dtype, like);
}

}  // namespace

std::tuple<Tensor, Tensor> moe_route(const Tensor& ids, int64_t num_experts, int64_t num_sms) {
  constexpr const char* kOp = "moe_route";
  const ScalarType dtype = ids.scalar_type();
  TORCHEXT_CHECK_TYPE(dtype == ScalarType::Long || dtype == ScalarType::Int, kOp,
                      ": ids must be torch.int64 or torch.int32 (got ", dtype_name(dtype),
                      "); convert them with .long()");
  const int64_t count = check_choices(kOp, "ids", ids);
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
                       dtype == ScalarType::Long,
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
