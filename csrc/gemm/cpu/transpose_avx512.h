// Loads 16 rows of FP8 codes so that each lane of a vector has one row. Include it after a pragma
// that selects AVX-512, in one file only per level: its functions are static.
#pragma once

namespace torchext::cpu_gemm {

constexpr int kReadAhead = 192;  // bytes of a row that are prefetched into L2, as measured on Zen 4

// Transposes four rows of quads (four codes each) within 128-bit lanes: lane l of y[j] has quad 4 l + j
// of each row. With kPairs, the first two codes of all four quads come before the others.
template <bool kPairs>
static inline __attribute__((always_inline)) void transpose_lanes(const __m512i* x, __m512i* y) {
  if (kPairs) {
    const __m512i low0 = _mm512_unpacklo_epi16(x[0], x[1]);
    const __m512i high0 = _mm512_unpackhi_epi16(x[0], x[1]);
    const __m512i low1 = _mm512_unpacklo_epi16(x[2], x[3]);
    const __m512i high1 = _mm512_unpackhi_epi16(x[2], x[3]);
    y[0] = _mm512_unpacklo_epi32(low0, low1);
    y[1] = _mm512_unpackhi_epi32(low0, low1);
    y[2] = _mm512_unpacklo_epi32(high0, high1);
    y[3] = _mm512_unpackhi_epi32(high0, high1);
    return;
  }
  const __m512i low0 = _mm512_unpacklo_epi32(x[0], x[1]);
  const __m512i high0 = _mm512_unpackhi_epi32(x[0], x[1]);
  const __m512i low1 = _mm512_unpacklo_epi32(x[2], x[3]);
  const __m512i high1 = _mm512_unpackhi_epi32(x[2], x[3]);
  y[0] = _mm512_unpacklo_epi64(low0, low1);
  y[1] = _mm512_unpackhi_epi64(low0, low1);
  y[2] = _mm512_unpacklo_epi64(high0, high1);
  y[3] = _mm512_unpackhi_epi64(high0, high1);
}

// Transposes 4 x 4 lanes, of y[j] from transpose_lanes() for rows 0, 4, 8 and 12. Calls use(q, codes)
// for q = j, j + 4, j + 8 and j + 12, where `codes` has quad q of 16 rows.
template <class Use>
static inline __attribute__((always_inline)) void join_lanes(__m512i y0, __m512i y4, __m512i y8,
                                                             __m512i y12, int j, const Use& use) {
  constexpr int kEven = 0x88, kOdd = 0xdd;  // lanes 0 and 2, or 1 and 3, of both
  const __m512i even0 = _mm512_shuffle_i32x4(y0, y4, kEven);
  const __m512i even1 = _mm512_shuffle_i32x4(y8, y12, kEven);
  use(j, _mm512_shuffle_i32x4(even0, even1, kEven));
  use(8 + j, _mm512_shuffle_i32x4(even0, even1, kOdd));
  const __m512i odd0 = _mm512_shuffle_i32x4(y0, y4, kOdd);
  const __m512i odd1 = _mm512_shuffle_i32x4(y8, y12, kOdd);
  use(4 + j, _mm512_shuffle_i32x4(odd0, odd1, kEven));
  use(12 + j, _mm512_shuffle_i32x4(odd0, odd1, kOdd));
}

// Calls use(q, codes) for q = 0 to 15, where `codes` has codes 4 q to 4 q + 3 of each of 16 rows, one
// row in each 32-bit lane; 0 beyond `rows` rows and `count` codes. Rows are `stride` apart. With
// kPairs, each 128-bit lane has the first two codes of its four rows, and then the others.
template <bool kPairs, class Use>
static inline void for_each_quad(const uint8_t* from, int64_t stride, int rows, int count,
                                 const Use& use) {
  __m512i y[4][4];
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    __m512i x[4];
    const uint8_t* row = from + 4 * g * stride;
    if (rows >= 16 && count >= 64) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        x[i] = _mm512_loadu_si512(row + i * stride);
        _mm_prefetch(reinterpret_cast<const char*>(row + i * stride + kReadAhead), _MM_HINT_T1);
      }
    } else {
      const __mmask64 mask = count >= 64 ? ~0ull : (1ull << count) - 1;
      for (int i = 0; i < 4; ++i)
        x[i] = 4 * g + i < rows ? _mm512_maskz_loadu_epi8(mask, row + i * stride)
                                : _mm512_setzero_si512();
    }
    transpose_lanes<kPairs>(x, y[g]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) join_lanes(y[0][j], y[1][j], y[2][j], y[3][j], j, use);
}

}  // namespace torchext::cpu_gemm
