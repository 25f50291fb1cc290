// Deadlock reports: what a group of lanes waits for.
#include "wait.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "machine.h"

namespace torchext::sim {

namespace {

// The number that the instructions after a poll compare its result with: ", compared with 4", or "".
std::string compared_with(const Warp& w, const Warp::Poll& poll, int lane) {
  const auto& code = w.program().code;
  const Instruction& load = code[poll.pc];
  if (load.list.empty()) return "";
  const std::uint32_t result = load.list.front().reg;
  constexpr std::size_t kAhead = 8;
  for (std::size_t pc = poll.pc + 1; pc < code.size() && pc <= poll.pc + kAhead; ++pc) {
    const Instruction& i = code[pc];
    if (!i.traits.compares || (i.s[0].reg != result) == (i.s[1].reg != result)) continue;
    const Slot& other = i.s[0].reg == result ? i.s[1] : i.s[0];
    return ", compared with " + std::to_string(w.integer(other, lane));
  }
  return "";
}

// Says which address the lanes of a group poll, and which value is there.
std::string polled_values(const Warp& w, const Group& g) {
  std::string text;
  std::vector<std::string> said;
  for_lanes(g.mask, [&](int lane) {
    const Warp::Poll& poll = w.last_poll(lane);
    if (poll.bytes == 0 || poll.progress != w.cluster().progress) return;
    const GlobalBuffer* buffer = w.grid().memory.find(poll.address);
    if (buffer == nullptr || poll.address + poll.bytes > buffer->end) return;
    std::uint64_t value = 0;
    std::memcpy(&value, reinterpret_cast<const void*>(poll.address),
                std::min<std::size_t>(poll.bytes, sizeof value));
    const std::string what = w.grid().memory.describe(poll.address) + ", which is " +
                             std::to_string(value) + compared_with(w, poll, lane);
    if (std::find(said.begin(), said.end(), what) != said.end()) return;
    said.push_back(what);
    text += (text.empty() ? " for " : "; ") + what;
  });
  return text;
}

}  // namespace

std::string wait_reason(Warp& w, const Group& g) {
  const Instruction& i = w.program().code[g.pc];
  const std::string& opcode = w.program().opcodes[i.opcode];
  if (w.waits_for_warp(g)) {
    char lanes[16];
    std::snprintf(lanes, sizeof lanes, "0x%x", w.live() & ~g.mask);
    return "waits at " + opcode + " for the lanes " + lanes + " of its warp";
  }
  if (i.traits.describe_wait != nullptr) return i.traits.describe_wait(w, g);
  return g.blocked ? "waits at " + opcode : "polls at " + opcode + polled_values(w, g);
}

}  // namespace torchext::sim
