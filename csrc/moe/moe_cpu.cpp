// Routes, permutes and combines on a CPU. Tokens are shared among threads; a token's elements stay
// in the L1 cache while all of its rows are written or added.

// No product is fused with an addition (moe.h).
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

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

// to[i] = from[i] * weight.
struct Scale {
  template <class Format>
  static void run(Format, const uint8_t* from, int64_t count, float weight, uint8_t* to) {
    const auto* x = reinterpret_cast<const typename Format::Bits*>(from);
    auto* y = reinterpret_cast<typename Format::Bits*>(to);
    for (int64_t i = 0; i < count; ++i) y[i] = Format::from_float(Format::to_float(x[i]) * weight);
  }
};

// sums[i] += from[i] * weight.
struct AddScaled {
  template <class Format>
  static void run(Format, const uint8_t* from, int64_t count, float weight, float* sums) {
    const auto* x = reinterpret_cast<const typename Format::Bits*>(from);
    for (int64_t i = 0; i < count; ++i) {
      const float product = Format::to_float(x[i]) * weight;
      sums[i] += product;
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
  for_each_chunk(x.rows, x.cols, choices.choices,
                 [&](int64_t token, int64_t col, int64_t cols, uint8_t* gathered) {
                   const uint8_t* from = contiguous(x, token, col, cols, gathered);
                   alignas(kLine) uint8_t codes[kChunk];
                   float scales[kChunk / kTile];
                   const int whole = int(cols / kTile), rest = int(cols % kTile);
                   task.quantize.groups(from, kTile, whole, kTile, task.dropped_mantissa, codes,
                                        kTile, scales, 1, Ahead(), false);
                   if (rest)
                     task.quantize.groups(from + whole * kTile * task.element_size, kTile, 1, rest,
                                          task.dropped_mantissa, codes + whole * kTile, kTile,
                                          scales + whole, 1, Ahead(), false);
                   for (int64_t choice = 0; choice < choices.choices; ++choice) {
                     const int64_t row = choices.slots(token, choice);
                     if (row < 0) continue;
                     uint8_t* to = data_at(out, row, col);
                     if (stream && rest == 0)
                       task.all.copy8(codes, whole, kTile, to, kTile, true);
                     else
                       std::memcpy(to, codes, size_t(cols));
                     for (int group = 0; group < whole + (rest != 0); ++group)
                       scale_at(out, row, col / kTile + group) = scales[group];
                   }
                 });
}

void permute_cpu(const MatrixView& x, const ChoicesView& choices, void* y) {
  const int64_t size = element_size(x.dtype);
  for_each_chunk(x.rows, x.cols, choices.choices,
                 [&](int64_t token, int64_t col, int64_t cols, uint8_t* gathered) {
                   const uint8_t* from = contiguous(x, token, col, cols, gathered);
                   for (int64_t choice = 0; choice < choices.choices; ++choice) {
                     const int64_t row = choices.slots(token, choice);
                     if (row < 0) continue;
                     uint8_t* to = static_cast<uint8_t*>(y) + (row * x.cols + col) * size;
                     if (choices.weights.data == nullptr) {
                       std::memcpy(to, from, size_t(cols * size));
                       continue;
                     }
                     const float weight = choices.weights(token, choice);
                     with_wide_format(x.dtype, [&](auto format) {
                       run_vectorized<Scale>(format, from, cols, weight, to);
                     });
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
        const auto add = [&](const MatrixView& x, int64_t row, float weight) {
          const uint8_t* from = contiguous(x, row, col, cols, gathered);
          with_wide_format(x.dtype, [&](auto format) {
            run_vectorized<AddScaled>(format, from, cols, weight, static_cast<float*>(sums));
          });
        };
        for (int64_t choice = 0; choice < choices.choices; ++choice) {
          const int64_t row = choices.slots(token, choice);
          if (row >= 0)
            add(view.y, row, choices.weights.data ? choices.weights(token, choice) : 1.0f);
        }
        if (view.residual.data != nullptr) add(view.residual, token, 1.0f);
        uint8_t* to = static_cast<uint8_t*>(view.out) + (token * view.y.cols + col) * out_size;
        with_wide_format(view.out_dtype, [&](auto format) {
          run_vectorized<Round>(format, static_cast<const float*>(sums), cols, to);
        });
      });
}

}  // namespace torchext
