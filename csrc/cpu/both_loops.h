// Quantizes a tile of BF16 along rows and along columns at once, for any instruction set: a part of
// loops.h, which includes this file.
//
//   1. 16 rows at a time: largest magnitudes of rows and of columns. The bytes of the elements are
//      parted into two planes, which the steps below share: exponents, and signs with fractions.
//   2. Codes of these rows from their planes.
//   3. After all rows, 16 columns at a time: transposed planes, and codes from these.
//
// The code of an element is that of encode_tabulated, from the exponent e' of kernels.h and the table.
// With e' + kBelow, saturated at 0, in place of e', elements that are zero or become zero need no mask:
// their sums are at most kBelow << mantissa bits, which is subtracted with saturation.

template <class Out>
constexpr int kMantissaBits = kIsE5m2<Out> ? 2 : 3;
template <class Out>
constexpr int kBelow = kMantissaBits<Out> + 2;

// Bytes of 128 x 128 elements, rows one after another, in the order of columns that V::column_of says.
struct BytePlanes {
  alignas(64) uint8_t exponents[kTile * kTile], fractions[kTile * kTile];
};

// How to look up the codes of some groups.
template <int kGroups>
struct GroupLookUps {
  alignas(64) uint32_t keys[kGroups], bases[kGroups];
};

// The scales of BF16 groups from their largest magnitudes. False if one of the scales has no table.
template <class Out, int kGroups>
inline __attribute__((always_inline)) bool tabulated(const uint32_t* largest,
                                                     uint32_t dropped_mantissa, float* scales,
                                                     GroupLookUps<kGroups>& look_ups) {
  const uint32_t least = bits_of(kLeastTabulated);
  uint32_t farthest = 0;
  for (int i = 0; i < kGroups; ++i) {
    const float scale = scale_for<BFloat16, Out>(largest[i], dropped_mantissa);
    scales[i] = scale;
    look_ups.keys[i] = significand_key(scale);
    look_ups.bases[i] = (bits_of(scale) >> 23) - exponents_below(kIsE5m2<Out>) - kBelow<Out>;
    farthest = std::max(farthest, bits_of(scale) - least);  // wraps for smaller scales
  }
  return farthest < kInfinityBits - least;
}

// Replaces the codes of steps that might have subnormal codes.
template <class V, class Out>
__attribute__((noinline)) void encode_planes_exactly(const uint8_t* exponents,
                                                     const uint8_t* fractions, float scale,
                                                     uint8_t base, typename V::I* codes) {
  using I = typename V::I;
  for (int step = 0; step < kTile; step += V::kBytes, ++codes) {
    const I excess = V::subs_u8(V::load(exponents + step), V::set8(base));
    if (V::all_at_least(V::sub8(excess, V::set8(1)), kBelow<Out>)) continue;
    alignas(64) uint16_t x[V::kBytes];
    for (int i = 0; i < V::kBytes; ++i)
      x[i] = uint16_t((fractions[step + i] & 0x80) << 8 | exponents[step + i] << 7 |
                      (fractions[step + i] & 0x7f));
    alignas(64) uint8_t bytes[V::kBytes];
    encode_exactly<V, BFloat16, Out>(x, scale, bytes);
    *codes = V::load(bytes);
  }
}

// The codes of 128 elements. Fetches the two lines at `ahead`, one after another, so that few misses are
// under way at a time.
template <class V, class Out>
inline __attribute__((always_inline)) void encode_planes(
    const uint8_t* exponents, const uint8_t* fractions, float scale, uint32_t key, uint8_t base,
    const Significands& tables, const uint8_t* ahead, typename V::I (&codes)[kTile / V::kBytes]) {
  using I = typename V::I;
  const auto table = V::significands(tables, key);
  const I least = V::set8(base), below = V::set8(uint8_t(kBelow<Out> << kMantissaBits<Out>));
  I nearest = V::set8(0xff);
#pragma GCC unroll 4
  for (int i = 0; i < kTile / V::kBytes; ++i) {
    if (i * V::kBytes % 64 == 0) __builtin_prefetch(ahead + i * V::kBytes, 0, 2);
    const I fraction = V::load(fractions + i * V::kBytes);
    const I excess = V::subs_u8(V::load(exponents + i * V::kBytes), least);
    nearest = V::min_u8(nearest, V::sub8(excess, V::set8(1)));  // zeros count for nothing
    const I sum =
        V::add8(V::template sll16<kMantissaBits<Out>>(excess), V::significands_at(table, fraction));
    codes[i] = V::merge_sign(V::subs_u8(sum, below), fraction);
  }
  if (__builtin_expect(!V::all_at_least(nearest, kBelow<Out>), 0)) {
    I exact[kTile / V::kBytes];  // so that `codes` can stay in registers
    std::copy(codes, codes + kTile / V::kBytes, exact);
    encode_planes_exactly<V, Out>(exponents, fractions, scale, base, exact);
    std::copy(exact, exact + kTile / V::kBytes, codes);
  }
}

// See Kernels::both.
template <class V, class Out>
struct QuantizeBoth {
  using I = typename V::I;
  using M = Magnitudes<V, uint16_t>;
  static constexpr int kBatch = 16;
  static constexpr int kPart = 4 * M::kElements;  // elements of four registers
  static constexpr int kParts = kTile / kPart;
  static constexpr int kSteps = kTile / V::kBytes;

  // Step 1 for four registers of each row. Magnitudes are doubled.
  static inline __attribute__((always_inline)) void part(const uint16_t* x, int64_t stride,
                                                         int rows, uint8_t* exponents,
                                                         uint8_t* fractions, uint16_t* columns,
                                                         I* largest) {
    constexpr int n = M::kElements;
    I c0 = V::load(columns), c1 = V::load(columns + n), c2 = V::load(columns + 2 * n),
      c3 = V::load(columns + 3 * n);
    for (int row = 0; row < rows; ++row) {
      const uint16_t* from = x + row * stride;
      const I x0 = V::load(from), x1 = V::load(from + n);
      const I x2 = V::load(from + 2 * n), x3 = V::load(from + 3 * n);
      const I m0 = V::add16(x0, x0), m1 = V::add16(x1, x1);
      const I m2 = V::add16(x2, x2), m3 = V::add16(x3, x3);
      c0 = M::larger(c0, m0);
      c1 = M::larger(c1, m1);
      c2 = M::larger(c2, m2);
      c3 = M::larger(c3, m3);
      largest[row] = M::larger(largest[row], M::larger(M::larger(m0, m1), M::larger(m2, m3)));
      const auto first = V::planes(x0, x1, m0, m1), second = V::planes(x2, x3, m2, m3);
      V::store(exponents + row * kTile, first.exponents);
      V::store(exponents + row * kTile + V::kBytes, second.exponents);
      V::store(fractions + row * kTile, first.fractions);
      V::store(fractions + row * kTile + V::kBytes, second.fractions);
    }
    V::store(columns, c0);
    V::store(columns + n, c1);
    V::store(columns + 2 * n, c2);
    V::store(columns + 3 * n, c3);
  }

  template <bool kStream>
  static bool run(const uint16_t* x, int64_t stride, int rows, uint32_t dropped_mantissa,
                  uint8_t* data, int64_t data_stride, float* scales, uint8_t* data_t,
                  int64_t data_t_stride, float* scales_t, bool stream_t, const Ahead& ahead) {
    const Significands& tables = significands(kIsE5m2<Out>);
    BytePlanes planes;
    alignas(64) uint16_t columns[kTile] = {};
    // Half of each row is fetched along rows, and half along columns. Without a row to fetch: what is
    // in the cache.
    const auto ahead_of = [&](int i, int half) {
      return i < ahead.rows ? ahead.data + i * ahead.pitch + half * kTile : planes.exponents;
    };
    for (int first = 0; first < rows; first += kBatch) {
      const int count = std::min(kBatch, rows - first);
      I magnitudes[kBatch];
      for (I& magnitude : magnitudes) magnitude = V::zero();
      for (int i = 0; i < kParts; ++i)
        part(x + first * stride + i * kPart, stride, count,
             planes.exponents + first * kTile + i * kPart,
             planes.fractions + first * kTile + i * kPart, columns + i * kPart, magnitudes);
      alignas(64) uint32_t largest[kBatch];
      M::reduce(magnitudes, largest);
      GroupLookUps<kBatch> look_ups;
      if (!tabulated<Out>(largest, dropped_mantissa, scales + first, look_ups)) return false;
      for (int i = 0; i < count; ++i) {
        const int row = first + i;
        I codes[kSteps];
        encode_planes<V, Out>(planes.exponents + row * kTile, planes.fractions + row * kTile,
                              scales[row], look_ups.keys[i], uint8_t(look_ups.bases[i]), tables,
                              ahead_of(row, 0), codes);
        for (int step = 0; step < kSteps; ++step)
          put<V>(data + row * data_stride + step * V::kBytes, V::planes_in_order(codes[step]),
                 kStream);
      }
    }
    if (rows < kTile) {
      std::memset(planes.exponents + rows * kTile, 0, size_t(kTile - rows) * kTile);
      std::memset(planes.fractions + rows * kTile, 0, size_t(kTile - rows) * kTile);
    }
    alignas(64) uint32_t largest[kTile];
    for (int i = 0; i < kTile; ++i) largest[i] = columns[i] >> 1;
    GroupLookUps<kTile> look_ups;
    if (!tabulated<Out>(largest, dropped_mantissa, scales_t, look_ups)) return false;
    constexpr int kColumns = 16;
    alignas(64) uint8_t exponents[kColumns * kTile], fractions[kColumns * kTile];
    for (int first = 0; first < kTile; first += kColumns) {
      transpose_whole<V, 1>(planes.exponents + first, kTile, kTile, kColumns, exponents, kTile,
                            false);
      transpose_whole<V, 1>(planes.fractions + first, kTile, kTile, kColumns, fractions, kTile,
                            false);
      for (int i = 0; i < kColumns; ++i) {
        const int column = V::column_of(first + i);
        I codes[kSteps];
        encode_planes<V, Out>(exponents + i * kTile, fractions + i * kTile, scales_t[column],
                              look_ups.keys[column], uint8_t(look_ups.bases[column]), tables,
                              ahead_of(first + i, 1), codes);
        uint8_t* to = data_t + column * data_t_stride;
        if (rows == kTile) {
          for (int step = 0; step < kSteps; ++step)
            put<V>(to + step * V::kBytes, codes[step], stream_t);
        } else {
          std::memcpy(to, codes, size_t(rows));
        }
      }
    }
    return true;
  }

  static bool kernel(const uint16_t* x, int64_t stride, int rows, uint32_t dropped_mantissa,
                     uint8_t* data, int64_t data_stride, float* scales, bool stream,
                     uint8_t* data_t, int64_t data_t_stride, float* scales_t, bool stream_t,
                     const Ahead& ahead) {
    const auto loop = stream ? run<true> : run<false>;
    return loop(x, stride, rows, dropped_mantissa, data, data_stride, scales, data_t, data_t_stride,
                scales_t, stream_t, ahead);
  }
};
