// Arithmetic on packed 16-bit floating-point numbers (PTX ISA "Half Precision Floating Point
// Instructions"). Subnormal operands and results are kept.
#pragma once

#include "common.h"

namespace ptx {

// a * b + c on both halves, each rounded once to nearest even (PTX 7.0, sm_80). NaN becomes the
// canonical NaN 0x7fff.
TORCHEXT_PTX uint32_t fma_rn_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

}  // namespace ptx
