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
#include "fp32.h"

namespace torchext::cpu_gemm {
namespace {

struct Avx2 : FP32<Avx2, 8, 2, 6> {
  // Rows of 16 codes -> columns: out[i] has column 2 i of all eight rows, then column 2 i + 1.
  static void transpose(const __m128i (&rows)[8], __m128i (&out)[8]) {
    __m128i x[8], y[8];
    for (int i = 0; i < 4; ++i) {  // x[2 i], x[2 i + 1]: rows i and i + 4, interleaved
      x[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 4]);
      x[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 4]);
    }
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 2; ++i) {  // rows i, i + 2, i + 4, i + 6
        y[4 * half + 2 * i] = _mm_unpacklo_epi8(x[2 * i + half], x[2 * i + 4 + half]);
        y[4 * half + 2 * i + 1] = _mm_unpackhi_epi8(x[2 * i + half], x[2 * i + 4 + half]);
      }
      for (int i = 0; i < 2; ++i) {  // all rows
        out[4 * half + 2 * i] = _mm_unpacklo_epi8(y[4 * half + i], y[4 * half + 2 + i]);
        out[4 * half + 2 * i + 1] = _mm_unpackhi_epi8(y[4 * half + i], y[4 * half + 2 + i]);
      }
    }
  }

  // 16 codes to FP32. As FP16, the bits of a finite e4m3 number are 2^-8 of it, subnormal or not.
  template <class Number>
  static void convert(__m128i codes, __m256& low, __m256& high) {
    constexpr bool e5m2 = Number::kFraction == 2;
    __m256i halves;
    if constexpr (e5m2)
      halves = _mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8);
    else
      halves = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7),
                                _mm256_set1_epi16(int16_t(0xbf80)));
    low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    if constexpr (!e5m2) {
      low = _mm256_mul_ps(low, _mm256_set1_ps(256));
      high = _mm256_mul_ps(high, _mm256_set1_ps(256));
    }
  }

  static bool has_nan(const __m128i (&rows)[8]) {
    __m128i found = _mm_setzero_si128();
    const __m128i nan = _mm_set1_epi8(0x7f);
    for (const __m128i row : rows)
      found = _mm_or_si128(found, _mm_cmpeq_epi8(_mm_and_si128(row, nan), nan));
    return !_mm_testz_si128(found, found);
  }

  template <class Number>
  static void pack_eight(const uint8_t* from, int64_t stride, int depth, float* out) {
    int k = 0;
    for (; k + 16 <= depth; k += 16) {
      __m128i rows[8], columns[8];
      for (int i = 0; i < 8; ++i)
        rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride + k));
      if (Number::kFraction == 3 && __builtin_expect(has_nan(rows), 0)) {
        pack_vector<Number>(from + k, stride, 8, 16, out + k * kPanel);
        continue;
      }
      transpose(rows, columns);
      for (int i = 0; i < 8; ++i) {
        __m256 low, high;
        convert<Number>(columns[i], low, high);
        _mm256_storeu_ps(out + (k + 2 * i) * kPanel, low);
        _mm256_storeu_ps(out + (k + 2 * i + 1) * kPanel, high);
      }
    }
    if (k < depth) pack_vector<Number>(from + k, stride, 8, depth - k, out + k * kPanel);
  }

  static void pack_panel(const Operand& b, int64_t row, int rows, int64_t column, int depth,
                         float* out) {
    if (rows < kPanel) return FP32::pack_panel(b, row, rows, column, depth, out);
    const auto* from = static_cast<const uint8_t*>(b.data) + row * b.stride + column;
    for (int v = 0; v < kVectors; ++v, from += kLanes * b.stride)
      (b.format == Format::e5m2 ? pack_eight<E5M2> : pack_eight<E4M3>)(from, b.stride, depth,
                                                                       out + v * kLanes);
  }
};

}  // namespace

const Level avx2 = Loops<Avx2>::level();

}  // namespace torchext::cpu_gemm
#pragma GCC pop_options
#endif
