// What the launcher (launch.cpp) and the kernels for GPUs other than Hopper agree on. The kernels
// of fp8_gemm_nt.cuh (instances in ../sm80 and ../sm89) and of fp8_linear.cuh (../sm80 and, for
// Hopper itself, ../sm90) use tensor cores; the plain kernel does not (../sm75). All of them take the
// whole GemmProblem.
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
  uint32_t b_scale_shift;  // column c of out uses row c >> b_scale_shift of b_scale
  bool aligned_rows;       // rows of out start at multiples of four elements
};

struct GemmKernel {
  void (*function)(KernelParams);
  const char* name;
  int tile_m, threads;
  uint32_t shared_bytes;  // dynamic
  uint32_t gate_bytes;    // dynamic, in addition, for SwiGLU
};

// Tiles of 128 or 32 rows. A large tile would be mostly empty if a has few rows.
enum class TileSize { large, small };

// Each of these functions is defined in the .cu file with its name. 1d2d: all columns of a tile
// share one scale of b; 1d1d: each column has its own scale of b; rowwise: promotion uses no
// scales.
using SelectKernel = GemmKernel(TileSize size, bool a_e5m2, bool b_e5m2);
SelectKernel mma89_fp8_gemm_nt_1d2d, mma89_fp8_gemm_nt_1d1d, mma89_fp8_gemm_nt_rowwise;
SelectKernel mma80_fp8_gemm_nt_1d2d, mma80_fp8_gemm_nt_1d1d, mma80_fp8_gemm_nt_rowwise;
GemmKernel plain_fp8_gemm_nt();  // any granularity, formats and size

// Weights-only products (fp8_linear.cuh), for every granularity.
using SelectLinear = GemmKernel(TileSize size, ScalarType a_dtype, bool b_e5m2);
SelectLinear mma80_fp8_linear, sm90_fp8_linear;

}  // namespace torchext::mma
