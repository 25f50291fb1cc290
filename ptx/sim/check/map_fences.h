// Tensor maps in memory that the kernel can write. Instructions read them through the tensormap
// proxy. If the launch has written the map, a use needs a release fence after the write, then
// synchronization, then an acquire fence of the map's address (PTX ISA, "fence.proxy.tensormap").
#pragma once

#include <cstdint>

#include "../machine/machine.h"

namespace torchext::sim {

// Executes fence.proxy.tensormap::generic.acquire of the map at this generic address.
void acquire_tensor_map(Warp& w, int lane, std::uint64_t address, Scope scope);

// True if a tensor map can lie at this generic address. Reports a finding if it cannot.
bool resolve_tensor_map(Warp& w, int lane, std::uint64_t address, Place* place);

// A map in a parameter or constant cannot change. Maps elsewhere are checked.
inline bool is_checked_map(const Place& place) {
  return place.shadow != nullptr;
}

// Checks the lane's use of a map, and records it as an access of `agent` at `clock`.
void read_tensor_map(Warp& w, int lane, const Place& place, std::uint64_t address,
                     std::uint32_t agent, std::uint32_t clock);

}  // namespace torchext::sim
