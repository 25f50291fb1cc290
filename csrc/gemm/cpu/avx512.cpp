// AVX-512: FP32 products on 512-bit vectors. The loops are in loops.h. A tile of 14 x 32 fills 28 of
// 32 registers.
#include <algorithm>
#include <cstring>
#include <utility>

#include "../../runtime/formats.h"
#include "../../runtime/intrinsics.h"
#include "kernel.h"

#ifdef TORCHEXT_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#include "fp32.h"
#include "transpose_avx512.h"

namespace torchext::cpu_gemm {
namespace {

struct Avx512 : FP32<Avx512, 16, 2, 14> {
  template <class Number>
  static void pack_vector_of(const uint8_t* from, int64_t stride, int rows, int depth, float* out) {
    for (int k = 0; k < depth; k += 64)
      for_each_quad<false>(
          from + k, stride, rows, depth - k,
          [&](int q, __m512i codes) __attribute__((always_inline)) {
            for (int i = 0; i < 4; ++i) {
              const __m512i code =
                  _mm512_and_si512(_mm512_srli_epi32(codes, 8 * i), _mm512_set1_epi32(0xff));
              store_floats(out + (k + 4 * q + i) * kPanel, to_floats<Number, Vector>(Words(code)));
            }
          });
  }

  static void pack_panel(const Operand& b, int64_t row, int rows, int64_t column, int depth,
                         float* out) {
    for (int v = 0; v < kVectors; ++v) {
      const auto* from =
          static_cast<const uint8_t*>(b.data) + (row + v * kLanes) * b.stride + column;
      (b.format == Format::e5m2
           ? pack_vector_of<E5M2>
           : pack_vector_of<E4M3>)(from, b.stride, rows - v * kLanes, depth, out + v * kLanes);
    }
  }
};

}  // namespace

const Level avx512 = Loops<Avx512>::level();

}  // namespace torchext::cpu_gemm
#pragma GCC pop_options
#endif
