// Links several parsed modules into one, as nvlink links cubins.
#pragma once

#include <string>
#include <vector>

#include "ir.h"

namespace torchext::sim {

// A name that is not .visible, .weak, .common or .extern stays local to its module. Throws
// PtxError, which names the modules, for a name that is defined twice or not at all, and for
// declarations that disagree. Lines are numbered through all modules; sources separates them.
ParsedModule link_modules(std::vector<ParsedModule> modules, const std::string& name);

}  // namespace torchext::sim
