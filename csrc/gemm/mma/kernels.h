// What the launcher (launch.cpp) and the kernels for GPUs other than Hopper agree on:
// fp8_gemm_nt.cuh on tensor cores (../sm80, ../sm89) and the plain one (../sm75). All take a
// GemmProblem as it is.
#pragma once

#include "../gemm.h"

namespace torchext::mma {

constexpr int kTileN = 128, kTileK = 128;
static_assert(kTileK == kGroup, "a K block is what one scale covers and one promotion sums");
static_assert(kTileN == kGroup, "a tile's columns share a scale of b, and one of quantized output");

struct KernelParams {
  GemmProblem problem;
  uint32_t width;          // columns of out: n, or what an activation leaves of them
  uint32_t b_scale_shift;  // b's scale of column c is that of row c >> b_scale_shift
  bool aligned_rows;       // rows of out start at multiples of four elements
};

struct GemmKernel {
  void (*function)(KernelParams);
  const char* name;
  int tile_m, threads;
  uint32_t shared_bytes;  // dynamic
  uint32_t gate_bytes;    // more, for SwiGLU
};

// Rows of a tile: `small` for few rows of a, where a large tile would be mostly empty.
enum class TileSize { large, small };

// By the formats of the operands; each in the .cu file of that name. Row-wise ones promote without
// scales; 1D2D takes one scale of b for all columns of a tile, 1D1D any.
using SelectKernel = GemmKernel(TileSize size, bool a_e5m2, bool b_e5m2);
SelectKernel mma89_fp8_gemm_nt_1d2d, mma89_fp8_gemm_nt_1d1d, mma89_fp8_gemm_nt_rowwise;
SelectKernel mma80_fp8_gemm_nt_1d2d, mma80_fp8_gemm_nt_1d1d, mma80_fp8_gemm_nt_rowwise;
GemmKernel plain_fp8_gemm_nt();  // any granularity, formats and size

}  // namespace torchext::mma
