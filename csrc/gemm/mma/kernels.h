// What the launcher (launch.cpp) and the kernels for GPUs other than Hopper agree on: those of
// fp8_gemm_nt.cuh, on tensor cores (instances in ../sm80 and ../sm89), and the plain one, without
// (../sm75). All take a GemmProblem as it is.
#pragma once

#include "../gemm.h"

namespace torchext::mma {

constexpr int kTileN = 128, kTileK = 128;
static_assert(kTileK == kScaleGroup, "one scale and one promotion cover a K block");
static_assert(kTileN == kScaleGroup,
              "a tile's columns share a scale of b, and one of quantized output");

struct KernelParams {
  GemmProblem problem;
  uint32_t width;          // columns of out
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

// 128 or 32 rows. A large tile would be mostly empty where a has few rows.
enum class TileSize { large, small };

// Each is defined in the .cu file of its name. 1D2D: one scale of b for all columns of a tile;
// 1D1D: a scale of b for each column; row-wise: promotion without scales.
using SelectKernel = GemmKernel(TileSize size, bool a_e5m2, bool b_e5m2);
SelectKernel mma89_fp8_gemm_nt_1d2d, mma89_fp8_gemm_nt_1d1d, mma89_fp8_gemm_nt_rowwise;
SelectKernel mma80_fp8_gemm_nt_1d2d, mma80_fp8_gemm_nt_1d1d, mma80_fp8_gemm_nt_rowwise;
GemmKernel plain_fp8_gemm_nt();  // any granularity, formats and size

}  // namespace torchext::mma
