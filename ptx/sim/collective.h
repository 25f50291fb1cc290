// Meeting the lanes that a warp-wide instruction needs.
#pragma once

#include <cstdint>

#include "ir.h"

namespace torchext::sim {

class Warp;
class Cta;
class Cluster;
class Decoder;
struct NamedBarrier;

// True if the lanes of `mask` include every live member; if not, tries to merge with groups that
// wait at the same instruction, and the caller blocks.
bool gather(Warp& warp, std::uint32_t members, std::uint32_t mask);

Step warp_barrier(Warp& warp, const Instruction& i, std::uint32_t mask);  // bar.warp.sync

// barriers.cpp; also when threads exit.
void complete_barrier_if_full(Cta& cta, NamedBarrier& barrier);
void complete_cluster_barrier_if_full(Cluster& cluster);
void decode_cluster_barrier(Decoder& d);

}  // namespace torchext::sim
