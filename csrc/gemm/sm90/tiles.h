// The tiles that the Hopper GEMM is compiled for: a line each, and nothing else to add.
//
// wgmma multiplies 64 `rows` by up to 192 `columns` at a time. As a rule a tile's rows are rows of
// a (tokens) and its columns rows of b (features); `swapped` tiles have it the other way round, so
// that few tokens fill a narrow tile and the features fill wgmma's 64 rows. Swapped tiles can also
// split K over the CTAs of a cluster. Names are tokens x features.
#pragma once

#include <cstdint>

#include "../../runtime/tensor.h"

namespace torchext::sm90 {

struct TileShape {
  const char* name;
  uint32_t rows, columns, stages;
  bool swapped;
  bool gated = false;  // SwiGLU: half of the columns are the gate's, half are up's
  constexpr uint32_t m() const { return swapped ? columns : rows; }
  constexpr uint32_t n() const { return swapped ? rows : gated ? columns / 2 : columns; }
};

// APPLY(name, rows, columns, stages of the pipeline, swapped, ...)
#define TORCHEXT_SM90_PLAIN_TILES(APPLY, ...)     \
  APPLY(64x128, 64, 128, 7, false, __VA_ARGS__)   \
  APPLY(64x256, 64, 256, 4, false, __VA_ARGS__)   \
  APPLY(128x64, 128, 64, 7, false, __VA_ARGS__)   \
  APPLY(128x128, 128, 128, 5, false, __VA_ARGS__) \
  APPLY(128x192, 128, 192, 4, false, __VA_ARGS__) \
  APPLY(128x256, 128, 256, 3, false, __VA_ARGS__) \
  APPLY(256x128, 256, 128, 3, false, __VA_ARGS__)

#define TORCHEXT_SM90_SWAPPED_TILES(APPLY, ...)      \
  APPLY(swap_16x64, 64, 16, 16, true, __VA_ARGS__)   \
  APPLY(swap_32x64, 64, 32, 14, true, __VA_ARGS__)   \
  APPLY(swap_64x64, 64, 64, 10, true, __VA_ARGS__)   \
  APPLY(swap_16x128, 128, 16, 10, true, __VA_ARGS__) \
  APPLY(swap_32x128, 128, 32, 8, true, __VA_ARGS__)  \
  APPLY(swap_64x128, 128, 64, 6, true, __VA_ARGS__)  \
  APPLY(swap_128x128, 128, 128, 4, true, __VA_ARGS__)

#define TORCHEXT_SM90_TILES(APPLY, ...)         \
  TORCHEXT_SM90_PLAIN_TILES(APPLY, __VA_ARGS__) \
  TORCHEXT_SM90_SWAPPED_TILES(APPLY, __VA_ARGS__)

// With an activation and 1x128 quantization: a tile's columns are one group of the output (two
// operands of it, gated).
#define TORCHEXT_SM90_GATED_TILES(APPLY, ...)   \
  APPLY(64x128, 64, 256, 4, false, __VA_ARGS__) \
  APPLY(128x128, 128, 256, 3, false, __VA_ARGS__)
#define TORCHEXT_SM90_ACTIVATED_TILES(APPLY, ...) \
  APPLY(64x128, 64, 128, 7, false, __VA_ARGS__)   \
  APPLY(128x128, 128, 128, 5, false, __VA_ARGS__)

// Fewer, for pairs of formats with e5m2: each tile is a kernel for each pair and granularity.
#define TORCHEXT_SM90_E5M2_TILES(APPLY, ...)      \
  APPLY(128x128, 128, 128, 5, false, __VA_ARGS__) \
  APPLY(256x128, 256, 128, 3, false, __VA_ARGS__) \
  APPLY(swap_32x128, 128, 32, 8, true, __VA_ARGS__)

}  // namespace torchext::sm90
