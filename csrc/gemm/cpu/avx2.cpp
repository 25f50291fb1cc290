// AVX2, FMA and F16C: FP32 products on 256-bit vectors. The loops are in loops.h. A tile of 6 x 16
// fills 12 of 16 registers. FP8 becomes FP16 by shifts, and FP32 from there by F16C.
#include <algorithm>
#include <cstring>
#include <utility>

#include "../../runtime/formats.h"
#include "kernel.h"

#ifdef TORCHEXT_X86_LEVELS
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,f16c")
#include "few_rows_avx2.h"
#include "fp32.h"

namespace torchext::cpu_gemm {
namespace {

struct Avx2 : FP32<Avx2, 8, 2, 6> {
  // Transposes rows of 32 codes: columns[i] has column 2 i of all eight rows, then column 2 i + 1, then
  // columns 16 + 2 i and 17 + 2 i.
  static inline __attribute__((always_inline)) void transpose(const __m256i (&rows)[8],
                                                              __m256i (&columns)[8]) {
    __m256i x[8], y[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // x[2 i], x[2 i + 1]: rows i and i + 4, interleaved
      x[2 * i] = _mm256_unpacklo_epi8(rows[i], rows[i + 4]);
      x[2 * i + 1] = _mm256_unpackhi_epi8(rows[i], rows[i + 4]);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {  // rows i, i + 2, i + 4, i + 6
        y[4 * half + 2 * i] = _mm256_unpacklo_epi8(x[2 * i + half], x[2 * i + 4 + half]);
        y[4 * half + 2 * i + 1] = _mm256_unpackhi_epi8(x[2 * i + half], x[2 * i + 4 + half]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {  // all rows
        columns[4 * half + 2 * i] = _mm256_unpacklo_epi8(y[4 * half + i], y[4 * half + 2 + i]);
        columns[4 * half + 2 * i + 1] = _mm256_unpackhi_epi8(y[4 * half + i], y[4 * half + 2 + i]);
      }
    }
  }

  // Rows of a are packed as 2^8 of themselves, and b as 2^-8, because the bits of a finite e4m3
  // number are 2^-8 of it as FP16, subnormal or not. A row with numbers too large for that is packed
  // as it is.
  static constexpr float kUp = 256;

  static float pack_row(const Operand& a, int64_t row, int64_t column, int count, float* steps) {
    FP32::pack_row(a, row, column, count, steps);
    constexpr uint32_t kLarge = 0x7b000000;  // 2^119
    uint32_t large = 0;
    if (a.format == Format::bf16 || a.format == Format::fp32)
      for (int i = 0; i < Depth::kSegment; ++i)
        large |= (bits_of(steps[i]) & 0x7fffffff) - kLarge < kInfinityBits - kLarge;
    if (large) return kUp;
    for (int i = 0; i < Depth::kSegment; ++i) steps[i] *= kUp;
    return 1;
  }

  template <class Number>
  struct Down : Number {
    static constexpr int kExponentBias = Number::kExponentBias + 8;
  };

  // Codes in the upper halves of 16 bits to FP16: e5m2 as it is, 2^-8 of e4m3.
  template <class Number>
  static __m256i halves(__m256i codes) {
    if constexpr (Number::kFraction == 2) return codes;
    return _mm256_and_si256(_mm256_srai_epi16(codes, 1), _mm256_set1_epi16(int16_t(0xbf80)));
  }

  // Eight of these to 2^-8 of the numbers.
  template <class Number>
  static __m256 floats(__m128i halves) {
    const __m256 x = _mm256_cvtph_ps(halves);
    if constexpr (Number::kFraction == 2) return _mm256_mul_ps(x, _mm256_set1_ps(1 / kUp));
    return x;
  }

  // The NaN of e4m3 would become a number. `largest` is that of twice the codes.
  template <class Number>
  static bool has_nan(__m256i largest) {
    const __m256i nan = _mm256_set1_epi8(int8_t(2 * Number::kSpecialCode));
    return Number::kFraction == 3 && _mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, nan)) != 0;
  }

  static __m256i larger_code(__m256i largest, __m256i codes) {
    return _mm256_max_epu8(largest, _mm256_add_epi8(codes, codes));
  }

  // Packs at most eight rows.
  template <class Number>
  static void pack_lanes(const uint8_t* from, int64_t stride, int count, int depth, float* out) {
    const auto pack_any = [&](int k, int size) {
      pack_vector<Down<Number>>(from + k, stride, count, size, out + k * kPanel);
    };
    int k = 0;
    for (; count == kLanes && k + 32 <= depth; k += 32) {
      __m256i rows[8], columns[8], largest = _mm256_setzero_si256();
      for (int i = 0; i < 8; ++i) {
        rows[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * stride + k));
        largest = larger_code(largest, rows[i]);
      }
      if (has_nan<Number>(largest)) [[unlikely]] {
        pack_any(k, 32);
        continue;
      }
      transpose(rows, columns);
      for (int i = 0; i < 8; ++i) {
        const auto store = [&](int at, __m256i codes) __attribute__((always_inline)) {
          const __m256i pair = halves<Number>(codes);
          float* to = out + (k + at) * kPanel;
          _mm256_storeu_ps(to, floats<Number>(_mm256_castsi256_si128(pair)));
          _mm256_storeu_ps(to + 16 * kPanel, floats<Number>(_mm256_extracti128_si256(pair, 1)));
        };
        store(2 * i, _mm256_unpacklo_epi8(_mm256_setzero_si256(), columns[i]));
        store(2 * i + 1, _mm256_unpackhi_epi8(_mm256_setzero_si256(), columns[i]));
      }
    }
    if (k < depth) pack_any(k, depth - k);
  }

  static void pack_panel(const Operand& b, int64_t row, int rows, int64_t column, int depth,
                         float* out) {
    const auto pack = b.format == Format::e5m2 ? pack_lanes<E5M2> : pack_lanes<E4M3>;
    for (int first = 0; first < kPanel; first += kLanes)
      pack(static_cast<const uint8_t*>(b.data) + (row + first) * b.stride + column, b.stride,
           std::clamp(rows - first, 0, kLanes), depth, out + first);
  }
};

}  // namespace

const Level avx2 = FewRowsAvx2<Avx2>::level();

}  // namespace torchext::cpu_gemm
#pragma GCC pop_options
#endif
