// PTX text to ParsedModule: declarations, functions, instructions with register names resolved.
#pragma once

#include <string>

#include "ir.h"

namespace torchext::sim {

// Throws PtxError, which names the line, for anything that is not well-formed PTX. Opcodes are
// checked later, when a kernel is decoded.
ParsedModule parse_ptx(const std::string& text, const std::string& name);

}  // namespace torchext::sim
