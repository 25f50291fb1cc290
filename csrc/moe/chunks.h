// How the ops for experts share out rows on a CPU: tokens among threads, and a token's columns in
// chunks, which stay in the L1 cache while all rows of the token are written or added.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../cpu/quantize_tiles.h"
#include "moe.h"

namespace torchext {

using namespace cpu;

constexpr int64_t kChunk = 1024;  // columns of a token that are handled at once

// Columns [col, col + cols) of row `row`: in place if they are contiguous, else gathered.
inline const uint8_t* contiguous(const MatrixView& x, int64_t row, int64_t col, int64_t cols,
                                 uint8_t* gathered) {
  const int64_t size = element_size(x.dtype);
  const auto* from =
      static_cast<const uint8_t*>(x.data) + (row * x.row_stride + col * x.col_stride) * size;
  if (x.col_stride == 1) return from;
  for (int64_t i = 0; i < cols; ++i)
    std::memcpy(gathered + i * size, from + i * x.col_stride * size, size_t(size));
  return gathered;
}

// Calls body(token, col, cols, gathered) for each kChunk columns of each token; `gathered` has room
// for them.
template <class Body>
void for_each_chunk(int64_t tokens, int64_t cols, int64_t choices, const Body& body) {
  if (cols == 0) return;
  const int64_t chunks = ceil_div(cols, kChunk);
  const int64_t elements = std::min(cols, kChunk) * (choices + 1);
  in_parallel(tokens * chunks, elements, kernels(), [&](int64_t begin, int64_t end) {
    alignas(kLine) uint8_t gathered[kChunk * sizeof(float)];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t col = i % chunks * kChunk;
      body(i / chunks, col, std::min(kChunk, cols - col), gathered);
    }
  });
}

// Quantizes `cols` contiguous elements of a row, with kTile of them to a scale.
inline void quantize_chunk(const QuantizeTask& task, const uint8_t* from, int cols, uint8_t* codes,
                           float* scales) {
  const int whole = cols / kTile, rest = cols % kTile;
  task.quantize.groups(from, kTile, whole, kTile, task.dropped_mantissa, codes, kTile, scales, 1,
                       Ahead(), false);
  if (rest)
    task.quantize.groups(from + whole * kTile * task.element_size, kTile, 1, rest,
                         task.dropped_mantissa, codes + whole * kTile, kTile, scales + whole, 1,
                         Ahead(), false);
}

// Writes a part of a row; past the cache if `stream`, for which `to` starts a cache line.
inline void write_row(const uint8_t* from, int64_t bytes, uint8_t* to, bool stream) {
  const int64_t whole = stream ? bytes / kTile : 0;
  if (whole) kernels().copy8(from, int(whole), kTile, to, kTile, true);
  std::memcpy(to + whole * kTile, from + whole * kTile, size_t(bytes - whole * kTile));
}

// The token that has each row; -1 for rows that no choice has.
inline std::vector<int32_t> tokens_of_rows(const ChoicesView& choices) {
  std::vector<int32_t> tokens(size_t(choices.rows), -1);
  for (int64_t token = 0; token < choices.tokens; ++token)
    for (int64_t choice = 0; choice < choices.choices; ++choice) {
      const int64_t row = choices.slots(token, choice);
      if (row >= 0) tokens[size_t(row)] = int32_t(token);
    }
  return tokens;
}

// The scales of tokens [tokens, groups], contiguous, in the rows of their choices. Columns of scales
// may lie a large power of two apart, in the same few lines of a cache. So a column's line is written
// at once, rather than a token's scales.
inline void write_scales(const std::vector<float>& scales, int64_t groups,
                         const ChoicesView& choices, const QuantizedView& out) {
  constexpr int64_t kPart = kLine / sizeof(float);
  const std::vector<int32_t> tokens = tokens_of_rows(choices);
  const int64_t parts = ceil_div(choices.rows, kPart);
  in_parallel(parts, kPart * groups, kernels(), [&](int64_t begin, int64_t end) {
    alignas(kLine) float part[kPart][kPart];
    for (int64_t first = begin * kPart; first < std::min(end * kPart, choices.rows);
         first += kPart) {
      const int64_t rows = std::min(kPart, choices.rows - first);
      const int32_t* token = tokens.data() + first;
      const bool all = std::all_of(token, token + rows, [](int32_t t) { return t >= 0; });
      for (int64_t group = 0; group < groups; group += kPart) {
        const int64_t columns = std::min(kPart, groups - group);
        for (int64_t r = 0; r < rows; ++r) {
          if (token[r] < 0) continue;
          const float* from = scales.data() + token[r] * groups + group;
          for (int64_t c = 0; c < columns; ++c) part[c][r] = from[c];
        }
        for (int64_t c = 0; c < columns; ++c) {
          float* to = &scale_at(out, first, group + c);
          if (all) {
            store_scales(part[c], int(rows), to, true);
            continue;
          }
          for (int64_t r = 0; r < rows; ++r)
            if (token[r] >= 0) to[r] = part[c][r];
        }
      }
    }
  });
}

}  // namespace torchext
