// Checks of arguments that the ops for mixtures of experts share.
#pragma once

#include "../runtime/check.h"
#include "../runtime/layout.h"
#include "../runtime/quantized_output.h"
#include "moe.h"

namespace torchext {

inline int check_num_sms(const char* op, int64_t num_sms) {
  TORCHEXT_CHECK_VALUE(num_sms >= 0 && num_sms <= (1 << 16), op,
                       ": num_sms must be 0 (all SMs) or the number of SMs to use (got ", num_sms,
                       ")");
  return int(num_sms);
}

inline void check_device(const char* op, const char* name, const Tensor& tensor,
                         const char* other_name, const Tensor& other) {
  TORCHEXT_CHECK_VALUE(
      tensor.is_cpu() == other.is_cpu() && tensor.get_device_index() == other.get_device_index(),
      op, ": ", name, " must be on the device of ", other_name, "; move it there with .to(",
      other_name, ".device)");
}

// A view of `tensor`, called `name` in messages; `letters` says what its sizes are.
inline MatrixView check_matrix(const char* op, const char* name, const char* letters,
                               const Tensor& tensor) {
  TORCHEXT_CHECK_TYPE(is_wide(tensor.scalar_type()), op, ": ", name,
                      " must be torch.bfloat16, torch.float16 or torch.float32 (got ",
                      dtype_name(tensor.scalar_type()), "); convert it with .to() first");
  TORCHEXT_CHECK_VALUE(tensor.dim() == 2, op, ": ", name, " must have shape ", letters, " (got ",
                       shape_string(tensor), "); fold its leading dimensions with .flatten(0, -2)");
  return {tensor.data_ptr(), tensor.scalar_type(), tensor.size(0),
          tensor.size(1),    tensor.stride(0),     tensor.stride(1)};
}

inline int64_t check_choices(const char* op, const char* name, const Tensor& tensor) {
  TORCHEXT_CHECK_VALUE(tensor.dim() == 2, op, ": ", name,
                       " must have shape [T, k], the k choices of each token (got ",
                       shape_string(tensor), "); for one choice each, pass ", name, "[:, None]");
  const int64_t count = tensor.size(0) * tensor.size(1);
  TORCHEXT_CHECK_VALUE(count < INT32_MAX, op, ": ", name,
                       " must have fewer than 2**31 elements (got ", count, ")");
  return count;
}

// The number of ids, of any experts.
inline int64_t check_ids(const char* op, const Tensor& ids) {
  const ScalarType dtype = ids.scalar_type();
  TORCHEXT_CHECK_TYPE(dtype == ScalarType::Long || dtype == ScalarType::Int, op,
                      ": ids must be torch.int64 or torch.int32 (got ", dtype_name(dtype),
                      "); convert them with .long()");
  return check_choices(op, "ids", ids);
}

// `like`, called `like_name`, is the other tensor of the call. tokens: T, or -1 if only slots tell.
inline ChoicesView check_slots(const char* op, const Tensor& slots,
                               const std::optional<Tensor>& weights, int64_t tokens,
                               const char* like_name, const Tensor& like) {
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

inline int64_t check_rows(const char* op, std::optional<int64_t> rows, const ChoicesView& choices) {
  const int64_t count = rows.value_or(choices.tokens * choices.choices);
  TORCHEXT_CHECK_VALUE(count >= 0 && count < INT32_MAX, op,
                       ": rows must be the number of rows of the result, or None for one for each "
                       "choice (got ",
                       count, ")");
  return count;
}

// A GPU cannot raise: its kernels ignore slots beyond the rows.
inline void check_range(const char* op, const ChoicesView& choices) {
  for (int64_t token = 0; token < choices.tokens; ++token)
    for (int64_t choice = 0; choice < choices.choices; ++choice)
      TORCHEXT_CHECK_VALUE(choices.slots(token, choice) < choices.rows, op,
                           ": slots must be below the number of rows, ", choices.rows, " (got ",
                           choices.slots(token, choice),
                           "); pass those that moe_route returned for these rows");
}

inline Tensor empty_rows(int64_t rows, int64_t cols, ScalarType dtype, const Tensor& like) {
  return empty_strided({rows, cols}, folded_strides({rows, cols}, cols, 1), dtype, like);
}

}  // namespace torchext
