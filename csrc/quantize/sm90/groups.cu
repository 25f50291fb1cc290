// 1x128 groups along rows. Eight lanes share a group, 16 elements each; a warp takes 8 rows of one
// group column, so that its scales, M-major in memory, leave as whole 32-byte sectors.
#include "matrix.cuh"

namespace torchext::sm90 {

constexpr int kWarps = 4;
constexpr int kRowsPerLane = 2;
constexpr int kRowsPerWarp = 4 * kRowsPerLane;
static_assert(8 * 16 == kGroup);

template <class In, class Out>
__device__ void quantize_1x128(const Source& x, const Sink& out, bool pow2_scale,
                               uint32_t groups) {
  const uint32_t tile = blockIdx.x * kWarps + threadIdx.x / 32;
  const int64_t row0 = int64_t(tile / groups) * kRowsPerWarp + threadIdx.x % 32 / 8;
  const uint32_t group = tile % groups;
  const int64_t col = group * kGroup + threadIdx.x % 8 * 16;

  Elements16<In> e[kRowsPerLane];
#pragma unroll
  for (int i = 0; i < kRowsPerLane; ++i) e[i] = load16<In>(x, row0 + 4 * i, col);
#pragma unroll
  for (int i = 0; i < kRowsPerLane; ++i) {
    const int64_t row = row0 + 4 * i;
    const uint32_t largest = reduce_magnitudes<In>(magnitudes(e[i]), 8);
    const GroupScale scale = scale_of(amax_bits<In>(largest), Out::kMax, pow2_scale);
    if (row >= x.rows) continue;
    store16(out.data + row * out.data_stride, col, x.cols, quantize16<In, Out>(e[i], scale));
    if (threadIdx.x % 8 == 0) out.store_scale(row, group, scale.scale);
  }
}

#define KERNEL(In, Out)                                                            \
  extern "C" __global__ void __launch_bounds__(32 * kWarps)                        \
      sm90_quantize_1x128_##In##_##Out(Source x, Sink out, bool pow2_scale, uint32_t groups) { \
    quantize_1x128<In, Out>(x, out, pow2_scale, groups);                           \
  }
TORCHEXT_SM90_QUANTIZERS(KERNEL)

}  // namespace torchext::sm90
