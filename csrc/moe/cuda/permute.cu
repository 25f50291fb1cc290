// Writes each token into the rows of its choices: as it is or weighted (moe_permute), or quantized
// once with 1x128 scales (moe_permute_quantize_1x128). rows.cuh has the contract and the map: each
// warp reads 512 columns of a token once and stores them k times.
#include "../../device/quantize_groups.cuh"
#include "rows.cuh"

namespace torchext::moe {

using namespace quantizers;

template <class In>
__device__ void permute_quantize(const Source& x, const Choices& choices, const Sink& out,
                                 EitherFp8 format, uint32_t dropped_mantissa) {
  static_assert(kColumns == 4 * kScaleGroup, "eight lanes share a scale group");
  for_each_token(x.rows, x.cols, [&](int64_t token, int64_t col) {
    const int valid = valid_of(col, x.cols, 16);
    const Elements16<In> e = load16<In>(x.at(token, col), x.col_stride, x.aligned, valid);
    const uint32_t largest = reduce_magnitudes<In>(magnitudes(e), 8);
    const GroupScale scale = scale_in(format, amax_bits<In>(largest), dropped_mantissa);
    const uint4 codes = quantize_in<In>(format, [&](int i) { return e.at(i); }, scale);
    const bool stores_scale = threadIdx.x % 8 == 0 && valid > 0;
    for (int64_t choice = 0; choice < choices.choices; ++choice) {
      const int64_t row = choices.row(token, choice);
      if (row < 0) continue;
      store16(out.at(row, col), valid, codes);
      if (stores_scale) *out.scale_at(row, col / kScaleGroup) = scale.scale;
    }
  });
}

template <class In>
__device__ void permute(const Source& x, const Choices& choices, const Rows& y) {
  for_each_token(x.rows, x.cols, [&](int64_t token, int64_t col) {
    const int valid = valid_of(col, x.cols, 16);
    const Elements16<In> e = load16<In>(x.at(token, col), x.col_stride, x.aligned, valid);
    for (int64_t choice = 0; choice < choices.choices; ++choice) {
      const int64_t row = choices.row(token, choice);
      if (row < 0) continue;
      Elements16<In> weighted = e;
      if (choices.weights.data != nullptr) {
        Values16 products = widened(e);
        const float weight = choices.weight(token, choice);
#pragma unroll
        for (float& product : products.at) product = __fmul_rn(product, weight);
        weighted = narrowed<In>(products);
      }
      store_elements16<In>(y.data + row * y.stride + col * (4 / In::kPerWord), y.aligned, valid,
                           weighted);
    }
  });
}

#define KERNEL(In)                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) moe_permute_quantize_1x128_##In( \
      Source x, Choices choices, Sink out, EitherFp8 format, uint32_t dropped_mantissa) {    \
    permute_quantize<In>(x, choices, out, format, dropped_mantissa);                         \
  }                                                                                          \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                                  \
      moe_permute_##In(Source x, Choices choices, Rows y) {                                  \
    permute<In>(x, choices, y);                                                              \
  }
TORCHEXT_INPUTS(KERNEL)
#undef KERNEL

}  // namespace torchext::moe

namespace torchext {

void permute_quantize_cuda(Device& device, const MatrixView& x, const ChoicesView& choices,
                           const QuantizeOptions& options, const QuantizedView& out, int num_sms,
                           Buffers buffers) {
  using namespace moe;
  if (x.rows == 0 || x.cols == 0 || choices.choices == 0) return;
  const uint32_t dropped = options.pow2_scale ? kMantissa : 0;
#define LAUNCH(In)                                                                  \
  if (x.dtype == In::kDtype)                                                        \
    return device.launch(TORCHEXT_KERNEL(moe_permute_quantize_1x128_##In),          \
                         config_of(x.rows, x.cols, num_sms), buffers, source_of(x), \
                         Choices{choices}, sink_of(out), EitherFp8{options.e5m2}, dropped);
  TORCHEXT_INPUTS(LAUNCH)
#undef LAUNCH
}

void permute_cuda(Device& device, const MatrixView& x, const ChoicesView& choices, void* y,
                  int num_sms, Buffers buffers) {
  using namespace moe;
  if (x.rows == 0 || x.cols == 0 || choices.choices == 0) return;
#define LAUNCH(In)                                                                              \
  if (x.dtype == In::kDtype)                                                                    \
    return device.launch(TORCHEXT_KERNEL(moe_permute_##In), config_of(x.rows, x.cols, num_sms), \
                         buffers, source_of(x), Choices{choices}, rows_of(y, x.cols, x.dtype));
  TORCHEXT_INPUTS(LAUNCH)
#undef LAUNCH
}

}  // namespace torchext
