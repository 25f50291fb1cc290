// The names of special registers. targets.cpp has the first target of each.
#include "special_registers.h"

#include <utility>

namespace torchext::sim {

namespace {

const std::pair<const char*, Special> kSpecials[] = {
    {"%tid.x", Special::tid_x},
    {"%tid.y", Special::tid_y},
    {"%tid.z", Special::tid_z},
    {"%ntid.x", Special::ntid_x},
    {"%ntid.y", Special::ntid_y},
    {"%ntid.z", Special::ntid_z},
    {"%ctaid.x", Special::ctaid_x},
    {"%ctaid.y", Special::ctaid_y},
    {"%ctaid.z", Special::ctaid_z},
    {"%nctaid.x", Special::nctaid_x},
    {"%nctaid.y", Special::nctaid_y},
    {"%nctaid.z", Special::nctaid_z},
    {"%laneid", Special::laneid},
    {"%warpid", Special::warpid},
    {"%nwarpid", Special::nwarpid},
    {"%smid", Special::smid},
    {"%nsmid", Special::nsmid},
    {"%gridid", Special::gridid},
    {"%lanemask_eq", Special::lanemask_eq},
    {"%lanemask_le", Special::lanemask_le},
    {"%lanemask_lt", Special::lanemask_lt},
    {"%lanemask_ge", Special::lanemask_ge},
    {"%lanemask_gt", Special::lanemask_gt},
    {"%clusterid.x", Special::clusterid_x},
    {"%clusterid.y", Special::clusterid_y},
    {"%clusterid.z", Special::clusterid_z},
    {"%nclusterid.x", Special::nclusterid_x},
    {"%nclusterid.y", Special::nclusterid_y},
    {"%nclusterid.z", Special::nclusterid_z},
    {"%cluster_ctaid.x", Special::cluster_ctaid_x},
    {"%cluster_ctaid.y", Special::cluster_ctaid_y},
    {"%cluster_ctaid.z", Special::cluster_ctaid_z},
    {"%cluster_nctaid.x", Special::cluster_nctaid_x},
    {"%cluster_nctaid.y", Special::cluster_nctaid_y},
    {"%cluster_nctaid.z", Special::cluster_nctaid_z},
    {"%cluster_ctarank", Special::cluster_ctarank},
    {"%cluster_nctarank", Special::cluster_nctarank},
    {"%dynamic_smem_size", Special::dynamic_smem_size},
    {"%total_smem_size", Special::total_smem_size},
    {"%aggr_smem_size", Special::aggr_smem_size},
    {"%clock", Special::clock},
    {"%clock_hi", Special::clock_hi},
    {"%clock64", Special::clock64},
    {"%globaltimer", Special::globaltimer},
    {"%globaltimer_lo", Special::globaltimer_lo},
    {"%globaltimer_hi", Special::globaltimer_hi},
    {"%tid.w", Special::zero},
    {"%ntid.w", Special::zero},
    {"%ctaid.w", Special::zero},
    {"%nctaid.w", Special::zero},
    {"%clusterid.w", Special::zero},
    {"%nclusterid.w", Special::zero},
    {"%cluster_ctaid.w", Special::zero},
    {"%cluster_nctaid.w", Special::zero},
    {"%is_explicit_cluster", Special::is_explicit_cluster},
    {"%envreg1", Special::workspace_high},
    {"%envreg2", Special::workspace_low},
    {"%reserved_smem_offset_begin", Special::zero},
    {"%reserved_smem_offset_0", Special::zero},
    {"%reserved_smem_offset_1", Special::reserved_shared_slot},
    {"%reserved_smem_offset_end", Special::reserved_shared_end},
    {"%reserved_smem_offset_cap", Special::reserved_shared_end},
    {"%current_graph_exec", Special::zero},  // no launch belongs to a graph
};

// The driver sets %envreg0 to %envreg31. All are 0 except those with the grid's workspace.
bool is_driver_register(const std::string& name) {
  if (name.compare(0, 7, "%envreg") != 0) return false;
  for (int i = 0; i < 32; ++i) {
    if (name == "%envreg" + std::to_string(i)) return true;
  }
  return false;
}

}  // namespace

std::optional<Special> special_register(const std::string& name) {
  for (const auto& [text, which] : kSpecials) {
    if (name == text) return which;
  }
  if (is_driver_register(name)) return Special::zero;
  return std::nullopt;
}

}  // namespace torchext::sim
