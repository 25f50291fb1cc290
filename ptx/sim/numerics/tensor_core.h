// Tensor-core arithmetic, bit for bit: D = A * B + C as wgmma and mma.sync compute it.
//
// One step takes `block_k` products and the addend c. Every product is exact and carries the
// exponent ea + eb (not normalized: 1.5 * 1.5 has exponent 0; subnormal inputs, and a subnormal c,
// keep the smallest normal exponent of their format). Products and c are aligned to the largest
// exponent among the non-zero terms (`zero_exponent` for a zero c), each is truncated toward zero to
// `fraction_bits` bits below it, and their sum is exact. The sum is rounded to `result`; the next
// step takes it as c. A zero result is +0, a NaN is 0x7fffffff (0x7fff in f16).
//
// Sources: Xie et al., "MMA-Sim", arXiv 2511.10909; Khattak and Mikaitis, "Accurate Models of
// NVIDIA Tensor Cores", arXiv 2512.07004; for sm_90 an H200 (docs/numerics.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "number_formats.h"

namespace torchext::sim {

enum class MmaResult {
  f32,    // truncated toward zero to 23 fraction bits
  e8m13,  // f32 with 13 fraction bits, truncated toward zero: FP8 inputs with an f32 accumulator
  f16,    // rounded to nearest even
};

struct MmaModel {
  int block_k;        // products added in one step
  int fraction_bits;  // kept below the largest exponent
  int zero_exponent;  // the exponent of a zero addend: a floor for the alignment
  MmaResult result;
  // sm_90 has no FP8 mma.sync unit. Its SASS widens to f16 (which normalizes subnormals of e4m3:
  // decode_operand's `widened`), chains two steps from zero (the first
  // takes the k with k % 4 < 2, the second the others: the low and high half of every register)
  // and adds c last, rounding to nearest even.
  bool fp8_widened_to_f16 = false;
  int least_addend_exponent = -126;  // of a non-zero c
};

// `inputs` is e4m3, e5m2, f16, bf16 or tf32; `accumulator` is f32 or f16.
// `target` is the number in PTX's .target. They throw std::invalid_argument, with the reason, for a
// combination that the hardware lacks or whose rounding is not known.
MmaModel wgmma_model(NumberFormat inputs, NumberFormat accumulator);
MmaModel mma_sync_model(int target, NumberFormat inputs, NumberFormat accumulator);

// A decoded operand: `count` rows of A (or columns of B) of length k, stored [k][count].
struct MmaOperand {
  NumberFormat format = NumberFormat::e4m3;
  int count = 0;
  int k = 0;
  std::vector<float> value;            // exact; for tf32 the 13 low bits are dropped
  std::vector<std::int16_t> exponent;  // of the leading bit position; kZeroExponent for zeros
  bool has_nonfinite = false;

  static constexpr std::int16_t kZeroExponent = -4096;
};

// Element (i, kk) lies at data + i * stride + kk * k_stride, strides in bytes; `negate` is wgmma's
// imm-scale = -1; `widened` is fp8_widened_to_f16 of the model. Reuses the operand's storage. Any
// alignment.
void decode_operand(MmaOperand& operand, NumberFormat format, const void* data, int count, int k,
                    std::ptrdiff_t stride, std::ptrdiff_t k_stride, bool negate = false,
                    bool widened = false);

// accumulator[m * row_stride + n] <- sum over k of a(m, k) * b(n, k) + accumulator[...]: C in, D
// out, as f32 values (with an f16 accumulator, f32 values that are f16 values). a.k == b.k; a k
// that is not a multiple of model.block_k ends with a shorter step. Zero the accumulator for
// scale-d = 0.
void multiply_accumulate(const MmaModel& model, const MmaOperand& a, const MmaOperand& b,
                         float* accumulator, std::ptrdiff_t row_stride);

// The same for one element, written to be read. It is the definition against which the fast path is
// tested, and it computes results with NaN and infinity.
float multiply_accumulate_element(const MmaModel& model, const MmaOperand& a, int m,
                                  const MmaOperand& b, int n, float c);

}  // namespace torchext::sim
