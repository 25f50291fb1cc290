// Matrix multiply by a warp, from and to registers (PTX ISA "Warp Level Matrix Multiply-Accumulate
// Instructions: mma"): D[16, 8] += A[16, K] * B[8, K].T with FP32 accumulators. All 32 lanes take
// part.
//
// What lane l holds, for h, i, s in {0, 1}:
//   d[2 * h + i]   row l / 4 + 8 * h, column 2 * (l % 4) + i
//   a[h + 2 * s]   row l / 4 + 8 * h, the four bytes of K from 16 * s + 4 * (l % 4) on
//   b[s]           row l / 4, the same four bytes of K
#pragma once

#include "common.h"
#include "formats.h"

namespace ptx {

// FP8, K = 32 (PTX 8.4, sm_89).
#define TORCHEXT_MMA_M16N8K32(A, B)                                                        \
  TORCHEXT_PTX void mma_m16n8k32(A, B, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, \
                                 uint32_t b1) {                                            \
    asm("mma.sync.aligned.m16n8k32.row.col.f32." #A "." #B                                 \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                   \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                   \
  }
TORCHEXT_MMA_M16N8K32(e4m3, e4m3)
TORCHEXT_MMA_M16N8K32(e4m3, e5m2)
TORCHEXT_MMA_M16N8K32(e5m2, e4m3)
TORCHEXT_MMA_M16N8K32(e5m2, e5m2)
#undef TORCHEXT_MMA_M16N8K32

// f16 and bf16, K = 16 (PTX 7.0, sm_80).
#define TORCHEXT_MMA_M16N8K16(FORMAT)                                                           \
  TORCHEXT_PTX void mma_m16n8k16_##FORMAT(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, \
                                          uint32_t a3, uint32_t b0, uint32_t b1) {              \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." #FORMAT "." #FORMAT                            \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                  \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                        \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                \
  }
TORCHEXT_MMA_M16N8K16(f16)
TORCHEXT_MMA_M16N8K16(bf16)
#undef TORCHEXT_MMA_M16N8K16

}  // namespace ptx
