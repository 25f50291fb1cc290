// AVX512-BF16 without AVX512_VBMI (Cooper Lake): see avx512_bf16.h. FP8 becomes BF16 by a table of
// 128 words, two of whose quarters a permutation can read at once.
#include <algorithm>
#include <cstring>
#include <utility>

#include "../../runtime/intrinsics.h"
#include "bf16_table.h"
#include "kernel.h"

#ifdef TORCHEXT_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#include "avx512_bf16.h"
#include "few_rows_avx512.h"

namespace torchext::cpu_gemm {
namespace {

// FP8 codes to BF16: `first` gets those of the first 8 bytes of each 128-bit lane, `second` the others.
struct DecodeByWords {
  __m512i words[4];

  explicit DecodeByWords(const BF16Table& table) {
    for (int i = 0; i < 4; ++i) words[i] = _mm512_load_si512(table.word + 32 * i);
  }

  // Codes in the high bytes of 16-bit lanes.
  __m512i decode(__m512i codes) const {
    const __m512i index = _mm512_srli_epi16(codes, 8);
    const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x4000));
    const __m512i magnitude =
        _mm512_mask_blend_epi16(upper, _mm512_permutex2var_epi16(words[0], index, words[1]),
                                _mm512_permutex2var_epi16(words[2], index, words[3]));
    return _mm512_or_si512(magnitude, _mm512_and_si512(codes, _mm512_set1_epi16(short(0x8000))));
  }

  void operator()(__m512i codes, __m512i& first, __m512i& second) const {
    const __m512i zero = _mm512_setzero_si512();
    first = decode(_mm512_unpacklo_epi8(zero, codes));
    second = decode(_mm512_unpackhi_epi8(zero, codes));
  }
};

}  // namespace

const Level avx512_bf16 = FewRows<BF16<DecodeByWords>>::level();

}  // namespace torchext::cpu_gemm
#pragma GCC pop_options
#endif
