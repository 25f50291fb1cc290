// Parses PTX text to a ParsedModule: declarations, functions, instructions with registers resolved.
#pragma once

#include <string>

#include "ir.h"

namespace torchext::sim {

// Throws PtxError, which names the line, if the text is not well-formed PTX. Opcodes are checked
// later, when a kernel is decoded.
ParsedModule parse_ptx(const std::string& text, const std::string& name);

}  // namespace torchext::sim
