// Warps: when their instructions issue, and what they wait for.
#include <stdexcept>

#include "replayer.h"

namespace torchext::sim::timing {

namespace {

constexpr double kPipeQueue = 16;  // cycles of work that a pipe accepts before a warp waits for it

}  // namespace

// ---- Waits --------------------------------------------------------------------------------------

void Replay::block(WarpRun& w, double now, std::uint32_t why) {
  w.blocked_at = now;
  w.wait_label = why;
}

void Replay::resume(WarpRun& w, double time) {
  journal_.waits(w, w.blocked_at, time, w.wait_label, w.wait_pc);
  w.time = time;
  push(time, Item::run, &w);
}

void Replay::wait_until(WarpRun& w, double now, double time, std::uint32_t why) {
  if (time <= now) return;
  journal_.waits(w, now, time, why, w.wait_pc);
  w.time = std::max(w.time, time);
}

// ---- Instructions -------------------------------------------------------------------------------

// Runs a warp until it waits, or until something else happens before its next instruction.
void Replay::step(WarpRun& w) {
  while (true) {
    if (w.at == w.events->size()) return finish_warp(w);
    const Event& e = (*w.events)[w.at];
    const std::uint32_t pc = e.pc & ~Event::kMore;
    const Cost& cost = costs_[pc];
    w.wait_pc = pc;
    double operands = 0;
    for (const std::uint32_t reg : cost.reads) operands = std::max(operands, w.ready[reg]);
    if (cost.in_order || cost.ends_block) {
      const double ready = cost.ends_block ? std::max(operands, w.block) : operands;
      if (cost.ends_block) w.block = 0;
      if (ready > w.time) {
        journal_.waits(w, w.time, ready, Wait::operands, pc);
        w.time = ready;
        push(ready, Item::run, &w);
        return;
      }
    }
    ++w.at;
    if (w.starts_block) w.hoisted = w.time;
    w.starts_block = cost.splits;
    const double before = w.time;
    const double now = issue(w, cost, operands, e.action == 0 || !cost.in_order);
    bool goes_on = e.action == 0 || act(w, e, cost, now);
    while (goes_on && w.at < w.events->size() && ((*w.events)[w.at].pc & Event::kMore)) {
      const Event& more = (*w.events)[w.at++];
      goes_on = act(w, more, cost, std::max(now, w.time));
    }
    if (!goes_on) return;
    if (w.time < before) throw std::logic_error("the clock runs backwards");
    if (!queue_.empty() && w.time > queue_.top().time) {
      push(w.time, Item::run, &w);
      return;
    }
  }
}

// Takes the instruction's slots and its pipe, and returns when it issues. `has_result`: its results
// are ready after its latency; if not, an action says when.
double Replay::issue(WarpRun& w, const Cost& cost, double operands, bool has_result) {
  Sm& sm = *w.cta->sm;
  double issued = w.time;
  if (cost.slots > 0) {
    double& scheduler = sm.scheduler[w.scheduler];
    issued = std::max(w.time, scheduler);
    scheduler = issued + cost.slots;
    sm.busy_slots += cost.slots;
    if (issued > w.time) w.waits[{Wait::issue, w.wait_pc}] += issued - w.time;
    w.time = issued + cost.slots;
  }
  double start = std::max(issued, operands);
  if (cost.pipe != kNoPipe) {
    double& pipe = sm.pipe[w.scheduler][cost.pipe];
    const double entered = std::max(issued, pipe);
    const double busy = cost.interval * std::max(1.0f, cost.slots);
    pipe = entered + busy;
    sm.busy_pipe[cost.pipe] += busy;
    start = std::max(entered, operands);
    if (entered - issued > kPipeQueue) wait_until(w, w.time, entered - kPipeQueue, Wait::issue);
  } else if (cost.tensor) {
    start = std::max(start, sm.mma[w.scheduler]);
    sm.mma[w.scheduler] = start + c_.mma_interval;
    sm.busy_tensor += c_.mma_interval / 4;
  } else if (cost.shuffle) {
    start = std::max(start, sm.shuffle);
    sm.shuffle = start + c_.shuffle_interval;
  }
  if (has_result) {
    const double begun = cost.hoists ? std::max(operands, w.hoisted) : start;
    const double ready = begun + cost.latency * std::max(1.0f, cost.slots / 2);
    for (const std::uint32_t reg : cost.writes) w.ready[reg] = ready;
    if (!cost.in_order && !cost.ends_block) w.block = std::max(w.block, start);
  }
  return issued;
}

// False if the warp must wait for something else to happen.
bool Replay::act(WarpRun& w, const Event& e, const Cost& cost, double now) {
  CtaRun& cta = *w.cta;
  ClusterRun& cluster = *cta.cluster;
  const Action& a = cluster.trace->actions[e.action];
  switch (a.kind) {
    case Action::none:
      break;
    case Action::shared:
      shared(w, a, cost, now);
      break;
    case Action::global:
    case Action::copy:
      global(w, a, cost, now);
      break;
    case Action::init: {
      Mbarrier& m = cta.mbarriers[a.id];
      m = Mbarrier{};
      m.expected = m.pending = a.count;
      break;
    }
    case Action::arrive:
      arrive(w, a, now);
      break;
    case Action::wait:
      return wait(w, a, now);
    case Action::load:
      load_tma(w, a, now, (e.pc & Event::kMore) != 0);
      break;
    case Action::store:
      store_tma(w, a, now);
      break;
    case Action::bulk_commit:
      w.bulk.commit();
      break;
    case Action::bulk_wait:
      wait_until(w, now, w.bulk.ready(a.count, a.flag), Wait::bulk);
      break;
    case Action::copy_commit:
      w.copies.commit();
      break;
    case Action::copy_wait:
      if (a.flag) w.copies.commit();
      wait_until(w, now, w.copies.ready(a.count, false), Wait::copy);
      break;
    case Action::wgmma:
      start_wgmma(w, a, now);
      break;
    case Action::wgmma_commit:
      w.wgmma_groups.push_back(w.wgmmas);
      break;
    case Action::wgmma_wait:
      return wait_for_wgmma(w, a, now);
    case Action::barrier:
      return barrier(w, a, now);
    case Action::cluster_arrive:
      cluster.arrived += a.lanes;
      w.cluster_generation = cluster.generation;
      check_all(cta, now);
      break;
    case Action::cluster_wait:
      return cluster_wait(w, now);
  }
  return true;
}

void Replay::finish_warp(WarpRun& w) {
  CtaRun& cta = *w.cta;
  ClusterRun& cluster = *cta.cluster;
  const double end = std::max(w.time, w.block);
  end_ = std::max(end_, end);
  journal_.finish(w, end);
  w.ready = {};  // the warp itself stays: late copies may still signal its CTA
  cta.alive_threads -= w.threads;
  cluster.alive_threads -= w.threads;
  check_all(cta, end);
  if (--cluster.live != 0) return;
  ++finished_;
  if (finished_ == count_ / 2) middle_ = end;
  if (next_ < count_) start_cluster(end + c_.cta_start, next_++);
}

}  // namespace torchext::sim::timing
