// Sums the rows of each token in FP32 (moe_combine; the order is that of CombineView). rows.cuh has
// the contract and the map: a warp adds 512 columns of k rows, and loads several of them at once.
#include "rows.cuh"

namespace torchext::moe {

using namespace quantizers;

template <class In>
__device__ void combine(const Source& y, const Choices& choices, const Source& residual,
                        const Rows& out, ScalarType out_dtype) {
  constexpr int kTogether = 2 * In::kPerWord;  // rows in flight
  for_each_token(choices.tokens, y.cols, [&](int64_t token, int64_t col) {
    const int valid = valid_of(col, y.cols, 16);
    Values16 sums = {};
    const auto add = [&](const Elements16<In>& e, float weight) {
#pragma unroll
      for (int i = 0; i < 16; ++i) sums.at[i] = __fadd_rn(sums.at[i], __fmul_rn(e.at(i), weight));
    };
    for (int64_t first = 0; first < choices.choices; first += kTogether) {
      Elements16<In> e[kTogether];
      bool exists[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int64_t row = first + j < choices.choices ? choices.row(token, first + j) : -1;
        exists[j] = row >= 0;
        if (exists[j]) e[j] = load16<In>(y.at(row, col), y.col_stride, y.aligned, valid);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        if (exists[j]) add(e[j], choices.weight(token, first + j));
    }
    if (residual.data != nullptr)
      add(load16<In>(residual.at(token, col), residual.col_stride, residual.aligned, valid), 1.0f);
    uint8_t* row = out.data + token * out.stride;
    if (out_dtype == ScalarType::Float)
      store_elements16<f32>(row + 4 * col, out.aligned, valid, narrowed<f32>(sums));
    else if (out_dtype == ScalarType::BFloat16)
      store_elements16<bf16>(row + 2 * col, out.aligned, valid, narrowed<bf16>(sums));
    else
      store_elements16<f16>(row + 2 * col, out.aligned, valid, narrowed<f16>(sums));
  });
}

#define KERNEL(In)                                                                  \
  extern "C" __global__ void __launch_bounds__(kThreads) moe_combine_##In(          \
      Source y, Choices choices, Source residual, Rows out, ScalarType out_dtype) { \
    combine<In>(y, choices, residual, out, out_dtype);                              \
  }
TORCHEXT_INPUTS(KERNEL)
#undef KERNEL

}  // namespace torchext::moe

namespace torchext {

void combine_cuda(Device& device, const CombineView& view, int num_sms, Buffers buffers) {
  using namespace moe;
  if (view.choices.tokens == 0 || view.y.cols == 0) return;
  const Source residual = view.residual.data ? source_of(view.residual) : Source{};
#define LAUNCH(In)                                                                      \
  if (view.y.dtype == In::kDtype)                                                       \
    return device.launch(TORCHEXT_KERNEL(moe_combine_##In),                             \
                         config_of(view.choices.tokens, view.y.cols, num_sms), buffers, \
                         source_of(view.y), Choices{view.choices}, residual,            \
                         rows_of(view.out, view.y.cols, view.out_dtype), view.out_dtype);
  TORCHEXT_INPUTS(LAUNCH)
#undef LAUNCH
}

}  // namespace torchext
