// Strong accesses (relaxed, acquire, release, volatile, atomic) as synchronization. A release, or a
// fence before a relaxed write, publishes at the address what the lane knows. An acquire, or a
// fence after a relaxed read, takes it in. Scopes limit both (scopes.h).
#pragma once

#include <mutex>

#include "../machine/machine.h"

namespace torchext::sim {

constexpr std::uint64_t kStrongBytes = 32;  // no aligned access crosses a multiple

// The lock of an address in global memory. All launches share it: a GPU's atomics exclude those of
// every kernel.
std::mutex& strong_lock(std::uint64_t address);

// The lock for a whole strong access to global memory: its value, its shadow record and the
// published knowledge change in one step even if other host threads run other CTAs. The lock is
// empty for shared memory, because a cluster has one host thread.
std::unique_lock<std::mutex> strong_step(const Place& place, std::uint64_t address);

void strong_read(Warp& warp, int lane, const Place& place, std::uint64_t address, Scope scope,
                 bool acquire);
void strong_write(Warp& warp, int lane, const Place& place, std::uint64_t address, Scope scope,
                  bool release);

}  // namespace torchext::sim
