// CPU GEMM: operands dequantised to FP32 a block at a time, ATen's FP32 matrix product on them, and
// one rounding at the end. Rounds less than a GPU does; both keep the bound of docs/numerics.md.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "../runtime/formats.h"
#include "gemm.h"

namespace torchext {
namespace {

constexpr int64_t kScratchElements = 1 << 24;  // of one dequantised operand: 64 MiB

// An operand, whichever of a and b it is.
struct Operand {
  const uint8_t* data;
  int64_t stride;
  const float* table;
  const float* scale;
  int64_t scale_row, scale_group;
  int64_t rows_per_scale;
  int64_t k;

  // Rows [begin, begin + count) into [count, k].
  void dequantize(int64_t begin, int64_t count, float* out) const {
    torch::stable::parallel_for(0, count, 1 + (1 << 15) / k, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const uint8_t* codes = data + (begin + i) * stride;
        const float* scales = scale + (begin + i) / rows_per_scale * scale_row;
        float* values = out + i * k;
        for (int64_t start = 0; start < k; start += kGroup) {
          const float group_scale = scales[start / kGroup * scale_group];
          const int64_t end = std::min(start + kGroup, k);
          for (int64_t j = start; j < end; ++j) values[j] = table[codes[j]] * group_scale;
        }
      }
    });
  }
};

const float* table_of(ScalarType dtype) {
  return (dtype == ScalarType::Float8_e5m2 ? fp8_table<E5M2>() : fp8_table<E4M3>()).data();
}

float read(const void* data, ScalarType dtype, int64_t i) {
  if (dtype == ScalarType::Float) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == ScalarType::BFloat16 ? float_of_bfloat16(bits) : float_of_half(bits);
}

template <class Out, class Encode, class Decode>
void finish_row(const GemmProblem& p, const float* product, const float* bias, int64_t count,
                Out* out, const Encode& encode, const Decode& decode) {
  for (int64_t j = 0; j < count; ++j) {
    float value = product == nullptr ? 0 : product[j];
    if (bias != nullptr) value += bias[j];
    if (p.accumulate) value += decode(out[j]);
    out[j] = encode(value);
  }
}

// Rows of the product [rows, cols] (nullptr: zeros), at (m, n) of the output, plus bias and old
// output.
void finish(const GemmProblem& p, const float* product, const float* bias, int64_t m, int64_t n,
            int64_t rows, int64_t cols) {
  torch::stable::parallel_for(0, rows, 1 + (1 << 15) / cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = product == nullptr ? nullptr : product + i * cols;
      const float* bias_row = bias == nullptr ? nullptr : bias + n;
      const int64_t offset = (m + i) * p.out_stride + n;
      uint16_t* halves = static_cast<uint16_t*>(p.out) + offset;
      if (p.out_dtype == ScalarType::Float) {
        const auto same = [](float value) { return value; };
        finish_row(p, row, bias_row, cols, static_cast<float*>(p.out) + offset, same, same);
      } else if (p.out_dtype == ScalarType::BFloat16) {
        finish_row(p, row, bias_row, cols, halves, bfloat16_of, float_of_bfloat16);
      } else {
        finish_row(p, row, bias_row, cols, halves, half_of, float_of_half);
      }
    }
  });
}

}  // namespace

void fp8_gemm_nt_cpu(const GemmProblem& p, const Tensor& like) {
  std::vector<float> bias(p.bias == nullptr ? 0 : p.n);
  for (size_t j = 0; j < bias.size(); ++j) bias[j] = read(p.bias, p.bias_dtype, int64_t(j));
  const float* bias_data = bias.empty() ? nullptr : bias.data();
  if (p.k == 0) return finish(p, nullptr, bias_data, 0, 0, p.m, p.n);

  const Operand a{static_cast<const uint8_t*>(p.a),
                  p.a_stride,
                  table_of(p.a_dtype),
                  p.a_scale,
                  p.a_scale_row,
                  p.a_scale_group,
                  1,
                  p.k};
  const Operand b{static_cast<const uint8_t*>(p.b),
                  p.b_stride,
                  table_of(p.b_dtype),
                  p.b_scale,
                  p.b_scale_row,
                  p.b_scale_group,
                  p.granularity == Granularity::k1D2D ? kGroup : 1,
                  p.k};
  const int64_t rows_at_once = std::max<int64_t>(kScratchElements / p.k, 1);
  for (int64_t n = 0; n < p.n; n += rows_at_once) {
    const int64_t cols = std::min(rows_at_once, p.n - n);
    const Tensor wide_b_t = empty_strided({p.k, cols}, {1, p.k}, ScalarType::Float, like);
    b.dequantize(n, cols, static_cast<float*>(wide_b_t.data_ptr()));
    for (int64_t m = 0; m < p.m; m += rows_at_once) {
      const int64_t rows = std::min(rows_at_once, p.m - m);
      const Tensor wide_a = empty_strided({rows, p.k}, {p.k, 1}, ScalarType::Float, like);
      const Tensor product = empty_strided({rows, cols}, {cols, 1}, ScalarType::Float, like);
      a.dequantize(m, rows, static_cast<float*>(wide_a.data_ptr()));
      // Past the dispatcher: under autocast it would turn the operands into BF16.
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(product.get(), wide_a.get(), wide_b_t.get()));
      finish(p, static_cast<const float*>(product.data_ptr()), bias_data, m, n, rows, cols);
    }
  }
}

}  // namespace torchext
