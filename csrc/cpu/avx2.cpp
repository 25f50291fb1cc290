// Kernels for AVX2 with FMA and F16C. The loops: loops.h.
#include <algorithm>
#include <cfloat>
#include <cstring>
#include <type_traits>

#include "../runtime/intrinsics.h"
#include "kernels.h"

#ifdef TORCHEXT_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace torchext::cpu {
namespace {

// The operations of loops.h.
struct Avx2 {
  using I = __m256i;
  using F = __m256;
  using Squares = Avx2;
  static constexpr int kBytes = 32;

  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static I in_each_lane(const void* p) {  // 16 bytes
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static I load_first(const void* p, int n) {
    alignas(kBytes) uint8_t bytes[kBytes] = {};
    std::memcpy(bytes, p, size_t(n));
    return load(bytes);
  }
  static void store_first(void* p, I a, int n) {
    alignas(kBytes) uint8_t bytes[kBytes];
    store(bytes, a);
    std::memcpy(p, bytes, size_t(n));
  }
  static void store(void* p, I a) { _mm256_storeu_si256(static_cast<I*>(p), a); }
  static void stream(void* p, I a) { _mm256_stream_si256(static_cast<I*>(p), a); }
  static void fence() { _mm_sfence(); }
  static I zero() { return _mm256_setzero_si256(); }
  static I set8(uint8_t a) { return _mm256_set1_epi8(char(a)); }
  static I set16(uint16_t a) { return _mm256_set1_epi16(short(a)); }
  static I set32(uint32_t a) { return _mm256_set1_epi32(int(a)); }
  static F setf(float a) { return _mm256_set1_ps(a); }
  static I as_int(F a) { return _mm256_castps_si256(a); }
  static F as_float(I a) { return _mm256_castsi256_ps(a); }

  static I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static I sub8(I a, I b) { return _mm256_sub_epi8(a, b); }
  static I add8(I a, I b) { return _mm256_add_epi8(a, b); }
  static I min_u8(I a, I b) { return _mm256_min_epu8(a, b); }
  static bool all_at_least(I a, uint8_t least) {
    const I below = subs_u8(set8(least), a);
    return _mm256_testz_si256(below, below);
  }
  static I subs_u8(I a, I b) { return _mm256_subs_epu8(a, b); }
  static I add16(I a, I b) { return _mm256_add_epi16(a, b); }
  static I sub16(I a, I b) { return _mm256_sub_epi16(a, b); }
  static I max_u16(I a, I b) { return _mm256_max_epu16(a, b); }
  static I add32(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub32(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I max_u32(I a, I b) { return _mm256_max_epu32(a, b); }
  static I max_s32(I a, I b) { return _mm256_max_epi32(a, b); }
  template <int kBits>
  static I sll16(I a) {
    return _mm256_slli_epi16(a, kBits);
  }
  template <int kBits>
  static I srl16(I a) {
    return _mm256_srli_epi16(a, kBits);
  }
  template <int kBits>
  static I srl32(I a) {
    return _mm256_srli_epi32(a, kBits);
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fmadd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fmsub(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
  static F fnmadd(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }

  static I zip8_low(I a, I b) { return _mm256_unpacklo_epi8(a, b); }
  static I zip8_high(I a, I b) { return _mm256_unpackhi_epi8(a, b); }
  static I zip16_low(I a, I b) { return _mm256_unpacklo_epi16(a, b); }
  static I zip16_high(I a, I b) { return _mm256_unpackhi_epi16(a, b); }
  static I zip32_low(I a, I b) { return _mm256_unpacklo_epi32(a, b); }
  static I zip32_high(I a, I b) { return _mm256_unpackhi_epi32(a, b); }

  static I zip64_low(I a, I b) { return _mm256_unpacklo_epi64(a, b); }
  static I zip64_high(I a, I b) { return _mm256_unpackhi_epi64(a, b); }
  // Joins the lanes of each register into one; those of two registers follow each other.
  template <class Join>
  static void join_lanes(const I (&a)[4], I (&joined)[2], const Join& join) {
    for (int i = 0; i < 2; ++i)
      joined[i] = join(_mm256_permute2x128_si256(a[2 * i], a[2 * i + 1], 0x20),
                       _mm256_permute2x128_si256(a[2 * i], a[2 * i + 1], 0x31));
  }

  static uint32_t reduce_max_u16(I a) {
    const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi32(-1)));
    return uint16_t(~_mm_cvtsi128_si32(least));
  }
  static uint32_t reduce_max_u32(I a) {
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
    return uint32_t(_mm_cvtsi128_si32(half));
  }

  // 8 elements as FP32.
  template <class In>
  static F load_wide(const typename In::Bits* x) {
    if constexpr (std::is_same_v<In, Float>) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(x));
    } else {
      const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
      if constexpr (std::is_same_v<In, Half>)
        return _mm256_cvtph_ps(words);
      else
        return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    }
  }
  // 8 finite FP8 codes as FP32.
  template <bool kE5m2>
  static F load_codes(const uint8_t* data) {
    const __m128i words =
        _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(data)));
    if constexpr (kE5m2) {
      return _mm256_cvtph_ps(_mm_slli_epi16(words, 8));
    } else {
      // As FP16, E4M3 codes stand for 2^-8 times their values.
      const __m128i magnitude = _mm_and_si128(words, _mm_set1_epi16(0x7f));
      const __m128i sign = _mm_and_si128(words, _mm_set1_epi16(0x80));
      const __m128i half = _mm_or_si128(_mm_slli_epi16(magnitude, 7), _mm_slli_epi16(sign, 8));
      return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(0x1p8f));
    }
  }
  static void store_half(uint8_t* to, F a, bool stream) {
    const __m128i half = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    if (stream)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to), half);
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
  }

  // The low and the high halves of each word of two registers, in an order that joined_in_order
  // undoes after two rounds.
  static I low_words(I a, I b) {
    return _mm256_packus_epi32(and_(a, set32(0xffff)), and_(b, set32(0xffff)));
  }
  static I high_words(I a, I b) { return _mm256_packus_epi32(srl32<16>(a), srl32<16>(b)); }
  static I low_bytes(I a, I b) {
    return _mm256_packus_epi16(and_(a, set16(0xff)), and_(b, set16(0xff)));
  }
  static I high_bytes(I a, I b) { return _mm256_packus_epi16(srl16<8>(a), srl16<8>(b)); }
  static I joined_in_order(I a) {
    return _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  // The largest power of two of at most |a|, but at least that of kLeast, with the sign of a.
  template <uint32_t kLeast>
  static F signed_power(F a) {
    const I power = max_s32(and_(as_int(a), set32(0x7f800000)), set32(kLeast));
    return as_float(_mm256_or_si256(power, and_(as_int(a), set32(0x80000000))));
  }
  // `code` with the sign bits of `sign`.
  static I merge_sign(I code, I sign) { return _mm256_or_si256(code, and_(sign, set8(0x80))); }

  // ---- BF16 to FP8 ----

  struct Table {
    I first, limit;
  };
  static Table significands(const Significands& tables, uint32_t key) {
    return {in_each_lane(tables.first[key]), in_each_lane(tables.limit[key])};
  }
  // Encodes 32 elements. False if one of them might have a subnormal code.
  template <int kMantissa>
  static bool encode_bf16(const uint16_t* x, const Table& table, I base, I& codes) {
    const I a = load(x), b = load(x + 16);
    const I exponents = _mm256_packus_epi16(srl16<8>(add16(a, a)), srl16<8>(add16(b, b)));
    const I fractions = _mm256_packus_epi16(and_(a, set16(0x7f)), and_(b, set16(0x7f)));
    const I block = and_(srl16<3>(fractions), set8(0x0f));
    const I above = _mm256_cmpgt_epi8(fractions, _mm256_shuffle_epi8(table.limit, block));
    const I significands = sub8(_mm256_shuffle_epi8(table.first, block), above);
    const I excess = subs_u8(exponents, base);
    const I small = _mm256_cmpeq_epi8(excess, zero());
    const I sum = _mm256_add_epi8(_mm256_slli_epi16(excess, kMantissa), significands);
    codes = merge_sign(_mm256_andnot_si256(small, sum), _mm256_packs_epi16(a, b));
    codes = _mm256_permute4x64_epi64(codes, 0xd8);  // undoes the packs' interleaving of lanes
    return _mm256_testc_si256(_mm256_cmpeq_epi8(exponents, zero()), small);
  }

  // The exponents of 32 elements a and b, and their signs with fractions; a2 = 2 a, b2 = 2 b.
  struct Planes {
    I exponents, fractions;
  };
  static constexpr bool kHasPlanes = true;
  static Planes planes(I a, I b, I a2, I b2) {
    const I exponents = _mm256_packus_epi16(srl16<8>(a2), srl16<8>(b2));
    const I fractions = _mm256_packus_epi16(and_(a, set16(0x7f)), and_(b, set16(0x7f)));
    return {exponents, merge_sign(fractions, _mm256_packs_epi16(a, b))};
  }
  // The packs interleave lanes: the column of byte i of a row of planes.
  static int column_of(int i) { return (i & ~24) | (i & 8) << 1 | (i & 16) >> 1; }
  static I planes_in_order(I codes) { return _mm256_permute4x64_epi64(codes, 0xd8); }
  // The significands of the codes; bit 7 of a fraction is ignored.
  static I significands_at(const Table& table, I fractions) {
    const I block = and_(srl16<3>(fractions), set8(0x0f));
    const I above =
        _mm256_cmpgt_epi8(and_(fractions, set8(0x7f)), _mm256_shuffle_epi8(table.limit, block));
    return sub8(_mm256_shuffle_epi8(table.first, block), above);
  }

  // ---- FP8 to BF16 ----

  struct Products {
    I low, high;  // bytes of products, repeated in each lane
  };
  static I look_up(I table, I index) { return _mm256_shuffle_epi8(table, index); }
  // BF16(i * unit * scale) for i = 0 to 15.
  static Products products(float scale, float unit) {
    const auto rounded = [=](F numbers) {
      const I bits = as_int(mul(mul(numbers, setf(unit)), setf(scale)));
      const I odd = and_(srl32<16>(bits), set32(1));
      return srl32<16>(add32(bits, add32(odd, set32(0x7fff))));
    };
    const I words = _mm256_permute4x64_epi64(
        _mm256_packus_epi32(rounded(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)),
                            rounded(_mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15))),
        0xd8);
    const I low = and_(words, set16(0xff)), high = srl16<8>(words);
    return {_mm256_permute4x64_epi64(_mm256_packus_epi16(low, low), 0x88),
            _mm256_permute4x64_epi64(_mm256_packus_epi16(high, high), 0x88)};
  }
  // Orders bytes such that zip8_low and zip8_high return the first and the second half.
  static I spread(I a) { return _mm256_permute4x64_epi64(a, 0xd8); }
  // True if all codes are below `limit`, signs aside.
  static bool all_below(I codes, uint8_t limit) {
    const I above = _mm256_cmpgt_epi8(and_(codes, set8(0x7f)), set8(uint8_t(limit - 1)));
    return _mm256_testz_si256(above, above);
  }

  // ---- transposes ----

  // 16 bytes from p and from p + stride into the lanes.
  static I load_lanes(const uint8_t* p, int64_t stride) {
    return _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + stride)), 1);
  }
};

#include "loops.h"
}  // namespace

const Kernels avx2_kernels = make_kernels<Avx2>();
}  // namespace torchext::cpu
#pragma GCC pop_options
#endif
