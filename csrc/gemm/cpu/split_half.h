// An FP16 row as two rows of BF16, for levels that multiply BF16.
#pragma once

#include <cmath>
#include <cstdint>

#include "../../runtime/formats.h"

namespace torchext::cpu_gemm {

// The sum of the two rows is x exactly: FP16 has 11 significant bits, BF16 8. `part` is 0 for x
// rounded to BF16, and 1 for the rest.
struct SplitHalf {
  static void run(const uint16_t* x, int64_t count, int part, uint16_t* out) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = Half::to_float(x[i]);
      const uint16_t rounded = BFloat16::from_float(value);
      const float rest = value - BFloat16::to_float(rounded);
      const bool is_finite = (x[i] & 0x7c00) != 0x7c00;
      out[i] = part == 0 ? rounded : is_finite ? BFloat16::from_float(rest) : uint16_t(0);
    }
  }
};

// Adds the totals of the two rows that each of `rows` rows was split into. An infinite weight makes
// the second NaN if the rest of an x is 0; then the first is infinite, and is the result.
inline void join_split(float* total, int64_t stride, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = total + 2 * i * stride;
    float* to = total + i * stride;
    for (int64_t j = 0; j < stride; ++j)
      to[j] = std::isfinite(from[j]) ? from[j] + from[stride + j] : from[j];
  }
}

}  // namespace torchext::cpu_gemm
