// mbarrier objects, for the instructions that signal them.
#pragma once

#include <cstdint>

#include "../machine/machine.h"

namespace torchext::sim {

// The mbarrier at an address of the given space, or nullptr after a finding: no barrier there, not
// aligned, exited CTA, or initialized in a way that this lane does not know of.
MBarrier* find_mbarrier(Warp& warp, int lane, Space space, std::uint64_t address, Cta** owner,
                        std::uint32_t* offset);
// The same, for an async-proxy use: asks for a fence after the initialization too.
MBarrier* find_mbarrier_for_async(Warp& warp, int lane, Space space, std::uint64_t address,
                                  Cta** owner, std::uint32_t* offset);

void arrive(Cta& cta, MBarrier& barrier, std::uint32_t count, const Knowledge& knowledge);
// Adds to (expect) or takes from (complete) the phase's bytes.
void expect_transactions(MBarrier& barrier, std::int64_t bytes);
// By offset, since the barrier may be gone (inval) or in another phase when the bytes land.
void complete_transactions(Cta& cta, std::uint32_t offset, std::int64_t bytes);

}  // namespace torchext::sim
