// The BF16 values of FP8 codes.
#pragma once

#include "../../runtime/formats.h"

namespace torchext::cpu_gemm {

// Indexed by a code without its sign: low and high bytes, and whole words.
template <class Number>
struct BF16Table {
  alignas(64) uint8_t low[128], high[128];
  alignas(64) uint16_t word[128];

  BF16Table() {
    for (int code = 0; code < 128; ++code) {
      word[code] = BFloat16::from_float(Number::to_float(uint8_t(code)));
      low[code] = uint8_t(word[code]);
      high[code] = uint8_t(word[code] >> 8);
    }
  }
};
template <class Number>
inline const BF16Table<Number> kBF16Table;

}  // namespace torchext::cpu_gemm
