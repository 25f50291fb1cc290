// What the replay notes for its Prediction: intervals of the timeline, waits by role, and what costs
// time needlessly.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "resources.h"

namespace torchext::sim::timing {

class Journal {
 public:
  Journal(const Program& program, const std::vector<std::unique_ptr<ClusterTrace>>& traces);

  // Forgets what it knows of warps and costs, for another simulation.
  void restart();
  void start_timeline() { tracing_ = true; }
  bool shows(const WarpRun& w) const;
  // Gives a warp a track of the timeline, if there is one.
  void show(WarpRun& w);
  void interval(std::uint32_t track, std::uint32_t name, double begin, double end);
  std::uint32_t name(const std::string& text);
  std::uint32_t track(const std::string& text);

  // The label of a wait for this mbarrier; those of other waits are Wait::Reasons.
  std::uint32_t mbarrier_label(std::uint32_t id);
  // The warp waits at `pc` from one time to another.
  void waits(WarpRun& w, double from, double to, std::uint32_t label, std::uint32_t pc);
  void finish(WarpRun& w, double end);

  // Resources that an instruction takes beyond what its bytes need, in cycles of an SM, and the two
  // numbers of wavefronts or sectors.
  void conflict(std::uint32_t pc, double cycles, double actual, double ideal);
  void uncoalesced(std::uint32_t pc, double cycles, double actual, double ideal);
  void idle_tensor_cores(std::uint32_t pc, double cycles) { idle_[pc] += cycles; }

  // Writes waits, remarks and the timeline. `simulated`: cycles of the simulation.
  void summarize(Prediction& to, double simulated, double sms);

 private:
  using ByPc = std::unordered_map<std::uint32_t, double>;
  std::uint32_t label(const std::string& text);
  const std::string& role_of(const std::vector<Event>& events, const ClusterTrace& trace);
  void summarize_waits(Prediction& to) const;
  void summarize_costs(Prediction& to, double simulated, double sms);
  std::string factor(std::uint32_t pc);

  const Program& program_;
  std::set<std::uint32_t> full_;  // mbarriers that count bytes
  bool tracing_ = false;
  std::vector<Interval> intervals_;
  std::vector<std::string> labels_, names_, tracks_;
  std::map<std::string, std::uint32_t> label_index_, name_index_, track_index_;
  std::unordered_map<const std::vector<Event>*, std::string> roles_;
  std::map<std::string, double> role_time_;
  std::map<std::string, std::map<std::pair<std::uint32_t, std::uint32_t>, double>> role_waits_;
  ByPc conflicts_, uncoalesced_, idle_;
  std::unordered_map<std::uint32_t, std::pair<double, double>> ratios_;
};

}  // namespace torchext::sim::timing
