// Instructions at which lanes, warps or CTAs meet, for the scheduler and for exiting threads.
#pragma once

#include <cstdint>

#include "../frontend/ir.h"

namespace torchext::sim {

class Warp;
class Cta;
class Cluster;
class Decoder;
struct NamedBarrier;

// collectives.cpp
void decode_warp_barrier(Decoder& d);  // bar.warp.sync

// barriers.cpp
void decode_cluster_barrier(Decoder& d);
// Threads that count as arrived, and those that complete the barrier.
struct Attendance {
  std::uint32_t arrived, expected;
};
Attendance attendance(const Cta& cta, const NamedBarrier& barrier);
Attendance cluster_attendance(const Cluster& cluster);
void complete_barrier_if_full(Cta& cta, NamedBarrier& barrier);
void complete_cluster_barrier_if_full(Cluster& cluster);

}  // namespace torchext::sim
