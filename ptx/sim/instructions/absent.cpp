// PTX instructions that the simulator refuses, with the reason. All other instructions of sm_75 to
// sm_90a are known.
#include "../frontend/decode.h"

namespace torchext::sim {

namespace {

const std::pair<const char*, const char*> kAbsent[] = {
    {"multimem", "memory that several GPUs map together is not simulated"},
    {"tex", "textures are not simulated"},
    {"tld4", "textures are not simulated"},
    {"txq", "textures are not simulated"},
    {"istypep", "textures, samplers and surfaces are not simulated"},
    {"suld", "surfaces are not simulated"},
    {"sust", "surfaces are not simulated"},
    {"sured", "surfaces are not simulated"},
    {"suq", "surfaces are not simulated"},
    {"tcgen05", "an instruction of sm_100, and the simulator ends at sm_90a"},
    {"clusterlaunchcontrol", "an instruction of sm_100, and the simulator ends at sm_90a"},
};

}  // namespace

std::string why_unknown(const std::string& opcode, const std::string& name) {
  for (const auto& [absent, reason] : kAbsent) {
    if (name == absent) return opcode + ": " + reason;
  }
  return "unknown instruction '" + opcode + "'";
}

}  // namespace torchext::sim
