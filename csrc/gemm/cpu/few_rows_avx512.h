// Products of few rows on AVX512-BF16. They are bound by reading and decoding b, so that is done
// while products are summed: in small pieces between the steps of K, because the processor looks
// too few instructions ahead to overlap more than that.
//
//   for each strip of 16 columns, for each segment of 128 (two at once if there are very few rows):
//     for each tile of a's rows:
//       for each step of K:
//         sums += row pair * column pairs           16 columns of one row in a register
//         a piece of packing the next segment       a transpose of 4 rows of b, or 4 decoded quads
//       total += sum * scale_a * scale_b
//
// 16 rows of b are read side by side, each from its beginning to its end: prefetchers keep up with
// that many streams. Include it after a pragma that selects AVX512-BF16.
#pragma once

#include "loops.h"
#include "transpose_avx512.h"

namespace torchext::cpu_gemm {

template <class Isa>
struct FewRows {
  using Decode = typename Isa::FromFP8;
  static constexpr int kLanes = Isa::kLanes, kSegment = Depth::kSegment, kSteps = kSegment / 2;
  static constexpr int kFewRows = 64, kTileRows = 16;
  // Up to this many rows take two segments at once, to have enough independent sums.
  static constexpr int kTwoSegmentRows = 6;
  static constexpr int kBlock = 64;       // codes of a row that are transposed at once
  static constexpr int kBlockPieces = 8;  // of packing a block: 4 of transpose(), 4 of decode()
  static constexpr int kSlots = 4;        // segments that are packed at a time
  static constexpr int kReadAhead = 512;  // bytes of a row, as measured on Zen 4

  // 16 rows of b, which are columns of the product.
  struct Strip {
    Rows rows;
    float* total;
  };

  // kBlock codes of each row of a strip, to be packed.
  struct Block {
    const uint8_t* from;
    int64_t stride, ahead;  // `ahead` is the distance from a code to the one to prefetch
    int rows, count;        // that exist
    uint16_t* to;
  };

  // Transposes rows 4 g to 4 g + 3 within 128-bit lanes (transpose_lanes).
  static void transpose(const Block& block, int g, __m512i* quads) {
    __m512i x[4];
    const uint8_t* row = block.from + 4 * g * block.stride;
    if (block.rows == kLanes && block.count >= kBlock) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        x[i] = _mm512_loadu_si512(row + i * block.stride);
        _mm_prefetch(reinterpret_cast<const char*>(row + i * block.stride + block.ahead),
                     _MM_HINT_T1);
      }
    } else {
      const int count = std::clamp(block.count, 0, kBlock);
      const __mmask64 mask = count == kBlock ? ~0ull : (1ull << count) - 1;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        x[i] = 4 * g + i < block.rows ? _mm512_maskz_loadu_epi8(mask, row + i * block.stride)
                                      : _mm512_setzero_si512();
    }
    transpose_lanes(x, quads + 4 * g);
  }

  // Decodes the quads j, j + 4, j + 8 and j + 12 of a block.
  static void decode(const Decode& decoder, const Block& block, int j, const __m512i* quads) {
    join_lanes(quads[j], quads[4 + j], quads[8 + j], quads[12 + j], j,
               [&](int q, __m512i codes) __attribute__((always_inline)) {
                 __m512i even, odd;
                 decoder(codes, even, odd);
                 uint16_t* to = block.to + q * 4 * kLanes;
                 _mm512_store_si512(to, even);
                 _mm512_store_si512(to + 2 * kLanes, odd);
               });
  }

  struct Tile {
    const uint32_t* a;  // [segment][step][row]
    const float* a_scales;
    const uint16_t* b[2];  // a packed segment each: [step][column][pair]
    const float* b_scales[2];
    int steps;
    float* total;
    int64_t total_stride;
    bool first;  // whether total has no sum yet
    const Decode* decoder;
    const Block *begin, *end;  // to be packed meanwhile; kSteps steps have room for all of them
  };

  template <int kRows, int kSegments>
  static void multiply_tile(const Tile& tile) {
    constexpr int kPieceSteps = kSteps / (2 * kBlockPieces * kSegments);
    const Decode decoder = *tile.decoder;
    alignas(64) __m512i quads[16];
    __m512 sum[kSegments][kRows] = {};
    const uint32_t* a = tile.a;
    int j = 0;
    const auto multiply = [&](int count) __attribute__((always_inline)) {
      for (int end = j + count; j < end; ++j, a += kRows) {
#pragma GCC unroll 2
        for (int s = 0; s < kSegments; ++s) {
          const __m512i columns = Isa::load(tile.b[s] + j * 2 * kLanes);
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i)
            sum[s][i] = Isa::dot(sum[s][i], Isa::broadcast(a + s * kSteps * kRows + i), columns);
        }
      }
    };
    for (const Block* block = tile.begin; block < tile.end; ++block) {
#pragma GCC unroll 1
      for (int g = 0; g < 4; ++g) {
        multiply(kPieceSteps);
        transpose(*block, g, quads);
      }
#pragma GCC unroll 1
      for (int q = 0; q < 4; ++q) {
        multiply(kPieceSteps);
        decode(decoder, *block, q, quads);
      }
    }
    multiply(tile.steps - j);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      float* to = tile.total + i * tile.total_stride;
      __m512 total = tile.first ? _mm512_setzero_ps() : Isa::load_floats(to);
#pragma GCC unroll 2
      for (int s = 0; s < kSegments; ++s)
        total = Isa::add_scaled(total, sum[s][i], tile.a_scales[s * kRows + i],
                                Isa::load_floats(tile.b_scales[s]));
      Isa::store_floats(to, total);
    }
  }

  using MultiplyTile = void (*)(const Tile&);

  template <int kSegments, std::size_t... kRows>
  static MultiplyTile of_height(int64_t height, std::index_sequence<kRows...>) {
    static constexpr MultiplyTile functions[] = {multiply_tile<int(kRows) + 1, kSegments>...};
    return functions[height - 1];
  }

  static Strip strip_of(const Product& p, int64_t i) {
    const int64_t before = ceil_div(p.columns[0].count, kLanes);
    const Rows& columns = p.columns[i < before ? 0 : 1];
    const int64_t first = (i < before ? i : i - before) * kLanes;
    const int64_t list = i < before ? 0 : round_up(p.columns[0].count, Isa::kPanel);
    return {columns.part(first, std::min(first + kLanes, columns.count)), p.total + list + first};
  }

  static void pack(const Decode& decoder, const Block* begin, const Block* end) {
    alignas(64) __m512i quads[16];
    for (; begin < end; ++begin) {
      for (int g = 0; g < 4; ++g) transpose(*begin, g, quads);
      for (int j = 0; j < 4; ++j) decode(decoder, *begin, j, quads);
    }
  }

  // Packed segments of strips, in order: the last kSlots that were packed.
  class Ring {
   public:
    explicit Ring(const Product& p) : p_(p) {}

    // Adds segment `s` of a strip. Writes the blocks to pack to `blocks`, and returns their end.
    Block* add(const Rows& rows, int64_t s, Block* blocks) {
      const int slot = int(added_++ % kSlots), count = p_.k.count(s);
      const int64_t first = p_.k.first(s), stride = p_.b->stride;
      Loops<Isa>::load_scales(*p_.b, rows, p_.k.group(s), scales_[slot]);
      std::fill(scales_[slot] + rows.count, scales_[slot] + kLanes, 0.0f);
      const auto* from = static_cast<const uint8_t*>(p_.b->data) + rows.first * stride + first;
      // After the end of these rows come the next strip's.
      int64_t ahead = kReadAhead;
      if (first + ahead >= p_.k.end) ahead += kLanes * stride + p_.k.begin - p_.k.end;
      for (int k = 0; k < kSegment; k += kBlock)
        *blocks++ = {from + k, stride, ahead, int(rows.count), count - k, data_[slot] + k * kLanes};
      return blocks;
    }
    int64_t added() const { return added_; }
    const uint16_t* data(int64_t i) const { return data_[i % kSlots]; }
    const float* scales(int64_t i) const { return scales_[i % kSlots]; }

   private:
    const Product& p_;
    int64_t added_ = 0;
    alignas(64) uint16_t data_[kSlots][kSegment * kLanes];
    alignas(64) float scales_[kSlots][kLanes];
  };

  static void multiply(const Product& p) {
    if (p.rows > kFewRows) return Loops<Isa>::multiply(p);
    const int64_t segments = p.k.segments();
    if (segments == 0) return Loops<Isa>::clear(p);
    const int64_t strips =
        ceil_div(p.columns[0].count, kLanes) + ceil_div(p.columns[1].count, kLanes);
    const int64_t all = strips * segments;  // segments of strips, counted in order
    const int most = p.rows <= kTwoSegmentRows ? 2 : 1;
    const Division tiles(p.rows, kTileRows);
    const Decode decoder(table_of(p.b->format));
    const auto is_whole = [&](int64_t s) { return p.k.count(s) == kSegment; };
    Ring ring(p);
    Strip strip = strip_of(p, 0), next_strip = strip;
    int64_t next = 0;  // segment of next_strip to be packed
    const auto add_until = [&](int64_t end, Block* blocks) {
      while (ring.added() < end) {
        blocks = ring.add(next_strip.rows, next, blocks);
        if (++next < segments) continue;
        next = 0;
        if (ring.added() < all) next_strip = strip_of(p, ring.added() / segments);
      }
      return blocks;
    };
    for (int64_t i = 0, s = 0; i < all;) {
      const bool two = most == 2 && s + 1 < segments && is_whole(s) && is_whole(s + 1);
      const int count = two ? 2 : 1;
      Block blocks[2 * kSlots];
      pack(decoder, blocks, add_until(i + count, blocks));
      Block* end = add_until(std::min(i + count + most, all), blocks);
      if (!is_whole(s) || end - blocks > 2 * count) {
        pack(decoder, blocks, end);
        end = blocks;
      }
      for (int64_t t = 0; t < tiles.parts; ++t) {
        const int64_t row = tiles.begin(t), height = tiles.begin(t + 1) - row;
        const int64_t at = row * segments + height * s;
        const Division share(end - blocks,
                             std::max<int64_t>(1, ceil_div(end - blocks, tiles.parts)));
        Tile tile{};
        tile.a = static_cast<const uint32_t*>(p.a.data) + at * kSteps;
        tile.a_scales = p.a.scales + at;
        for (int j = 0; j < count; ++j) {
          tile.b[j] = ring.data(i + j);
          tile.b_scales[j] = ring.scales(i + j);
        }
        tile.steps = int(ceil_div(p.k.count(s), 4)) * 2;
        tile.total = strip.total + row * p.total_stride;
        tile.total_stride = p.total_stride;
        tile.first = s == 0;
        tile.decoder = &decoder;
        tile.begin = t < share.parts ? blocks + share.begin(t) : end;
        tile.end = t < share.parts ? blocks + share.begin(t + 1) : end;
        (two ? of_height<2>(height, std::make_index_sequence<kTwoSegmentRows>())
             : of_height<1>(height, std::make_index_sequence<kTileRows>()))(tile);
      }
      i += count;
      s += count;
      if (s < segments || i == all) continue;
      s = 0;
      strip = strip_of(p, i / segments);
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
