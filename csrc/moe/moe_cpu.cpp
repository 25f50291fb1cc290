// Routes, permutes and combines on a CPU; chunks.h says how the work is shared out.

// No product is fused with an addition (moe.h).
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <vector>

#include "chunks.h"

namespace torchext {
namespace {

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
                   quantize_chunk(task, from, int(cols), codes, scales);
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
