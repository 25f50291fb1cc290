// What the launcher (launch.cpp) hands to a Hopper GEMM kernel (fp8_gemm_nt.cuh), and what it knows
// of each.
#pragma once

#include "../../device/sm90/boxes.h"
#include "../gemm.h"
#include "tiles.h"

namespace torchext::sm90 {

constexpr int kTileK = 128;
static_assert(kTileK == kGroup, "a K block is what one scale covers and one promotion sums");

constexpr uint32_t kMaxGroups =
    1024;  // of M-grouped products: the schedule lists them in shared memory
constexpr uint32_t kMaxSplits = 8;  // of K: CTAs of a portable cluster

struct GemmParams {
  // As wgmma sees them: `rows` fill its 64 rows, `columns` its N. Boxes: {128 of K, the tile's rows
  // (half of them where two CTAs share them)}, {128 of K, its columns}; scales {rows or columns, 1
  // group}, where the granularity has them per row of K; out {128 bytes, 64 rows, 1 group}.
  TensorMap rows, columns, row_scale, column_scale, out_map;
  const float* a_scale;  // row-wise
  const float* b_scale;  // row-wise and 1D2D
  int64_t a_scale_row, b_scale_row, b_scale_group, b_scale_batch;
  const void* bias;
  void* out;
  int64_t out_stride, out_group_stride;
  const int32_t* group_index;
  float* out_scale;  // Activation: of the FP8 output
  int64_t out_scale_group;
  uint32_t m, n, k_blocks, groups,
      group_rows;  // n: of the output; SwiGLU's b has twice as many rows
  Grouping grouping;
  Activation activation;
  ScalarType out_dtype, bias_dtype;
  bool accumulate;
  bool out_aligned;  // rows of out start at multiples of 16 bytes
  bool multicast;    // the two CTAs of a cluster share `rows`; otherwise a cluster splits K
  bool pow2_scale;
};

struct GemmKernel {
  void (*function)(GemmParams);
  const char* name;
  uint32_t threads, shared_bytes;
  TileShape tile;
};

struct KernelTable {
  const GemmKernel* kernels;
  size_t count;
  const GemmKernel* begin() const { return kernels; }
  const GemmKernel* end() const { return kernels + count; }
};

// The kernels of each .cu file here.
KernelTable table_1d2d_e4m3_e4m3();
KernelTable table_1d2d_e4m3_e4m3_swapped();
KernelTable table_1d2d_e4m3_e5m2();
KernelTable table_1d2d_e5m2_e4m3();
KernelTable table_1d2d_e5m2_e5m2();
KernelTable table_1d2d_e4m3_e4m3_gated();
KernelTable table_1d2d_e4m3_e4m3_activated();
KernelTable table_1d2d_e4m3_e5m2_gated();
KernelTable table_1d2d_e4m3_e5m2_activated();
KernelTable table_1d2d_e5m2_e4m3_gated();
KernelTable table_1d2d_e5m2_e4m3_activated();
KernelTable table_1d2d_e5m2_e5m2_gated();
KernelTable table_1d2d_e5m2_e5m2_activated();
KernelTable table_1d1d_e4m3_e4m3();
KernelTable table_1d1d_e4m3_e4m3_swapped();
KernelTable table_1d1d_e4m3_e5m2();
KernelTable table_1d1d_e5m2_e4m3();
KernelTable table_1d1d_e5m2_e5m2();
KernelTable table_1d1d_e4m3_e4m3_gated();
KernelTable table_1d1d_e4m3_e4m3_activated();
KernelTable table_1d1d_e4m3_e5m2_gated();
KernelTable table_1d1d_e4m3_e5m2_activated();
KernelTable table_1d1d_e5m2_e4m3_gated();
KernelTable table_1d1d_e5m2_e4m3_activated();
KernelTable table_1d1d_e5m2_e5m2_gated();
KernelTable table_1d1d_e5m2_e5m2_activated();
KernelTable table_rowwise_e4m3_e4m3();
KernelTable table_rowwise_e4m3_e4m3_swapped();
KernelTable table_rowwise_e4m3_e5m2();
KernelTable table_rowwise_e5m2_e4m3();
KernelTable table_rowwise_e5m2_e5m2();
KernelTable table_rowwise_e4m3_e4m3_gated();
KernelTable table_rowwise_e4m3_e4m3_activated();
KernelTable table_rowwise_e4m3_e5m2_gated();
KernelTable table_rowwise_e4m3_e5m2_activated();
KernelTable table_rowwise_e5m2_e4m3_gated();
KernelTable table_rowwise_e5m2_e4m3_activated();
KernelTable table_rowwise_e5m2_e5m2_gated();
KernelTable table_rowwise_e5m2_e5m2_activated();

}  // namespace torchext::sm90
