// The order in which persistent CTAs take the tiles of a matrix: strips of kStripRows tile rows,
// and column by column within a strip, so that CTAs that run side by side share rows of a and of b
// in L2.
#pragma once

#include <cstdint>

namespace torchext {

constexpr uint32_t kStripRows = 8;

__device__ __forceinline__ uint32_t ceil_div_u32(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}

struct TilePosition {
  uint32_t row, column;  // in tiles
};

// The position of tile `index` in a matrix of m_tiles x n_tiles; index < m_tiles * n_tiles.
__device__ __forceinline__ TilePosition strip_walk(uint32_t index, uint32_t m_tiles,
                                                   uint32_t n_tiles) {
  const uint32_t strip = index / (kStripRows * n_tiles);
  const uint32_t within = index % (kStripRows * n_tiles);
  const uint32_t height = min(kStripRows, m_tiles - strip * kStripRows);
  return {strip * kStripRows + within % height, within / height};
}

}  // namespace torchext
