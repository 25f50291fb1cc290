// The timeline, waits by role, remarks: gathered by instruction, summed up at the end.
#include "journal.h"

#include <algorithm>
#include <cstdio>

namespace torchext::sim::timing {

namespace {

constexpr std::size_t kMaxIntervals = 60'000;

std::uint32_t index_in(std::vector<std::string>& all, std::map<std::string, std::uint32_t>& index,
                       const std::string& text) {
  const auto [it, is_new] = index.try_emplace(text, static_cast<std::uint32_t>(all.size()));
  if (is_new) all.push_back(text);
  return it->second;
}

}  // namespace

Journal::Journal(const Program& program, const std::vector<std::unique_ptr<ClusterTrace>>& traces)
    : program_(program) {
  for (const auto& trace : traces) {
    for (const Action& a : trace->actions) {
      if (a.kind == Action::load) full_.insert(a.id);
    }
  }
  // In the order of Wait::Reason.
  for (const char* text : {"the scheduler", "operands", "loads", "a CTA's barrier",
                           "the cluster's barrier", "wgmma groups", "bulk stores", "cp.async"})
    label(text);
}

void Journal::restart() {
  role_time_.clear();
  role_waits_.clear();
  conflicts_.clear();
  uncoalesced_.clear();
  idle_.clear();
  ratios_.clear();
}

// ---- Timeline -----------------------------------------------------------------------------------

bool Journal::shows(const WarpRun& w) const {
  return w.track != ~0u && intervals_.size() < kMaxIntervals;
}

void Journal::show(WarpRun& w) {
  if (!tracing_) return;
  const CtaRun& cta = *w.cta;
  w.track = track("CTA " + std::to_string(cta.rank) + ": warp " + std::to_string(w.index) + " (" +
                  role_of(*w.events, *cta.cluster->trace) + ")");
}

void Journal::interval(std::uint32_t track, std::uint32_t name, double begin, double end) {
  if (end > begin) intervals_.push_back({track, name, begin, end});
}

std::uint32_t Journal::name(const std::string& text) {
  return index_in(names_, name_index_, text);
}
std::uint32_t Journal::track(const std::string& text) {
  return index_in(tracks_, track_index_, text);
}

// ---- Waits --------------------------------------------------------------------------------------

std::uint32_t Journal::label(const std::string& text) {
  return index_in(labels_, label_index_, text);
}

std::uint32_t Journal::mbarrier_label(std::uint32_t id) {
  return label(full_.count(id) ? "full[slot]" : "empty[slot]");
}

void Journal::waits(WarpRun& w, double from, double to, std::uint32_t why, std::uint32_t pc) {
  if (to <= from) return;
  w.waits[{why, pc}] += to - from;
  if (to - from >= 8 && shows(w)) interval(w.track, name("waits for " + labels_[why]), from, to);
}

void Journal::finish(WarpRun& w, double end) {
  const std::string& role = role_of(*w.events, *w.cta->cluster->trace);
  role_time_[role] += end - w.begin;
  for (const auto& [key, cycles] : w.waits) role_waits_[role][key] += cycles;
  w.waits.clear();
}

const std::string& Journal::role_of(const std::vector<Event>& events, const ClusterTrace& trace) {
  std::string& role = roles_[&events];
  if (!role.empty()) return role;
  bool tensor = false, loads = false, stores = false;
  for (const Event& event : events) {
    const Action::Kind kind = trace.actions[event.action].kind;
    tensor |= kind == Action::wgmma;
    loads |= kind == Action::load;
    stores |= kind == Action::store;
    if (tensor || loads) break;
  }
  role = tensor ? "consumers" : loads ? "producer" : stores ? "store warps" : "other warps";
  return role;
}

// ---- Costs --------------------------------------------------------------------------------------

void Journal::conflict(std::uint32_t pc, double cycles, double actual, double ideal) {
  conflicts_[pc] += cycles;
  auto& sums = ratios_[pc];
  sums.first += actual;
  sums.second += ideal;
}

void Journal::uncoalesced(std::uint32_t pc, double cycles, double actual, double ideal) {
  uncoalesced_[pc] += cycles;
  auto& sums = ratios_[pc];
  sums.first += actual;
  sums.second += ideal;
}

// ---- Summary ------------------------------------------------------------------------------------

void Journal::summarize(Prediction& to, double simulated, double sms) {
  summarize_waits(to);
  summarize_costs(to, simulated, sms);
  to.tracks = tracks_;
  to.names = names_;
  to.intervals = std::move(intervals_);
}

void Journal::summarize_waits(Prediction& to) const {
  for (const auto& [role, waits] : role_waits_) {
    std::map<std::uint32_t, std::pair<double, std::pair<double, std::uint32_t>>> by_label;
    for (const auto& [key, spent] : waits) {
      auto& [total, worst] = by_label[key.first];
      total += spent;
      worst = std::max(worst, {spent, key.second});
    }
    for (const auto& [why, what] : by_label) {
      const double part = what.first / std::max(1.0, role_time_.at(role));
      const Instruction& i = program_.code[what.second.second];
      to.waits.push_back({role, labels_[why], part, i.line});
    }
  }
  std::stable_sort(to.waits.begin(), to.waits.end(), [](const auto& a, const auto& b) {
    return a.role != b.role ? a.role < b.role : a.share > b.share;
  });
}

std::string Journal::factor(std::uint32_t pc) {
  char text[64];
  const auto [actual, ideal] = ratios_[pc];
  std::snprintf(text, sizeof text, "%.1f times as many", ideal > 0 ? actual / ideal : 1.0);
  return text;
}

void Journal::summarize_costs(Prediction& to, double simulated, double sms) {
  const auto remark = [&](const char* kind, const std::string& text, double lost,
                          std::uint32_t pc) {
    to.remarks.push_back({kind, text, lost / sms, program_.code[pc].line});
  };
  for (const auto& [pc, lost] : conflicts_) {
    if (lost / sms > 0.01 * simulated)
      remark("bank conflicts", factor(pc) + " wavefronts as without conflicts", lost, pc);
  }
  for (const auto& [pc, lost] : uncoalesced_) {
    if (lost / sms > 0.01 * simulated)
      remark("uncoalesced access", factor(pc) + " sectors as its bytes fill", lost, pc);
  }
  for (const auto& [pc, lost] : idle_) {
    if (lost / sms > 0.05 * simulated)
      remark("serialized wgmma", "the tensor cores idle after this wait", lost, pc);
  }
  std::sort(to.remarks.begin(), to.remarks.end(), [](const Remark& a, const Remark& b) {
    return a.cycles != b.cycles ? a.cycles > b.cycles : a.ptx_line < b.ptx_line;
  });
}

}  // namespace torchext::sim::timing
