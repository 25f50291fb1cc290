// A cluster's CTAs on one host thread: the seeded scheduler, asynchronous work, deadlock.
#include <algorithm>
#include <sstream>

#include "../instructions/wgmma_stream.h"
#include "machine.h"
#include "wait.h"

namespace torchext::sim {

Cta::Cta(Cluster& c, Dim3 i, std::uint32_t r)
    : cluster(c),
      index(i),
      rank(r),
      shared(c.grid.shared_bytes, 0xcd),
      shadow(c.grid.shared_bytes, false,
             {r * c.grid.warps_per_cta * 32, c.grid.warps_per_cta * 32,
              c.grid.cluster_size * c.grid.warps_per_cta * 32}) {
  if (c.grid.shared_begin == 0) {  // cooperative groups expect zeros there on sm_80 and later
    std::fill_n(shared.begin(), kSharedBase, 0);
    shadow.set_valid(0, kSharedBase);
  }
}

Cluster::Cluster(Grid& g, std::uint32_t n)
    : grid(g),
      number(n),
      key(g.gpu << kGpuShift | n),
      random(g.options.seed * 0x2545f4914f6cdd1dull + std::uint64_t{key} * 0x9e3779b97f4a7c15ull),
      counts(g.program->code.size(), 0) {
  const Dim3 c = g.cluster_dim, all = g.options.grid;
  const std::uint32_t across = all.x / c.x, down = all.y / c.y;
  const Dim3 origin{n % across * c.x, n / across % down * c.y, n / (across * down) * c.z};
  agents_ = g.cluster_size * g.warps_per_cta * 32;
  for (std::uint32_t rank = 0; rank < g.cluster_size; ++rank) {
    const Dim3 index{origin.x + rank % c.x, origin.y + rank / c.x % c.y,
                     origin.z + rank / (c.x * c.y)};
    ctas.push_back(std::make_unique<Cta>(*this, index, rank));
  }
  for (auto& cta : ctas) {
    cta->live_threads = g.threads;
    for (std::uint32_t w = 0; w < g.warps_per_cta; ++w) {
      cta->warps.push_back(std::make_unique<Warp>(*cta, w));
      all_warps.push_back(cta->warps.back().get());
    }
  }
}

Cluster::~Cluster() = default;

Cluster::State Cluster::run(std::uint64_t budget) {
  const std::uint64_t end = executed + budget;
  const bool random_completion = grid.options.completion == LaunchOptions::Random;
  while (executed < end) {
    if (grid.stop.load(std::memory_order_relaxed)) throw LaunchStopped{};
    const std::uint64_t progress_before = progress, spins_before = spins;
    std::uint64_t ran = 0;
    bool alive = false;
    // A new order every round. A rotation and a direction suffice to interleave any two warps.
    const auto count = static_cast<std::uint32_t>(all_warps.size());
    const std::uint32_t start_at = random.below(count);
    const std::uint32_t stride = random.below(2) ? 1 : count - 1;
    for (std::uint32_t k = 0, w = start_at; k < count; ++k, w = (w + stride) % count) {
      Warp& warp = *all_warps[w];
      if (warp.finished()) continue;
      alive = true;
      if (!warp.runnable()) continue;
      ran += warp.run(1 + random.below(64));
      if (random_completion && has_work() && random.below(8) == 0) complete_some();
    }
    if (!alive) {
      while (complete_some()) {
      }  // stores whose source has been read may outlive the threads
      return State::finished;
    }
    executed += ran;
    grid.executed.fetch_add(ran, std::memory_order_relaxed);
    if (ran == 0 && progress != progress_before) continue;  // work completed in the meantime
    if (ran == 0) {
      if (!stalled()) {
        report_deadlock();
        throw LaunchStopped{};
      }
      idle_rounds_ = 0;
    } else if (progress == progress_before && spins != spins_before) {
      // Everything polls. Complete late work first, then end waits that may end in vain.
      if (++idle_rounds_ % 16 == 0 && (complete_some() || time_out() | unpark())) continue;
      if (idle_rounds_ > 64) {  // another cluster may have to run first
        time_out();
        return State::running;
      }
    } else {
      idle_rounds_ = 0;
    }
    if (executed > grid.options.max_instructions ||
        grid.executed.load(std::memory_order_relaxed) > grid.options.max_instructions) {
      for (Warp* w : all_warps) {
        if (w->finished()) continue;
        w->finding(FindingKind::instruction_limit,
                   "the launch has executed more than max_instructions warp-instructions",
                   w->live());
        throw LaunchStopped{};
      }
    }
  }
  return State::running;
}

void Cluster::start(const std::shared_ptr<AsyncWork>& work) {
  if (grid.options.completion == LaunchOptions::Eager) {
    finish(*work);
  } else {
    pending_.push_back(work);
  }
}

void Cluster::finish_read(AsyncWork& work) {
  if (work.read_done) return;
  work.read_done = true;
  ++progress;
  if (work.read) work.read();
}

void Cluster::finish(AsyncWork& work) {
  if (work.done) return;
  finish_read(work);
  work.done = true;
  ++progress;
  if (work.finish) work.finish();
}

// Completes one piece of work, or only its reads; awaited work first. False if there is none.
bool Cluster::complete_some() {
  pending_.erase(
      std::remove_if(pending_.begin(), pending_.end(), [](const auto& w) { return w->done; }),
      pending_.end());
  if (pending_.empty()) return false;
  std::vector<std::size_t> wanted;
  for (std::size_t i = 0; i < pending_.size(); ++i) {
    if (pending_[i]->wanted) wanted.push_back(i);
  }
  const std::size_t i = wanted.empty()
                            ? random.below(static_cast<std::uint32_t>(pending_.size()))
                            : wanted[random.below(static_cast<std::uint32_t>(wanted.size()))];
  AsyncWork& work = *pending_[i];
  if (!work.read_done && work.read) {
    finish_read(work);
    work.wanted = false;  // a group that needs the rest sets it again
  } else {
    finish(work);
  }
  return true;
}

// Called when nothing can run. Takes the first possible step that real hardware might take; false
// if there is no step left.
bool Cluster::stalled() {
  if (complete_some()) return true;
  const bool first = stalled_at_ != progress;
  stalled_at_ = progress;
  return (first && time_out()) || unpark() || (!repeats() && time_out()) || let_go_alone();
}

bool Cluster::repeats() {
  const std::uint64_t world = grid.global_progress.load();
  if (progress_seen_ != progress || world_seen_ != world) {
    progress_seen_ = progress;
    world_seen_ = world;
    for (Warp* w : all_warps) w->forget_states();
  }
  bool all = true;
  for (Warp* w : all_warps) all &= w->finished() || w->repeats();
  return all;
}

bool Cluster::time_out() {
  bool any = false;
  for (Warp* w : all_warps) any |= !w->finished() && w->time_out();
  return any;
}

bool Cluster::unpark() {
  bool any = false;
  for (Warp* w : all_warps) any |= !w->finished() && w->unpark();
  return any;
}

bool Cluster::let_go_alone() {
  bool any = false;
  for (Warp* w : all_warps) any |= !w->finished() && w->let_go_alone();
  return any;
}

std::string Cluster::describe_agent(std::uint32_t agent) const {
  const std::uint32_t threads = grid.cluster_size * grid.warps_per_cta * 32;
  std::ostringstream out;
  if (agent < threads) {
    if (grid.cluster_size > 1) out << "CTA rank " << agent / (grid.warps_per_cta * 32) << ' ';
    out << "warp " << agent / 32 % grid.warps_per_cta << " lane " << agent % 32;
  } else if (const auto it = agent_names.find(agent); it != agent_names.end()) {
    out << it->second;
  } else {
    out << "asynchronous work";
  }
  return out.str();
}

std::pair<Warp*, const Group*> Cluster::add_waits(const std::string& where, Waits* waits) const {
  Warp* first = nullptr;
  const Group* first_group = nullptr;
  for (Warp* w : all_warps) {
    if (w->finished()) continue;
    for (const Group& g : w->groups()) {
      if (g.parked) continue;
      if (first == nullptr) {
        first = w;
        first_group = &g;
      }
      std::ostringstream who, why;
      who << where;
      if (grid.cluster_size > 1) who << "CTA rank " << w->cta().rank << ' ';
      who << "warp " << w->index();
      if (g.mask != ~0u) who << " lanes 0x" << std::hex << g.mask;
      why << grid.program->place(grid.program->code[g.pc].line) << ": " << wait_reason(*w, g);
      const auto same = std::find_if(waits->begin(), waits->end(),
                                     [&](const auto& other) { return other.first == why.str(); });
      if (same == waits->end())
        waits->emplace_back(why.str(), who.str());
      else
        same->second += ", " + who.str();
    }
  }
  return {first, first_group};
}

void Cluster::report_deadlock() {
  Waits waits;
  const auto [first, group] = add_waits("", &waits);
  if (first == nullptr) return;
  std::string message = "no warp can go on:";
  for (const auto& [why, who] : waits) message += "\n  " + who + ", " + why;
  first->finding_at(group->pc, FindingKind::deadlock, message, group->mask);
}

}  // namespace torchext::sim
