// Strong accesses (relaxed, acquire, release, volatile, atomic) as synchronisation: a release, or a
// fence before a relaxed write, publishes what the lane knows at that address; an acquire, or a
// fence after a relaxed read, takes it in; both as far as their scopes reach (scopes.h).
#pragma once

#include "machine.h"

namespace torchext::sim {

void strong_read(Warp& warp, int lane, const Place& place, std::uint64_t address, Scope scope,
                 bool acquire);
void strong_write(Warp& warp, int lane, const Place& place, std::uint64_t address, Scope scope,
                  bool release);

}  // namespace torchext::sim
