// Tensor maps that lie in memory the kernel can write. They are read through the tensormap proxy:
// who uses a map that was written in this launch needs a release fence behind the write,
// synchronization, and an acquire fence of the map's address (PTX ISA, "fence.proxy.tensormap").
#pragma once

#include <cstdint>

#include "../machine/machine.h"

namespace torchext::sim {

// fence.proxy.tensormap::generic.acquire of the map at this generic address.
void acquire_tensor_map(Warp& w, int lane, std::uint64_t address, Scope scope);

// Whether a tensor map can lie at this generic address; reports it if not.
bool resolve_tensor_map(Warp& w, int lane, std::uint64_t address, Place* place);

// A parameter or a constant cannot change; other maps are checked.
inline bool is_checked_map(const Place& place) {
  return place.shadow != nullptr;
}

// Checks lane's use of a map, and records it as an access of `agent` at `clock`.
void read_tensor_map(Warp& w, int lane, const Place& place, std::uint64_t address,
                     std::uint32_t agent, std::uint32_t clock);

}  // namespace torchext::sim
