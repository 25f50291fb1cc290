// FP8 to BF16 with AVX512_VBMI. Include it after a pragma that selects AVX512_VBMI.
#pragma once

#include "bf16_table.h"

namespace torchext::cpu_gemm {

// FP8 codes to BF16: `first` gets those of the first 8 bytes of each 128-bit lane, `second` the others.
struct DecodeByBytes {
  __m512i low[2], high[2];

  explicit DecodeByBytes(const BF16Table& table) {
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(table.low + 64 * i);
      high[i] = _mm512_load_si512(table.high + 64 * i);
    }
  }

  void operator()(__m512i codes, __m512i& first, __m512i& second) const {
    constexpr int kWhereMask = 0xca;  // of (mask, x, y): mask ? x : y
    const __m512i low_bytes = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    const __m512i magnitudes = _mm512_permutex2var_epi8(high[0], codes, high[1]);
    const __m512i high_bytes =
        _mm512_ternarylogic_epi32(_mm512_set1_epi8(char(0x80)), codes, magnitudes, kWhereMask);
    first = _mm512_unpacklo_epi8(low_bytes, high_bytes);
    second = _mm512_unpackhi_epi8(low_bytes, high_bytes);
  }
};

}  // namespace torchext::cpu_gemm
