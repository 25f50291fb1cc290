// Host entry of the ops that turn tokens into messages to other ranks, and messages into the rows of
// experts. moe.h has the layout of a message.
#include "checks.h"

namespace torchext {
namespace {

// The ids and weights of the headers; none if neither is given.
HeaderView check_header(const char* op, const Tensor& x, const std::optional<Tensor>& ids,
                        const std::optional<Tensor>& weights) {
  TORCHEXT_CHECK_VALUE(ids.has_value() == weights.has_value(), op,
                       ": ids and weights must be given together, or neither (got ",
                       ids ? "ids" : "weights", " alone)");
  HeaderView header{};
  if (!ids) return header;
  check_ids(op, *ids);
  TORCHEXT_CHECK_VALUE(ids->size(0) == x.size(0), op,
                       ": ids must have shape [T, k] with T = ", x.size(0), ", the rows of x (got ",
                       shape_string(*ids), "); pass those of the same tokens");
  check_device(op, "ids", *ids, "x", x);
  TORCHEXT_CHECK_TYPE(weights->scalar_type() == ScalarType::Float, op,
                      ": weights must be torch.float32 (got ", dtype_name(weights->scalar_type()),
                      "); convert them with .float()");
  TORCHEXT_CHECK_VALUE(sizes_of(*weights) == sizes_of(*ids), op,
                       ": weights must have the shape of ids, ", shape_string(*ids), " (got ",
                       shape_string(*weights), "); pass one for each choice");
  check_device(op, "weights", *weights, "x", x);
  return {ids->size(1),
          ids->data_ptr(),
          ids->scalar_type() == ScalarType::Long,
          ids->stride(0),
          ids->stride(1),
          {static_cast<const float*>(weights->data_ptr()), weights->stride(0), weights->stride(1)}};
}

}  // namespace

Tensor moe_pack_1x128(const Tensor& x, const Tensor& slots, std::optional<Tensor> ids,
                      std::optional<Tensor> weights, std::optional<int64_t> rows,
                      std::optional<ScalarType> dtype, bool pow2_scale, int64_t num_sms) {
  constexpr const char* kOp = "moe_pack_1x128";
  PackView view{};
  view.x = check_matrix(kOp, "x", "[T, K]", x);
  view.rows = check_slots(kOp, slots, std::nullopt, view.x.rows, "x", x);
  view.rows.rows = check_rows(kOp, rows, view.rows);
  view.header = check_header(kOp, x, ids, weights);
  view.options = {check_fp8_dtype(kOp, dtype) == ScalarType::Float8_e5m2, pow2_scale};
  view.layout = message_layout(view.x.cols, view.header.choices);
  const int sms = check_num_sms(kOp, num_sms);
  Tensor message = empty_rows(view.rows.rows, view.layout.pitch, ScalarType::Byte, x);
  view.message = static_cast<uint8_t*>(message.data_ptr());
  if (view.header.choices > 0 && view.rows.rows > 0) {
    // Rows of no token choose no expert: every id is -1.
    Tensor sent = torch::stable::narrow(message, 1, view.layout.ids, 4 * view.header.choices);
    torch::stable::fill_(sent, 255.0);
  }
  Device* device = device_for(x, kOp);
  if (device == nullptr) {
    check_range(kOp, view.rows);
    pack_cpu(view);
  } else if constexpr (kBuiltWithCuda) {
    pack_cuda(*device, view, sms,
              {reads(x, "x"), reads(slots, "slots"), reads(ids ? *ids : slots, "ids"),
               reads(weights ? *weights : slots, "weights"), updates(message, "message")});
  }
  return message;
}

std::tuple<Tensor, Tensor, Tensor> moe_unpack_1x128(const Tensor& message, const Tensor& slots,
                                                    const Tensor& offsets, int64_t columns,
                                                    std::optional<int64_t> rows, bool header,
                                                    std::optional<ScalarType> dtype,
                                                    int64_t num_sms) {
  constexpr const char* kOp = "moe_unpack_1x128";
  TORCHEXT_CHECK_TYPE(message.scalar_type() == ScalarType::Byte, kOp,
                      ": message must be torch.uint8 (got ", dtype_name(message.scalar_type()),
                      "); pass one that moe_pack_1x128 returned");
  TORCHEXT_CHECK_VALUE(columns >= 0, kOp, ": columns must be those of the tokens (got ", columns,
                       ")");
  TORCHEXT_CHECK_VALUE(message.dim() == 2, kOp, ": message must have shape [M, pitch] (got ",
                       shape_string(message), "); pass one that moe_pack_1x128 returned");
  UnpackView view{};
  view.choices = check_slots(kOp, slots, std::nullopt, message.size(0), "message", message);
  view.choices.rows = check_rows(kOp, rows, view.choices);
  const MessageLayout layout = message_layout(columns, header ? view.choices.choices : 0);
  TORCHEXT_CHECK_VALUE(message.size(1) == layout.pitch, kOp, ": message must have ", layout.pitch,
                       " bytes in a row, for ", columns, " columns and ",
                       header ? view.choices.choices : 0, " choices (got ", message.size(1),
                       "); pass the columns and choices that were packed");
  view.message_stride = message.size(0) > 1 ? message.stride(0) : layout.pitch;
  TORCHEXT_CHECK_VALUE(
      message.size(0) == 0 || (message.stride(1) == 1 && view.message_stride % 16 == 0 &&
                               reinterpret_cast<uintptr_t>(message.data_ptr()) % 16 == 0),
      kOp, ": message must have contiguous rows that start at multiples of 16 bytes (got strides ",
      stride_string(message), "); copy it with .clone()");
  TORCHEXT_CHECK_TYPE(offsets.scalar_type() == ScalarType::Int, kOp,
                      ": offsets must be torch.int32 (got ", dtype_name(offsets.scalar_type()),
                      "); pass those that moe_route returned");
  TORCHEXT_CHECK_VALUE(offsets.dim() == 1 && offsets.size(0) > 0, kOp,
                       ": offsets must have shape [E], where each expert's rows end (got ",
                       shape_string(offsets), "); pass those that moe_route returned");
  check_device(kOp, "offsets", offsets, "message", message);
  const QuantizeOptions options{check_fp8_dtype(kOp, dtype) == ScalarType::Float8_e5m2, false};
  const int sms = check_num_sms(kOp, num_sms);
  const QuantizedOutput out =
      empty_quantized_groups({view.choices.rows, columns}, view.choices.rows, options, message);
  const Tensor weight = empty_strided({view.choices.rows}, {1}, ScalarType::Float, message);
  view.message = static_cast<const uint8_t*>(message.data_ptr());
  view.cols = columns;
  view.scales = layout.scales;
  if (header)
    view.choices.weights = {reinterpret_cast<const float*>(view.message + layout.weights),
                            view.message_stride / int64_t(sizeof(float)), 1};
  view.used =
      static_cast<const int32_t*>(offsets.data_ptr()) + (offsets.size(0) - 1) * offsets.stride(0);
  view.out = out.view;
  view.weight = static_cast<float*>(weight.data_ptr());
  Device* device = device_for(message, kOp);
  if (device == nullptr) {
    check_range(kOp, view.choices);
    unpack_cpu(view);
  } else if constexpr (kBuiltWithCuda) {
    unpack_cuda(*device, view, sms,
                {reads(message, "message"), reads(slots, "slots"), reads(offsets, "offsets"),
                 writes(out.data, "data"), writes(out.scale, "scale"), writes(weight, "weight")});
  }
  return {out.data, out.scale, weight};
}

}  // namespace torchext
