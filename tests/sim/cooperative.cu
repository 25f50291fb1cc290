// Cooperative groups as nvcc writes them, for test_cooperative.py: grid.sync(), tiles of several
// warps, reduce and scan over tiles and the grid's own numbers.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>

namespace cg = cooperative_groups;

// Each CTA adds up the numbers that all CTAs wrote in the previous round.
extern "C" __global__ void rounds(int* data, int* out, int count) {
  const cg::grid_group grid = cg::this_grid();
  const int me = blockIdx.x, ctas = gridDim.x;
  for (int round = 0; round < count; ++round) {
    int sum = 1;
    if (threadIdx.x == 0) {
      for (int other = 0; other < ctas; ++other) sum += data[(round & 1) * ctas + other];
    }
    grid.sync();
    if (threadIdx.x == 0) data[(~round & 1) * ctas + me] = sum;
    grid.sync();
  }
  if (threadIdx.x == 0) out[me] = data[(count & 1) * ctas + me];
}

extern "C" __global__ void valid(int* out) {
  const cg::grid_group grid = cg::this_grid();
  out[grid.thread_rank()] = grid.is_valid() ? static_cast<int>(grid.size()) : -1;
}

// Tiles of two warps: each thread gets the sum over its tile.
extern "C" __global__ void tiles(const int* in, int* out) {
  const auto block = cg::this_thread_block();
  const auto tile = cg::tiled_partition<64>(block);
  const int t = threadIdx.x;
  const int sum = cg::reduce(tile, in[t], cg::plus<int>());
  tile.sync();
  out[t] = sum * 1000 + tile.meta_group_rank() * 100 + tile.thread_rank();
}
