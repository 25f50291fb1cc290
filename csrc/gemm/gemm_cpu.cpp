// CPU GEMM: blocks of the operands are dequantised to FP32 and multiplied by ATen's FP32 product;
// bias and old output are added in FP32, and the sum is rounded once.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "../runtime/cpu.h"
#include "../runtime/formats.h"
#include "gemm.h"

namespace torchext {
namespace {

constexpr ScalarType kE5M2 = ScalarType::Float8_e5m2;

// So many rows of a and of b are dequantised at a time, and so much of K: at most 16 MiB of each,
// which malloc keeps for the next block. Where b is most of the work, its block stays in cache.
constexpr int64_t kMostRows = 2048, kMostK = 2048;
constexpr int64_t kFewRows = 64, kMostRowsForFew = 256;

// a or b: rows of FP8 with a scale for every 128 columns of row_group rows.
struct Operand {
  const uint8_t* data;
  int64_t stride;
  bool e5m2;
  const float* scale;
  int64_t scale_row, scale_group;
  int64_t row_group;
};

// Rows [row, ...) and columns [col, col + cols) of an operand as FP32, rows `cols` apart.
template <class In>
struct Dequantize {
  static void run(const Operand& x, int64_t row, int64_t col, int64_t cols, float* out,
                  int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* data = x.data + (row + i) * x.stride + col;
      const float* scales = x.scale + (row + i) / x.row_group * x.scale_row;
      for (int64_t j = 0; j < cols; j += kGroup) {
        const uint8_t* __restrict from = data + j;
        float* __restrict to = out + i * cols + j;
        const float scale = scales[(col + j) / kGroup * x.scale_group];
        const int count = int(std::min(kGroup, cols - j));
        for (int l = 0; l < count; ++l) to[l] = In::to_float(from[l]) * scale;
      }
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

void dequantize(const Operand& x, int64_t row, int64_t rows, int64_t col, int64_t cols,
                float* out) {
  with_fp8_format(x.e5m2, [&](auto in) {
    run_parallel<Dequantize<decltype(in)>>(rows, grain(cols), x, row, col, cols, out);
  });
}

// Rows of the product, finished: `out` = product + bias (+ out).
template <class Out>
struct Finish {
  static void run(const GemmProblem& p, const float* product, const float* bias, int64_t row,
                  int64_t col, int64_t cols, int64_t begin, int64_t end) {
    using Bits = typename Out::Bits;
    for (int64_t i = begin; i < end; ++i) {
      const float* __restrict from = product + i * cols;
      Bits* __restrict to = static_cast<Bits*>(p.out) + (row + i) * p.out_stride + col;
      if (p.accumulate) {
        for (int64_t j = 0; j < cols; ++j)
          to[j] = Out::from_float(from[j] + bias[j] + Out::to_float(to[j]));
      } else {
        for (int64_t j = 0; j < cols; ++j) to[j] = Out::from_float(from[j] + bias[j]);
      }
    }
  }
};

// out = a @ b (+ out), past the dispatcher: under autocast it would turn the operands into BF16.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(),
                                                  accumulate ? 1.0 : 0.0, 1.0));
}

// Whether ATen's FP32 product is one. torch.set_float32_matmul_precision lets it round operands to
// BF16 or TF32 on processors with AMX; LibTorch's stable ABI cannot ask, so try.
bool products_are_fp32(const Tensor& like) {
  constexpr int64_t kSize = 32;  // large enough not to be spared
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

// The same with FP64 in between.
void multiply_fp64(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  const Tensor wide = torch::stable::to(out, ScalarType::Double);
  multiply(wide, torch::stable::to(a, ScalarType::Double), torch::stable::to(b, ScalarType::Double),
           accumulate);
  Tensor narrow = out;
  torch::stable::copy_(narrow, wide);
}

std::vector<float> bias_of(const GemmProblem& p) {
  std::vector<float> bias(p.n, -0.0f);  // the zero that changes no sum
  if (p.bias == nullptr) return bias;
  with_wide_format(p.bias_dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* from = static_cast<const typename Format::Bits*>(p.bias);
    std::transform(from, from + p.n, bias.begin(), Format::to_float);
  });
  return bias;
}

}  // namespace

void fp8_gemm_nt_cpu(const GemmProblem& p, const Tensor& like) {
  const Operand a{static_cast<const uint8_t*>(p.a),
                  p.a_stride,
                  p.a_dtype == kE5M2,
                  p.a_scale,
                  p.a_scale_row,
                  p.a_scale_group,
                  1};
  const Operand b{static_cast<const uint8_t*>(p.b),
                  p.b_stride,
                  p.b_dtype == kE5M2,
                  p.b_scale,
                  p.b_scale_row,
                  p.b_scale_group,
                  p.granularity == Granularity::k1D2D ? kGroup : 1};
  const std::vector<float> bias = bias_of(p);
  const bool fp32 = products_are_fp32(like);
  const auto scratch = [&](int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
    return empty_strided({rows, cols}, {row_stride, col_stride}, ScalarType::Float, like);
  };
  const int64_t most_cols = p.m > kFewRows ? kMostRows : kMostRowsForFew;
  for (int64_t n = 0; n < p.n; n += most_cols) {
    const int64_t cols = std::min(most_cols, p.n - n);
    for (int64_t m = 0; m < p.m; m += kMostRows) {
      const int64_t rows = std::min(kMostRows, p.m - m);
      const Tensor product = scratch(rows, cols, cols, 1);
      if (p.k == 0) std::fill_n(floats(product), rows * cols, 0.0f);
      for (int64_t k = 0; k < p.k; k += kMostK) {
        const int64_t depth = std::min(kMostK, p.k - k);
        const Tensor wide_a = scratch(rows, depth, depth, 1);
        const Tensor wide_b_t = scratch(depth, cols, 1, depth);
        dequantize(a, m, rows, k, depth, floats(wide_a));
        dequantize(b, n, cols, k, depth, floats(wide_b_t));
        (fp32 ? multiply : multiply_fp64)(product, wide_a, wide_b_t, k > 0);
      }
      with_wide_format(p.out_dtype, [&](auto out) {
        run_parallel<Finish<decltype(out)>>(rows, grain(cols), p, floats(product), &bias[n], m, n,
                                            cols);
      });
    }
  }
}

}  // namespace torchext
