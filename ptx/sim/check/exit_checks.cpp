// Checks of work that lanes must have finished before they exit, and what their exit frees.
#include "exit_checks.h"

#include "../instructions/wgmma_stream.h"
#include "../machine/collective.h"
#include "../machine/machine.h"

namespace torchext::sim {

// PTX does not define what happens to a copy whose CTA has exited. The SM gives the shared memory
// to its next CTA: a copy out of it may then read that CTA's data, and a copy into it, or its
// mbarrier signal, may overwrite that data. This is an error. If no CTA of the launch can follow,
// the bytes keep their values until the grid ends, and a grid ends after its memory operations:
// this is a note. compute-sanitizer reports neither.
static const char* const kReused =
    "; the grid has more CTAs than the GPU holds at once, so that the next one gets this memory";

void before_exit(Warp& w, std::uint32_t lanes) {
  if (w.grid().checks) {
    for_lanes(lanes, [&](int lane) {
      const auto it = w.bulk_groups.find(lane);
      if (it == w.bulk_groups.end()) return;
      const CopyGroups& g = it->second;
      const std::uint32_t last = g.open ? g.current : g.current - 1;
      if (g.remote != 0 && g.waited < g.remote) {
        w.finding_at(g.remote_pc, FindingKind::outstanding_remote_store,
                     "the thread exits before its bulk store to memory of device " +
                         std::to_string(g.remote_device) + " is complete",
                     1u << lane);
      } else if (g.read_waited < last) {
        const std::string what =
            g.open ? "the thread exits with a bulk store that it has not committed"
                   : "the thread exits while a bulk store may still read shared memory";
        if (w.grid().reuses_shared) {
          w.finding_at(g.last_pc, FindingKind::shared_memory_reused, what + kReused, 1u << lane);
        } else {
          w.finding_at(g.last_pc, FindingKind::outstanding_bulk_store, what, 1u << lane);
        }
      }
    });
    if (w.live() == lanes) {
      for (const auto& p : w.wgmma_pending) {
        w.finding_at(p->pc, FindingKind::wgmma_not_committed,
                     "the warp exits before it has waited for this wgmma", lanes);
        break;
      }
    }
  }
}

void after_exit(Warp& w, std::uint32_t lanes) {
  Cluster& cluster = w.cluster();
  ++cluster.progress;
  Cta& cta = w.cta();
  cta.live_threads -= static_cast<std::uint32_t>(__builtin_popcount(lanes));
  if (!cta.exited()) {
    for (NamedBarrier& b : cta.barriers) complete_barrier_if_full(cta, b);
  }
  if (w.finished()) {
    if (cta.exited() && w.grid().checks) {
      for (const auto& [number, warpgroup] : cta.warpgroups) {
        if (warpgroup.open.empty()) continue;
        const WgmmaRecord& first = warpgroup.open.begin()->second;
        w.finding_at(first.pc, FindingKind::wgmma_disagreement,
                     "only " + std::to_string(first.parts.size()) +
                         " of the four warps of a warpgroup executed this wgmma",
                     0);
      }
      for (const auto& [offset, m] : cta.mbarriers) {
        if (m.signaled <= m.waited) continue;
        const std::string what =
            "the CTA exits without having waited for this copy into its shared memory";
        if (w.grid().reuses_shared) {
          w.finding_at(m.signaled_pc, FindingKind::shared_memory_reused, what + kReused, 0, offset);
        } else {
          w.finding_at(m.signaled_pc, FindingKind::outstanding_async_copy, what, 0, offset);
        }
      }
    }
  }
  complete_cluster_barrier_if_full(cluster);
}

}  // namespace torchext::sim
