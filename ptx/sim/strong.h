// Strong accesses (relaxed, acquire, release, volatile, atomic) as synchronisation: a release, or a
// fence before a relaxed write, publishes what the lane knows at that address; an acquire, or a
// fence after a relaxed read, takes it in.
#pragma once

#include "machine.h"

namespace torchext::sim {

void strong_read(Warp& warp, int lane, const Place& place, std::uint64_t address, bool acquire);
void strong_write(Warp& warp, int lane, const Place& place, std::uint64_t address, bool release);

}  // namespace torchext::sim
