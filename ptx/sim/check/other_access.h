// The second access of a finding about order: where its thread is, and what would have ordered the
// two.
#pragma once

#include <cstdint>
#include <string>

#include "findings.h"
#include "shadow.h"

namespace torchext::sim {

class Warp;

// The access that `conflict` found, as a report tells it. `proxy`: "async-proxy " or the like.
OtherAccess other_access(const Warp& warp, const Conflict& conflict, const std::string& proxy);

// What orders the two accesses of a data race, in PTX's words and in CUDA's; "": the kind's remedy.
std::string race_remedy(const Warp& warp, const Conflict& conflict, const Actor& actor);

}  // namespace torchext::sim
