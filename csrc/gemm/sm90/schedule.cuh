// Which tile a CTA computes next. Of U units (CTAs, or clusters that work together), unit u takes
// tiles u, u + U, u + 2U, ... Producer and consumers each compute this sequence for themselves.
#pragma once

#include "../../device/strip_walk.cuh"
#include "params.h"
#include "ptx/isa/cluster.h"
#include "ptx/isa/memory.h"

namespace torchext::sm90 {

// A tile of one group's GEMM: rows [m, m_end) of a, at most as many as the tile has, and features
// from n on.
struct Work {
  uint32_t m, m_end, n, group;
  uint32_t k_begin, k_end;   // K blocks
  uint32_t k_first, k_last;  // kAlongK: the group's columns of a and b
};

// This CTA's place: its unit among `units` that share the tiles, and its rank in its cluster.
struct Place {
  uint32_t unit, units, rank, cluster;
  __device__ static Place here() {
    const uint32_t cluster = ptx::cluster_nctarank();
    return {blockIdx.x / cluster, gridDim.x / cluster, ptx::cluster_ctarank(), cluster};
  }
};

// First row and number of rows of M-grouped group g.
__device__ __forceinline__ uint2 group_rows(const GemmParams& p, uint32_t g) {
  const int32_t value = p.group_index[g];
  if (p.grouping == Grouping::kCounts)
    return {g * p.group_rows, uint32_t(min(max(value, 0), int32_t(p.group_rows)))};
  const int32_t first = g == 0 ? 0 : max(p.group_index[g - 1], 0);
  return {uint32_t(first), uint32_t(max(min(value, int32_t(p.m)) - first, 0))};
}

template <class L>
class Schedule {
 public:
  // M-grouped: tile_end[g] = number of tiles of groups 0 to g. All threads call it.
  static __device__ void list_groups(const GemmParams& p, uint32_t* tile_end) {
    const uint32_t n_tiles = ceil_div_u32(p.n, width(p));
    for (uint32_t g = threadIdx.x; g < p.groups; g += blockDim.x)
      tile_end[g] = ceil_div_u32(group_rows(p, g).y, L::kTileM) * n_tiles;
    __syncthreads();
    if (threadIdx.x < 32) {  // each lane sums a run of groups, then adds the earlier runs' sums
      const uint32_t run = ceil_div_u32(p.groups, 32), lane = threadIdx.x;
      const uint32_t first = min(lane * run, p.groups), last = min(first + run, p.groups);
      uint32_t sum = 0;
      for (uint32_t g = first; g < last; ++g) tile_end[g] = sum += tile_end[g];
      uint32_t before = sum;
      for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, before, distance);
        if (lane >= distance) before += other;
      }
      before -= sum;
      for (uint32_t g = first; g < last; ++g) tile_end[g] += before;
    }
  }

  __device__ Schedule(const GemmParams& p, const uint32_t* tile_end)
      : p_(p), tile_end_(tile_end), index_(Place::here().unit) {}

  // Moves on to the unit's next tile; false when there is none. All lanes of a warp call it
  // together. Loop bounds are broadcast so that ptxas knows them to be uniform: if warps might
  // diverge, it serializes wgmmas in flight (C7518).
  __device__ __forceinline__ bool next(Work& work) {
    const bool more = advance(work);
    work.k_begin = __shfl_sync(~0u, work.k_begin, 0);
    work.k_end = __shfl_sync(~0u, work.k_end, 0);
    return __shfl_sync(~0u, more, 0);
  }

 private:
  // Accumulators leave few registers, so everything that can be computed again is.
  __device__ __forceinline__ bool advance(Work& work) {
    const Place place = Place::here();
    const uint32_t n_tiles = ceil_div_u32(p_.n, width(p_));
    const uint32_t tiles = ceil_div_u32(p_.m, L::kTileM) * n_tiles;  // of all rows of a
    const bool splits = !p_.multicast && place.cluster > 1;
    work.group = 0;
    work.m_end = p_.m;
    work.k_begin = splits ? p_.k_blocks * place.rank / place.cluster : 0;
    work.k_end = splits ? p_.k_blocks * (place.rank + 1) / place.cluster : p_.k_blocks;
    switch (p_.grouping) {
      case Grouping::kNone:
        if (index_ >= tiles) return false;
        locate(work, place, index_, p_.m, n_tiles);
        break;
      case Grouping::kRowIds:
        return next_run(work, place, tiles, n_tiles);
      case Grouping::kAlongK: {
        const uint32_t group = index_ / tiles;
        if (group >= p_.groups) return false;
        locate(work, place, index_ % tiles, p_.m, n_tiles);
        work.group = group;
        take_columns(work);
        break;
      }
      default: {
        uint32_t& group = cursor_;
        while (group < p_.groups && index_ >= tile_end_[group]) ++group;
        if (group == p_.groups) return false;
        const uint2 rows = group_rows(p_, group);
        locate(work, place, index_ - (group == 0 ? 0 : tile_end_[group - 1]), rows.y, n_tiles);
        work.m += rows.x;
        work.m_end = rows.x + rows.y;
        work.group = group;
      }
    }
    index_ += place.units;
    return true;
  }

  // How many features a unit covers at a time.
  static __device__ uint32_t width(const GemmParams& p) {
    return p.multicast ? 2 * L::kTileN : L::kTileN;
  }

  // Finds the position of tile `index` of a matrix of `rows` rows, along the strip walk.
  __device__ void locate(Work& work, const Place& place, uint32_t index, uint32_t rows,
                         uint32_t n_tiles) const {
    const TilePosition tile = strip_walk(index, ceil_div_u32(rows, L::kTileM), n_tiles);
    work.m = tile.row * L::kTileM;
    work.n = tile.column * width(p_) + (p_.multicast ? place.rank * L::kTileN : 0);
  }

  __device__ void take_columns(Work& work) const {
    const int32_t end = p_.k_blocks * kTileK;
    const int32_t first = work.group == 0 ? 0 : min(max(p_.group_index[work.group - 1], 0), end);
    const int32_t last = max(min(p_.group_index[work.group], end), first);
    work.k_first = first;
    work.k_last = last;
    work.k_begin = first / kTileK;
    work.k_end = last > first ? ceil_div_u32(last, kTileK) : work.k_begin;
  }

  // kRowIds: tiles begin at multiples of the tile's height. Within a tile, each run of rows of one
  // group is computed as a tile of its own, which begins with the run's first row.
  __device__ bool next_run(Work& work, const Place& place, uint32_t tiles, uint32_t n_tiles) {
    for (; index_ < tiles; index_ += place.units, cursor_ = 0) {
      locate(work, place, index_, p_.m, n_tiles);
      const uint32_t end = min(work.m + L::kTileM, p_.m);
      while (work.m + cursor_ < end) {
        const uint32_t first = work.m + cursor_;
        const int32_t id = p_.group_index[first];
        const uint32_t last = run_end(id, first, end);
        cursor_ = last - work.m;
        if (id < 0 || id >= int32_t(p_.groups)) continue;
        work.m = first;
        work.m_end = last;
        work.group = id;
        return true;
      }
    }
    return false;
  }

  __device__ uint32_t run_end(int32_t id, uint32_t first, uint32_t end) const {
    for (uint32_t row = first; row < end; row += 32) {
      const uint32_t mine = row + threadIdx.x % 32;
      const uint32_t other = __ballot_sync(~0u, mine >= end || p_.group_index[mine] != id);
      if (other != 0) return row + __ffs(other) - 1;
    }
    return end;
  }

  const GemmParams& p_;
  const uint32_t* tile_end_;
  uint32_t index_;
  uint32_t cursor_ = 0;  // of listed groups: the group; kRowIds: rows of this tile already computed
};

}  // namespace torchext::sm90
