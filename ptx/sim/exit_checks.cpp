// What lanes must have finished before they exit, and what their exit sets free.
#include "exit_checks.h"

#include "collective.h"
#include "machine.h"
#include "wgmma_stream.h"

namespace torchext::sim {

void before_exit(Warp& w, std::uint32_t lanes) {
  if (w.grid().checks) {
    for_lanes(lanes, [&](int lane) {
      const auto it = w.bulk_groups.find(lane);
      if (it == w.bulk_groups.end()) return;
      const CopyGroups& g = it->second;
      const std::uint32_t last = g.open ? g.current : g.current - 1;
      if (g.read_waited < last) {
        w.finding_at(g.last_pc, "outstanding bulk store",
                     g.open ? "the thread exits with a bulk store that it has not committed"
                            : "the thread exits while a bulk store may still read shared memory",
                     1u << lane);
      }
    });
    if (w.live() == lanes) {
      for (const auto& p : w.wgmma_pending) {
        w.finding_at(p->pc, "wgmma not committed",
                     "the warp exits before it has waited for this wgmma", lanes);
        break;
      }
    }
  }
}

void after_exit(Warp& w) {
  Cluster& cluster = w.cluster();
  ++cluster.progress;
  Cta& cta = w.cta();
  if (w.finished()) {
    cta.live_threads -= 32;
    cta.register_pool += std::int64_t{w.registers} * 32;
    if (cta.live_threads != 0) {
      for (NamedBarrier& b : cta.barriers) complete_barrier_if_full(cta, b);
    }
    if (cta.exited() && w.grid().checks) {
      for (const auto& [warpgroup, log] : cta.wgmma_log) {
        if (log.empty()) continue;
        w.finding_at(log.begin()->second.pc, "wgmma disagreement",
                     "only " + std::to_string(log.begin()->second.seen) +
                         " of the four warps of a warpgroup executed this wgmma",
                     0);
      }
      for (const auto& [offset, m] : cta.mbarriers) {
        if (m.signalled <= m.waited) continue;
        w.finding_at(m.signalled_pc, "outstanding async copy",
                     "the CTA exits without having waited for this copy into its shared memory", 0,
                     offset);
      }
    }
  }
  complete_cluster_barrier_if_full(cluster);
}

}  // namespace torchext::sim
