// Deadlock reports: what each kind of waiting instruction waits for.
#include "wait.h"

#include <cstdio>

#include "collective.h"
#include "machine.h"

namespace torchext::sim {

// Of the phase that the mbarrier is in.
static std::string what_is_missing(const MBarrier& m) {
  const std::string arrivals =
      std::to_string(m.pending) + " of " + std::to_string(m.expected) + " arrivals";
  if (m.transactions >= 0)
    return "and lacks " + arrivals + " and " + std::to_string(m.transactions) + " bytes";
  const std::string surplus = std::to_string(-m.transactions) +
                              " more bytes arrived than were expected (expect_tx is too small)";
  if (m.pending == 0) return "and lacks no arrival, but " + surplus;
  return "and lacks " + arrivals + "; " + surplus;
}

std::string wait_reason(Warp& w, const Group& g) {
  const Instruction& i = w.program().code[g.pc];
  const std::string& opcode = w.program().opcodes[i.opcode];
  const auto lane = static_cast<int>(lane_of(g.mask));
  const auto starts = [&](const char* prefix) { return opcode.rfind(prefix, 0) == 0; };
  char text[256];
  if (starts("mbarrier.t")) {
    const std::uint64_t address = w.integer(i.s[0], lane) + static_cast<std::uint64_t>(i.offset);
    const auto at = static_cast<std::uint32_t>(address);
    const std::uint32_t rank = at >> kSharedRankShift;
    Cta& cta = rank == 0 ? w.cta() : *w.cluster().ctas[rank - 1];
    const auto it = cta.mbarriers.find(at & kSharedOffsetMask);
    if (it == cta.mbarriers.end()) return opcode;
    const MBarrier& m = it->second;
    const bool parity = opcode.find("parity") != std::string::npos;
    std::snprintf(text, sizeof text, "waits for %s %llu of mbarrier 0x%x, which is in phase %llu ",
                  parity ? "parity" : "phase",
                  static_cast<unsigned long long>(parity ? w.integer(i.s[1], lane) & 1
                                                         : w.integer(i.s[1], lane) >> 32),
                  at & kSharedOffsetMask, static_cast<unsigned long long>(m.phase));
    return text + what_is_missing(m);
  }
  if (w.waits_for_warp(g)) {
    std::snprintf(text, sizeof text, "waits at %s for the lanes 0x%x of its warp", opcode.c_str(),
                  w.live() & ~g.mask);
    return text;
  }
  for (const char* collective : {"bar.warp", "shfl", "vote", "match", "redux", "elect"}) {
    if (!starts(collective)) continue;
    const std::uint32_t members = members_of(w, i, lane);
    std::snprintf(text, sizeof text,
                  "waits at %s, member mask 0x%x, for lanes 0x%x, which do not come with that mask",
                  opcode.c_str(), members, members & w.live() & ~g.mask);
    return text;
  }
  if (starts("barrier.cluster")) {
    const Attendance a = cluster_attendance(w.cluster());
    std::snprintf(text, sizeof text,
                  "waits at barrier.cluster, where %u of %u threads have arrived", a.arrived,
                  a.expected);
    return text;
  }
  if (starts("bar")) {
    const auto id = static_cast<std::uint32_t>(w.integer(i.s[0], lane));
    if (id < 16) {
      const Attendance a = attendance(w.cta(), w.cta().barriers[id]);
      std::snprintf(text, sizeof text, "waits at barrier %u, where %u of %u threads have arrived",
                    id, a.arrived, a.expected);
      return text;
    }
  }
  if (starts("setmaxnreg")) {
    std::snprintf(text, sizeof text,
                  "waits for registers: setmaxnreg to %u from %u, but the CTA's pool has %lld left",
                  i.target, w.registers, static_cast<long long>(w.cta().register_pool));
    return text;
  }
  return (g.blocked ? "waits at " : "polls at ") + opcode;
}

}  // namespace torchext::sim
