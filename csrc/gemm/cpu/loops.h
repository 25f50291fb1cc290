// The loops of a CPU GEMM, for a level's instructions `Isa`. Include it after the pragma that
// selects the level's instructions: all of it is templates over Isa, so that each level has its
// own.
//
//   for each chunk of K (a few segments of 128):
//     pack this chunk of b, panel by panel       FP8 rows -> panels, converted once
//     for each tile of a's rows:
//       for each panel:                          tile: a's rows x one or two panels, in registers
//         for each segment of 128:
//           sum of products over the segment     Isa::dot, K in order
//           total += sum * scale_a * scale_b
//
// A panel holds Isa::kVectors vectors of columns for each step of K; a step is Isa::kPair elements
// of K. Isa packs four elements of K (a quad) at a time, in steps of its own order; packed a has
// the same order. A segment is padded to whole quads with zeros. Isa::pack_row returns a power of
// two by which the row's sums must be multiplied.
#pragma once

#include <cstring>
#include <utility>

#include "kernel.h"

namespace torchext::cpu_gemm {

template <class Isa>
struct Loops {
  using Element = typename Isa::Element;
  using Vector = typename Isa::Vector;
  using Step = typename Isa::Step;  // kPair elements of a, to be broadcast
  static constexpr int kLanes = Isa::kLanes, kVectors = Isa::kVectors;
  static constexpr int kPanel = kLanes * kVectors, kSegment = Depth::kSegment;
  static constexpr int kTileRows = Isa::kTileRows;
  // A tile of at most this many rows takes two panels at once, to have enough independent sums.
  static constexpr int kWideRows = kTileRows / 2;
  static constexpr int kFewRows = 48;
  static constexpr int kSteps = kSegment / Isa::kPair;
  static_assert(sizeof(Step) == sizeof(Element) * Isa::kPair, "a step is kPair elements");

  static int padded(int depth) { return (depth + 3) / 4 * 4; }

  // ---- a ----

  // The scales of `count` rows. Rows that share one come in runs, so that few divisions are needed.
  static void load_scales(const Operand& x, const Rows& rows, int64_t group, float* scales) {
    if (x.scale == nullptr) {
      std::fill_n(scales, rows.count, 1.0f);
      return;
    }
    const float* column = x.scale + group * x.scale_group;
    if (x.row_group == 1) {
      for (int64_t i = 0; i < rows.count; ++i) scales[i] = column[rows[i] * x.scale_row];
      return;
    }
    for (int64_t i = 0; i < rows.count;) {
      const int64_t shared = (rows.first + i) / x.row_group;
      const int64_t end = std::min(rows.count, (shared + 1) * x.row_group - rows.first);
      std::fill(scales + i, scales + end, column[shared * x.scale_row]);
      i = end;
    }
  }

  static void pack(const Operand& a, const Rows& rows, const Depth& k, const PackedRows& out) {
    const int64_t segments = k.segments(), height = rows.count;
    Step* data = static_cast<Step*>(out.data);
    for (int64_t s = 0; s < segments; ++s, data += height * kSteps) {
      load_scales(a, rows, k.group(s), out.scales + s * height);
      if (Isa::pack_tile(a, rows, k.first(s), k.count(s), data)) continue;
      for (int64_t i = 0; i < height; ++i) {
        Step steps[kSteps];
        out.scales[s * height + i] *= Isa::pack_row(a, rows[i], k.first(s), k.count(s), steps);
        const int count = padded(k.count(s)) / Isa::kPair;
        for (int j = 0; j < count; ++j) data[j * height + i] = steps[j];
      }
    }
  }

  // ---- b ----

  struct Panels {
    Element* data;  // [panel][segment][step][column][pair]
    float* scales;  // [panel][segment][column]
    int64_t chunk;  // segments that each panel has room for
  };

  static Element* data_of(const Panels& panels, int64_t panel, int64_t segment) {
    return panels.data + (panel * panels.chunk + segment) * kSegment * kPanel;
  }
  static float* scales_of(const Panels& panels, int64_t panel, int64_t segment) {
    return panels.scales + (panel * panels.chunk + segment) * kPanel;
  }

  // Packs segments [begin, end) of all columns.
  static void pack_columns(const Product& p, int64_t begin, int64_t end, const Panels& panels) {
    int64_t panel = 0;
    for (const Rows& columns : p.columns) {
      for (int64_t n = 0; n < columns.count; n += kPanel, ++panel) {
        const int count = int(std::min<int64_t>(kPanel, columns.count - n));
        for (int64_t s = begin; s < end; ++s) {
          Isa::pack_panel(*p.b, columns.first + n, count, p.k.first(s), p.k.count(s),
                          data_of(panels, panel, s - begin));
          float* scales = scales_of(panels, panel, s - begin);
          load_scales(*p.b, columns.part(n, n + count), p.k.group(s), scales);
          std::fill(scales + count, scales + kPanel, 0.0f);
        }
      }
    }
  }

  // ---- a tile and one or two panels ----

  struct Tile {
    const Step* a;
    const float* a_scales;
    const Panels* panels;
    int64_t panel;
    const Depth* k;
    int64_t begin, end;  // segments
    float* total;
    int64_t total_stride;
    bool first;  // whether total has no sum yet
    // The tile fetches what will be packed next, two lines of a row of b in every two steps of K,
    // because memory would idle otherwise. A stride of 0 fetches one line again and again, which
    // costs nothing.
    const char* ahead;
    int64_t ahead_stride;
  };

  template <int kRows, int kCount>
  static void multiply_tile(const Tile& tile) {
    constexpr int kAll = kVectors * kCount;
    const Step* a = tile.a;
    const float* a_scales = tile.a_scales;
    for (int64_t s = tile.begin; s < tile.end; ++s) {
      const Element* b[kCount];
      for (int p = 0; p < kCount; ++p) b[p] = data_of(*tile.panels, tile.panel + p, s - tile.begin);
      Vector sum[kRows][kAll] = {};
      const int steps = padded(tile.k->count(s)) / Isa::kPair;
      const Step* at = a;
      const char* ahead = tile.ahead + (s - tile.begin) * kSegment;
      for (int64_t j = 0; j < steps; ++j) {
        if (j % 2 == 0) {
#pragma GCC unroll 2
          for (int p = 0; p < kCount; ++p) {
            __builtin_prefetch(ahead + p * kPanel * tile.ahead_stride, 0, 2);
            __builtin_prefetch(ahead + p * kPanel * tile.ahead_stride + 64, 0, 2);
          }
          ahead += tile.ahead_stride;
        }
        typename Isa::Operands columns[kAll];
#pragma GCC unroll 8
        for (int v = 0; v < kAll; ++v)
          columns[v] =
              Isa::load(b[v / kVectors] + (j * kVectors + v % kVectors) * kLanes * Isa::kPair);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const typename Isa::Operands row = Isa::broadcast(at + i);
#pragma GCC unroll 8
          for (int v = 0; v < kAll; ++v) sum[i][v] = Isa::dot(sum[i][v], row, columns[v]);
        }
        at += kRows;
      }
#pragma GCC unroll 8
      for (int v = 0; v < kAll; ++v) {
        const Vector scales =
            Isa::load_floats(scales_of(*tile.panels, tile.panel + v / kVectors, s - tile.begin) +
                             v % kVectors * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          float* total = tile.total + i * tile.total_stride + v * kLanes;
          const Vector before = tile.first && s == tile.begin ? Vector{} : Isa::load_floats(total);
          Isa::store_floats(total, Isa::add_scaled(before, sum[i][v], a_scales[i], scales));
        }
      }
      a += kRows * kSteps;
      a_scales += kRows;
    }
  }

  using MultiplyTile = void (*)(const Tile&);

  template <int kCount, std::size_t... kRows>
  static MultiplyTile of_height(int64_t height, std::index_sequence<kRows...>) {
    static constexpr MultiplyTile functions[] = {multiply_tile<int(kRows) + 1, kCount>...};
    return functions[height - 1];
  }

  static void multiply_chunk(const Product& p, const Panels& panels, int64_t count, int64_t begin,
                             int64_t end) {
    const int64_t segments = p.k.segments();
    const Division tiles(p.rows, kTileRows);
    for (int64_t t = 0; t < tiles.parts; ++t) {
      const int64_t row = tiles.begin(t), height = tiles.begin(t + 1) - row;
      Tile tile{};
      tile.a = static_cast<const Step*>(p.a.data) + (row * segments + height * begin) * kSteps;
      tile.a_scales = p.a.scales + row * segments + height * begin;
      tile.panels = &panels;
      tile.k = &p.k;
      tile.begin = begin;
      tile.end = end;
      tile.total = p.total + row * p.total_stride;
      tile.total_stride = p.total_stride;
      tile.first = begin == 0;
      const bool read_ahead = t == 0 && p.rows <= kFewRows && end < segments;
      tile.ahead = static_cast<const char*>(p.b->data);
      if (read_ahead) tile.ahead += p.columns[0].first * p.b->stride + p.k.first(end);
      tile.ahead_stride = read_ahead ? p.b->stride : 0;
      const MultiplyTile one = of_height<1>(height, std::make_index_sequence<kTileRows>());
      const MultiplyTile two = height <= kWideRows
                                   ? of_height<2>(height, std::make_index_sequence<kWideRows>())
                                   : nullptr;
      while (tile.panel < count) {
        const bool wide = two != nullptr && tile.panel + 1 < count;
        (wide ? two : one)(tile);
        tile.panel += wide ? 2 : 1;
        tile.total += wide ? 2 * kPanel : kPanel;
        tile.ahead += (wide ? 2 : 1) * kPanel * tile.ahead_stride;
      }
    }
  }

  static void clear(const Product& p) {
    for (int64_t i = 0; i < p.rows; ++i)
      std::fill_n(p.total + i * p.total_stride, p.total_stride, 0.0f);
  }

  // Packs b a chunk of K at a time, and calls multiply(p, panels, their count, first segment, last).
  template <class Multiply>
  static void for_each_chunk(const Level& level, const Product& p, const Multiply& multiply) {
    const int64_t segments = p.k.segments(), width = padded_columns(level, p.columns);
    if (segments == 0) return clear(p);
    const int64_t chunk = chunk_of(level, p.rows, p.k);
    auto* data = static_cast<Element*>(p.scratch);
    const Panels panels{data, reinterpret_cast<float*>(data + chunk * width * kSegment), chunk};
    for (int64_t s = 0; s < segments; s += chunk) {
      const int64_t end = std::min(s + chunk, segments);
      pack_columns(p, s, end, panels);
      multiply(p, panels, width / kPanel, s, end);
    }
  }

  static void multiply(const Product& p) { for_each_chunk(level(), p, multiply_chunk); }

  static constexpr Level level() {
    return {kPanel, kTileRows, int(sizeof(Element)), Isa::kChunk, kFewRows, kTileRows,
            pack,   multiply};
  }
};

}  // namespace torchext::cpu_gemm
