// Levels that multiply pairs of BF16 share this: the BF16 values of FP8 codes.
#pragma once

#include "../../runtime/formats.h"
#include "kernel.h"

namespace torchext::cpu_gemm {

// Indexed by a code without its sign: low and high bytes, and whole words.
struct BF16Table {
  alignas(64) uint8_t low[128], high[128];
  alignas(64) uint16_t word[128];

  template <class Number>
  explicit BF16Table(Number) {
    for (int code = 0; code < 128; ++code) {
      word[code] = BFloat16::from_float(Number::to_float(uint8_t(code)));
      low[code] = uint8_t(word[code]);
      high[code] = uint8_t(word[code] >> 8);
    }
  }
};
template <class Number>
inline const BF16Table kBF16Table{Number()};

inline const BF16Table& table_of(Format fp8) {
  return fp8 == Format::e5m2 ? kBF16Table<E5M2> : kBF16Table<E4M3>;
}

}  // namespace torchext::cpu_gemm
