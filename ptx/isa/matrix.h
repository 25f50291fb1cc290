// 8x8 matrices of 16-bit elements between registers and shared memory (PTX ISA "ldmatrix"; PTX 6.5,
// sm_75; "stmatrix"; PTX 7.8, sm_90). Lane i of the warp holds elements [i / 4][2 * (i % 4) + {0,
// 1}] of each matrix, which is how wgmma and mma leave their accumulators. All 32 lanes take part.
#pragma once

#include "common.h"

namespace ptx {

// Loads four matrices. Lanes 8j to 8j + 7 give the addresses of the eight 16-byte rows of matrix j,
// which r[j] receives. In bytes, r[j] is the four of row lane / 4 from byte 4 * (lane % 4) on.
TORCHEXT_PTX void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_row)
               : "memory");
}

// Stores four matrices, matrix j from register rj. Lanes 8j to 8j + 7 give the addresses of its
// eight 16-byte rows.
TORCHEXT_PTX void stmatrix_x4(uint32_t shared_row, uint32_t r0, uint32_t r1, uint32_t r2,
                              uint32_t r3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_row),
      "r"(r0), "r"(r1), "r"(r2), "r"(r3)
      : "memory");
}

}  // namespace ptx
