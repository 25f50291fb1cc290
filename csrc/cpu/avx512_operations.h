// The operations of loops.h on AVX-512 registers, with byte permutes if kVbmi. Included by
// avx512.cpp and avx512_vbmi.cpp under their `#pragma GCC target`.

// The indices of every second element.
template <class T>
struct Indices {
  T at[64 / sizeof(T)];
};
template <class T>
constexpr Indices<T> every_second(int first) {
  Indices<T> indices{};
  for (int i = 0; i < int(64 / sizeof(T)); ++i) indices.at[i] = T(2 * i + first);
  return indices;
}
alignas(64) constexpr auto kEvenWords = every_second<uint16_t>(0);
alignas(64) constexpr auto kOddWords = every_second<uint16_t>(1);
#if TORCHEXT_VBMI
alignas(64) constexpr auto kEven = every_second<uint8_t>(0), kOdd = every_second<uint8_t>(1);
#endif

// Half registers, for transposes: 32 rows, as whole registers would take, are more than 8 ways of
// the L1 cache hold if rows are a multiple of 2 KiB apart.
struct Avx512Squares {
  using I = __m256i;
  static constexpr int kBytes = 32;
  static void store(void* p, I a) { _mm256_storeu_si256(static_cast<I*>(p), a); }
  static void stream(void* p, I a) { _mm256_stream_si256(static_cast<I*>(p), a); }
  static I zip16_low(I a, I b) { return _mm256_unpacklo_epi16(a, b); }
  static I zip16_high(I a, I b) { return _mm256_unpackhi_epi16(a, b); }
  static I zip32_low(I a, I b) { return _mm256_unpacklo_epi32(a, b); }
  static I zip32_high(I a, I b) { return _mm256_unpackhi_epi32(a, b); }
  static I load_lanes(const uint8_t* p, int64_t stride) {
    return _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + stride)), 1);
  }
};

struct Avx512 {
  using I = __m512i;
  using F = __m512;
  using Squares = Avx512Squares;
  static constexpr int kBytes = 64;

  // A mask that selects the first n bytes of a register; n is at most 64.
  static __mmask64 first_bytes(int n) { return n < 64 ? (uint64_t(1) << n) - 1 : ~uint64_t(0); }

  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static I load_first(const void* p, int n) { return _mm512_maskz_loadu_epi8(first_bytes(n), p); }
  static I in_each_lane(const uint8_t* p) {  // 16 bytes
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(void* p, I a) { _mm512_storeu_si512(p, a); }
  static void store_first(void* p, I a, int n) { _mm512_mask_storeu_epi8(p, first_bytes(n), a); }
  static void stream(void* p, I a) { _mm512_stream_si512(static_cast<__m512i*>(p), a); }
  static void fence() { _mm_sfence(); }
  static I zero() { return _mm512_setzero_si512(); }
  static I set8(uint8_t a) { return _mm512_set1_epi8(char(a)); }
  static I set16(uint16_t a) { return _mm512_set1_epi16(short(a)); }
  static I set32(uint32_t a) { return _mm512_set1_epi32(int(a)); }
  static F setf(float a) { return _mm512_set1_ps(a); }
  static I as_int(F a) { return _mm512_castps_si512(a); }
  static F as_float(I a) { return _mm512_castsi512_ps(a); }

  static I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static I sub8(I a, I b) { return _mm512_sub_epi8(a, b); }
  static I add8(I a, I b) { return _mm512_add_epi8(a, b); }
  static I min_u8(I a, I b) { return _mm512_min_epu8(a, b); }
  static bool all_at_least(I a, uint8_t least) {
    return _mm512_cmplt_epu8_mask(a, set8(least)) == 0;
  }
  static I subs_u8(I a, I b) { return _mm512_subs_epu8(a, b); }
  static I add16(I a, I b) { return _mm512_add_epi16(a, b); }
  static I sub16(I a, I b) { return _mm512_sub_epi16(a, b); }
  static I max_u16(I a, I b) { return _mm512_max_epu16(a, b); }
  static I add32(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub32(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I max_u32(I a, I b) { return _mm512_max_epu32(a, b); }
  static I max_s32(I a, I b) { return _mm512_max_epi32(a, b); }
  template <int kBits>
  static I sll16(I a) {
    return _mm512_slli_epi16(a, kBits);
  }
  template <int kBits>
  static I srl16(I a) {
    return _mm512_srli_epi16(a, kBits);
  }
  template <int kBits>
  static I srl32(I a) {
    return _mm512_srli_epi32(a, kBits);
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fmadd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fmsub(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  static F fnmadd(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }

  static I zip8_low(I a, I b) { return _mm512_unpacklo_epi8(a, b); }
  static I zip8_high(I a, I b) { return _mm512_unpackhi_epi8(a, b); }

  static I zip32_low(I a, I b) { return _mm512_unpacklo_epi32(a, b); }
  static I zip32_high(I a, I b) { return _mm512_unpackhi_epi32(a, b); }
  static I zip64_low(I a, I b) { return _mm512_unpacklo_epi64(a, b); }
  static I zip64_high(I a, I b) { return _mm512_unpackhi_epi64(a, b); }
  // Joins the lanes of each register into one; those of four registers follow each other.
  template <class Join>
  static void join_lanes(const I (&a)[4], I (&joined)[1], const Join& join) {
    const I low =
        join(_mm512_shuffle_i32x4(a[0], a[1], 0x44), _mm512_shuffle_i32x4(a[0], a[1], 0xee));
    const I high =
        join(_mm512_shuffle_i32x4(a[2], a[3], 0x44), _mm512_shuffle_i32x4(a[2], a[3], 0xee));
    joined[0] = join(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
  }

  static uint32_t reduce_max_u16(I a) {
    const __m256i half =
        _mm256_max_epu16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    const __m128i quarter =
        _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i ones = _mm_set1_epi32(-1);
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, ones));
    return uint16_t(~_mm_cvtsi128_si32(least));
  }
  static uint32_t reduce_max_u32(I a) {
    const __m256i half =
        _mm256_max_epu32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    __m128i quarter =
        _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    quarter = _mm_max_epu32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
    quarter = _mm_max_epu32(quarter, _mm_shuffle_epi32(quarter, 0xb1));
    return uint32_t(_mm_cvtsi128_si32(quarter));
  }

  // 16 elements as FP32.
  template <class In>
  static F load_wide(const typename In::Bits* x) {
    if constexpr (std::is_same_v<In, BFloat16>) {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
      return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    } else if constexpr (std::is_same_v<In, Half>) {
      return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    } else {
      return _mm512_loadu_ps(x);
    }
  }
  // 16 finite FP8 codes as FP32.
  template <bool kE5m2>
  static F load_codes(const uint8_t* data) {
    const __m256i words =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
    if constexpr (kE5m2) {
      return _mm512_cvtph_ps(_mm256_slli_epi16(words, 8));
    } else {
      // As FP16, E4M3 codes stand for 2^-8 times their values.
      const __m256i magnitude = _mm256_and_si256(words, _mm256_set1_epi16(0x7f));
      const __m256i sign = _mm256_and_si256(words, _mm256_set1_epi16(0x80));
      const __m256i half =
          _mm256_or_si256(_mm256_slli_epi16(magnitude, 7), _mm256_slli_epi16(sign, 8));
      return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(0x1p8f));
    }
  }
  static void store_half(uint8_t* to, F a, bool stream) {
    const __m256i half = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    if (stream)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), half);
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  }

  // The low and the high halves of each word of two registers, in an order that joined_in_order
  // undoes after two rounds.
  static I low_words(I a, I b) { return _mm512_permutex2var_epi16(a, load(kEvenWords.at), b); }
  static I high_words(I a, I b) { return _mm512_permutex2var_epi16(a, load(kOddWords.at), b); }
#if TORCHEXT_VBMI
  static I low_bytes(I a, I b) { return _mm512_permutex2var_epi8(a, load(kEven.at), b); }
  static I high_bytes(I a, I b) { return _mm512_permutex2var_epi8(a, load(kOdd.at), b); }
  static I joined_in_order(I a) { return a; }
#else
  static I low_bytes(I a, I b) {
    return _mm512_packus_epi16(and_(a, set16(0xff)), and_(b, set16(0xff)));
  }
  static I high_bytes(I a, I b) { return _mm512_packus_epi16(srl16<8>(a), srl16<8>(b)); }
  static I joined_in_order(I a) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), a);
  }
#endif
  // The largest power of two of at most |a|, but at least that of kLeast, with the sign of a.
  template <uint32_t kLeast>
  static F signed_power(F a) {
    const F power = as_float(and_(as_int(a), set32(0xff800000)));
    return _mm512_range_ps(power, as_float(set32(kLeast)), 3);  // larger magnitude, first's sign
  }
  // `code` with the sign bits of `sign`.
  static I merge_sign(I code, I sign) {
    return _mm512_ternarylogic_epi32(code, sign, set8(0x80), 0xf8);  // code | sign & 0x80
  }

  // ---- BF16 to FP8 ----

#if TORCHEXT_VBMI
  struct Table {
    I low, high;
  };
  static Table significands(const Significands& tables, uint32_t key) {
    const uint8_t* row = tables.significand[key];
    return {_mm512_load_si512(row), _mm512_load_si512(row + 64)};
  }
  // Encodes 64 elements. False if one of them might have a subnormal code.
  template <int kMantissa>
  static bool encode_bf16(const uint16_t* x, const Table& table, I base, I& codes) {
    const I even = _mm512_load_si512(kEven.at), odd = _mm512_load_si512(kOdd.at);
    const I a = load(x), b = load(x + 32);
    const I exponents = _mm512_permutex2var_epi8(add16(a, a), odd, add16(b, b));
    const I fractions = _mm512_permutex2var_epi8(a, even, b);
    const I signs = _mm512_permutex2var_epi8(a, odd, b);
    // Bit 7 of an index, here the last bit of the exponent, is ignored.
    const I significands = _mm512_permutex2var_epi8(table.low, fractions, table.high);
    return merge<kMantissa>(exponents, significands, signs, base, codes);
  }
  // The exponents of 64 elements a and b, and their signs with fractions; a2 = 2 a, b2 = 2 b.
  struct Planes {
    I exponents, fractions;
  };
  static constexpr bool kHasPlanes = true;
  static Planes planes(I a, I b, I a2, I b2) {
    const I even = _mm512_load_si512(kEven.at), odd = _mm512_load_si512(kOdd.at);
    const I signs = _mm512_permutex2var_epi8(a, odd, b);
    const I fractions = _mm512_permutex2var_epi8(a, even, b);
    return {_mm512_permutex2var_epi8(a2, odd, b2),
            _mm512_ternarylogic_epi32(set8(0x80), signs, fractions, 0xca)};  // bit 7 from signs
  }
  // The column of byte i of a row of planes.
  static int column_of(int i) { return i; }
  static I planes_in_order(I codes) { return codes; }
  // The significands of the codes; bit 7 of a fraction is ignored.
  static I significands_at(const Table& table, I fractions) {
    return _mm512_permutex2var_epi8(table.low, fractions, table.high);
  }
#else
  struct Table {
    I first, limit;
  };
  static Table significands(const Significands& tables, uint32_t key) {
    return {in_each_lane(tables.first[key]), in_each_lane(tables.limit[key])};
  }
  // Encodes 64 elements. False if one of them might have a subnormal code.
  template <int kMantissa>
  static bool encode_bf16(const uint16_t* x, const Table& table, I base, I& codes) {
    const I a = load(x), b = load(x + 32);
    const I exponents = _mm512_packus_epi16(srl16<8>(add16(a, a)), srl16<8>(add16(b, b)));
    const I fractions = _mm512_packus_epi16(and_(a, set16(0x7f)), and_(b, set16(0x7f)));
    const I signs = _mm512_packs_epi16(a, b);
    const I block = and_(srl16<3>(fractions), set8(0x0f));
    const __mmask64 above =
        _mm512_cmpgt_epu8_mask(fractions, _mm512_shuffle_epi8(table.limit, block));
    const I first = _mm512_shuffle_epi8(table.first, block);
    const I significands = _mm512_mask_add_epi8(first, above, first, set8(1));
    const bool normal = merge<kMantissa>(exponents, significands, signs, base, codes);
    codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), codes);
    return normal;
  }
  // The exponents of 64 elements a and b, and their signs with fractions; a2 = 2 a, b2 = 2 b.
  struct Planes {
    I exponents, fractions;
  };
  static constexpr bool kHasPlanes = true;
  static Planes planes(I a, I b, I a2, I b2) {
    const I exponents = _mm512_packus_epi16(srl16<8>(a2), srl16<8>(b2));
    const I fractions = _mm512_packus_epi16(and_(a, set16(0x7f)), and_(b, set16(0x7f)));
    return {exponents, merge_sign(fractions, _mm512_packs_epi16(a, b))};
  }
  // The packs interleave lanes: the column of byte i of a row of planes.
  static int column_of(int i) { return (i & ~56) | (i & 8) << 2 | (i & 48) >> 1; }
  static I planes_in_order(I codes) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), codes);
  }
  // The significands of the codes; bit 7 of a fraction is ignored.
  static I significands_at(const Table& table, I fractions) {
    const I block = and_(srl16<3>(fractions), set8(0x0f));
    const __mmask64 above = _mm512_cmpgt_epu8_mask(and_(fractions, set8(0x7f)),
                                                   _mm512_shuffle_epi8(table.limit, block));
    const I first = _mm512_shuffle_epi8(table.first, block);
    return _mm512_mask_add_epi8(first, above, first, set8(1));
  }
#endif

  template <int kMantissa>
  static bool merge(I exponents, I significands, I signs, I base, I& codes) {
    const __mmask64 normal = _mm512_cmpgt_epu8_mask(exponents, base);
    const __mmask64 zero = _mm512_testn_epi8_mask(exponents, exponents);
    const I shifted = _mm512_slli_epi16(subs_u8(exponents, base), kMantissa);
    codes = merge_sign(_mm512_maskz_add_epi8(normal, shifted, significands), signs);
    return _kortestc_mask64_u8(normal, zero);
  }

  // ---- FP8 to BF16 ----

  struct Products {
    I low, high;  // bytes of products, repeated in each lane
  };
  static I look_up(I table, I index) { return _mm512_shuffle_epi8(table, index); }
  // BF16(i * unit * scale) for i = 0 to 15.
  static Products products(float scale, float unit) {
    const F numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const I bits = as_int(mul(mul(numbers, setf(unit)), setf(scale)));
    const I odd = and_(srl32<16>(bits), set32(1));
    const I rounded = add32(bits, add32(odd, set32(0x7fff)));
    return {_mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(srl32<16>(rounded))),
            _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(srl32<24>(rounded)))};
  }
  // Orders bytes such that zip8_low and zip8_high return the first and the second half.
  static I spread(I a) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), a);
  }
  // True if all codes are below `limit`, signs aside.
  static bool all_below(I codes, uint8_t limit) {
    return _mm512_cmpge_epu8_mask(and_(codes, set8(0x7f)), set8(limit)) == 0;
  }

  // ---- transposes ----

  // 16 bytes from p, p + stride, ... into the lanes.
  static I load_lanes(const uint8_t* p, int64_t stride) {
    I rows = in_each_lane(p);
    rows = _mm512_mask_blend_epi32(0x00f0, rows, in_each_lane(p + stride));
    rows = _mm512_mask_blend_epi32(0x0f00, rows, in_each_lane(p + 2 * stride));
    return _mm512_mask_blend_epi32(0xf000, rows, in_each_lane(p + 3 * stride));
  }
};
