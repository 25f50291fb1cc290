// The second access of a finding about order: which thread made it, and what would have ordered
// the two accesses.
#pragma once

#include <cstdint>
#include <string>

#include "findings.h"
#include "shadow.h"

namespace torchext::sim {

class Warp;

// The access that `conflict` found, in a report's words. `proxy` is such as "async-proxy ".
OtherAccess other_access(const Warp& warp, const Conflict& conflict, const std::string& proxy);

// What would order two racing accesses, named in PTX and in CUDA. Empty: use the kind's remedy.
std::string race_remedy(const Warp& warp, const Conflict& conflict, const Actor& actor);

}  // namespace torchext::sim
