// What every launcher of a persistent GEMM checks and counts: the SMs it may use, and the tiles of
// the output.
#pragma once

#include <algorithm>

#include "../runtime/check.h"
#include "gemm.h"

namespace torchext {

// How many SMs the GEMM may use.
inline int64_t sms_for(const GemmProblem& p, int sm_count) {
  TORCHEXT_CHECK_VALUE(p.num_sms <= sm_count, p.op, ": num_sms must be at most ", sm_count,
                       ", the SMs of this GPU (got ", p.num_sms, ")");
  return p.num_sms > 0 ? p.num_sms : sm_count;
}

// The largest number of tiles of tile_m x tile_n that the output can have. If only the device knows
// the groups, the host knows no more than that.
inline int64_t most_tiles(const GemmProblem& p, int64_t tile_m, int64_t tile_n) {
  int64_t m_tiles = ceil_div(p.m, tile_m);
  if (p.grouping == Grouping::kOffsets) m_tiles = std::min(m_tiles + p.groups, p.m);
  if (p.grouping == Grouping::kCounts) m_tiles = p.groups * ceil_div(p.group_rows, tile_m);
  if (p.grouping == Grouping::kAlongK) m_tiles *= p.groups;
  return m_tiles * ceil_div(out_columns(p), tile_n);
}

// Kernels count tiles in 32 bits, and step past the last one.
inline void check_tile_count(const GemmProblem& p, int64_t tiles, int64_t tile_m, int64_t tile_n) {
  TORCHEXT_CHECK_VALUE(tiles < (int64_t(1) << 31), p.op, ": the output has ", tiles, " tiles of ",
                       tile_m, "x", tile_n, ", more than 2^31; split the product");
}

}  // namespace torchext
