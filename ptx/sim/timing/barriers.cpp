// Mbarriers, named barriers and the cluster's barrier.
#include "replayer.h"

namespace torchext::sim::timing {

// ---- Mbarriers ----------------------------------------------------------------------------------

void Replay::arrive(WarpRun& w, const Action& a, double now) {
  const CtaRun& cta = *w.cta;
  Mbarrier& m = cta.cluster->ctas[a.rank]->mbarriers[a.id];
  double at = now + (a.rank == cta.rank ? c_.arrive_latency : c_.remote_arrive_latency);
  if (a.flag) {  // when the warp's cp.asyncs are done
    m.pending += a.ideal;
    for (const auto& group : w.copies.committed) at = std::max(at, group.second);
    at = std::max(at, w.copies.done);
  }
  push(at, Item::arrive, &m, a.count, a.bytes);
}

bool Replay::wait(WarpRun& w, const Action& a, double now) {
  Mbarrier& m = w.cta->cluster->ctas[a.rank]->mbarriers[a.id];
  const std::uint32_t why = journal_.mbarrier_label(a.id);
  if (m.phase >= a.count) {
    wait_until(w, now, now + c_.wait_latency, why);
    return true;
  }
  block(w, now, why);
  m.waiters.emplace_back(&w, a.count);
  return false;
}

void Replay::change(Mbarrier& m, double time, std::int64_t arrivals, std::int64_t bytes) {
  m.pending -= arrivals;
  m.transactions += bytes;
  if (m.pending != 0 || m.transactions != 0 || m.expected == 0) return;
  ++m.phase;
  m.pending = m.expected;
  auto waiters = std::move(m.waiters);
  m.waiters.clear();
  for (const auto& [w, needed] : waiters) {
    if (m.phase >= needed)
      resume(*w, time + c_.wait_latency);
    else
      m.waiters.emplace_back(w, needed);
  }
}

// ---- Barriers of the CTA and of the cluster -----------------------------------------------------

// False if the warp waits. Lanes that arrive apart wait once all lanes of the warp have arrived.
bool Replay::barrier(WarpRun& w, const Action& a, double now) {
  NamedBarrier& b = w.cta->barriers[a.id & 15];
  b.arrived += a.lanes;
  std::uint32_t& own = b.lanes[&w];
  own += a.lanes;
  const std::uint32_t expected = a.count != 0 ? a.count : w.cta->alive_threads;
  const bool waits = !a.flag && own >= w.threads;
  if (waits) {
    block(w, now, Wait::barrier);
    b.waiters.push_back(&w);
  }
  if (b.arrived >= expected) release(b, now);
  return !waits;
}

void Replay::release(NamedBarrier& b, double time) {
  const double at = time + c_.barrier_latency + c_.barrier_per_warp * b.arrived / 32;
  auto waiters = std::move(b.waiters);
  b = NamedBarrier{};
  for (WarpRun* w : waiters) resume(*w, at);
}

bool Replay::cluster_wait(WarpRun& w, double now) {
  ClusterRun& cluster = *w.cta->cluster;
  if (cluster.generation > w.cluster_generation) {
    wait_until(w, now, now + c_.cluster_barrier_latency, Wait::cluster);
    return true;
  }
  block(w, now, Wait::cluster);
  cluster.waiters.push_back(&w);
  return false;
}

// A barrier without a count waits for the threads that have not exited.
void Replay::check_all(CtaRun& cta, double time) {
  for (NamedBarrier& b : cta.barriers) {
    if (!b.waiters.empty() && b.arrived >= cta.alive_threads) release(b, time);
  }
  ClusterRun& c = *cta.cluster;
  if (c.arrived != 0 && c.arrived >= c.alive_threads) {
    c.arrived = 0;
    ++c.generation;
    auto waiters = std::move(c.waiters);
    c.waiters.clear();
    for (WarpRun* w : waiters) resume(*w, time + c_.cluster_barrier_latency);
  }
}

}  // namespace torchext::sim::timing
