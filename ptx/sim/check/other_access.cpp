// Converts agents, which are numbered within a cluster, to CTAs of the grid, warps and lanes.
#include "other_access.h"

#include "../machine/machine.h"

namespace torchext::sim {
namespace {

// A cluster's agents are its threads, CTA by CTA, followed by the asynchronous workers.
bool is_thread(const Grid& grid, std::uint32_t agent) {
  return agent < grid.cluster_size * grid.warps_per_cta * 32;
}

std::uint32_t rank_of(const Grid& grid, std::uint32_t agent) {
  return agent / (grid.warps_per_cta * 32);
}

std::string text(const Dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

}  // namespace

OtherAccess other_access(const Warp& w, const Conflict& c, const std::string& proxy) {
  const Grid& grid = w.grid().of_cluster(c.other_cluster);
  const Instruction& i = grid.program->code[c.other_pc];
  const bool thread = is_thread(grid, c.other_agent), here = c.other_cluster == w.cluster().key;
  const bool this_gpu = grid.gpu == w.grid().gpu;
  const std::uint32_t cluster = c.other_cluster & ((1u << kGpuShift) - 1);
  OtherAccess other;
  other.ptx_line = i.line;
  other.device = grid.device;
  other.gpu = grid.gpu;
  std::string who = this_gpu ? "" : "device " + std::to_string(grid.device) + ", ";
  if (thread || grid.cluster_size == 1) {
    const std::uint32_t rank = thread ? rank_of(grid, c.other_agent) : 0;
    const Dim3 cta = grid.cta_index(cluster, rank);
    other.cta = {cta.x, cta.y, cta.z};
    const Dim3& own = w.cta().index;
    if (!this_gpu || cta.x != own.x || cta.y != own.y || cta.z != own.z) {
      who += "CTA " + text(cta);
      if (grid.cluster_size > 1 && here) who += " of the same cluster";
      who += ", ";
    }
  } else if (!here) {
    who += "the cluster of CTA " + text(grid.cta_index(cluster, 0)) + ", ";
  }
  if (thread) {
    other.warp = static_cast<std::int32_t>(c.other_agent / 32 % grid.warps_per_cta);
    other.lane = static_cast<std::int32_t>(c.other_agent % 32);
    who += "warp " + std::to_string(other.warp) + " lane " + std::to_string(other.lane);
  } else {
    who += here ? w.cluster().describe_agent(c.other_agent) : "asynchronous work";
  }
  other.what = proxy + (c.other_is_write ? "write" : "read") + " by " + who + ", " +
               grid.program->place(i.line) + ": " + grid.program->opcodes[i.opcode];
  return other;
}

std::string race_remedy(const Warp& w, const Conflict& c, const Actor& actor) {
  const Grid& grid = w.grid();
  if (gpu_of(c.other_cluster) != gpu_of(actor.cluster)) {
    return "Only .sys orders GPUs: after the first access, a release at .sys scope of a flag "
           "(st.release.sys, red.release.sys, or __threadfence_system() and a volatile store); "
           "before "
           "the second, an acquire of it at .sys.";
  }
  if (c.other_cluster != actor.cluster) {
    return "No barrier orders CTAs of a grid: use an atomic, or a release and an acquire at .gpu "
           "scope "
           "(__threadfence() and a flag), or give each CTA a destination of its own.";
  }
  const Completion completion = w.program().code[c.other_pc].traits.completion;
  if (completion == Completion::mbarrier)
    return "Wait for the phase of the mbarrier that the copy signals (mbarrier.try_wait, "
           "cuda::barrier::wait) before the bytes are touched.";
  if (completion == Completion::copy_group)
    return "Wait for the copy in the thread that started it (cp.async.wait_group, "
           "__pipeline_wait_prior), then put a barrier (__syncthreads()) before other threads "
           "touch "
           "the bytes.";
  if (!is_thread(grid, c.other_agent) || actor.agent != actor.issuer) return "";
  if (rank_of(grid, c.other_agent) != rank_of(grid, actor.agent))
    return "Put barrier.cluster.arrive and .wait (cluster.sync()) between the two accesses, in "
           "both "
           "CTAs.";
  if (c.other_agent / 32 == actor.agent / 32)
    return "Put bar.warp.sync (__syncwarp()) between the two accesses; lanes of a warp are not in "
           "step "
           "by themselves.";
  return "Put a barrier (bar.sync, __syncthreads()) or an mbarrier wait between the two accesses, "
         "on "
         "both sides.";
}

}  // namespace torchext::sim
