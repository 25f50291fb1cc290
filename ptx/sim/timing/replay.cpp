// The replay: a discrete-event model of one group of SMs, which hold one cluster after another. All
// other SMs are taken to do the same at the same time: they share L2 and device memory with it.
//
// Times are in cycles. A warp issues its instructions in order. A result is ready after its
// latency; ptxas is taken to order each basic block so that only the end of the block waits for it,
// except for memory instructions, which wait for their operands. A resource serves requests in the
// order of their times. (One file: the parts share the state of the simulated SMs.)
#include "replay.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <queue>
#include <set>
#include <stdexcept>
#include <unordered_map>

#include "csrc/runtime/architecture.h"
#include "weights.h"

namespace torchext::sim::timing {

namespace {

constexpr double kNever = 1e300;
constexpr std::size_t kMaxIntervals = 60'000;
constexpr std::uint64_t kMaxEvents = 24'000'000;  // replayed; further waves are extrapolated,
constexpr std::uint64_t kMaxClusters = 1024;      // as beyond so many clusters
constexpr double kTogether = 2000;  // cycles for which the SMs of a launch run in step
constexpr double kSlack = 500;      // cycles by which the SMs' requests spread
constexpr double kChunk = 2048;     // bytes of a TMA copy that are served together

struct Wait {  // why a warp does not issue
  enum Reason : std::uint8_t { issue, operands, load, barrier, cluster, wgmma, bulk, copy, full };
};

struct WarpRun;
struct CtaRun;

struct Mbarrier {
  std::int64_t expected = 0, pending = 0, transactions = 0;
  std::uint32_t phase = 0;
  std::vector<std::pair<WarpRun*, std::uint32_t>> waiters;  // and the phases that they need
};

struct Named {
  std::uint32_t arrived = 0;
  std::vector<WarpRun*> waiters;
  std::unordered_map<const WarpRun*, std::uint32_t> lanes;
};

struct Groups {               // of asynchronous work
  double read = 0, done = 0;  // of the open group
  std::vector<std::pair<double, double>> committed;
  void commit() {
    if (!committed.empty()) {  // groups complete in order
      read = std::max(read, committed.back().first);
      done = std::max(done, committed.back().second);
    }
    committed.emplace_back(read, done);
    read = done = 0;
  }
  double ready(std::uint32_t allowed, bool only_read) const {
    if (committed.size() <= allowed) return 0;
    const auto& group = committed[committed.size() - 1 - allowed];
    return only_read ? group.first : group.second;
  }
};

struct Sm {
  double scheduler[4] = {}, pipe[4][kPipes] = {}, mma[4] = {};
  double load_store = 0, shuffle = 0, tensor = 0, tma = 0, read_port = 0, load_port = 0,
         write_port = 0;
  double shared_debt = 0;  // cycles of shared memory that the next wgmma finds taken
  double busy_slots = 0, busy_pipe[kPipes] = {}, busy_shared = 0, busy_tensor = 0, busy_tma = 0,
         busy_port = 0;
  std::uint32_t last_wait = ~0u;  // pc of the last wgmma wait
};

struct Warpgroup {
  std::vector<double> ends;  // of the wgmmas that have started
  std::vector<std::uint8_t> issued;
  std::vector<std::pair<WarpRun*, std::size_t>> waiters;  // and how many wgmmas they need
};

struct ClusterRun {
  const ClusterTrace* trace = nullptr;
  std::vector<std::unique_ptr<CtaRun>> ctas;
  std::uint32_t live = 0, generation = 0, arrived = 0, alive_threads = 0;
  double multiplicity = 1;  // clusters that run at the same time as this one
  std::vector<WarpRun*> waiters;
  std::uint32_t index = 0;
};

struct CtaRun {
  ClusterRun* cluster;
  Sm* sm;
  std::unordered_map<std::uint32_t, Mbarrier> mbarriers;
  Named barriers[16];
  std::vector<std::unique_ptr<WarpRun>> warps;
  std::vector<Warpgroup> groups;
  std::uint32_t alive_threads = 0, rank = 0;
};

struct WarpRun {
  CtaRun* cta;
  const std::vector<Event>* events;
  std::size_t at = 0;
  std::uint32_t scheduler = 0, index = 0, threads = 32, track = ~0u;
  double time = 0, block = 0, begin = 0;
  std::vector<double> ready;  // by register
  Groups bulk, copies;
  std::vector<std::size_t> wgmma_groups;  // wgmmas issued at each commit
  std::size_t wgmmas = 0;
  std::uint32_t cluster_generation = 0;
  bool blocked = false, finished = false;
  double blocked_at = 0;
  std::uint32_t wait_label = 0, wait_pc = 0;
  std::map<std::pair<std::uint32_t, std::uint32_t>, double> waits;  // by label and pc
};

struct Item {
  enum Kind : std::uint8_t { run, arrive, transactions };
  double time;
  std::uint64_t order;
  Kind kind;
  void* what;
  std::int64_t count, bytes;
  bool operator>(const Item& o) const { return time != o.time ? time > o.time : order > o.order; }
};

class Replay {
 public:
  Replay(const Gpu& gpu, const Program& program, const LaunchShapeOf& launch,
         const std::vector<std::unique_ptr<ClusterTrace>>& traces);
  Prediction run();

 private:
  using Samples = std::vector<const ClusterTrace*>;
  double simulate(const Samples& samples, std::uint64_t count, std::uint32_t resident,
                  std::uint64_t rest, double* middle);
  double share_of_others(const ClusterTrace& trace) const;
  void start_cluster(double time, std::uint64_t index);
  void finish_warp(WarpRun& w);
  void step(WarpRun& w);
  bool act(WarpRun& w, const Event& e, const Cost& cost, double now);
  void block(WarpRun& w, double now, std::uint32_t label);
  void resume(WarpRun& w, double time);
  void wait_until(WarpRun& w, double now, double time, std::uint32_t label);
  void account(WarpRun& w, double from, double to, std::uint32_t label, std::uint32_t pc);
  void push(double time, Item::Kind kind, void* what, std::int64_t count = 0,
            std::int64_t bytes = 0) {
    queue_.push({time, order_++, kind, what, count, bytes});
  }
  void change(Mbarrier& m, double time, std::int64_t arrivals, std::int64_t bytes);
  void start_wgmma(WarpRun& w, const Action& a, double now);
  void load_tma(WarpRun& w, const Action& a, double now, bool more);
  void store_tma(WarpRun& w, const Action& a, double now);
  void shared(WarpRun& w, const Action& a, const Cost& cost, double now);
  void global(WarpRun& w, const Action& a, const Cost& cost, double now);
  bool barrier(WarpRun& w, const Action& a, double now);
  void release(Named& b, double time);
  void check_all(CtaRun& cta, double time);
  double read(Sm& sm, double& port, double now, double bytes, double charged, std::uint16_t buffer,
              double multiplicity, double hit_latency, double miss_latency);
  double write(Sm& sm, double now, double bytes, double multiplicity);
  double dram(double now, double bytes, double multiplicity);
  void settle(double time);
  void find_misses();
  void set_clock();
  std::uint32_t label(const std::string& text);
  std::uint32_t mbarrier_label(std::uint32_t id);
  bool shows(const WarpRun& w) const {
    return w.track != ~0u && out_.intervals.size() < kMaxIntervals;
  }
  void interval(std::uint32_t track, std::uint32_t name, double begin, double end) {
    if (end > begin) out_.intervals.push_back({track, name, begin, end});
  }
  std::uint32_t name(const std::string& text);
  std::uint32_t track(const std::string& text);
  const std::string& role_of(const std::vector<Event>& events, const ClusterTrace& trace);
  void summarize(double cycles);
  void remark(const std::string& kind, const std::string& text, double cycles, std::uint32_t pc);

  const Gpu& gpu_;
  const Program& program_;
  const LaunchShapeOf& launch_;
  const std::vector<std::unique_ptr<ClusterTrace>>& traces_;
  const Constants c_;
  std::vector<Cost> costs_;
  Prediction out_;
  double dram_rate_ = 0;  // bytes per cycle
  std::vector<double> miss_, miss_credit_;
  std::set<std::uint32_t> full_;  // mbarriers that count bytes

  std::priority_queue<Item, std::vector<Item>, std::greater<Item>> queue_;
  std::uint64_t order_ = 0;
  std::vector<Sm> sms_;
  std::deque<std::unique_ptr<ClusterRun>> running_;
  const Samples* samples_ = nullptr;
  std::uint64_t next_ = 0, count_ = 0, rest_ = 0, islands_ = 1;
  double now_ = 0, end_ = 0, middle_ = 0;
  std::uint64_t finished_ = 0;
  using InFlight = std::pair<double, double>;
  std::priority_queue<InFlight, std::vector<InFlight>, std::greater<InFlight>> in_flight_;
  double share_ = 1;  // share_of_others of the replayed cluster
  double average_in_flight_ = 0, settled_ = 0, dram_free_ = 0;
  double bytes_in_flight_ = 0, dram_bytes_ = 0, l2_bytes_ = 0;
  std::vector<double> multicast_;  // when the pieces of a multicast arrive at its issuer
  double copy_begin_ = 0;
  bool tracing_ = false, uses_tensor_cores_ = false;

  std::vector<std::string> labels_;
  std::map<std::string, std::uint32_t> label_index_, name_index_, track_index_;
  std::unordered_map<const std::vector<Event>*, std::string> roles_;
  std::map<std::string, double> role_time_;
  std::map<std::string, std::map<std::pair<std::uint32_t, std::uint32_t>, double>> role_waits_;
  std::unordered_map<std::uint32_t, double> conflicts_, uncoalesced_, idle_;
  std::unordered_map<std::uint32_t, std::pair<double, double>> ratios_;
};

Replay::Replay(const Gpu& gpu, const Program& program, const LaunchShapeOf& launch,
               const std::vector<std::unique_ptr<ClusterTrace>>& traces)
    : gpu_(gpu), program_(program), launch_(launch), traces_(traces), costs_(costs(program, c_)) {
  bool fp8 = false, tensor = false;
  for (const Instruction& i : program.code) {
    const std::string& op = program.opcodes[i.opcode];
    const bool wgmma = i.traits.op_class == OpClass::wgmma;
    tensor |= wgmma || i.traits.op_class == OpClass::mma;
    fp8 |= wgmma && (op.find("e4m3") != op.npos || op.find("e5m2") != op.npos);
  }
  uses_tensor_cores_ = tensor;
  out_.gpu = gpu.name;
  out_.mhz = fp8 ? gpu.fp8_mhz : tensor ? gpu.tensor_mhz : gpu.other_mhz;
  out_.sms = gpu.sms;
  dram_rate_ = gpu.gigabytes_per_second * 1e3 / out_.mhz;
  for (const auto& trace : traces) {
    for (const Action& a : trace->actions) {
      if (a.kind == Action::load) full_.insert(a.id);
    }
  }
  for (const char* text : {"the scheduler", "operands", "loads", "a CTA's barrier",
                           "the cluster's barrier", "wgmma groups", "bulk stores", "cp.async"})
    label(text);
  find_misses();
}

std::uint32_t Replay::label(const std::string& text) {
  const auto [it, is_new] =
      label_index_.try_emplace(text, static_cast<std::uint32_t>(labels_.size()));
  if (is_new) labels_.push_back(text);
  return it->second;
}
std::uint32_t Replay::name(const std::string& text) {
  const auto [it, is_new] =
      name_index_.try_emplace(text, static_cast<std::uint32_t>(out_.names.size()));
  if (is_new) out_.names.push_back(text);
  return it->second;
}
std::uint32_t Replay::track(const std::string& text) {
  const auto [it, is_new] =
      track_index_.try_emplace(text, static_cast<std::uint32_t>(out_.tracks.size()));
  if (is_new) out_.tracks.push_back(text);
  return it->second;
}

std::uint32_t Replay::mbarrier_label(std::uint32_t id) {
  return label(full_.count(id) ? "full[slot]" : "empty[slot]");
}

// The share of each buffer's loads that L2 does not serve. A line misses when it is first touched.
// If all touched lines together exceed L2, CTAs that run side by side still share lines: those of a
// square of tiles read 1/sqrt(CTAs) of what they ask for.
void Replay::find_misses() {
  const std::size_t n = launch_.buffer_bytes.size();
  miss_.assign(n, 1);
  miss_credit_.assign(n, 0.5);
  const double clusters = static_cast<double>(launch_.clusters);
  const double scale = clusters / static_cast<double>(traces_.size());
  double touched = 0;
  std::vector<double> unique(n, 0), loaded(n, 0);
  for (std::size_t b = 0; b < n; ++b) {
    for (const auto& trace : traces_) {
      unique[b] += static_cast<double>(trace->buffers[b].unique());
      loaded[b] += static_cast<double>(trace->buffers[b].loaded);
    }
    unique[b] = std::min(static_cast<double>(launch_.buffer_bytes[b]), unique[b] * scale);
    loaded[b] *= scale;
    touched += unique[b];
  }
  const double side_by_side = std::min(clusters * launch_.cluster_size, double(gpu_.sms));
  const bool exceeds = touched > gpu_.l2_megabytes * 1e6;
  for (std::size_t b = 0; b < n; ++b) {
    if (loaded[b] == 0) continue;
    const double least = std::min(1.0, unique[b] / loaded[b]);
    miss_[b] = exceeds ? std::max(least, std::min(1.0, 1 / std::sqrt(side_by_side))) : least;
  }
}

// ---- Memory -------------------------------------------------------------------------------------

// Latency and rate by one curve: with W bytes in flight on the whole GPU, a request takes
// (latency^n + (W / rate)^n)^(1/n). The SMs start together and drift apart, so the others have as
// much in flight as these SMs at first, and later as much as they had on average.
double Replay::dram(double now, double bytes, double multiplicity) {
  while (!in_flight_.empty() && in_flight_.top().first <= now) {
    const auto [until, size] = in_flight_.top();
    settle(until);
    bytes_in_flight_ -= size;
    in_flight_.pop();
  }
  settle(now);
  bytes_in_flight_ += bytes * multiplicity;
  dram_bytes_ += bytes;
  if (now < kTogether) average_in_flight_ = bytes_in_flight_;
  const double others = std::max(0.0, 1 - 1 / multiplicity);
  const double all = (1 - others) * bytes_in_flight_ + others * average_in_flight_;
  const double n = c_.dram_exponent;
  const double curve =
      std::pow(std::pow(c_.dram_latency, n) + std::pow(all / dram_rate_, n), 1 / n);
  // However the SMs' requests are spread, memory has its rate: what it cannot do in kSlack waits.
  dram_free_ = std::max(dram_free_, now - kSlack) + bytes * multiplicity / dram_rate_;
  const double latency = std::max(curve, dram_free_ - now);
  in_flight_.emplace(now + latency, bytes * multiplicity);
  return latency;
}

void Replay::settle(double time) {
  if (time <= settled_) return;
  average_in_flight_ +=
      (bytes_in_flight_ - average_in_flight_) * (1 - std::exp((settled_ - time) / kTogether));
  settled_ = time;
}

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
  bool miss = false;
  if (buffer < miss_.size()) {
    miss_credit_[buffer] += miss_[buffer];
    miss = miss_credit_[buffer] >= 1;
    if (miss) miss_credit_[buffer] -= 1;
  }
  const double sent = granted + charged / c_.l2_rate;
  if (!miss) return sent + c_.l2_latency + hit_latency;
  return sent + dram(granted, bytes, multiplicity) + miss_latency;
}

double Replay::write(Sm& sm, double now, double bytes, double multiplicity) {
  const double granted = std::max(now, sm.write_port);
  sm.write_port = granted + bytes / c_.l2_rate;
  l2_bytes_ += bytes;
  dram(granted, bytes, multiplicity);
  return sm.write_port + c_.l2_latency;
}

// ---- Barriers -----------------------------------------------------------------------------------

void Replay::account(WarpRun& w, double from, double to, std::uint32_t why, std::uint32_t pc) {
  if (to <= from) return;
  w.waits[{why, pc}] += to - from;
  if (to - from >= 8 && shows(w)) interval(w.track, name("waits for " + labels_[why]), from, to);
}

void Replay::block(WarpRun& w, double now, std::uint32_t why) {
  w.blocked = true;
  w.blocked_at = now;
  w.wait_label = why;
}

void Replay::resume(WarpRun& w, double time) {
  w.blocked = false;
  account(w, w.blocked_at, time, w.wait_label, w.wait_pc);
  w.time = time;
  push(time, Item::run, &w);
}

void Replay::wait_until(WarpRun& w, double now, double time, std::uint32_t why) {
  if (time <= now) return;
  account(w, now, time, why, w.wait_pc);
  w.time = std::max(w.time, time);
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

void Replay::release(Named& b, double time) {
  const double at = time + c_.barrier_latency + c_.barrier_per_warp * b.arrived / 32;
  auto waiters = std::move(b.waiters);
  b = Named{};
  for (WarpRun* w : waiters) resume(*w, at);
}

// A barrier without a count waits for the threads that have not exited.
void Replay::check_all(CtaRun& cta, double time) {
  for (Named& b : cta.barriers) {
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

// False if the warp waits. Lanes that arrive apart wait once all lanes of the warp have arrived.
bool Replay::barrier(WarpRun& w, const Action& a, double now) {
  Named& b = w.cta->barriers[a.id & 15];
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

// ---- Tensor cores -------------------------------------------------------------------------------

// A wgmma starts when the last of its warps has issued it, one after another on the SM. It takes
// the longer of its products and its operands' way out of shared memory.
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
    idle_[sm.last_wait] += start - sm.tensor;
  sm.tensor = start + busy;
  sm.busy_tensor += products;
  sm.busy_shared += operands;
  if (shows(w))
    interval(track("CTA " + std::to_string(w.cta->rank) + ": tensor cores"),
             name("wgmma m64n" + std::to_string(a.count)), start, sm.tensor);
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

// ---- Copies -------------------------------------------------------------------------------------

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
    done = std::max(multicast_.empty() ? begin : multicast_.back(), sm.read_port) + away;
  } else {
    multicast_.clear();
    double at = begin;
    for (double left = a.global_bytes; left > 0; left -= kChunk) {
      const double bytes = std::min(left, kChunk);
      const double arrives = read(sm, sm.read_port, at, bytes, bytes / a.receivers, a.buffer,
                                  multiplicity, c_.tma_latency, c_.tma_dram_latency);
      done = std::max(done, arrives);
      at += bytes / c_.tma_rate;
    }
    multicast_.push_back(done);
    done += away;
  }
  const double cycles = a.bytes / 128.0 * c_.tma_write_share;
  sm.shared_debt += cycles;
  sm.busy_shared += cycles;
  push(done, Item::transactions, &to.mbarriers[a.id], 0, -static_cast<std::int64_t>(a.bytes));
  if (shows(w))
    interval(track("CTA " + std::to_string(to.rank) + ": TMA loads"),
             name(std::to_string(a.bytes) + " bytes"), begin, done);
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
  if (shows(w))
    interval(track("CTA " + std::to_string(w.cta->rank) + ": TMA stores"),
             name(std::to_string(a.bytes) + " bytes"), begin, done);
}

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
  if (a.count > a.ideal) {
    conflicts_[w.wait_pc] += a.count - a.ideal;
    auto& [actual, ideal] = ratios_[w.wait_pc];
    actual += a.count;
    ideal += a.ideal;
  }
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
  if (a.id > a.ideal) {
    uncoalesced_[w.wait_pc] += (a.id - a.ideal) * 32.0 / c_.l2_rate;
    auto& [actual, ideal] = ratios_[w.wait_pc];
    actual += a.id;
    ideal += a.ideal;
  }
}

// ---- Warps --------------------------------------------------------------------------------------

// False if the warp must wait for something else to happen.
bool Replay::act(WarpRun& w, const Event& e, const Cost& cost, double now) {
  const Action& a = w.cta->cluster->trace->actions[e.action];
  CtaRun& cta = *w.cta;
  ClusterRun& cluster = *cta.cluster;
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
    case Action::arrive: {
      Mbarrier& m = cluster.ctas[a.rank]->mbarriers[a.id];
      double at = now + (a.rank == cta.rank ? c_.arrive_latency : c_.remote_arrive_latency);
      if (a.flag) {
        m.pending += a.ideal;
        for (const auto& group : w.copies.committed) at = std::max(at, group.second);
        at = std::max(at, w.copies.done);
      }
      push(at, Item::arrive, &m, a.count, a.bytes);
      break;
    }
    case Action::wait: {
      Mbarrier& m = cluster.ctas[a.rank]->mbarriers[a.id];
      const std::uint32_t why = mbarrier_label(a.id);
      if (m.phase >= a.count) {
        wait_until(w, now, now + c_.wait_latency, why);
        break;
      }
      block(w, now, why);
      m.waiters.emplace_back(&w, a.count);
      return false;
    }
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
    case Action::wgmma_wait: {
      cta.sm->last_wait = w.wait_pc;
      if (w.wgmma_groups.size() <= a.count) break;
      const std::size_t needed = w.wgmma_groups[w.wgmma_groups.size() - 1 - a.count];
      Warpgroup& g = cta.groups[w.index / 4];
      if (needed == 0) break;
      if (g.ends.size() >= needed) {
        wait_until(w, now, g.ends[needed - 1] + c_.wgmma_tail, Wait::wgmma);
        break;
      }
      block(w, now, Wait::wgmma);
      g.waiters.emplace_back(&w, needed);
      return false;
    }
    case Action::barrier:
      return barrier(w, a, now);
    case Action::cluster_arrive:
      cluster.arrived += a.lanes;
      w.cluster_generation = cluster.generation;
      check_all(cta, now);
      break;
    case Action::cluster_wait:
      if (cluster.generation > w.cluster_generation) {
        wait_until(w, now, now + c_.cluster_barrier_latency, Wait::cluster);
        break;
      }
      block(w, now, Wait::cluster);
      cluster.waiters.push_back(&w);
      return false;
  }
  return true;
}

void Replay::step(WarpRun& w) {
  Sm& sm = *w.cta->sm;
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
      if (ready > w.time) {
        account(w, w.time, ready, Wait::operands, pc);
        w.time = ready;
        if (cost.ends_block) w.block = 0;
        push(ready, Item::run, &w);
        return;
      }
      if (cost.ends_block) w.block = 0;
    }
    ++w.at;
    const double before = w.time;
    double issued = w.time;
    if (cost.slots > 0) {
      double& scheduler = sm.scheduler[w.scheduler];
      issued = std::max(w.time, scheduler);
      scheduler = issued + cost.slots;
      sm.busy_slots += cost.slots;
      if (issued > w.time) w.waits[{Wait::issue, pc}] += issued - w.time;
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
      // A pipe has a short queue; then the warp waits for it.
      if (entered - issued > 16) wait_until(w, w.time, entered - 16, Wait::issue);
    } else if (cost.tensor) {
      const double entered = std::max(start, sm.mma[w.scheduler]);
      sm.mma[w.scheduler] = entered + c_.mma_interval;
      sm.busy_tensor += c_.mma_interval / 4;
      start = entered;
    } else if (cost.shuffle) {
      start = std::max(start, sm.shuffle);
      sm.shuffle = start + c_.shuffle_interval;
    }
    if (e.action == 0 || !cost.in_order) {
      const double ready = start + cost.latency * std::max(1.0f, cost.slots / 2);
      for (const std::uint32_t reg : cost.writes) w.ready[reg] = ready;
      if (!cost.in_order && !cost.ends_block) w.block = std::max(w.block, start);
    }
    const double now = issued;
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

void Replay::finish_warp(WarpRun& w) {
  CtaRun& cta = *w.cta;
  ClusterRun& cluster = *cta.cluster;
  w.finished = true;
  const double end = std::max(w.time, w.block);
  end_ = std::max(end_, end);
  const std::string& role = role_of(*w.events, *cluster.trace);
  role_time_[role] += end - w.begin;
  for (const auto& [key, cycles] : w.waits) role_waits_[role][key] += cycles;
  w.waits.clear();
  w.ready = {};  // the warp itself stays: late copies may still signal its CTA
  cta.alive_threads -= w.threads;
  cluster.alive_threads -= w.threads;
  check_all(cta, end);
  if (--cluster.live != 0) return;
  ++finished_;
  if (finished_ == count_ / 2) middle_ = end;
  if (next_ < count_) start_cluster(end + c_.cta_start, next_++);
}

const std::string& Replay::role_of(const std::vector<Event>& events, const ClusterTrace& trace) {
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

// How much the traced clusters move on average, as a share of what this one moves: in a launch that
// fits on the GPU at once, some CTAs may have less to do than others, or nothing.
double Replay::share_of_others(const ClusterTrace& trace) const {
  const auto moved = [](const ClusterTrace& t) {
    double bytes = 1;
    for (const BufferUse& use : t.buffers) bytes += double(use.loaded + use.stored);
    return bytes;
  };
  double sum = 0;
  for (const auto& each : traces_) sum += moved(*each);
  return std::min(1.0, sum / double(traces_.size()) / moved(trace));
}

void Replay::start_cluster(double time, std::uint64_t index) {
  auto run = std::make_unique<ClusterRun>();
  run->index = static_cast<std::uint32_t>(index);
  run->trace = (*samples_)[index % samples_->size()];
  // In the last, partial wave fewer SMs have a cluster.
  run->multiplicity = double(rest_ != 0 && index + 1 == count_ ? rest_ : islands_);
  if (launch_.clusters <= islands_) share_ = share_of_others(*run->trace);
  run->multiplicity *= share_;
  for (std::size_t rank = 0; rank < run->trace->ctas.size(); ++rank) {
    auto cta = std::make_unique<CtaRun>();
    cta->cluster = run.get();
    cta->sm = &sms_[rank];
    cta->rank = static_cast<std::uint32_t>(rank);
    const auto& warps = run->trace->ctas[rank];
    cta->groups.resize((warps.size() + 3) / 4);
    for (std::size_t k = 0; k < warps.size(); ++k) {
      auto w = std::make_unique<WarpRun>();
      w->cta = cta.get();
      w->events = &warps[k];
      w->index = static_cast<std::uint32_t>(k);
      w->scheduler = static_cast<std::uint32_t>(k + index) % 4;
      w->threads = std::min(32u, launch_.threads - static_cast<std::uint32_t>(k) * 32);
      w->time = w->begin = time;
      w->ready.assign(program_.register_count + 1, 0);
      if (tracing_ && index == 0) {
        w->track = track("CTA " + std::to_string(rank) + ": warp " + std::to_string(k) + " (" +
                         role_of(*w->events, *run->trace) + ")");
      }
      cta->alive_threads += w->threads;
      run->alive_threads += w->threads;
      ++run->live;
      push(time, Item::run, w.get());
      cta->warps.push_back(std::move(w));
    }
    run->ctas.push_back(std::move(cta));
  }
  running_.push_back(std::move(run));
}

// Runs `count` clusters, `resident` at a time. `rest`: clusters of the last, partial wave.
double Replay::simulate(const Samples& samples, std::uint64_t count, std::uint32_t resident,
                        std::uint64_t rest, double* middle) {
  queue_ = {};
  in_flight_ = {};
  bytes_in_flight_ = dram_bytes_ = l2_bytes_ = average_in_flight_ = settled_ = dram_free_ = 0;
  sms_.assign(launch_.cluster_size, Sm{});
  running_.clear();
  role_time_.clear();
  role_waits_.clear();
  conflicts_.clear();
  uncoalesced_.clear();
  idle_.clear();
  ratios_.clear();
  samples_ = &samples;
  count_ = count;
  rest_ = rest;
  next_ = 0;
  finished_ = 0;
  end_ = middle_ = 0;
  while (next_ < count && next_ < resident) start_cluster(0, next_++);
  while (!queue_.empty()) {
    const Item item = queue_.top();
    queue_.pop();
    now_ = item.time;
    switch (item.kind) {
      case Item::run:
        step(*static_cast<WarpRun*>(item.what));
        break;
      case Item::arrive:
        change(*static_cast<Mbarrier*>(item.what), item.time, item.count, item.bytes);
        break;
      case Item::transactions:
        change(*static_cast<Mbarrier*>(item.what), item.time, 0, item.bytes);
        break;
    }
  }
  if (finished_ != count)
    throw std::runtime_error("the timing replay stopped: a warp waits for what no traced CTA does");
  if (middle != nullptr) *middle = middle_;
  return end_;
}

Prediction Replay::run() {
  const std::uint32_t size = launch_.cluster_size;
  // Clusters lie within a GPC; GPCs have 16 or 18 SMs: 66 of 2, 30 of 4 and 15 of 8 CTAs
  // fit on 132 SMs (flash-vla).
  islands_ = size <= 2   ? gpu_.sms / size
             : size <= 4 ? gpu_.sms / 4 - gpu_.sms / 44
                         : (gpu_.sms / 8) - 1;
  if (size > 8) islands_ = std::max(1u, gpu_.sms / 18);
  const Architecture& arch = *find_architecture(gpu_.capability);
  std::uint32_t fit =
      std::min(arch.threads_per_sm / ((launch_.threads + 31) / 32 * 32), arch.ctas_per_sm);
  fit = std::min(fit, arch.shared_per_sm / std::max(1u, launch_.shared_bytes + 1024));
  double registers = launch_.registers_per_thread;  // that the launch bounds allow
  if (!uses_tensor_cores_) registers = std::min(registers, c_.plain_registers);
  fit = std::min(fit, static_cast<std::uint32_t>(limits::registers_per_sm /
                                                 std::max(1.0, registers * launch_.threads)));
  fit = std::max(1u, fit);
  out_.ctas_per_sm = fit;
  const std::uint64_t most = islands_;
  islands_ = std::min<std::uint64_t>(most, launch_.clusters);
  const std::uint64_t queue = (launch_.clusters + islands_ - 1) / islands_;
  const std::uint64_t rest = launch_.clusters % islands_;
  out_.waves = double(launch_.clusters) / double(most * fit);
  for (const auto& trace : traces_)
    out_.traced_ctas += static_cast<std::uint32_t>(trace->ctas.size());

  Samples all;
  std::uint64_t events = 0;
  for (const auto& trace : traces_) {
    all.push_back(trace.get());
    events += trace->events();
  }
  double cycles = 0;
  if (queue == 1) {  // one cluster on each group of SMs: the slowest decides
    double longest = 0, sum = 0;
    Samples slowest;
    for (const ClusterTrace* trace : all) {
      const double each = simulate({trace}, 1, 1, 0, nullptr);
      sum += each;
      if (each > longest) {
        longest = each;
        slowest = {trace};
      }
    }
    out_.tail = 1 - sum / (longest * double(all.size()));
    if (uses_tensor_cores_) {
      simulate(slowest, 1, 1, 0, nullptr);
      set_clock();
    }
    tracing_ = true;
    cycles = simulate(slowest, 1, 1, 0, nullptr);
  } else {
    const std::uint64_t each = std::max<std::uint64_t>(1, events / all.size());
    const std::uint64_t affordable =
        std::max<std::uint64_t>(4 * fit, std::min(kMaxClusters, kMaxEvents / each));
    const std::uint64_t count = std::min(queue, affordable);
    double middle = 0;
    if (uses_tensor_cores_) {
      simulate(all, count, fit, count == queue ? rest : 0, &middle);
      set_clock();
    }
    tracing_ = true;
    cycles = simulate(all, count, fit, count == queue ? rest : 0, &middle);
    if (count < queue)
      cycles += (cycles - middle) / double(count - count / 2) * double(queue - count);
    out_.tail = 1 - double(launch_.clusters) / double(queue * islands_);
  }
  summarize(cycles);
  return std::move(out_);
}

// Tensor cores at work lower the clock: in full, if they work for c_.full_load of the time.
void Replay::set_clock() {
  double busy = 0;
  for (const Sm& sm : sms_) busy += sm.busy_tensor;
  const double load = busy / std::max(1.0, end_ * double(sms_.size()));
  const double full = out_.mhz;
  out_.mhz = gpu_.other_mhz - (gpu_.other_mhz - full) * std::min(1.0, load / c_.full_load);
  dram_rate_ = gpu_.gigabytes_per_second * 1e3 / out_.mhz;
}

// ---- Summary ------------------------------------------------------------------------------------

void Replay::remark(const std::string& kind, const std::string& text, double cycles,
                    std::uint32_t pc) {
  const Instruction& i = program_.code[pc];
  out_.remarks.push_back({kind, text, cycles, i.line});
}

void Replay::summarize(double cycles) {
  out_.cycles = cycles;
  out_.launch_microseconds = c_.ramp + c_.drain;
  out_.microseconds = cycles / out_.mhz + out_.launch_microseconds;
  out_.error = c_.error;
  const double simulated = std::max(1.0, end_), sms = double(sms_.size());
  Sm sum;
  for (const Sm& sm : sms_) {
    sum.busy_slots += sm.busy_slots;
    for (int p = 0; p < kPipes; ++p) sum.busy_pipe[p] += sm.busy_pipe[p];
    sum.busy_shared += sm.busy_shared;
    sum.busy_tensor += sm.busy_tensor;
    sum.busy_tma += sm.busy_tma;
    sum.busy_port += sm.busy_port;
  }
  const double whole = simulated * sms;
  auto& u = out_.utilization;
  u["issue slots"] = sum.busy_slots / whole / 4;
  u["ALU"] = sum.busy_pipe[kAlu] / whole / 4;
  u["FMA"] = sum.busy_pipe[kFma] / whole / 4;
  u["special functions"] = sum.busy_pipe[kSpecial] / whole / 4;
  u["converts"] = sum.busy_pipe[kConvert] / whole / 4;
  u["shared memory"] = sum.busy_shared / whole;
  u["tensor cores"] = sum.busy_tensor / whole;
  u["TMA"] = sum.busy_tma / whole;
  u["L2 to SM"] = sum.busy_port / whole;
  const double share = share_ * double(islands_) * dram_bytes_ / simulated / dram_rate_;
  u["device memory"] = std::min(1.0, share);
  const double scale = share_ * double(islands_) * cycles / simulated;
  out_.dram_bytes = dram_bytes_ * scale;
  out_.l2_bytes = l2_bytes_ * scale;

  for (const auto& [role, waits] : role_waits_) {
    std::map<std::uint32_t, std::pair<double, std::pair<double, std::uint32_t>>> by_label;
    for (const auto& [key, spent] : waits) {
      auto& [total, worst] = by_label[key.first];
      total += spent;
      worst = std::max(worst, {spent, key.second});
    }
    for (const auto& [why, what] : by_label) {
      const double part = what.first / std::max(1.0, role_time_[role]);
      const Instruction& i = program_.code[what.second.second];
      out_.waits.push_back({role, labels_[why], part, i.line});
    }
  }
  std::stable_sort(out_.waits.begin(), out_.waits.end(), [](const auto& a, const auto& b) {
    return a.role != b.role ? a.role < b.role : a.share > b.share;
  });

  const auto factor = [&](std::uint32_t pc) {
    char text[64];
    const auto [actual, ideal] = ratios_[pc];
    std::snprintf(text, sizeof text, "%.1f times as many", ideal > 0 ? actual / ideal : 1.0);
    return std::string(text);
  };
  for (const auto& [pc, lost] : conflicts_) {
    if (lost / sms > 0.01 * simulated)
      remark("bank conflicts", factor(pc) + " wavefronts as without conflicts", lost / sms, pc);
  }
  for (const auto& [pc, lost] : uncoalesced_) {
    if (lost / sms > 0.01 * simulated)
      remark("uncoalesced access", factor(pc) + " sectors as its bytes fill", lost / sms, pc);
  }
  for (const auto& [pc, lost] : idle_) {
    if (lost / sms > 0.05 * simulated)
      remark("serialized wgmma", "the tensor cores idle after this wait", lost / sms, pc);
  }
  std::sort(out_.remarks.begin(), out_.remarks.end(), [](const Remark& a, const Remark& b) {
    return a.cycles != b.cycles ? a.cycles > b.cycles : a.ptx_line < b.ptx_line;
  });
}

}  // namespace

static thread_local Request* asked = nullptr;
Request* request() {
  return asked;
}
Asking::Asking(Request* request) {
  asked = request;
}
Asking::~Asking() {
  asked = nullptr;
}

const std::vector<Gpu>& gpus() {
  static const std::vector<Gpu> rows = {
#define TORCHEXT_GPU(name, ...) {#name, __VA_ARGS__},
#include "csrc/runtime/timing.inc"
  };
  return rows;
}

const Gpu* find_gpu(const std::string& name) {
  for (const Gpu& gpu : gpus()) {
    if (name == gpu.name) return &gpu;
  }
  return nullptr;
}

const std::vector<ConstantRow>& constant_rows() {
  static const std::vector<ConstantRow> rows = {
#define TORCHEXT_TIME(name, value, unit, fitted, grade, source) \
  {#name, value, unit, fitted != 0, grade, source},
#include "csrc/runtime/timing.inc"
  };
  return rows;
}

Prediction predict(const Gpu& gpu, const Program& program, const LaunchShapeOf& launch,
                   const std::vector<std::unique_ptr<ClusterTrace>>& traces) {
  return Replay(gpu, program, launch, traces).run();
}

}  // namespace torchext::sim::timing
