// Which `.target` an instruction needs.
#pragma once

#include <string>

#include "ir.h"

namespace torchext::sim {

// Throws PtxError if ptxas would refuse the instruction for the module's target. The message names
// the line, the target that is needed and the target that the module has.
void check_target(const ParsedModule::Source& source, const RawInstruction& instruction);
// The same for a kernel's directives.
void check_target(const ParsedModule::Source& source, const Function& function);

// The target that every form of the opcode needs: "sm_90a"; "" if some form runs on any.
std::string least_target(const std::string& opcode);

}  // namespace torchext::sim
