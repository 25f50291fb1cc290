// mbarrier objects, for the instructions that signal them.
#pragma once

#include <cstdint>

#include "../machine/machine.h"

namespace torchext::sim {

// The mbarrier at an address of the given space. Returns nullptr after a finding: there is none,
// the address is misaligned, the CTA has exited, or the lane does not know the initialization.
MBarrier* find_mbarrier(Warp& warp, int lane, Space space, std::uint64_t address, Cta** owner,
                        std::uint32_t* offset);
// The same for a use by the async proxy, which also needs a fence after the initialization.
MBarrier* find_mbarrier_for_async(Warp& warp, int lane, Space space, std::uint64_t address,
                                  Cta** owner, std::uint32_t* offset);

void arrive(Cta& cta, MBarrier& barrier, std::uint32_t count, const Knowledge& knowledge);
// Adds to the phase's pending bytes (expect) or subtracts from them (complete).
void expect_transactions(MBarrier& barrier, std::int64_t bytes);
// Takes an offset, because inval may have removed the barrier by the time the bytes arrive.
void complete_transactions(Cta& cta, std::uint32_t offset, std::int64_t bytes);

}  // namespace torchext::sim
