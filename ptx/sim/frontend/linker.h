// Several parsed modules into one, as nvlink makes one cubin of several.
#pragma once

#include <string>
#include <vector>

#include "ir.h"

namespace torchext::sim {

// Names that are neither .visible, .weak, .common nor .extern stay their module's own. Throws
// PtxError, which names the modules, for what is defined twice or not at all, and for declarations
// that disagree. Lines count on from module to module: ParsedModule::sources tells them apart.
ParsedModule link_modules(std::vector<ParsedModule> modules, const std::string& name);

}  // namespace torchext::sim
