// What the launcher (launch.cpp) hands to a Hopper GEMM kernel (fp8_gemm_nt.cuh), and the tile that
// the two agree on.
#pragma once

#include "../gemm.h"

namespace torchext::sm90 {

constexpr int kTileM = 128, kTileN = 128, kTileK = 128;
static_assert(kTileK == kGroup, "a K block is what one scale covers and one promotion sums");
static_assert(kTileN == kGroup, "1D2D: one scale of b serves a tile for a K block");

constexpr int kConsumerWarpgroups = 2;
constexpr int kConsumerRows = kTileM / kConsumerWarpgroups;  // 64: wgmma's M
constexpr int kThreads = 128 * (1 + kConsumerWarpgroups);

constexpr int kSwizzleBytes = 128;  // a row of a tile in shared memory, and of a store's box

struct GemmParams {
  // Boxes: a {128 of K, 128 rows}, b likewise; scales {128 rows, 1 group}; out {128 bytes, 64
  // rows}.
  TensorMap a, b, a_scale, b_scale,
      out_map;                // scales: only where the granularity loads them by TMA
  const float* a_scale_data;  // row-wise
  const float* b_scale_data;  // row-wise and 1D2D
  int64_t a_scale_row, b_scale_row, b_scale_group;
  const void* bias;
  void* out;
  int64_t out_stride;
  uint32_t m, n, k_blocks;
  ScalarType out_dtype, bias_dtype;
  bool accumulate;
  bool store_by_tma;  // out's rows are 16-byte aligned and not read back
};

struct GemmKernel {
  void (*function)(GemmParams);
  const char* name;
  uint32_t shared_bytes;
};

// The kernels of one granularity, by operand formats; each in the .cu file of that name.
GemmKernel fp8_gemm_nt_1d2d(bool a_e5m2, bool b_e5m2);
GemmKernel fp8_gemm_nt_1d1d(bool a_e5m2, bool b_e5m2);
GemmKernel fp8_gemm_nt_rowwise(bool a_e5m2, bool b_e5m2);

}  // namespace torchext::sm90
