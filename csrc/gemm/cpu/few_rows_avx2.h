// Products of at most six rows on AVX2. They are bound by decoding b, whose columns are kept in the L1
// cache as FP16, half of what Loops writes there, and become FP32 between the products.
//
//   for each panel of 16 columns, for each run of four segments of 128 of K (two with many rows):
//     for each 8 columns: load 8 rows of b, transposed and as FP16
//     for each 8 columns:
//       for each K of a segment, for each segment, so that many sums are independent:
//         columns to FP32; sums += row * columns
//       for each segment: total += sum * scale_a * scale_b
//
// b is read 512 bytes of a row at a time: of 128 bytes, a Zen 3 reads half as fast. What is not whole
// and what has a NaN (Isa::has_nan) goes through Loops; both give an element the same sequence of
// operations. Include it after a pragma that selects AVX2.
#pragma once

#include "loops.h"

namespace torchext::cpu_gemm {

template <class Isa>
struct FewRowsAvx2 {
  using AnyRows = Loops<Isa>;
  using Vector = typename Isa::Vector;
  static constexpr int kLanes = Isa::kLanes, kSegment = Depth::kSegment;
  static_assert(kLanes == 8 && Isa::kPair == 1 && Isa::kPanel == 16 && Isa::kTileRows == 6);
  static constexpr int kMostRows = 6;
  static constexpr int kRun = 4;        // segments at once
  static constexpr int kThreeRows = 3;  // the most whose sums of kRun segments stay in registers
  static constexpr int kReadAhead = kRun * kSegment;  // bytes of a row of b
  static constexpr int kSegmentHalves = kLanes * kSegment;

  // Transposes 8 rows of a segment to FP16 (Isa::halves): out has, for each 32 of K, for each k < 16,
  // eight columns of k and then of 16 + k. Returns the largest code.
  template <class Number>
  static __m256i load_strip(const uint8_t* from, int64_t stride, uint16_t* out) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i largest = zero;
    for (int k = 0; k < kSegment; k += 32, out += 32 * kLanes) {
      __m256i rows[8], columns[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const uint8_t* row = from + i * stride + k;
        rows[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
        if (k % 64 == 0) __builtin_prefetch(row + kReadAhead, 0, 2);
        largest = Isa::larger_code(largest, rows[i]);
      }
      Isa::transpose(rows, columns);
      auto* to = reinterpret_cast<__m256i*>(out);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m256i even = _mm256_unpacklo_epi8(zero, columns[i]);
        const __m256i odd = _mm256_unpackhi_epi8(zero, columns[i]);
        _mm256_store_si256(to + 2 * i, Isa::template halves<Number>(even));
        _mm256_store_si256(to + 2 * i + 1, Isa::template halves<Number>(odd));
      }
    }
    return largest;
  }

  struct Segments {
    const float* a;  // [segment][k][row]
    const float* a_scales;
    const uint16_t* columns;  // transposed, segment after segment
    const float* b_scales;    // [segment][column of a panel]
    float* total;
    int64_t total_stride;
    bool first;  // whether total has no sum yet
  };

  // total += (rows * columns) * scales, for kCount segments.
  template <class Number, int kRows, int kCount>
  static void multiply_segments(const Segments& s) {
    Vector sum[kCount][kRows] = {};
    const float* a = s.a;
    for (int k = 0; k < kSegment; k += 16) {
      const uint16_t* columns = s.columns + (k / 32 * 32 + k % 32 / 16) * kLanes;
#pragma GCC unroll 2
      for (int i = 0; i < 16; ++i, columns += 2 * kLanes, a += kRows) {
#pragma GCC unroll 4
        for (int j = 0; j < kCount; ++j) {
          const Vector floats = Isa::template floats<Number>(
              _mm_load_si128(reinterpret_cast<const __m128i*>(columns + j * kSegmentHalves)));
#pragma GCC unroll 6
          for (int row = 0; row < kRows; ++row)
            sum[j][row] =
                Isa::dot(sum[j][row], Isa::broadcast(a + j * kSegment * kRows + row), floats);
        }
      }
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      float* to = s.total + row * s.total_stride;
      Vector total = s.first ? Vector{} : Isa::load_floats(to);
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j)
        total = Isa::add_scaled(total, sum[j][row], s.a_scales[j * kRows + row],
                                Isa::load_floats(s.b_scales + j * Isa::kPanel));
      Isa::store_floats(to, total);
    }
  }

  using Multiply = void (*)(const Segments&);

  template <class Number, int kCount, std::size_t... i>
  static Multiply of_height(int64_t height, std::index_sequence<i...>) {
    static constexpr Multiply functions[] = {multiply_segments<Number, int(i) + 1, kCount>...};
    return functions[height - 1];
  }

  template <class Number>
  static Multiply of(int64_t height, int64_t count) {
    constexpr auto heights = std::make_index_sequence<kMostRows>();
    if (count == kRun)
      return of_height<Number, kRun>(height, std::make_index_sequence<kThreeRows>());
    return count == 2 ? of_height<Number, 2>(height, heights)
                      : of_height<Number, 1>(height, heights);
  }

  // Multiplies one segment by a panel of columns in any case, by Loops.
  static void multiply_packed(const Product& p, const Rows& columns, int64_t s, float* total) {
    Product part = p;
    part.columns[0] = columns;
    part.columns[1] = {};
    part.total = total;
    auto* data = static_cast<float*>(p.scratch);
    const typename AnyRows::Panels panel{data, data + Isa::kPanel * kSegment, 1};
    AnyRows::pack_columns(part, s, s + 1, panel);
    AnyRows::multiply_chunk(part, panel, 1, s, s + 1);
  }

  // Loads a panel of `count` segments of b. Returns false if it has a NaN.
  template <class Number>
  static bool load(const Operand& b, int64_t row, int64_t column, int64_t count,
                   uint16_t* columns) {
    const auto* from = static_cast<const uint8_t*>(b.data) + row * b.stride + column;
    __m256i largest = _mm256_setzero_si256();
    for (int half = 0; half < 2; ++half, from += kLanes * b.stride)
      for (int64_t j = 0; j < count; ++j, columns += kSegmentHalves)
        largest =
            _mm256_max_epu8(largest, load_strip<Number>(from + j * kSegment, b.stride, columns));
    return !Isa::template has_nan<Number>(largest);
  }

  template <class Number>
  static void multiply_panel(const Product& p, const Rows& columns, float* total) {
    alignas(32) uint16_t halves[2 * kRun * kSegmentHalves];
    alignas(32) float scales[kRun * Isa::kPanel];
    const int64_t segments = p.k.segments();
    int64_t count;
    for (int64_t s = 0; s < segments; s += count) {
      const auto is_whole = [&](int64_t i) { return p.k.count(i) == kSegment; };
      count = p.rows <= kThreeRows ? kRun : 2;
      while (count > 1 && (s + count > segments || !is_whole(s) || !is_whole(s + count - 1)))
        count /= 2;
      if (columns.count < Isa::kPanel || !is_whole(s) ||
          !load<Number>(*p.b, columns.first, p.k.first(s), count, halves)) {
        for (int64_t j = 0; j < count; ++j) multiply_packed(p, columns, s + j, total);
        continue;
      }
      for (int64_t j = 0; j < count; ++j)
        AnyRows::load_scales(*p.b, columns, p.k.group(s + j), scales + j * Isa::kPanel);
      const Multiply function = of<Number>(p.rows, count);
      for (int half = 0; half < 2; ++half)
        function({static_cast<const float*>(p.a.data) + s * p.rows * kSegment,
                  p.a.scales + s * p.rows, halves + half * count * kSegmentHalves,
                  scales + half * kLanes, total + half * kLanes, p.total_stride, s == 0});
    }
  }

  static void multiply(const Product& p) {
    if (p.rows > kMostRows) return AnyRows::multiply(p);
    if (p.k.segments() == 0) return AnyRows::clear(p);
    const auto multiply_panel = p.b->format == Format::e5m2 ? FewRowsAvx2::multiply_panel<E5M2>
                                                            : FewRowsAvx2::multiply_panel<E4M3>;
    float* total = p.total;
    for (const Rows& columns : p.columns) {
      for (int64_t n = 0; n < columns.count; n += Isa::kPanel)
        multiply_panel(p, columns.part(n, std::min(n + Isa::kPanel, columns.count)), total + n);
      total += round_up(columns.count, Isa::kPanel);
    }
  }

  static constexpr Level level() {
    Level level = AnyRows::level();
    level.multiply = multiply;
    return level;
  }
};

}  // namespace torchext::cpu_gemm
