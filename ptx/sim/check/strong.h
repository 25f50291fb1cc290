// Strong accesses (relaxed, acquire, release, volatile, atomic) as synchronization: a release, or a
// fence before a relaxed write, publishes what the lane knows at that address; an acquire, or a
// fence after a relaxed read, takes it in; both as far as their scopes reach (scopes.h).
#pragma once

#include <mutex>

#include "../machine/machine.h"

namespace torchext::sim {

// Held for the whole of a strong access to global memory, so that its value, its record in the
// shadow and the knowledge that goes with it change in one step, whichever host threads run the
// CTAs. Empty for shared memory: a cluster has one host thread.
std::unique_lock<std::mutex> strong_step(Warp& warp, const Place& place, std::uint64_t address);

void strong_read(Warp& warp, int lane, const Place& place, std::uint64_t address, Scope scope,
                 bool acquire);
void strong_write(Warp& warp, int lane, const Place& place, std::uint64_t address, Scope scope,
                  bool release);

}  // namespace torchext::sim
