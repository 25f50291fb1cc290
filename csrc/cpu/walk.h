// How CPU kernels walk through a matrix: parts of it on torch's threads, tiles of at most 128 x 128 in
// an order that suits caches and the TLB, and when stores bypass the cache.
#pragma once

#include <algorithm>

#include "../runtime/cpu.h"
#include "kernels.h"

namespace torchext::cpu {

constexpr int64_t kGrain = 1 << 15;         // elements that are worth a thread
constexpr int64_t kStreamBytes = 16 << 20;  // outputs of this size do not stay in a cache
constexpr int64_t kLine = 64;               // bytes of a cache line

// Calls body(begin, end) on torch's threads for parts of [0, count), each of at least kGrain elements
// if one of `count` is `elements`, in the default floating-point environment.
template <class Body>
void in_parallel(int64_t count, int64_t elements, const Kernels& kernels, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(elements, 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const DefaultFloatingPoint environment;
    body(begin, end);
    kernels.fence();
  });
}

// Whether to bypass the cache when writing rows `stride` bytes apart, in parts of 128 elements.
inline bool should_stream(const void* data, int64_t stride, int64_t rows) {
  return rows * stride >= kStreamBytes && stride % kLine == 0 &&
         reinterpret_cast<uintptr_t>(data) % kLine == 0;
}

// Where a tile lies in its matrix. A tile without rows is none.
struct TilePosition {
  int64_t row = 0, col = 0;
  int rows = 0, cols = 0;
};

// The tiles of a matrix: `tile_rows` x 128, less at the edges. They are visited row by row, or row by
// row within some columns, for outputs that lie the other way. Both the input and such an output then
// stay within pages that the TLB holds.
class TileOrder {
 public:
  TileOrder(int64_t rows, int64_t cols, int tile_rows, bool output_is_transposed)
      : rows_(rows),
        cols_(cols),
        tile_rows_(tile_rows),
        down_(ceil_div(rows, tile_rows)),
        across_(ceil_div(cols, kTile)),
        width_(output_is_transposed ? kWidth : across_) {}

  int64_t count() const { return down_ * across_; }
  int64_t down() const { return down_; }
  int64_t across() const { return across_; }
  int tile_rows() const { return tile_rows_; }

  TilePosition operator[](int64_t i) const {
    const int64_t left = i / (down_ * width_) * width_, rest = i - left * down_;
    const int64_t width = std::min(width_, across_ - left);
    return at(rest / width, left + rest % width);
  }

  // The tile in row i and column j of tiles.
  TilePosition at(int64_t i, int64_t j) const {
    const int64_t row = i * tile_rows_, col = j * kTile;
    return {row, col, int(std::min<int64_t>(tile_rows_, rows_ - row)),
            int(std::min<int64_t>(kTile, cols_ - col))};
  }

 private:
  static constexpr int64_t kWidth = 8;
  int64_t rows_, cols_;
  int tile_rows_;
  int64_t down_, across_, width_;
};

// How many tiles lie between the tile that a thread computes and the tile that it fetches.
constexpr int64_t kTilesAhead = 2;

// Calls body(scratch, position, next) for all tiles, shared among threads. `next` is a tile that the
// same thread visits soon, or none. Each thread has a Scratch, which is not initialized.
template <class Scratch, class Body>
void for_each_tile(const TileOrder& order, const Kernels& kernels, const Body& body) {
  in_parallel(order.count(), order.tile_rows() * kTile, kernels, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i)
      body(scratch, order[i], i + kTilesAhead < end ? order[i + kTilesAhead] : TilePosition());
  });
}

// The same, but a thread visits whole rows of tiles. It calls prepare(scratch, row, rows) before each.
template <class Scratch, class Prepare, class Body>
void for_each_row_of_tiles(const TileOrder& order, const Kernels& kernels, const Prepare& prepare,
                           const Body& body) {
  const int64_t across = order.across();
  in_parallel(order.down(), across * order.tile_rows() * kTile, kernels,
              [&](int64_t begin, int64_t end) {
                Scratch scratch;
                for (int64_t i = begin; i < end; ++i) {
                  const TilePosition first = order.at(i, 0);
                  prepare(scratch, first.row, first.rows);
                  for (int64_t j = 0; j < across; ++j)
                    body(scratch, order.at(i, j),
                         j + kTilesAhead < across ? order.at(i, j + kTilesAhead) : TilePosition());
                }
              });
}

}  // namespace torchext::cpu
