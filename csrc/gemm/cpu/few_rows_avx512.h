// Products of few rows on AVX512-BF16. They are bound by decoding b, so that is done between the
// products: the processor overlaps both if neither is long, and decoded columns go from register to
// register, because a 512-bit store costs Zen 4 about 1.5 products.
//
//   for each strip of 16 columns, for each run of segments of 128:
//     for each segment (two at once if there are very few rows):
//       for each group of 16 of K, for each quad of K in it:
//         decode the quad of 16 columns, and load a part of the next group
//         sums += row pair * column pairs           16 columns of one row in a register
//       total += sum * scale_a * scale_b
//
// With more than 16 rows, the first tile of rows does so and keeps the decoded columns of its run
// for the other tiles. Columns that are not whole strips, and segments that are not whole, are
// decoded before all tiles. 16 rows of b are read side by side, each from its beginning to its end:
// prefetchers keep up with that many streams. Include it after a pragma that selects AVX512-BF16.
#pragma once

#include "loops.h"
#include "transpose_avx512.h"

namespace torchext::cpu_gemm {

template <class Isa>
struct FewRows {
  using Decode = typename Isa::FromFP8;
  static constexpr int kLanes = Isa::kLanes, kSegment = Depth::kSegment, kSteps = kSegment / 2;
  static constexpr int kFewRows = 64, kTileRows = 16;
  static constexpr int kLeastOfMany = 8;  // rows of a tile, if there are several
  // Up to this many rows take two segments at once, to have enough independent sums.
  static constexpr int kTwoSegmentRows = 6;
  static constexpr int kGroup = 16;
  static constexpr int kStepWords = 2 * kLanes;
  static constexpr int kMostRun = 32, kKeptRun = 8;  // segments of a run; if columns are kept
  static constexpr int kReadAhead = 512;             // bytes of a row, as measured on Zen 4

  struct Tile {
    const uint32_t* a;  // [segment][step][row]
    const float* a_scales;
    const float* b_scales;  // [segment][column]
    int segments;
    float* total;
    int64_t total_stride;
    bool first;  // whether total has no sum yet
    // For multiply_codes: 16 rows of b, and how far K and the next strip are from here.
    const Decode* decoder;
    const uint8_t* codes;
    int64_t stride, left, next_strip;
    // Decoded columns: [segment][step][column][pair].
    uint16_t* columns;
    int steps;  // of a segment
  };

  // total += sums * scales, for kSegments segments from segment s on.
  template <int kRows, int kSegments>
  static inline __attribute__((always_inline)) void promote(const Tile& tile, int s,
                                                            const __m512 (&sum)[kSegments][kRows]) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      float* to = tile.total + i * tile.total_stride;
      __m512 total = tile.first && s == 0 ? _mm512_setzero_ps() : Isa::load_floats(to);
#pragma GCC unroll 2
      for (int j = 0; j < kSegments; ++j)
        total = Isa::add_scaled(total, sum[j][i], tile.a_scales[(s + j) * kRows + i],
                                Isa::load_floats(tile.b_scales + (s + j) * kLanes));
      Isa::store_floats(to, total);
    }
  }

  template <int kRows>
  static inline __attribute__((always_inline)) void add_step(__m512 (&sum)[kRows],
                                                             const uint32_t* a, __m512i columns) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) sum[i] = Isa::dot(sum[i], Isa::broadcast(a + i), columns);
  }

  // 16 codes of each of the rows i, 4 + i, 8 + i and 12 + i, a 128-bit lane for each.
  static inline __attribute__((always_inline)) __m512i load_lanes(const uint8_t* codes,
                                                                  int64_t stride, int i) {
    const auto load = [&](int row) __attribute__((always_inline)) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + row * stride));
    };
    __m512i lanes = _mm512_castsi128_si512(load(i));
    lanes = _mm512_mask_broadcast_i32x4(lanes, 0x00f0, load(4 + i));
    lanes = _mm512_mask_broadcast_i32x4(lanes, 0x0f00, load(8 + i));
    return _mm512_mask_broadcast_i32x4(lanes, 0xf000, load(12 + i));
  }

  // Multiplies columns that it decodes, of whole segments; their number is a multiple of kSegments.
  template <int kRows, int kSegments, bool kKeep>
  static void multiply_codes(const Tile& tile) {
    static_assert(!kKeep || kSegments == 1, "kept columns are in the order of steps");
    const Decode decoder = *tile.decoder;
    const int64_t stride = tile.stride;
    const uint8_t* codes = tile.codes;
    const uint32_t* a = tile.a;
    uint16_t* columns = tile.columns;
    __m512i loaded[kSegments][4], quads[kSegments][4];
#pragma GCC unroll 2
    for (int j = 0; j < kSegments; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) loaded[j][i] = load_lanes(codes + j * kSegment, stride, i);
      transpose_lanes<true>(loaded[j], quads[j]);
    }
    for (int s = 0; s < tile.segments; s += kSegments) {
      __m512 sum[kSegments][kRows] = {};
      // After the end of these rows come the next strip's.
      const int64_t ahead =
          kReadAhead + (s * kSegment + kReadAhead < tile.left ? 0 : tile.next_strip);
#pragma GCC unroll 1
      for (int k = 0; k < kSegment; k += kGroup) {
        const uint8_t* fetched = codes + ahead + k / kGroup % 4 * 4 * stride;
        if (k + kGroup < kSegment)
          codes += kGroup;
        else if (s + kSegments < tile.segments)
          codes += kGroup + (kSegments - 1) * kSegment;
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 2
          for (int j = 0; j < kSegments; ++j) {
            __m512i first, second;
            decoder(quads[j][q], first, second);
            if (kKeep) {
              _mm512_store_si512(columns, first);
              _mm512_store_si512(columns + kStepWords, second);
              columns += 2 * kStepWords;
            }
            loaded[j][q] = load_lanes(codes + j * kSegment, stride, q);
            _mm_prefetch(reinterpret_cast<const char*>(fetched + j * kSegment + q * stride),
                         _MM_HINT_T0);
            const uint32_t* step = a + (j * kSteps + 2 * q) * kRows;
            add_step(sum[j], step, first);
            add_step(sum[j], step + kRows, second);
          }
        }
#pragma GCC unroll 2
        for (int j = 0; j < kSegments; ++j) transpose_lanes<true>(loaded[j], quads[j]);
        a += kGroup / 2 * kRows;
      }
      a += (kSegments - 1) * kSteps * kRows;
      promote<kRows, kSegments>(tile, s, sum);
    }
  }

  // Multiplies columns that are decoded already. Totals of few rows stay in registers, too.
  template <int kRows>
  static void multiply_columns(const Tile& tile) {
    __m512 total[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      total[i] =
          tile.first ? _mm512_setzero_ps() : Isa::load_floats(tile.total + i * tile.total_stride);
    for (int s = 0; s < tile.segments; ++s) {
      const uint32_t* a = tile.a + s * kSteps * kRows;
      const uint16_t* columns = tile.columns + s * kSteps * kStepWords;
      __m512 sum[kRows] = {};
      for (int j = 0; j < tile.steps; ++j, a += kRows, columns += kStepWords)
        add_step(sum, a, Isa::load(columns));
      const __m512 scales = Isa::load_floats(tile.b_scales + s * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
        total[i] = Isa::add_scaled(total[i], sum[i], tile.a_scales[s * kRows + i], scales);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) Isa::store_floats(tile.total + i * tile.total_stride, total[i]);
  }

  using MultiplyTile = void (*)(const Tile&);

  template <int kLeast, int kSegments, bool kKeep, std::size_t... i>
  static MultiplyTile for_codes(int64_t height, std::index_sequence<i...>) {
    static constexpr MultiplyTile functions[] = {
        multiply_codes<kLeast + int(i), kSegments, kKeep>...};
    return functions[height - kLeast];
  }

  template <std::size_t... i>
  static MultiplyTile for_columns(int64_t height, std::index_sequence<i...>) {
    static constexpr MultiplyTile functions[] = {multiply_columns<int(i) + 1>...};
    return functions[height - 1];
  }

  static void decode(const Operand& b, const Rows& rows, int64_t column, int count,
                     uint16_t* columns) {
    const Decode decoder(table_of(b.format));
    const auto* from = static_cast<const uint8_t*>(b.data) + rows.first * b.stride + column;
    for (int k = 0; k < count; k += 64)
      for_each_quad<true>(from + k, b.stride, int(rows.count), count - k,
                          [&](int q, __m512i codes) __attribute__((always_inline)) {
                            __m512i first, second;
                            decoder(codes, first, second);
                            uint16_t* to = columns + (k / 2 + 2 * q) * kStepWords;
                            _mm512_store_si512(to, first);
                            _mm512_store_si512(to + kStepWords, second);
                          });
  }

  // Multiplies by at most 16 rows of b, which are columns of the product.
  static void multiply_strip(const Product& p, const Decode& decoder, const Rows& rows,
                             float* total) {
    alignas(64) uint16_t columns[kKeptRun * kSteps * kStepWords];
    alignas(64) float scales[kMostRun * kLanes];
    const int64_t segments = p.k.segments(), stride = p.b->stride;
    const Division tiles(p.rows, kTileRows);
    const bool many = tiles.parts > 1;
    Tile tile{};
    tile.total_stride = p.total_stride;
    tile.b_scales = scales;
    tile.decoder = &decoder;
    tile.stride = stride;
    tile.next_strip = kLanes * stride - (p.k.end - p.k.begin);
    tile.columns = columns;
    for (int64_t s = 0; s < segments; s += tile.segments) {
      const auto is_whole = [&](int64_t i) { return p.k.count(i) == kSegment; };
      const bool whole = rows.count == kLanes && is_whole(s);
      tile.segments = 1;
      while (whole && tile.segments < (many ? kKeptRun : kMostRun) &&
             s + tile.segments < segments && is_whole(s + tile.segments))
        ++tile.segments;
      const bool two = p.rows <= kTwoSegmentRows && tile.segments > 1;
      if (two) tile.segments -= tile.segments % 2;
      for (int i = 0; i < tile.segments; ++i) {
        float* to = scales + i * kLanes;
        Loops<Isa>::load_scales(*p.b, rows, p.k.group(s + i), to);
        std::fill(to + rows.count, to + kLanes, 0.0f);
      }
      tile.steps = int(ceil_div(p.k.count(s), 4)) * 2;
      tile.first = s == 0;
      tile.codes = static_cast<const uint8_t*>(p.b->data) + rows.first * stride + p.k.first(s);
      tile.left = p.k.end - p.k.first(s);
      if (!whole) decode(*p.b, rows, p.k.first(s), p.k.count(s), columns);
      for (int64_t t = 0; t < tiles.parts; ++t) {
        const int64_t row = tiles.begin(t), height = tiles.begin(t + 1) - row;
        const int64_t at = row * segments + height * s;
        tile.a = static_cast<const uint32_t*>(p.a.data) + at * kSteps;
        tile.a_scales = p.a.scales + at;
        tile.total = total + row * p.total_stride;
        MultiplyTile function;
        if (!whole || t > 0)
          function = for_columns(height, std::make_index_sequence<kTileRows>());
        else if (many)
          function = for_codes<kLeastOfMany, 1, true>(
              height, std::make_index_sequence<kTileRows - kLeastOfMany + 1>());
        else if (two)
          function = for_codes<1, 2, false>(height, std::make_index_sequence<kTwoSegmentRows>());
        else
          function = for_codes<1, 1, false>(height, std::make_index_sequence<kTileRows>());
        function(tile);
      }
    }
  }

  static void multiply(const Product& p) {
    if (p.rows > kFewRows) return Loops<Isa>::multiply(p);
    if (p.k.segments() == 0) return Loops<Isa>::clear(p);
    const Decode decoder(table_of(p.b->format));
    float* total = p.total;
    for (const Rows& columns : p.columns) {
      for (int64_t n = 0; n < columns.count; n += kLanes)
        multiply_strip(p, decoder, columns.part(n, std::min(n + kLanes, columns.count)), total + n);
      total += round_up(columns.count, Isa::kPanel);
    }
  }

  static constexpr Level level() {
    Level level = Loops<Isa>::level();
    level.few_rows = kFewRows;
    level.few_tile_rows = kTileRows;
    level.multiply = multiply;
    return level;
  }
};

}  // namespace torchext::cpu_gemm
