// The place of a thread among the consumers, and which elements its accumulators hold: the map of
// wgmma's D fragment (ptx/isa/wgmma.h). Contract: consumers are whole warpgroups of 128 threads.
#pragma once

#include <cstdint>

namespace torchext::sm90 {

// Register i of an accumulator of 64 rows is row `row() + row_of(i)`, column
// `column() + column_of(i)` of its block.
struct ThreadCoord {
  uint32_t warpgroup, warp, lane;  // among the consumers; in the warpgroup; in the warp

  __device__ uint32_t row() const { return warp * 16 + lane / 4; }
  __device__ uint32_t column() const { return lane % 4 * 2; }
  __device__ uint32_t thread() const { return warp * 32 + lane; }  // in the warpgroup

  static __device__ constexpr uint32_t row_of(int i) { return i / 2 % 2 * 8; }
  static __device__ constexpr uint32_t column_of(int i) { return i / 4 * 8 + i % 2; }
};

// Named barriers: 0 is __syncthreads, 1 and 2 are for one consumer warpgroup each, 3 is for both.
__device__ __forceinline__ uint32_t warpgroup_barrier(const ThreadCoord& at) {
  return 1 + at.warpgroup;
}
constexpr uint32_t kConsumersBarrier = 3;

}  // namespace torchext::sm90
