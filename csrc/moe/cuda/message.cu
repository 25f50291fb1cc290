// Tokens as messages (moe_pack_1x128) and messages as rows of experts (moe_unpack_1x128); moe.h has the
// layout of a message. rows.cuh has the contract and the map: each warp reads 512 columns of a token
// or of a message once and stores them in all of its rows; the warp of the first columns also writes
// what belongs to the whole row.
//
// Contract: rows of a message start at multiples of 16 bytes.
#include <algorithm>

#include "../../device/quantize_groups.cuh"
#include "rows.cuh"

namespace torchext::moe {

using namespace quantizers;

struct Header : HeaderView {
  __device__ int32_t id(int64_t token, int64_t choice) const {
    const int64_t at = token * token_stride + choice * choice_stride;
    if (!wide) return max(__ldg(static_cast<const int32_t*>(ids) + at), -1);
    const int64_t id = __ldg(static_cast<const long long*>(ids) + at);
    return id >= 0 && id <= INT32_MAX ? int32_t(id) : -1;
  }
  __device__ float weight(int64_t token, int64_t choice) const {
    return __ldg(weights.data + token * weights.token_stride + choice * weights.choice_stride);
  }
};

// Sets all but the first `valid` of 16 bytes to zero.
__device__ inline uint4 first_bytes(const uint4& bytes, int valid) {
  uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int kept = valid - 4 * i;
    words[i] &= kept >= 4 ? ~0u : kept <= 0 ? 0 : (1u << 8 * kept) - 1;
  }
  return {words[0], words[1], words[2], words[3]};
}

// Writes the choices of a token, one to a lane at a time, and the zeros behind them.
__device__ inline void store_header(uint8_t* row, const MessageLayout& layout, const Header& header,
                                    int64_t token) {
  const int lane = threadIdx.x % 32;
  for (int64_t choice = lane; choice < header.choices; choice += 32) {
    reinterpret_cast<int32_t*>(row + layout.ids)[choice] = header.id(token, choice);
    reinterpret_cast<float*>(row + layout.weights)[choice] = header.weight(token, choice);
  }
  if (4 * lane < layout.pitch - layout.end) reinterpret_cast<uint32_t*>(row + layout.end)[lane] = 0;
}

template <class In>
__device__ void pack(const Source& x, const Choices& rows, const Header& header,
                     const MessageLayout& layout, uint8_t* message, EitherFp8 format,
                     uint32_t dropped_mantissa) {
  for_each_token(x.rows, max(x.cols, int64_t(1)), [&](int64_t token, int64_t col) {
    const int valid = valid_of(col, x.cols, 16);
    const Elements16<In> e = load16<In>(x.at(token, col), x.col_stride, x.aligned, valid);
    const uint32_t largest = reduce_magnitudes<In>(magnitudes(e), 8);
    const GroupScale scale = scale_in(format, amax_bits<In>(largest), dropped_mantissa);
    const uint4 codes =
        first_bytes(quantize_in<In>(format, [&](int i) { return e.at(i); }, scale), valid);
    for (int64_t i = 0; i < rows.choices; ++i) {
      const int64_t index = rows.row(token, i);
      if (index < 0) continue;
      uint8_t* row = message + index * layout.pitch;
      if (valid > 0) *reinterpret_cast<uint4*>(row + col) = codes;
      if (threadIdx.x % 8 == 0 && valid > 0)
        reinterpret_cast<float*>(row + layout.scales)[col / kScaleGroup] = scale.scale;
      if (col < kColumns) store_header(row, layout, header, token);
    }
  });
}

#define KERNEL(In)                                                                         \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                                \
      moe_pack_1x128_##In(Source x, Choices rows, Header header, MessageLayout layout,     \
                          uint8_t* message, EitherFp8 format, uint32_t dropped_mantissa) { \
    pack<In>(x, rows, header, layout, message, format, dropped_mantissa);                  \
  }
TORCHEXT_INPUTS(KERNEL)
#undef KERNEL

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    moe_unpack_1x128(const uint8_t* message, int64_t stride, int64_t cols, int64_t scales,
                     Choices choices, const int32_t* used, Sink out, float* weight) {
  const int64_t walked = max(cols, int64_t(1));
  for_each_token(choices.tokens, walked, [&](int64_t token, int64_t col) {
    const int valid = valid_of(col, cols, 16);
    const uint8_t* from = message + token * stride;
    const bool stores_scale = threadIdx.x % 8 == 0 && valid > 0;
    uint4 codes = {};
    float scale = 0;
    if (valid > 0) codes = __ldg(reinterpret_cast<const uint4*>(from + col));
    if (stores_scale)
      scale = __ldg(reinterpret_cast<const float*>(from + scales) + col / kScaleGroup);
    for (int64_t choice = 0; choice < choices.choices; ++choice) {
      const int64_t row = choices.row(token, choice);
      if (row < 0) continue;
      store16(out.at(row, col), valid, codes);
      if (stores_scale) *out.scale_at(row, col / kScaleGroup) = scale;
      if (col == 0) weight[row] = choices.weight(token, choice);
    }
  });
  const int64_t first = __ldg(used);
  for_each_token(choices.rows - first, walked, [&](int64_t i, int64_t col) {
    const int valid = valid_of(col, cols, 16);
    store16(out.at(first + i, col), valid, uint4{});
    if (threadIdx.x % 8 == 0 && valid > 0) *out.scale_at(first + i, col / kScaleGroup) = 1;
    if (col == 0) weight[first + i] = 0;
  });
}

}  // namespace torchext::moe

namespace torchext {

void pack_cuda(Device& device, const PackView& view, int num_sms, Buffers buffers) {
  using namespace moe;
  const MatrixView& x = view.x;
  if (x.rows == 0 || view.rows.choices == 0) return;
  const uint32_t dropped = view.options.pow2_scale ? kMantissa : 0;
#define LAUNCH(In)                                                                           \
  if (x.dtype == In::kDtype)                                                                 \
    return device.launch(TORCHEXT_KERNEL(moe_pack_1x128_##In),                               \
                         config_of(x.rows, std::max(x.cols, int64_t(1)), num_sms), buffers,  \
                         source_of(x), Choices{view.rows}, Header{view.header}, view.layout, \
                         view.message, EitherFp8{view.options.e5m2}, dropped);
  TORCHEXT_INPUTS(LAUNCH)
#undef LAUNCH
}

void unpack_cuda(Device& device, const UnpackView& view, int num_sms, Buffers buffers) {
  using namespace moe;
  const ChoicesView& choices = view.choices;
  if (choices.rows == 0) return;
  device.launch(
      TORCHEXT_KERNEL(moe_unpack_1x128),
      config_of(std::max(choices.tokens, choices.rows), std::max(view.cols, int64_t(1)), num_sms),
      buffers, view.message, view.message_stride, view.cols, view.scales, Choices{choices},
      view.used, sink_of(view.out), view.weight);
}

}  // namespace torchext
