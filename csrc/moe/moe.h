// Rows for the experts of a mixture: which row each choice of a token gets (route), tokens as rows,
// quantized or not (permute), rows summed into tokens (combine), and tokens as messages to other
// ranks and back (pack, unpack). Host entry points of the ops (moe.cpp, message.cpp: check, allocate,
// dispatch), and what the CPU kernels (moe_cpu.cpp, message_cpu.cpp) and CUDA launchers (cuda/)
// implement. checks.h checks arguments.
//
// Each of T tokens makes k choices. A choice's slot is the row that it has; a negative slot is no
// row. Rows of an expert are a run, in the order of the tokens. So results do not depend on how the
// work is shared out. No kernel tells the host anything: nothing here waits for the device.
#pragma once

#include <optional>
#include <tuple>

#include "../runtime/device.h"
#include "../runtime/views.h"

namespace torchext {

constexpr int kMaxExperts = 1024;  // their counts fit in the shared memory of a CTA

// ---- ops ----
std::tuple<Tensor, Tensor> moe_route(const Tensor& ids, int64_t num_experts, int64_t num_sms);
std::tuple<Tensor, Tensor> moe_permute_quantize_1x128(const Tensor& x, const Tensor& slots,
                                                      std::optional<int64_t> rows,
                                                      std::optional<ScalarType> dtype,
                                                      bool pow2_scale, int64_t num_sms);
Tensor moe_permute(const Tensor& x, const Tensor& slots, std::optional<Tensor> weights,
                   std::optional<int64_t> rows, int64_t num_sms);
Tensor moe_combine(const Tensor& y, const Tensor& slots, std::optional<Tensor> weights,
                   std::optional<Tensor> residual, std::optional<ScalarType> out_dtype,
                   int64_t num_sms);
Tensor moe_pack_1x128(const Tensor& x, const Tensor& slots, std::optional<Tensor> ids,
                      std::optional<Tensor> weights, std::optional<int64_t> rows,
                      std::optional<ScalarType> dtype, bool pow2_scale, int64_t num_sms);
std::tuple<Tensor, Tensor, Tensor> moe_unpack_1x128(const Tensor& message, const Tensor& slots,
                                                    const Tensor& offsets, int64_t columns,
                                                    std::optional<int64_t> rows, bool header,
                                                    std::optional<ScalarType> dtype,
                                                    int64_t num_sms);

// ---- kernels ----
using Buffers = std::initializer_list<Buffer>;

// A value for each choice, with strides in elements.
template <class T>
struct ChoiceValues {
  const T* data;
  int64_t token_stride, choice_stride;

  T operator()(int64_t token, int64_t choice) const {
    return data[token * token_stride + choice * choice_stride];
  }
};

// Choices with their rows.
struct ChoicesView {
  int64_t tokens, choices;  // T, k
  int64_t rows;             // slots lie below
  ChoiceValues<int32_t> slots;
  ChoiceValues<float> weights;  // data is nullptr for ones
};

// ids of choices -> their slots, and where the rows of each expert end. An id that is no expert's
// counts as the expert after the last one.
struct RouteView {
  int64_t tokens, choices;
  const void* ids;  // int64 if `wide`, else int32
  bool wide;
  int64_t token_stride, choice_stride;  // elements
  int64_t experts;
  int32_t* slots;    // [tokens, choices], contiguous
  int32_t* offsets;  // [experts]
};
void route_cpu(const RouteView& view);
// `counts`: [ctas, experts + 1] of workspace; with one CTA it is not used. `ids`: the memory of the ids.
void route_cuda(Device& device, const RouteView& view, int ctas, int32_t* counts, Buffer ids);

// Quantizes each token once, and writes it into the rows of its choices.
void permute_quantize_cpu(const MatrixView& x, const ChoicesView& choices,
                          const QuantizeOptions& options, const QuantizedView& out);
void permute_quantize_cuda(Device& device, const MatrixView& x, const ChoicesView& choices,
                           const QuantizeOptions& options, const QuantizedView& out, int num_sms,
                           Buffers buffers);

// Writes each token, times the choice's weight in FP32, into the rows of its choices. `y` has
// contiguous rows of x's dtype.
void permute_cpu(const MatrixView& x, const ChoicesView& choices, void* y);
void permute_cuda(Device& device, const MatrixView& x, const ChoicesView& choices, void* y,
                  int num_sms, Buffers buffers);

// For each token the FP32 sum of its rows times their weights, added to +0 in the order of the
// choices, then of the residual; products are rounded before they are added. `out`: contiguous rows.
struct CombineView {
  MatrixView y;
  ChoicesView choices;
  MatrixView residual;  // of y's dtype; data is nullptr if there is none
  void* out;
  ScalarType out_dtype;
};
void combine_cpu(const CombineView& view);
void combine_cuda(Device& device, const CombineView& view, int num_sms, Buffers buffers);

// Where the parts of a message's row begin, in bytes: codes from 0 on, FP32 scales, and for each
// choice its expert (int32) and its weight (FP32). Rows are `pitch` apart; bytes between the parts
// and from `end` on are zero.
struct MessageLayout {
  int64_t scales, ids, weights, end, pitch;
};
inline MessageLayout message_layout(int64_t cols, int64_t choices) {
  const int64_t scales = round_up(cols, 16), ids = scales + 4 * ceil_div(cols, kScaleGroup);
  const int64_t weights = ids + 4 * choices, end = weights + 4 * choices;
  return {scales, ids, weights, end, round_up(end, 16)};
}

// The choices of each token, as a message has them. An id that is no int32 is sent as -1.
struct HeaderView {
  int64_t choices;  // 0 for a message without headers
  const void* ids;  // int64 if `wide`, else int32
  bool wide;
  int64_t token_stride, choice_stride;  // of ids, in elements
  ChoiceValues<float> weights;
};

// Quantizes each token once, and writes it into its rows of the message: `rows.slots` has one for
// each rank.
struct PackView {
  MatrixView x;
  ChoicesView rows;
  HeaderView header;
  QuantizeOptions options;
  MessageLayout layout;
  uint8_t* message;
};
void pack_cpu(const PackView& view);
void pack_cuda(Device& device, const PackView& view, int num_sms, Buffers buffers);

// Writes each row of a message into the rows of its choices, and zeros, with scales of 1, into the
// rows from *used on.
struct UnpackView {
  const uint8_t* message;
  int64_t message_stride;  // bytes, a multiple of 16
  int64_t cols;
  int64_t scales;  // where a row's scales begin
  ChoicesView choices;
  const int32_t* used;
  QuantizedView out;
  float* weight;  // of each row of out
};
void unpack_cpu(const UnpackView& view);
void unpack_cuda(Device& device, const UnpackView& view, int num_sms, Buffers buffers);

}  // namespace torchext
