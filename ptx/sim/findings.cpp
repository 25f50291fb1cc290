// Findings: collection and the remedies.
#include "findings.h"

#include <algorithm>
#include <utility>

namespace torchext::sim {

namespace {
const std::pair<const char*, const char*> kRemedies[] = {
    {"out of bounds", "Check the index or the bound that guards it against the buffer's size."},
    {"misaligned access", "Align the address to the access size, or use narrower accesses."},
    {"uninitialized memory", "Write these bytes before they are read, or do not read them."},
    {"uninitialized register", "Assign the register on every path that leads here."},
    {"data race",
     "Put a barrier, an mbarrier wait or a group wait between the two accesses, on both sides."},
    {"missing proxy fence",
     "Run fence.proxy.async after the generic-proxy writes, then synchronise, then start the "
     "async operation."},
    {"wgmma operand in flight",
     "Wait for the wgmma group (wgmma.wait_group) before its operands in shared memory change."},
    {"wgmma register in flight",
     "Run wgmma.wait_group before the registers of a pending wgmma are read or written."},
    {"missing wgmma.fence",
     "Run wgmma.fence after the registers were last touched and before the wgmma that uses them."},
    {"wgmma not committed", "Run wgmma.commit_group and wgmma.wait_group after the last wgmma."},
    {"wgmma disagreement",
     "All four warps of a warpgroup must execute the same wgmma with the same descriptors."},
    {"mbarrier misuse", "Follow init, fence, barrier, use, inval; count every arrival and byte."},
    {"missing mbarrier fence",
     "Run fence.mbarrier_init.release.cluster (or fence.proxy.async) after mbarrier.init, before "
     "the barrier that publishes it."},
    {"deadlock", "Make every wait match an arrival: counts, bytes, parity and barrier ids."},
    {"read-only memory", "Declare the buffer as output, or write elsewhere."},
    {"outstanding bulk store",
     "Run cp.async.bulk.commit_group and cp.async.bulk.wait_group.read 0 before the thread exits."},
    {"bulk store in flight",
     "Run cp.async.bulk.wait_group.read in the thread that started the copy, then a barrier, "
     "before "
     "its source is written again."},
    {"outstanding async copy", "Wait for every async copy before the CTA exits."},
    {"divergent collective",
     "Let all lanes of the warp reach an .aligned instruction together, or use the form with a "
     "member mask."},
    {"exited CTA",
     "Keep every CTA of the cluster alive (barrier.cluster) until remote accesses to it are done."},
    {"register pool", "Lower the counts, so that the CTA's warps together fit its registers."},
    {"trap", "The kernel stopped itself: look at the condition that guards the trap."},
    {"assertion", "The kernel's own assert failed."},
    {"barrier misuse", "Give every participant of a barrier the same id and thread count."},
    {"tensor map", "Make the tensor map and the instruction agree, and align as TMA asks."},
    {"instruction limit", "The kernel may not terminate; raise max_instructions if it should."},
    {"invalid operand", "See the PTX ISA's rules for this instruction's operands."},
    {"invalid call", "Call a function that the module defines, with its own parameters."},
};
}  // namespace

const char* remedy_for(const std::string& kind) {
  for (const auto& [name, remedy] : kRemedies) {
    if (kind == name) return remedy;
  }
  return "";
}

void FindingSink::add(Finding finding) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (findings_.size() >= cap_) {
    full_ = true;
    return;
  }
  if (!seen_.insert({finding.kind, finding.ptx_line, finding.other_ptx_line}).second) return;
  finding.remedy = remedy_for(finding.kind);
  findings_.push_back(std::move(finding));
}

std::vector<Finding> FindingSink::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::stable_sort(findings_.begin(), findings_.end(), [](const Finding& a, const Finding& b) {
    return std::tie(a.cta[2], a.cta[1], a.cta[0], a.ptx_line, a.kind) <
           std::tie(b.cta[2], b.cta[1], b.cta[0], b.ptx_line, b.kind);
  });
  return std::move(findings_);
}

}  // namespace torchext::sim
