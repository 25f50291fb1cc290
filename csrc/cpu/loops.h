// The loops of kernels.h for any instruction set with vectors of bytes. The file of an instruction set
// defines a struct V of operations on its registers, includes this file under its `#pragma GCC
// target`, and fills a Kernels with make_kernels<V>(). Everything here has internal linkage, so that
// no other file gets code for that instruction set. There is no include guard and no namespace of its
// own: see the files that include it. Above 500 lines because every file includes all of it.
//
// V has integer registers I (kBytes bytes, in lanes of 16) and FP32 registers F. A step is kBytes
// elements, which become one register of codes. V::Squares has the registers that transpose tiles.
//
//   groups      16 groups at a time: their largest magnitudes, their scales, then encode for each
//   columns     the same for all columns of a tile at once
//   encode      BF16: significands by look-up, exponents by saturating byte arithmetic. A step with
//               codes that might be subnormal, and other dtypes: FP32 quotients by Markstein's method
//   dequantize  to BF16: products with the 16 (E5M2: 8) smallest codes, look-ups, and exponents added
//               as integers. To other dtypes: FP32 products
//   both        both_loops.h
//   transpose   transpose_loops.h

template <class In>
constexpr bool kIsBf16 = std::is_same_v<In, BFloat16>;
template <class In>
constexpr bool kIsHalf = std::is_same_v<In, Half>;
template <class Out>
constexpr bool kIsE5m2 = std::is_same_v<Out, E5M2>;

template <class V>
inline __attribute__((always_inline)) void put(uint8_t* to, typename V::I value, bool stream) {
  if (stream)
    V::stream(to, value);
  else
    V::store(to, value);
}

// ---- magnitudes ----

// Magnitudes are compared as unsigned integers, shifted left by one so that the
// sign drops out.
template <class V, class Bits>
struct Magnitudes {
  using I = typename V::I;
  static constexpr int kElements = V::kBytes / int(sizeof(Bits));
  static I load(const Bits* x) { return without_sign(V::load(x)); }
  // The first n elements; zeros for the rest.
  static I load_first(const Bits* x, int n) {
    return without_sign(V::load_first(x, n * int(sizeof(Bits))));
  }
  static I larger(I a, I b) {
    if constexpr (sizeof(Bits) == 2)
      return V::max_u16(a, b);
    else
      return V::max_u32(a, b);
  }
  static uint32_t reduce(I a) {
    if constexpr (sizeof(Bits) == 2)
      return V::reduce_max_u16(a) >> 1;
    else
      return V::reduce_max_u32(a) >> 1;
  }
  // Reduces each of 16 registers.
  static inline __attribute__((always_inline)) void reduce(const I (&a)[16], uint32_t* largest) {
    I fours[4];
    for (int i = 0; i < 4; ++i) {
      const I even = across<true>(a[4 * i], a[4 * i + 1]);
      fours[i] = across<false>(even, across<true>(a[4 * i + 2], a[4 * i + 3]));
    }
    // Each lane of fours[i] now has one 32-bit word of each of registers 4 i to 4 i + 3.
    I reduced[16 / (V::kBytes / 4)];
    V::join_lanes(fours, reduced, larger);
    for (I& words : reduced) {
      if constexpr (sizeof(Bits) == 2)
        words = V::and_(V::template srl32<1>(larger(words, V::template srl32<16>(words))),
                        V::set32(0x7fff));
      else
        words = V::template srl32<1>(words);
      V::store(largest, words);
      largest += V::kBytes / 4;
    }
  }

 private:
  static I without_sign(I v) {
    if constexpr (sizeof(Bits) == 2)
      return V::add16(v, v);
    else
      return V::add32(v, v);
  }
  template <bool kWords>
  static I across(I a, I b) {
    if constexpr (kWords)
      return larger(V::zip32_low(a, b), V::zip32_high(a, b));
    else
      return larger(V::zip64_low(a, b), V::zip64_high(a, b));
  }
};

// The largest magnitudes in some rows, in each element of a register.
template <class V, class Bits>
inline __attribute__((always_inline)) typename V::I largest_in(const Bits* x, int64_t stride,
                                                               int rows, int64_t cols) {
  using M = Magnitudes<V, Bits>;
  constexpr int kUnroll = 4, kPart = kUnroll * M::kElements;
  typename V::I largest[kUnroll] = {V::zero(), V::zero(), V::zero(), V::zero()};
  for (int row = 0; row < rows; ++row, x += stride) {
    int64_t i = 0;
    for (; i + kPart <= cols; i += kPart)
      for (int u = 0; u < kUnroll; ++u)
        largest[u] = M::larger(largest[u], M::load(x + i + u * M::kElements));
    for (; i + M::kElements <= cols; i += M::kElements)
      largest[0] = M::larger(largest[0], M::load(x + i));
    if (i < cols) largest[1] = M::larger(largest[1], M::load_first(x + i, int(cols - i)));
  }
  return M::larger(M::larger(largest[0], largest[1]), M::larger(largest[2], largest[3]));
}

// ---- scales ----

// The FP32 bits of a magnitude; Inf or more for Inf and NaN.
template <class In>
uint32_t wide_magnitude(uint32_t magnitude) {
  if constexpr (kIsBf16<In>) {
    return magnitude << 16;
  } else if constexpr (kIsHalf<In>) {
    const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
    return select(magnitude >= 0x7c00, kNaNBits, finite);
  } else {
    return magnitude;
  }
}

// As scale_of (portable.cpp).
template <class In, class Out>
float scale_for(uint32_t magnitude, uint32_t dropped_mantissa) {
  const uint32_t amax = wide_magnitude<In>(magnitude);
  const float quotient = float_of(amax) / Out::kMax;
  const float scale = quotient < FLT_MIN ? FLT_MIN : quotient;
  uint32_t bits = (bits_of(scale) + dropped_mantissa) & ~dropped_mantissa;
  bits = select(magnitude == 0, bits_of(1.0f), bits);
  bits = select(amax >= kInfinityBits, kNaNBits, bits);
  return float_of(bits);
}

// ---- FP8 codes of FP32 quotients ----

// What some elements are divided by.
template <class V>
struct Divisor {
  typename V::F scale, reciprocal;
};

// The codes of V::kBytes quotients; divisor(0) to divisor(3) are those of each quarter. kDivide: by
// true division, for scales below 2^-64; otherwise Markstein's method, whose remainder does not
// underflow for any quotient that is not zero in FP8.
//
// As in SmallFloat::encode_finite (runtime/formats.h), adding a power of two rounds the quotient. That
// power has the quotient's sign. So the sum is that of the code, and has the power's exponent in its
// high bits and the significand in its low bits.
template <class V, class In, class Out, bool kDivide, class Divisors>
inline __attribute__((always_inline)) typename V::I encode_step(const typename In::Bits* x,
                                                                const Divisors& divisor) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int kMantissa = kIsE5m2<Out> ? 2 : 3;
  constexpr int kDropped = 23 - kMantissa;
  constexpr uint32_t kLeastExponent = kIsE5m2<Out> ? 113 : 121;
  I sums[4];
  for (int part = 0; part < 4; ++part) {
    const F wide = V::template load_wide<In>(x + part * (V::kBytes / 4));
    const auto [scale, reciprocal] = divisor(part);
    F quotient;
    if constexpr (kDivide) {
      quotient = V::div(wide, scale);
    } else {  // in this form, -0 stays -0
      const F estimate = V::mul(wide, reciprocal);
      quotient = V::fnmadd(V::fmsub(estimate, scale, wide), reciprocal, estimate);
    }
    const F power = V::template signed_power<kLeastExponent << 23>(quotient);
    sums[part] = V::as_int(V::fmadd(power, V::setf(float(1 << kDropped)), quotient));
  }
  const I high0 = V::high_words(sums[0], sums[1]), high1 = V::high_words(sums[2], sums[3]);
  const I code0 = V::add16(V::template srl16<7 - kMantissa>(high0), V::low_words(sums[0], sums[1]));
  const I code1 = V::add16(V::template srl16<7 - kMantissa>(high1), V::low_words(sums[2], sums[3]));
  const I code = V::low_bytes(code0, code1);
  const I excess = V::set8(uint8_t((kLeastExponent + kDropped) << kMantissa));
  return V::joined_in_order(V::merge_sign(V::sub8(code, excess), V::high_bytes(high0, high1)));
}

// A step that a look-up cannot encode.
template <class V, class In, class Out>
__attribute__((noinline)) void encode_exactly(const typename In::Bits* x, float scale,
                                              uint8_t* to) {
  const Divisor<V> divisor{V::setf(scale), V::setf(1.0f / scale)};
  V::store(to, encode_step<V, In, Out, false>(x, [&](int) { return divisor; }));
}

// The first n elements of a step, and zeros. Not inlined: GCC 12 warns of such a loop where it never
// runs.
template <class V, class Bits>
__attribute__((noinline)) void copy_first(const Bits* x, int n, Bits* to) {
  constexpr int kElements = V::kBytes / int(sizeof(Bits));
  for (int i = 0; i < V::kBytes; i += kElements)
    V::store(to + i, V::load_first(x + i, std::clamp(n - i, 0, kElements) * int(sizeof(Bits))));
}

// Calls step(x, to) for the steps of n elements; the last may be one of copies.
template <class V, class Bits, class Step>
inline __attribute__((always_inline)) void for_each_step(const Bits* x, int64_t n, uint8_t* to,
                                                         bool stream, const Step& step) {
  int64_t i = 0;
  for (; i + V::kBytes <= n; i += V::kBytes) put<V>(to + i, step(x + i), stream);
  if (i < n) {
    const int rest = int(n - i);
    alignas(64) Bits tail[V::kBytes];
    copy_first<V>(x + i, rest, tail);
    V::store_first(to + i, step(tail), rest);
  }
}

// BF16: data = x / scale by look-up. Elements below 2^-126 become zero.
constexpr float kLeastTabulated = 0x1p-100f;  // scale
template <class V, class In, class Out>
inline __attribute__((always_inline)) void encode_tabulated(const typename In::Bits* x, int64_t n,
                                                            float scale, uint32_t key, uint8_t base,
                                                            const Significands& tables,
                                                            uint8_t* data, bool stream) {
  using I = typename V::I;
  constexpr int kMantissa = kIsE5m2<Out> ? 2 : 3;
  const auto table = V::significands(tables, key);
  const I least = V::set8(base);
  for_each_step<V>(
      x, n, data, stream, [&](const typename In::Bits* from) __attribute__((always_inline)) {
        I codes;
        if (__builtin_expect(V::template encode_bf16<kMantissa>(from, table, least, codes), 1))
          return codes;
        alignas(64) uint8_t exact[V::kBytes];
        encode_exactly<V, In, Out>(from, scale, exact);
        return V::load(exact);
      });
}

// data = x / scale by the reciprocal of the scale.
constexpr float kLeastMultiplied = 0x1p-64f;  // scale
template <class V, class In, class Out>
inline __attribute__((always_inline)) void encode_multiplied(const typename In::Bits* x, int64_t n,
                                                             float scale, float reciprocal,
                                                             uint8_t* data, bool stream) {
  const Divisor<V> divisor{V::setf(scale), V::setf(reciprocal)};
  for_each_step<V>(x, n, data, stream,
                   [&](const typename In::Bits* from) __attribute__((always_inline)) {
                     return encode_step<V, In, Out, false>(from, [&](int) { return divisor; });
                   });
}

// data = x / scale.
template <class V, class In, class Out>
inline __attribute__((always_inline)) void encode_run(const typename In::Bits* x, int64_t n,
                                                      float scale, const Significands& tables,
                                                      uint8_t* data, bool stream) {
  using Bits = typename In::Bits;
  if constexpr (kIsBf16<In>) {
    if (scale >= kLeastTabulated)
      return encode_tabulated<V, In, Out>(
          x, n, scale, significand_key(scale),
          uint8_t((bits_of(scale) >> 23) - exponents_below(kIsE5m2<Out>)), tables, data, stream);
  }
  if (scale >= kLeastMultiplied) {
    encode_multiplied<V, In, Out>(x, n, scale, 1.0f / scale, data, stream);
  } else if (scale == scale) {
    const Divisor<V> divisor{V::setf(scale), V::setf(scale)};
    for_each_step<V>(x, n, data, stream, [&](const Bits* from) __attribute__((always_inline)) {
      return encode_step<V, In, Out, true>(from, [&](int) { return divisor; });
    });
  } else {
    std::memset(data, 0x7f, size_t(n));
  }
}

template <class V, class In, class Out>
struct Quantize {
  using Bits = typename In::Bits;

  template <bool kWhole, bool kStream>
  static void run(const Bits* x, int64_t x_stride, int groups, int cols, uint32_t dropped_mantissa,
                  uint8_t* data, int64_t data_stride, float* scales, int64_t scale_stride,
                  const Ahead& ahead) {
    constexpr int kBatch = 16;
    const Significands& tables = significands(kIsE5m2<Out>);
    const int n = kWhole ? kTile : cols;
    for (int first = 0; first < groups; first += kBatch) {
      const int count = std::min(kBatch, groups - first);
      typename V::I magnitudes[kBatch];
      for (int i = 0; i < kBatch; ++i)
        magnitudes[i] =
            i < count ? largest_in<V, Bits>(x + (first + i) * x_stride, 0, 1, n) : V::zero();
      alignas(64) uint32_t largest[kBatch];
      Magnitudes<V, Bits>::reduce(magnitudes, largest);
      float batch[kBatch];
      for (int i = 0; i < kBatch; ++i) batch[i] = scale_for<In, Out>(largest[i], dropped_mantissa);
      for (int i = 0; i < count; ++i) scales[(first + i) * scale_stride] = batch[i];
      if constexpr (kIsBf16<In>) {
        uint32_t keys[kBatch], bases[kBatch], tabulated = 1;
        for (int i = 0; i < kBatch; ++i) {
          keys[i] = significand_key(batch[i]);
          bases[i] = (bits_of(batch[i]) >> 23) - exponents_below(kIsE5m2<Out>);
          tabulated &= batch[i] >= kLeastTabulated;
        }
        if (tabulated) {
          for (int i = 0; i < count; ++i) {
            ahead.fetch(first + i);
            encode_tabulated<V, In, Out>(x + (first + i) * x_stride, n, batch[i], keys[i],
                                         uint8_t(bases[i]), tables,
                                         data + (first + i) * data_stride, kStream);
          }
          continue;
        }
      } else {
        float reciprocals[kBatch];
        uint32_t multiplied = 1;
        for (int i = 0; i < kBatch; ++i) {
          reciprocals[i] = 1.0f / batch[i];
          multiplied &= batch[i] >= kLeastMultiplied;
        }
        if (multiplied) {
          for (int i = 0; i < count; ++i) {
            ahead.fetch(first + i);
            encode_multiplied<V, In, Out>(x + (first + i) * x_stride, n, batch[i], reciprocals[i],
                                          data + (first + i) * data_stride, kStream);
          }
          continue;
        }
      }
      for (int i = 0; i < count; ++i) {
        ahead.fetch(first + i);
        encode_run<V, In, Out>(x + (first + i) * x_stride, n, batch[i], tables,
                               data + (first + i) * data_stride, kStream);
      }
    }
  }

  static void groups(const void* x, int64_t x_stride, int groups, int cols,
                     uint32_t dropped_mantissa, uint8_t* data, int64_t data_stride, float* scales,
                     int64_t scale_stride, const Ahead& ahead, bool stream) {
    const auto loop = cols != kTile ? run<false, false>
                      : stream      ? run<true, true>
                                    : run<true, false>;
    loop(static_cast<const Bits*>(x), x_stride, groups, cols, dropped_mantissa, data, data_stride,
         scales, scale_stride, ahead);
  }

  static uint32_t amax(const void* x, int64_t x_stride, int rows, int64_t cols) {
    return Magnitudes<V, Bits>::reduce(
        largest_in<V, Bits>(static_cast<const Bits*>(x), x_stride, rows, cols));
  }

  template <bool kStream>
  static void encode_rows(const Bits* x, int64_t x_stride, int rows, int64_t cols, float scale,
                          uint8_t* data, int64_t data_stride, const Ahead& ahead) {
    const Significands& tables = significands(kIsE5m2<Out>);
    for (int i = 0; i < rows; ++i) {
      ahead.fetch(i);
      encode_run<V, In, Out>(x + i * x_stride, cols, scale, tables, data + i * data_stride,
                             kStream);
    }
  }

  static void encode(const void* x, int64_t x_stride, int rows, int64_t cols, float scale,
                     uint8_t* data, int64_t data_stride, const Ahead& ahead, bool stream) {
    const auto loop = stream ? encode_rows<true> : encode_rows<false>;
    loop(static_cast<const Bits*>(x), x_stride, rows, cols, scale, data, data_stride, ahead);
  }

  static float scale(uint32_t amax, uint32_t dropped_mantissa) {
    return scale_for<In, Out>(amax, dropped_mantissa);
  }

  static constexpr QuantizeKernels kernels() { return {groups, amax, scale, encode}; }
};

// Quantizes the columns of a tile; see Kernels::columns.
template <class V, class Out>
bool quantize_columns(const float* tile, int64_t stride, int rows, uint32_t dropped_mantissa,
                      uint8_t* codes, float* scales, const Ahead& ahead) {
  using M = Magnitudes<V, uint32_t>;
  using I = typename V::I;
  const auto* x = reinterpret_cast<const uint32_t*>(tile);
  constexpr int kQuarter = M::kElements;
  alignas(64) uint32_t largest[kTile];
  for (int step = 0; step < kTile; step += V::kBytes) {
    I quarters[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (int row = 0; row < rows; ++row)
      for (int i = 0; i < 4; ++i)
        quarters[i] = M::larger(quarters[i], M::load(x + row * stride + step + i * kQuarter));
    for (int i = 0; i < 4; ++i)
      V::store(largest + step + i * kQuarter, V::template srl32<1>(quarters[i]));
  }
  alignas(64) float reciprocals[kTile];
  uint32_t multiplied = 1;
  for (int i = 0; i < kTile; ++i) {
    scales[i] = scale_for<Float, Out>(largest[i], dropped_mantissa);
    reciprocals[i] = 1.0f / scales[i];
    multiplied &= scales[i] >= kLeastMultiplied;
  }
  if (!multiplied) return false;
  for (int step = 0; step < kTile; step += V::kBytes) {
    Divisor<V> divisors[4];
    for (int i = 0; i < 4; ++i)
      divisors[i] = {V::as_float(V::load(scales + step + i * kQuarter)),
                     V::as_float(V::load(reciprocals + step + i * kQuarter))};
    for (int row = 0; row < rows; ++row) {
      if (step == 0) ahead.fetch(row);
      V::store(codes + row * kTile + step,
               encode_step<V, Float, Out, false>(x + row * stride + step,
                                                 [&](int part) { return divisors[part]; }));
    }
  }
  return true;
}

// ---- dequantization ----

template <class V, class In, class Out>
struct Dequantize {
  using I = typename V::I;
  using F = typename V::F;
  using Bits = typename Out::Bits;
  static constexpr int kMantissa = kIsE5m2<In> ? 2 : 3;
  static constexpr uint8_t kSpecial =
      kIsE5m2<In> ? 0x7c : 0x7f;  // the least code that is not finite

  // Whether this code serves a scale. If y is BF16, products must be normal.
  static bool serves(float scale) {
    if (kIsBf16<Out>) return scale >= 0x1p-110f && scale <= 0x1p110f;
    return scale - scale == 0;
  }

  // y = data * scale for a step of finite codes.
  static void step(const uint8_t* data, const typename V::Products& products, F scale, Bits* y,
                   bool stream) {
    auto* to = reinterpret_cast<uint8_t*>(y);
    if constexpr (kIsBf16<Out>) {
      const I codes = V::spread(V::load(data));
      const I magnitude = V::and_(codes, V::set8(0x7f));
      // magnitude = exponent + rest, where `rest` is below twice the least
      // normal code.
      constexpr int kNormal = 1 << kMantissa;
      const I exponent = V::and_(V::subs_u8(magnitude, V::set8(kNormal)), V::set8(0x80 - kNormal));
      const I rest = V::sub8(magnitude, exponent);
      const I low = V::look_up(products.low, rest);
      const I high = V::merge_sign(V::look_up(products.high, rest), codes);
      const auto add_exponent = [&](I product, I shifted) {
        return V::add16(product, V::template srl16<kMantissa + 1>(shifted));
      };
      put<V>(to, add_exponent(V::zip8_low(low, high), V::zip8_low(V::zero(), exponent)), stream);
      put<V>(to + V::kBytes,
             add_exponent(V::zip8_high(low, high), V::zip8_high(V::zero(), exponent)), stream);
    } else {
      for (int part = 0; part < 4; ++part) {
        constexpr int kPart = V::kBytes / 4;
        const F value = V::mul(V::template load_codes<kIsE5m2<In>>(data + part * kPart), scale);
        if constexpr (kIsHalf<Out>)
          V::store_half(to + part * kPart * 2, value, stream);
        else
          put<V>(to + part * kPart * 4, V::as_int(value), stream);
      }
    }
  }

  template <bool kStream>
  static void run(const uint8_t* data, int64_t cols, const float* scales, Bits* y) {
    const auto portable = portable_kernels.dequantize[kIsE5m2<In>][kIsBf16<Out>   ? 0
                                                                   : kIsHalf<Out> ? 1
                                                                                  : 2];
    typename V::Products products{};
    float prepared = 0;
    F scale = V::setf(0);
    for (int64_t col = 0; col < cols; col += kTile, ++scales) {
      if (*scales != prepared || prepared == 0) {
        if (!serves(*scales)) {
          portable(data + col, std::min<int64_t>(kTile, cols - col), scales, y + col, false);
          continue;
        }
        prepared = *scales;
        scale = V::setf(prepared);
        if (kIsBf16<Out>) products = V::products(prepared, kIsE5m2<In> ? 0x1p-16f : 0x1p-9f);
      }
      const int64_t end = std::min<int64_t>(col + kTile, cols);
      int64_t i = col;
      for (; i + V::kBytes <= end; i += V::kBytes) {
        if (__builtin_expect(V::all_below(V::load(data + i), kSpecial), 1))
          step(data + i, products, scale, y + i, kStream);
        else
          portable(data + i, V::kBytes, scales, y + i, false);
      }
      if (i < end) portable(data + i, end - i, scales, y + i, false);
    }
  }

  static void kernel(const uint8_t* data, int64_t cols, const float* scales, void* y, bool stream) {
    if (stream)
      run<true>(data, cols, scales, static_cast<Bits*>(y));
    else
      run<false>(data, cols, scales, static_cast<Bits*>(y));
  }
};

#include "transpose_loops.h"

#include "both_loops.h"

template <class V, class Out>
constexpr QuantizeBothKernel both_kernel() {
  if constexpr (V::kHasPlanes)
    return QuantizeBoth<V, Out>::kernel;
  else
    return nullptr;
}

template <class V>
constexpr Kernels make_kernels() {
  return {
      {{Quantize<V, BFloat16, E4M3>::kernels(), Quantize<V, BFloat16, E5M2>::kernels()},
       {Quantize<V, Half, E4M3>::kernels(), Quantize<V, Half, E5M2>::kernels()},
       {Quantize<V, Float, E4M3>::kernels(), Quantize<V, Float, E5M2>::kernels()}},
      {{Dequantize<V, E4M3, BFloat16>::kernel, Dequantize<V, E4M3, Half>::kernel,
        Dequantize<V, E4M3, Float>::kernel},
       {Dequantize<V, E5M2, BFloat16>::kernel, Dequantize<V, E5M2, Half>::kernel,
        Dequantize<V, E5M2, Float>::kernel}},
      {quantize_columns<V, E4M3>, quantize_columns<V, E5M2>},
      {both_kernel<V, E4M3>(), both_kernel<V, E5M2>()},
      transpose_tile<typename V::Squares, uint16_t>,
      transpose_tile<typename V::Squares, uint32_t>,
      transpose_codes<V>,
      copy_codes<V>,
      V::fence,
  };
}
