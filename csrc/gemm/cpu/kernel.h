// The interface of a level of the CPU GEMM (one file each: portable.cpp, avx2.cpp, ...), in plain
// types. A level packs rows of a, and multiplies packed rows by rows of b; gemm_cpu.cpp makes GEMMs
// of these. Contract: every element of the product is computed alone, by one sequence of operations
// that depends on K only. So its bits depend neither on the size of the product, nor on how the
// work is divided, nor on the number of threads.
#pragma once

#include <cstdint>

#include "../../runtime/cpu_level.h"
#include "../../runtime/tensor.h"

namespace torchext::cpu_gemm {

// The number format of an operand. Products with FP8 operands only, or with BF16, use BF16 dot
// products where the level has them; FP16 and FP32 operands need FP32 products (but
// gemm_cpu.cpp splits a row of FP16 into two of BF16).
enum class Format { e4m3, e5m2, bf16, fp16, fp32 };

// Rows of a matrix, by number: first, first + 1, ..., or what list[first], ... say.
struct Rows {
  int64_t first, count;
  const int32_t* list = nullptr;
  int64_t operator[](int64_t i) const { return list ? list[first + i] : first + i; }
  Rows part(int64_t begin, int64_t end) const { return {first + begin, end - begin, list}; }
};

// a or b: a matrix with one scale for every 128 columns of row_group rows, or without scales.
struct Operand {
  const void* data;
  int64_t stride;  // from row to row, in elements
  Format format;
  const float* scale;  // may be nullptr
  int64_t scale_row, scale_group;
  int64_t row_group;  // 1 if rows are given by a list
};

// Columns [begin, end) of a and b, cut into segments at the multiples of 128. A segment has one
// scale for each row. Its products are summed first, and then promoted: total += sum * scales.
struct Depth {
  static constexpr int kSegment = int(kScaleGroup);
  int64_t begin, end;
  int64_t segments() const { return begin == end ? 0 : ceil_div(end, kSegment) - begin / kSegment; }
  int64_t group(int64_t segment) const { return begin / kSegment + segment; }  // of scales
  int64_t first(int64_t segment) const {
    const int64_t column = group(segment) * kSegment;
    return column < begin ? begin : column;
  }
  int count(int64_t segment) const {
    const int64_t next = (group(segment) + 1) * kSegment;
    return int((next < end ? next : end) - first(segment));
  }
};

// `count` rows (or other things) divided evenly into as few parts as have at most `most` each. Part i
// is [begin(i), begin(i + 1)).
struct Division {
  int64_t count, parts;
  Division(int64_t count, int64_t most) : count(count), parts(ceil_div(count, most)) {}
  int64_t begin(int64_t part) const { return count * part / parts; }
};

// Packed rows of a. A tile is a few rows that are multiplied together: a part of
// Level::tiles(rows). `data` has 128 elements for every row and segment, tile after tile, and
// `scales` one.
struct PackedRows {
  void* data;
  float* scales;
};

struct Product {
  PackedRows a;
  int64_t rows;
  Depth k;
  const Operand* b;
  Rows columns[2];  // rows of b; those of the second list, which may be empty, come after the first
  float* total;     // FP32 output. The second list begins at a multiple of the level's `panel`
  int64_t total_stride;
  void* scratch;  // scratch_bytes()
};

// Products of few rows are bound by reading b: they pack a few segments of few columns at a time,
// so that the packed form stays in the L1 cache, and read ahead while they multiply.
constexpr int64_t kFewSegments = 2, kFewColumns = 64;

struct Level {
  int panel;          // columns that are multiplied together; the packed form of b is cut so
  int tile_rows;      // most rows of a tile
  int element_bytes;  // of packed a and b
  int chunk;          // segments of a panel of b that are packed at a time for a large product
  int few_rows;       // most rows of a product of few rows
  int few_tile_rows;  // most rows of its tiles

  // Packs columns k of `rows` of a, which are one tile.
  void (*pack)(const Operand& a, const Rows& rows, const Depth& k, const PackedRows& out);
  void (*multiply)(const Product& product);

  Division tiles(int64_t rows) const {
    return {rows, rows <= few_rows ? few_tile_rows : tile_rows};
  }
};

// Segments of b that multiply() packs at a time.
inline int64_t chunk_of(const Level& level, int64_t rows, const Depth& k) {
  const int64_t most = rows <= level.few_rows ? kFewSegments : level.chunk, all = k.segments();
  return all < most ? all : most;
}

// Columns of `total`, over both lists.
inline int64_t padded_columns(const Level& level, const Rows* columns) {
  return round_up(columns[0].count, level.panel) + round_up(columns[1].count, level.panel);
}

// Bytes for the packed columns of b and their scales.
inline int64_t scratch_bytes(const Level& level, int64_t rows, const Depth& k, int64_t padded) {
  const int64_t segment = Depth::kSegment * level.element_bytes + int64_t(sizeof(float));
  return chunk_of(level, rows, k) * padded * segment;
}

extern const Level portable;
#ifdef TORCHEXT_X86_LEVELS
extern const Level avx2, avx512, avx512_bf16, avx512_bf16_vbmi, amx;
#endif
#ifdef TORCHEXT_ARM_LEVELS
extern const Level neon;
#endif

// The level for operands of these formats on this machine.
const Level& level_for(Format a, Format b);

}  // namespace torchext::cpu_gemm
