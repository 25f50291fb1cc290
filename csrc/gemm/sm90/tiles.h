// The tiles that the Hopper GEMM is compiled for. A new tile needs one line here and nothing else.
//
// wgmma multiplies 64 `rows` by up to 192 `columns` at a time. As a rule a tile's rows are rows of
// a (tokens) and its columns are rows of b (features). In a `swapped` tile rows come from b and
// columns from a, so that few tokens fill a narrow tile and the features fill wgmma's 64 rows.
// Swapped tiles can also split K over the CTAs of a cluster. Names are tokens x features.
#pragma once

#include <cstdint>

#include "../../runtime/tensor.h"

namespace torchext::sm90 {

struct TileShape {
  const char* name;
  uint32_t rows, columns, stages;
  bool swapped;
  bool gated = false;  // SwiGLU: half of the columns are of the gate, half of up
  constexpr uint32_t m() const { return swapped ? columns : rows; }
  constexpr uint32_t n() const { return swapped ? rows : gated ? columns / 2 : columns; }
};

// clang-format off: tables
// Tiles: APPLY(name, rows, columns, stages of the pipeline, swapped, ...)
#define TORCHEXT_SM90_UNSWAPPED_TILES(APPLY, ...) \
  APPLY( 64x128,  64, 128, 7, false, __VA_ARGS__) \
  APPLY( 64x256,  64, 256, 4, false, __VA_ARGS__) \
  APPLY(128x64,  128,  64, 7, false, __VA_ARGS__) \
  APPLY(128x128, 128, 128, 5, false, __VA_ARGS__) \
  APPLY(128x192, 128, 192, 4, false, __VA_ARGS__) \
  APPLY(128x256, 128, 256, 3, false, __VA_ARGS__) \
  APPLY(256x128, 256, 128, 3, false, __VA_ARGS__)

#define TORCHEXT_SM90_SWAPPED_TILES(APPLY, ...)        \
  APPLY(swap_16x64,    64,  16, 16, true, __VA_ARGS__) \
  APPLY(swap_32x64,    64,  32, 14, true, __VA_ARGS__) \
  APPLY(swap_64x64,    64,  64, 10, true, __VA_ARGS__) \
  APPLY(swap_16x128,  128,  16, 10, true, __VA_ARGS__) \
  APPLY(swap_32x128,  128,  32,  8, true, __VA_ARGS__) \
  APPLY(swap_64x128,  128,  64,  6, true, __VA_ARGS__) \
  APPLY(swap_128x128, 128, 128,  4, true, __VA_ARGS__)

// There are fewer tiles for operands in e5m2, since each tile is one kernel for each pair of
// formats and granularity.
#define TORCHEXT_SM90_E5M2_TILES(APPLY, ...)           \
  APPLY(128x128,     128, 128, 5, false, __VA_ARGS__)  \
  APPLY(256x128,     256, 128, 3, false, __VA_ARGS__)  \
  APPLY(swap_32x128, 128,  32, 8, true,  __VA_ARGS__)

// Tiles with an activation and 1x128 quantization: the tile's columns are one scale group of the
// output, or, gated, one scale group of the gate and one of up.
#define TORCHEXT_SM90_ACTIVATED_TILES(APPLY, ...) \
  APPLY( 64x128,  64, 128, 7, false, __VA_ARGS__) \
  APPLY(128x128, 128, 128, 5, false, __VA_ARGS__)
#define TORCHEXT_SM90_GATED_TILES(APPLY, ...)     \
  APPLY( 64x128,  64, 256, 4, false, __VA_ARGS__) \
  APPLY(128x128, 128, 256, 3, false, __VA_ARGS__)

// The kernels of a .cu file (TORCHEXT_SM90_FILES in params.h): tiles x pairs of formats. After a
// tile's own fields come: prefix of the kernels' names, granularity, format of a, of b, output.
#define TORCHEXT_SM90_stored(APPLY, G, GRANULARITY)                                             \
  TORCHEXT_SM90_UNSWAPPED_TILES(                                                                \
      APPLY, sm90_fp8_gemm_nt_##G##_e4m3_e4m3, GRANULARITY, e4m3, e4m3, kStored)

#define TORCHEXT_SM90_swapped(APPLY, G, GRANULARITY)                                            \
  TORCHEXT_SM90_SWAPPED_TILES(                                                                  \
      APPLY, sm90_fp8_gemm_nt_##G##_e4m3_e4m3, GRANULARITY, e4m3, e4m3, kStored)

#define TORCHEXT_SM90_E5M2_PAIR(APPLY, G, GRANULARITY, A, B)                                    \
  TORCHEXT_SM90_E5M2_TILES(                                                                     \
      APPLY, sm90_fp8_gemm_nt_##G##_##A##_##B, GRANULARITY, A, B, kStored)
#define TORCHEXT_SM90_e5m2(APPLY, G, GRANULARITY)                                               \
  TORCHEXT_SM90_E5M2_PAIR(APPLY, G, GRANULARITY, e4m3, e5m2)                                    \
  TORCHEXT_SM90_E5M2_PAIR(APPLY, G, GRANULARITY, e5m2, e4m3)                                    \
  TORCHEXT_SM90_E5M2_PAIR(APPLY, G, GRANULARITY, e5m2, e5m2)

#define TORCHEXT_SM90_ACTIVATED_PAIR(APPLY, G, GRANULARITY, A, B)                               \
  TORCHEXT_SM90_GATED_TILES(                                                                    \
      APPLY, sm90_fp8_gemm_nt_swiglu_quantize_##G##_##A##_##B, GRANULARITY, A, B, kGated)       \
  TORCHEXT_SM90_ACTIVATED_TILES(                                                                \
      APPLY, sm90_fp8_gemm_nt_activate_quantize_##G##_##A##_##B, GRANULARITY, A, B, kActivated)
#define TORCHEXT_SM90_activated(APPLY, G, GRANULARITY)                                          \
  TORCHEXT_SM90_ACTIVATED_PAIR(APPLY, G, GRANULARITY, e4m3, e4m3)                               \
  TORCHEXT_SM90_ACTIVATED_PAIR(APPLY, G, GRANULARITY, e4m3, e5m2)                               \
  TORCHEXT_SM90_ACTIVATED_PAIR(APPLY, G, GRANULARITY, e5m2, e4m3)                               \
  TORCHEXT_SM90_ACTIVATED_PAIR(APPLY, G, GRANULARITY, e5m2, e5m2)
// clang-format on

}  // namespace torchext::sm90
