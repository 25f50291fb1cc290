// Which tile of the output a CTA computes next, for dense and grouped GEMMs on one persistent grid.
// Groups are read on the device. Every thread of the CTA computes the sequence for itself.
#pragma once

#include "../../device/strip_walk.cuh"
#include "kernels.h"

namespace torchext::mma {

struct Tile {
  uint32_t group;           // selects b; along K: selects out
  uint32_t row, rows_end;   // first row of a; where its rows end
  uint32_t column;          // of out
  uint32_t k_begin, k_end;  // of a and b
};

// Whether `row` belongs to the tile: it is before rows_end and belongs to the tile's group.
__device__ __forceinline__ bool holds(const GemmProblem& p, const Tile& tile, uint32_t row) {
  return row < tile.rows_end &&
         (p.grouping != Grouping::kRowIds || uint32_t(p.group_index[row]) == tile.group);
}

// Walks tiles blockIdx.x, blockIdx.x + gridDim.x, ... Tiles are numbered group after group, and
// within a group along its strip walk. With kRowIds, a tile is computed once for each group among
// its rows.
template <int kTileM>
class Schedule {
 public:
  __device__ Schedule(const GemmProblem& p, uint32_t width)
      : p_(p), n_tiles_(ceil_div_u32(width, kTileN)) {}

  __device__ bool next(Tile& tile) {
    const bool by_row = p_.grouping == Grouping::kRowIds;
    if (by_row && index_ != blockIdx.x && next_id(tile, tile.group + 1)) return true;
    while (locate(tile)) {
      index_ += gridDim.x;
      if (!by_row || next_id(tile, 0)) return true;
    }
    return false;
  }

 private:
  // Rows of group range_.
  __device__ void read_range(uint32_t& begin, uint32_t& end) const {
    begin = 0;
    end = uint32_t(p_.m);
    if (p_.grouping == Grouping::kOffsets) {
      begin = range_ == 0 ? 0 : clamped(p_.group_index[range_ - 1], 0, uint32_t(p_.m));
      end = clamped(p_.group_index[range_], begin, uint32_t(p_.m));
    } else if (p_.grouping == Grouping::kCounts) {
      begin = range_ * uint32_t(p_.group_rows);
      end = begin + clamped(p_.group_index[range_], 0, uint32_t(p_.group_rows));
    }
  }

  __device__ uint32_t ranges() const {
    return p_.grouping == Grouping::kNone || p_.grouping == Grouping::kRowIds ? 1
                                                                              : uint32_t(p_.groups);
  }

  __device__ static uint32_t clamped(int32_t x, uint32_t least, uint32_t most) {
    return min(max(uint32_t(max(x, 0)), least), most);
  }

  // Finds the tile of number index_; false if there is none.
  __device__ bool locate(Tile& tile) {
    for (; range_ < ranges(); ++range_) {
      uint32_t begin, end;
      read_range(begin, end);
      const uint32_t m_tiles = ceil_div_u32(end - begin, kTileM);
      if (index_ - first_ >= m_tiles * n_tiles_) {
        first_ += m_tiles * n_tiles_;
        continue;
      }
      const TilePosition position = strip_walk(index_ - first_, m_tiles, n_tiles_);
      tile.group = range_;
      tile.row = begin + position.row * kTileM;
      tile.rows_end = min(end, tile.row + kTileM);
      tile.column = position.column * kTileN;
      tile.k_begin = 0;
      tile.k_end = uint32_t(p_.k);
      if (p_.grouping == Grouping::kAlongK) {
        tile.k_begin = range_ == 0 ? 0 : clamped(p_.group_index[range_ - 1], 0, uint32_t(p_.k));
        tile.k_end = clamped(p_.group_index[range_], tile.k_begin, uint32_t(p_.k));
      }
      return true;
    }
    return false;
  }

  // Sets tile.group to the smallest id among the tile's rows that is at least `least`, in every
  // lane; false if there is none.
  __device__ bool next_id(Tile& tile, uint32_t least) {
    uint32_t found = ~0u;
    for (uint32_t row = tile.row + threadIdx.x % 32; row < tile.rows_end; row += 32) {
      const int32_t id = p_.group_index[row];
      if (id >= 0 && uint32_t(id) >= least && id < p_.groups) found = min(found, uint32_t(id));
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2)
      found = min(found, __shfl_xor_sync(~0u, found, distance));
    tile.group = found;
    return found != ~0u;
  }

  const GemmProblem& p_;
  uint32_t n_tiles_;
  uint32_t index_ = blockIdx.x;  // of the next tile
  uint32_t first_ = 0;           // index of the first tile of range_
  uint32_t range_ = 0;
};

}  // namespace torchext::mma
