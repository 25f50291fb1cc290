// Routes, permutes and combines on a CPU. Tokens are shared among threads; a token's elements stay
// in the L1 cache while all of its rows are written or added.

// No product is fused with an addition (moe.h).
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include "../cpu/quantize_tiles.h"
#include "moe.h"

namespace torchext {
namespace {

using namespace cpu;

constexpr int64_t kChunk = 1024;  // columns of a token that are handled at once

// Columns [col, col + cols) of row `row`: in place if they are contiguous, else gathered.
const uint8_t* contiguous(const MatrixView& x, int64_t row, int64_t col, int64_t cols,
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

// Writes a part of a row; past the cache if `stream`, for which `to` starts a cache line.
void write_row(const uint8_t* from, int64_t bytes, uint8_t* to, bool stream) {
  const int64_t whole = stream ? bytes / kTile : 0;
  if (whole) kernels().copy8(from, int(whole), kTile, to, kTile, true);
  std::memcpy(to + whole * kTile, from + whole * kTile, size_t(bytes - whole * kTile));
}

// The token that has each row; -1 for rows that no choice has.
std::vector<int32_t> tokens_of_rows(const ChoicesView& choices) {
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
void write_scales(const std::vector<float>& scales, int64_t groups, const ChoicesView& choices,
                  const QuantizedView& out) {
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

// to[i] = from[i] * weight.
struct Scale {
  template <class Format>
  static void run(Format, const uint8_t* from, int64_t count, float weight, uint8_t* to) {
    const auto* x = reinterpret_cast<const typename Format::Bits*>(from);
    auto* y = reinterpret_cast<typename Format::Bits*>(to);
    for (int64_t i = 0; i < count; ++i) y[i] = Format::from_float(Format::to_float(x[i]) * weight);
  }
};

// sums[i] += from[0][i] * weights[0], then from[1][i] * weights[1], ...: each product is rounded. All
// rows in one pass, so that sums stay in registers.
constexpr int kRowsAtOnce = 8;
struct AddRowsTimesWeights {
  template <class Format>
  static void run(Format format, const uint8_t* const* from, const float* weights, int rows,
                  int64_t count, float* sums) {
    static_assert(kRowsAtOnce == 8);
    for (; rows >= 8; rows -= 8, from += 8, weights += weights ? 8 : 0)
      add<8>(format, from, weights, count, sums);
    if (rows & 4) {
      add<4>(format, from, weights, count, sums);
      from += 4, weights += weights ? 4 : 0;
    }
    if (rows & 2) {
      add<2>(format, from, weights, count, sums);
      from += 2, weights += weights ? 2 : 0;
    }
    if (rows & 1) add<1>(format, from, weights, count, sums);
  }

  template <int kRows, class Format>
  static void add(Format, const uint8_t* const* from, const float* weights, int64_t count,
                  float* __restrict sums) {
    using Bits = typename Format::Bits;
    const Bits* x[kRows];
    float w[kRows];
    for (int r = 0; r < kRows; ++r) {
      x[r] = reinterpret_cast<const Bits*>(from[r]);
      w[r] = weights ? weights[r] : 1.0f;
    }
    if (weights == nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        float sum = sums[i];
        for (int r = 0; r < kRows; ++r) sum += Format::to_float(x[r][i]);
        sums[i] = sum;
      }
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      float sum = sums[i];
      for (int r = 0; r < kRows; ++r) {
        const float product = Format::to_float(x[r][i]) * w[r];
        sum += product;
      }
      sums[i] = sum;
    }
  }
};

struct Round {
  template <class Format>
  static void run(Format, const float* from, int64_t count, uint8_t* to) {
    auto* y = reinterpret_cast<typename Format::Bits*>(to);
    for (int64_t i = 0; i < count; ++i) y[i] = Format::from_float(from[i]);
  }
};

}  // namespace

void route_cpu(const RouteView& view) {
  const auto expert_of = [&](int64_t token, int64_t choice) {
    const int64_t at = token * view.token_stride + choice * view.choice_stride;
    const int64_t id = view.wide ? static_cast<const int64_t*>(view.ids)[at]
                                 : static_cast<const int32_t*>(view.ids)[at];
    return id >= 0 && id < view.experts ? id : view.experts;
  };
  std::vector<int32_t> next(size_t(view.experts) + 1);  // first the counts, then the next row
  for (int64_t token = 0; token < view.tokens; ++token)
    for (int64_t choice = 0; choice < view.choices; ++choice)
      ++next[size_t(expert_of(token, choice))];
  int32_t row = 0;
  for (size_t expert = 0; expert < next.size(); ++expert) {
    const int32_t count = next[expert];
    next[expert] = row;
    row += count;
    if (expert < size_t(view.experts)) view.offsets[expert] = row;
  }
  for (int64_t token = 0; token < view.tokens; ++token)
    for (int64_t choice = 0; choice < view.choices; ++choice)
      view.slots[token * view.choices + choice] = next[size_t(expert_of(token, choice))]++;
}

void permute_quantize_cpu(const MatrixView& x, const ChoicesView& choices,
                          const QuantizeOptions& options, const QuantizedView& out) {
  const QuantizeTask task(x.dtype, options);
  const bool stream = should_stream(out.data, out.data_stride, choices.rows);
  const int64_t groups = ceil_div(x.cols, kTile);
  std::vector<float> scales_of_tokens(size_t(x.rows * groups));
  for_each_chunk(x.rows, x.cols, choices.choices,
                 [&](int64_t token, int64_t col, int64_t cols, uint8_t* gathered) {
                   const uint8_t* from = contiguous(x, token, col, cols, gathered);
                   alignas(kLine) uint8_t codes[kChunk];
                   float* scales = scales_of_tokens.data() + token * groups + col / kTile;
                   const int whole = int(cols / kTile), rest = int(cols % kTile);
                   task.quantize.groups(from, kTile, whole, kTile, task.dropped_mantissa, codes,
                                        kTile, scales, 1, Ahead(), false);
                   if (rest)
                     task.quantize.groups(from + whole * kTile * task.element_size, kTile, 1, rest,
                                          task.dropped_mantissa, codes + whole * kTile, kTile,
                                          scales + whole, 1, Ahead(), false);
                   for (int64_t choice = 0; choice < choices.choices; ++choice) {
                     const int64_t row = choices.slots(token, choice);
                     if (row >= 0) write_row(codes, cols, data_at(out, row, col), stream);
                   }
                 });
  write_scales(scales_of_tokens, groups, choices, out);
}

void permute_cpu(const MatrixView& x, const ChoicesView& choices, void* y) {
  const int64_t size = element_size(x.dtype);
  const bool stream = should_stream(y, x.cols * size, choices.rows);
  for_each_chunk(x.rows, x.cols, choices.choices,
                 [&](int64_t token, int64_t col, int64_t cols, uint8_t* gathered) {
                   const uint8_t* from = contiguous(x, token, col, cols, gathered);
                   alignas(kLine) uint8_t weighted[kChunk * sizeof(float)];
                   for (int64_t choice = 0; choice < choices.choices; ++choice) {
                     const int64_t row = choices.slots(token, choice);
                     if (row < 0) continue;
                     uint8_t* to = static_cast<uint8_t*>(y) + (row * x.cols + col) * size;
                     if (choices.weights.data == nullptr) {
                       write_row(from, cols * size, to, stream);
                       continue;
                     }
                     const float weight = choices.weights(token, choice);
                     with_wide_format(x.dtype, [&](auto format) {
                       run_vectorized<Scale>(format, from, cols, weight,
                                             stream ? static_cast<uint8_t*>(weighted) : to);
                     });
                     if (stream) write_row(weighted, cols * size, to, true);
                   }
                 });
}

void combine_cpu(const CombineView& view) {
  const ChoicesView& choices = view.choices;
  const int64_t out_size = element_size(view.out_dtype);
  for_each_chunk(
      choices.tokens, view.y.cols, choices.choices,
      [&](int64_t token, int64_t col, int64_t cols, uint8_t* gathered) {
        alignas(kLine) float sums[kChunk] = {};
        const uint8_t* rows[kRowsAtOnce];
        float weights[kRowsAtOnce];
        int count = 0;  // of `rows`
        const auto add = [&](const float* factors) {
          with_wide_format(view.y.dtype, [&](auto format) {
            run_vectorized<AddRowsTimesWeights>(format, static_cast<const uint8_t* const*>(rows),
                                                factors, count, cols, static_cast<float*>(sums));
          });
          count = 0;
        };
        // Columns that are not contiguous are gathered into memory for one row.
        const int at_once = view.y.col_stride == 1 ? kRowsAtOnce : 1;
        const bool weighted = choices.weights.data != nullptr;
        for (int64_t choice = 0; choice < choices.choices; ++choice) {
          const int64_t row = choices.slots(token, choice);
          if (row < 0) continue;
          rows[count] = contiguous(view.y, row, col, cols, gathered);
          weights[count++] = weighted ? choices.weights(token, choice) : 1.0f;
          if (count == at_once) add(weighted ? weights : nullptr);
        }
        if (count) add(weighted ? weights : nullptr);
        if (view.residual.data != nullptr) {
          rows[count++] = contiguous(view.residual, token, col, cols, gathered);
          add(nullptr);
        }
        uint8_t* to = static_cast<uint8_t*>(view.out) + (token * view.y.cols + col) * out_size;
        with_wide_format(view.out_dtype, [&](auto format) {
          run_vectorized<Round>(format, static_cast<const float*>(sums), cols, to);
        });
      });
}

}  // namespace torchext
