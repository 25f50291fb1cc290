// Deadlock reports: what a group of lanes waits for.
#include "wait.h"

#include <cstdio>

#include "machine.h"

namespace torchext::sim {

std::string wait_reason(Warp& w, const Group& g) {
  const Instruction& i = w.program().code[g.pc];
  const std::string& opcode = w.program().opcodes[i.opcode];
  if (w.waits_for_warp(g)) {
    char lanes[16];
    std::snprintf(lanes, sizeof lanes, "0x%x", w.live() & ~g.mask);
    return "waits at " + opcode + " for the lanes " + lanes + " of its warp";
  }
  if (i.traits.describe_wait != nullptr) return i.traits.describe_wait(w, g);
  return (g.blocked ? "waits at " : "polls at ") + opcode;
}

}  // namespace torchext::sim
