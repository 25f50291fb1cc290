// Shared memory, loads and stores, and the copies of TMA.
#include <cmath>

#include "replayer.h"

namespace torchext::sim::timing {

namespace {

constexpr double kChunk = 2048;  // bytes of a TMA copy that are served together

}  // namespace

// ---- An SM's way to L2 --------------------------------------------------------------------------

// When `bytes` from L2 or from memory behind it arrive. `charged`: bytes that L2 sends for this SM.
// `port` is the SM's way to L2: loads do not queue behind the copies of TMA, but take their time.
double Replay::read(Sm& sm, double& port, double now, double bytes, double charged,
                    std::uint16_t buffer, double multiplicity, double hit_latency,
                    double miss_latency) {
  const double granted = std::max(now, port);
  port = granted + charged / c_.l2_rate;
  if (&port != &sm.read_port) sm.read_port = std::max(now, sm.read_port) + charged / c_.l2_rate;
  sm.busy_port += charged / c_.l2_rate;
  l2_bytes_ += charged;
  const double sent = granted + charged / c_.l2_rate;
  if (!l2_.misses(buffer)) return sent + c_.l2_latency + hit_latency;
  return sent + memory_.request(granted, bytes, multiplicity) + miss_latency;
}

double Replay::write(Sm& sm, double now, double bytes, double multiplicity) {
  const double granted = std::max(now, sm.write_port);
  sm.write_port = granted + bytes / c_.l2_rate;
  l2_bytes_ += bytes;
  memory_.request(granted, bytes, multiplicity);
  return sm.write_port + c_.l2_latency;
}

// ---- TMA ----------------------------------------------------------------------------------------

// A copy to one CTA. A multicast is one such action for each receiver, all but the first `more`.
void Replay::load_tma(WarpRun& w, const Action& a, double now, bool more) {
  ClusterRun& cluster = *w.cta->cluster;
  CtaRun& to = *cluster.ctas[a.rank];
  Sm& sm = *to.sm;
  const double multiplicity = cluster.multiplicity;
  const bool again = more && a.receivers > 1;  // another receiver of the same multicast
  double begin = copy_begin_;
  if (!again) {
    Sm& own = *w.cta->sm;
    begin = copy_begin_ = std::max(now, own.tma);
    const double busy = std::max(c_.tma_issue, a.bytes / c_.tma_rate);
    own.tma = begin + busy;
    own.busy_tma += busy;
    begin = copy_begin_ += c_.tma_issue;
  }
  const double away = a.rank != w.cta->rank ? c_.multicast_latency : 0;
  double done = begin;
  if (a.global_bytes == 0) {
    done += a.buffer == Action::kNoBuffer ? c_.remote_shared_latency + a.bytes / c_.tma_rate
                                          : c_.l2_latency + c_.tma_latency;
  } else if (again) {
    sm.read_port = std::max(begin, sm.read_port) + a.global_bytes / c_.l2_rate / a.receivers;
    done = std::max(multicast_, sm.read_port) + away;
  } else {
    double at = begin;
    // Rows of a tensor lie apart: memory opens a page for each.
    const double taken = a.flag ? multiplicity / c_.row_share : multiplicity;
    const double missing = c_.tma_dram_latency + (a.flag ? c_.tma_row_latency : 0);
    for (double left = a.global_bytes; left > 0; left -= kChunk) {
      const double bytes = std::min(left, kChunk);
      const double arrives = read(sm, sm.read_port, at, bytes, bytes / a.receivers, a.buffer, taken,
                                  c_.tma_latency, missing);
      done = std::max(done, arrives);
      at += bytes / c_.tma_rate;
    }
    multicast_ = done;
    done += away;
  }
  const double cycles = a.bytes / 128.0 * c_.tma_write_share;
  sm.shared_debt += cycles;
  sm.busy_shared += cycles;
  push(done, Item::transactions, &to.mbarriers[a.id], 0, -static_cast<std::int64_t>(a.bytes));
  if (journal_.shows(w)) {
    journal_.interval(journal_.track("CTA " + std::to_string(to.rank) + ": TMA loads"),
                      journal_.name(std::to_string(a.bytes) + " bytes"), begin, done);
  }
}

void Replay::store_tma(WarpRun& w, const Action& a, double now) {
  Sm& sm = *w.cta->sm;
  const double begin = std::max(now, sm.tma);
  const double busy = std::max(c_.tma_issue, a.bytes / c_.tma_rate);
  sm.tma = begin + busy;
  sm.busy_tma += busy;
  sm.shared_debt += a.bytes / 128.0 * c_.tma_write_share;
  const double read = begin + c_.bulk_read_latency + a.bytes / c_.tma_rate;
  const double done = write(sm, read, a.bytes, w.cta->cluster->multiplicity);
  w.bulk.read = std::max(w.bulk.read, read);
  w.bulk.done = std::max(w.bulk.done, done);
  end_ = std::max(end_, done);
  if (journal_.shows(w)) {
    journal_.interval(journal_.track("CTA " + std::to_string(w.cta->rank) + ": TMA stores"),
                      journal_.name(std::to_string(a.bytes) + " bytes"), begin, done);
  }
}

// ---- Loads and stores ---------------------------------------------------------------------------

void Replay::shared(WarpRun& w, const Action& a, const Cost& cost, double now) {
  Sm& sm = *w.cta->sm;
  const double start = std::max(now, sm.load_store);
  sm.load_store = start + std::max<double>(c_.shared_issue, a.count);
  const bool remote = a.rank != w.cta->rank;
  sm.shared_debt += a.count;
  sm.busy_shared += a.count;
  const double latency = remote ? c_.remote_shared_latency : c_.shared_latency;
  const double ready = start + latency + a.count - 1;
  for (const std::uint32_t reg : cost.writes) w.ready[reg] = ready;
  if (a.count > a.ideal) journal_.conflict(w.wait_pc, a.count - a.ideal, a.count, a.ideal);
}

void Replay::global(WarpRun& w, const Action& a, const Cost& cost, double now) {
  Sm& sm = *w.cta->sm;
  const double multiplicity = w.cta->cluster->multiplicity;
  const double start = std::max(now, sm.load_store);
  const double passes = std::max(c_.shared_issue, std::ceil(a.id / 4.0));
  sm.load_store = start + passes;
  const double bytes = 32.0 * a.count;
  double ready = start + c_.l1_latency;
  if (a.writes && !a.flag) {
    end_ = std::max(end_, write(sm, start, bytes, multiplicity));
    // Stores that L2 has not taken fill the path to it.
    const double queue = sm.write_port - 512;
    if (queue > now) wait_until(w, now, queue, Wait::load);
  } else if (a.count != 0) {
    ready = read(sm, sm.load_port, start, bytes, bytes, a.buffer, multiplicity, 0, 0);
  }
  if (a.kind == Action::copy) {
    w.copies.done = std::max(w.copies.done, ready);
    sm.shared_debt += a.bytes / 128.0;
  }
  for (const std::uint32_t reg : cost.writes) w.ready[reg] = ready;
  if (a.id > a.ideal)
    journal_.uncoalesced(w.wait_pc, (a.id - a.ideal) * 32.0 / c_.l2_rate, a.id, a.ideal);
}

}  // namespace torchext::sim::timing
