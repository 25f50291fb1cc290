// wgmma: one after another on an SM.
#include "replayer.h"

namespace torchext::sim::timing {

// A wgmma starts when the last of its warps has issued it. It takes the longer of its products and
// its operands' way out of shared memory.
void Replay::start_wgmma(WarpRun& w, const Action& a, double now) {
  Warpgroup& g = w.cta->groups[w.index / 4];
  const std::size_t number = w.wgmmas++;
  if (g.issued.size() <= number) g.issued.resize(number + 1, 0);
  if (++g.issued[number] < 4) return;
  Sm& sm = *w.cta->sm;
  const double n = a.count;
  const double operands = a.flag ? std::max(n / 4, c_.wgmma_rs_least) : (64 + n) / 4;
  const double products = n / 2;
  const double debt = std::min(sm.shared_debt, products + operands);
  const double busy = std::max(operands + debt, products) + c_.wgmma_overhead;
  sm.shared_debt -= std::min(debt, busy - operands);
  const double start = std::max(now, sm.tensor);
  if (start > sm.tensor && sm.tensor > 0 && sm.last_wait != ~0u)
    journal_.idle_tensor_cores(sm.last_wait, start - sm.tensor);
  sm.tensor = start + busy;
  sm.busy_tensor += products;
  sm.busy_shared += operands;
  if (journal_.shows(w)) {
    const std::uint32_t track =
        journal_.track("CTA " + std::to_string(w.cta->rank) + ": tensor cores");
    journal_.interval(track, journal_.name("wgmma m64n" + std::to_string(a.count)), start,
                      sm.tensor);
  }
  g.ends.push_back(sm.tensor);
  auto waiters = std::move(g.waiters);
  g.waiters.clear();
  for (const auto& [waiter, needed] : waiters) {
    if (g.ends.size() >= needed)
      resume(*waiter, std::max(now, g.ends[needed - 1] + c_.wgmma_tail));
    else
      g.waiters.emplace_back(waiter, needed);
  }
}

// False if the warp waits for a wgmma that has not started.
bool Replay::wait_for_wgmma(WarpRun& w, const Action& a, double now) {
  w.cta->sm->last_wait = w.wait_pc;
  if (w.wgmma_groups.size() <= a.count) return true;
  const std::size_t needed = w.wgmma_groups[w.wgmma_groups.size() - 1 - a.count];
  Warpgroup& g = w.cta->groups[w.index / 4];
  if (needed == 0) return true;
  if (g.ends.size() >= needed) {
    wait_until(w, now, g.ends[needed - 1] + c_.wgmma_tail, Wait::wgmma);
    return true;
  }
  block(w, now, Wait::wgmma);
  g.waiters.emplace_back(&w, needed);
  return false;
}

}  // namespace torchext::sim::timing
