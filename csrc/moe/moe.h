// Rows for the experts of a mixture, on one device: which row each choice of a token gets (route),
// tokens as rows, quantized or not (permute), and rows summed into tokens (combine). Host entry
// points of the ops (moe.cpp: check, allocate, dispatch), and what the CPU kernels (moe_cpu.cpp) and
// CUDA launchers (cuda/) implement.
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

}  // namespace torchext
