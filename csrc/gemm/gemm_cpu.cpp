// CPU GEMM: dequantizes blocks of the operands to FP32 and multiplies them by ATen's FP32 matmul.
// Bias and old output are added in FP32. The sum is rounded once, or goes through an activation and
// is quantized (activation_cpu.cpp). Each group is a GEMM of some rows or some columns of a.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "../runtime/check.h"
#include "../runtime/cpu.h"
#include "../runtime/formats.h"
#include "activation_cpu.h"

namespace torchext {
namespace {

constexpr ScalarType kE5M2 = ScalarType::Float8_e5m2;

// How many rows of a and of b, and how much of K, are dequantized at a time: at most 16 MiB of each
// operand, which malloc keeps for the next block. If a has few rows, b is most of the work, and its
// smaller block stays in cache.
constexpr int64_t kMostRows = 2048, kMostK = 2048;
constexpr int64_t kFewRows = 64, kMostRowsForFew = 256;

// a or b: rows of FP8, with one scale for every 128 columns of row_group rows. Or rows of a wide
// dtype, which have no scale.
struct Operand {
  const uint8_t* data;
  int64_t stride;  // elements
  ScalarType dtype;
  const float* scale;
  int64_t scale_row, scale_group;
  int64_t row_group;
};

Operand operand_a(const GemmProblem& p) {
  return {static_cast<const uint8_t*>(p.a),
          p.a_stride,
          p.a_dtype,
          p.a_scale,
          p.a_scale_row,
          p.a_scale_k_block,
          1};
}

// The matrix of b that a group is multiplied by.
Operand operand_b(const GemmProblem& p, int64_t group) {
  return {static_cast<const uint8_t*>(p.b) + group * p.n * p.b_stride,
          p.b_stride,
          p.b_dtype,
          p.b_scale + group * p.b_scale_group,
          p.b_scale_row,
          p.b_scale_k_block,
          p.granularity == Granularity::k1D2D ? kScaleGroup : 1};
}

// `count` rows of an operand or of the output, from `first` on; with a list, the rows that its
// elements from `first` on name.
struct Rows {
  int64_t first, count;
  const int32_t* list = nullptr;
  int64_t operator[](int64_t i) const { return list ? list[first + i] : first + i; }
  Rows part(int64_t begin, int64_t most) const {
    return {first + begin, std::min(most, count - begin), list};
  }
};

// Dequantizes columns [col, col + cols) of rows of an operand to FP32; rows of `out` are `cols`
// apart.
template <class In>
struct Dequantize {
  static void run(const Operand& x, const Rows& rows, int64_t col, int64_t cols, float* out,
                  int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* data = x.data + rows[i] * x.stride + col;
      const float* scales = x.scale + rows[i] / x.row_group * x.scale_row;
      for (int64_t j = 0; j < cols;) {
        const uint8_t* __restrict from = data + j;
        float* __restrict to = out + i * cols + j;
        const float scale = scales[(col + j) / kScaleGroup * x.scale_group];
        const int count = int(std::min(kScaleGroup - (col + j) % kScaleGroup, cols - j));
        for (int l = 0; l < count; ++l) to[l] = In::to_float(from[l]) * scale;
        j += count;
      }
    }
  }
};

// The same for an operand of a wide dtype.
template <class In>
struct Widen {
  static void run(const Operand& x, const Rows& rows, int64_t col, int64_t cols, float* out,
                  int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto* __restrict from =
          reinterpret_cast<const typename In::Bits*>(x.data) + rows[i] * x.stride + col;
      float* __restrict to = out + i * cols;
      for (int64_t j = 0; j < cols; ++j) to[j] = In::to_float(from[j]);
    }
  }
};

// The fewest rows of `cols` elements that are worth a thread.
int64_t grain(int64_t cols) {
  return ceil_div(1 << 15, cols);
}

float* floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.data_ptr());
}

void dequantize(const Operand& x, const Rows& rows, int64_t col, int64_t cols, float* out) {
  if (is_wide(x.dtype))
    return with_wide_format(x.dtype, [&](auto in) {
      run_parallel<Widen<decltype(in)>>(rows.count, grain(cols), x, rows, col, cols, out);
    });
  with_fp8_format(x.dtype == kE5M2, [&](auto in) {
    run_parallel<Dequantize<decltype(in)>>(rows.count, grain(cols), x, rows, col, cols, out);
  });
}

// Finishes rows of the product: out = product + bias (+ out). `first_out` is the output's first
// row.
template <class Out>
struct Finish {
  static void run(const GemmProblem& p, const float* product, const float* bias, void* first_out,
                  const Rows& rows, int64_t col, int64_t cols, int64_t begin, int64_t end) {
    using Bits = typename Out::Bits;
    for (int64_t i = begin; i < end; ++i) {
      const float* __restrict from = product + i * cols;
      Bits* __restrict to = static_cast<Bits*>(first_out) + rows[i] * p.out_stride + col;
      if (p.accumulate) {
        for (int64_t j = 0; j < cols; ++j)
          to[j] = Out::from_float(from[j] + bias[j] + Out::to_float(to[j]));
      } else {
        for (int64_t j = 0; j < cols; ++j) to[j] = Out::from_float(from[j] + bias[j]);
      }
    }
  }
};

// out = a @ b (+ out). Bypasses the dispatcher, which under autocast would round the operands to
// BF16.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(),
                                                  accumulate ? 1.0 : 0.0, 1.0));
}

// Whether ATen's FP32 matmul computes in FP32. torch.set_float32_matmul_precision lets it round
// operands to BF16 or TF32 on processors with AMX. LibTorch's stable ABI cannot ask for this
// setting, so try.
bool products_are_fp32(const Tensor& like) {
  constexpr int64_t kSize = 32;  // large enough for ATen to round
  constexpr float kProbe = 1 + 0x1p-12f;
  const std::vector<int64_t> sizes{kSize, kSize}, strides{kSize, 1};
  const Tensor a = empty_strided(sizes, strides, ScalarType::Float, like);
  const Tensor b = empty_strided(sizes, strides, ScalarType::Float, like);
  const Tensor product = empty_strided(sizes, strides, ScalarType::Float, like);
  std::fill_n(floats(a), kSize * kSize, 0.0f);
  std::fill_n(floats(b), kSize * kSize, 0.0f);
  *floats(a) = kProbe;
  *floats(b) = 1;
  multiply(product, a, b, false);
  return *floats(product) == kProbe;
}

// The same, computed in FP64 and rounded to FP32.
void multiply_fp64(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  const Tensor wide = torch::stable::to(out, ScalarType::Double);
  multiply(wide, torch::stable::to(a, ScalarType::Double), torch::stable::to(b, ScalarType::Double),
           accumulate);
  Tensor narrow = out;
  torch::stable::copy_(narrow, wide);
}

std::vector<float> bias_of(const GemmProblem& p, int64_t group) {
  std::vector<float> bias(p.n, -0.0f);  // adding -0 changes no number
  if (p.bias == nullptr) return bias;
  with_wide_format(p.bias_dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* from = static_cast<const typename Format::Bits*>(p.bias) + group * p.n;
    std::transform(from, from + p.n, bias.begin(), Format::to_float);
  });
  return bias;
}

// A GEMM of some rows of a and one matrix of b, over columns [k, k + depth) of both.
struct Part {
  Rows rows;
  int64_t group;  // selects the matrix of b and the bias
  int64_t k, depth;
  void* out;  // first row of the output, even if `rows` lacks it
};

class Multiplier {
 public:
  Multiplier(const GemmProblem& problem, const Tensor& like)
      : p_(problem), like_(like), fp32_(products_are_fp32(like)) {}

  void run(const Part& part) const {
    const std::vector<float> bias = bias_of(p_, part.group);
    const bool gated = p_.activation == Activation::kSwiGLU;  // then columns come in pairs
    const int64_t width = gated ? p_.n / 2 : p_.n;
    const int64_t most_cols =
        (part.rows.count > kFewRows ? kMostRows : kMostRowsForFew) / (gated ? 2 : 1);
    for (int64_t n = 0; n < width; n += most_cols) {
      const int64_t cols = std::min(most_cols, width - n);
      std::vector<Rows> b_rows{{n, cols}};
      if (gated) b_rows.push_back({width + n, cols});
      for (int64_t m = 0; m < part.rows.count; m += kMostRows) {
        const Rows rows = part.rows.part(m, kMostRows);
        const Tensor product = multiply(part, rows, b_rows);
        if (p_.activation != Activation::kNone) {
          activate_and_quantize_cpu(p_, floats(product), &bias[n], rows.first, rows.count, n, cols);
        } else {
          with_wide_format(p_.out_dtype, [&](auto out) {
            run_parallel<Finish<decltype(out)>>(rows.count, grain(cols), p_, floats(product),
                                                &bias[n], part.out, rows, n, cols);
          });
        }
      }
    }
  }

 private:
  Tensor scratch(int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) const {
    return empty_strided({rows, cols}, {row_stride, col_stride}, ScalarType::Float, like_);
  }

  // The product in FP32; the columns of the elements of b_rows are side by side.
  Tensor multiply(const Part& part, const Rows& a_rows, const std::vector<Rows>& b_rows) const {
    const Operand a = operand_a(p_), b = operand_b(p_, part.group);
    const int64_t cols = b_rows[0].count * int64_t(b_rows.size());
    const Tensor product = scratch(a_rows.count, cols, cols, 1);
    if (part.depth == 0) std::fill_n(floats(product), a_rows.count * cols, 0.0f);
    for (int64_t k = 0; k < part.depth; k += kMostK) {
      const int64_t depth = std::min(kMostK, part.depth - k);
      const Tensor wide_a = scratch(a_rows.count, depth, depth, 1);
      const Tensor wide_b_t = scratch(depth, cols, 1, depth);
      dequantize(a, a_rows, part.k + k, depth, floats(wide_a));
      float* to = floats(wide_b_t);
      for (const Rows& rows : b_rows) {
        dequantize(b, rows, part.k + k, depth, to);
        to += rows.count * depth;
      }
      (fp32_ ? torchext::multiply : multiply_fp64)(product, wide_a, wide_b_t, k > 0);
    }
    return product;
  }

  const GemmProblem& p_;
  const Tensor& like_;
  bool fp32_;
};

// ---- groups ----

// 0 and the offsets. Checks that they ascend to at most `most`, which errors call `name`.
std::vector<int64_t> bounds(const GemmProblem& p, int64_t most, const char* name) {
  std::vector<int64_t> bounds{0};
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t end = p.group_index[g];
    TORCHEXT_CHECK_VALUE(end >= bounds.back() && end <= most, p.op,
                         ": offsets must ascend from 0 or more to at most ", name, " = ", most,
                         " (got ", end, " for group ", g, ", after ", bounds.back(), ")");
    bounds.push_back(end);
  }
  return bounds;
}

// Rows sorted by group: those of group g are list[begin[g]] to list[begin[g + 1] - 1].
struct SortedRows {
  std::vector<int64_t> begin;
  std::vector<int32_t> list;

  explicit SortedRows(const GemmProblem& p) : begin(p.groups + 1, 0), list(p.m) {
    for (int64_t row = 0; row < p.m; ++row) {
      const int64_t group = p.group_index[row];
      TORCHEXT_CHECK_VALUE(group < p.groups, p.op, ": group_ids must be below G = ", p.groups,
                           ", or negative for rows of no group (got ", group, " for row ", row,
                           ")");
      if (group >= 0) ++begin[group + 1];
    }
    for (int64_t g = 0; g < p.groups; ++g) begin[g + 1] += begin[g];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t row = 0; row < p.m; ++row)
      if (p.group_index[row] >= 0) list[next[p.group_index[row]]++] = int32_t(row);
  }
};

void check_counts(const GemmProblem& p) {
  for (int64_t g = 0; g < p.groups; ++g)
    TORCHEXT_CHECK_VALUE(p.group_index[g] >= 0 && p.group_index[g] <= p.group_rows, p.op,
                         ": masked_m must be from 0 to M = ", p.group_rows, " (got ",
                         p.group_index[g], " for group ", g, ")");
}

}  // namespace

void fp8_gemm_cpu(const GemmProblem& p, const Tensor& like) {
  const Multiplier multiplier(p, like);
  const auto run_rows = [&](const Rows& rows, int64_t group) {
    if (rows.count > 0) multiplier.run({rows, group, 0, p.k, p.out});
  };
  switch (p.grouping) {
    case Grouping::kNone:
      return run_rows({0, p.m}, 0);
    case Grouping::kOffsets: {
      const std::vector<int64_t> begin = bounds(p, p.m, "M");
      for (int64_t g = 0; g < p.groups; ++g) run_rows({begin[g], begin[g + 1] - begin[g]}, g);
      return;
    }
    case Grouping::kRowIds: {
      const SortedRows rows(p);
      for (int64_t g = 0; g < p.groups; ++g)
        run_rows({rows.begin[g], rows.begin[g + 1] - rows.begin[g], rows.list.data()}, g);
      return;
    }
    case Grouping::kCounts:
      check_counts(p);
      for (int64_t g = 0; g < p.groups; ++g) run_rows({g * p.group_rows, p.group_index[g]}, g);
      return;
    case Grouping::kAlongK: {
      const std::vector<int64_t> begin = bounds(p, p.k, "K");
      for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t depth = begin[g + 1] - begin[g];
        if (depth == 0 && p.accumulate) continue;
        void* out = static_cast<char*>(p.out) + g * p.out_group_stride * element_size(p.out_dtype);
        multiplier.run({{0, p.m}, 0, begin[g], depth, out});
      }
    }
  }
}

}  // namespace torchext
