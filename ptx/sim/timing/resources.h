// What the replay simulates of an SM, and of the clusters, CTAs and warps on it. Times are in cycles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "trace.h"
#include "weights.h"

namespace torchext::sim::timing {

struct WarpRun;
struct CtaRun;

struct Wait {  // why a warp does not issue; the first labels of a Journal
  enum Reason : std::uint8_t { issue, operands, load, barrier, cluster, wgmma, bulk, copy };
};

// ---- Of the hardware ----------------------------------------------------------------------------

// When each unit is free, and for how many cycles it has been busy.
struct Sm {
  double scheduler[4] = {}, pipe[4][kPipes] = {}, mma[4] = {};
  double load_store = 0, shuffle = 0, tensor = 0, tma = 0, read_port = 0, load_port = 0,
         write_port = 0;
  double shared_debt = 0;  // cycles of shared memory that the next wgmma finds taken
  double busy_slots = 0, busy_pipe[kPipes] = {}, busy_shared = 0, busy_tensor = 0, busy_tma = 0,
         busy_port = 0;
  std::uint32_t last_wait = ~0u;  // pc of the last wgmma wait
};

struct Mbarrier {
  std::int64_t expected = 0, pending = 0, transactions = 0;
  std::uint32_t phase = 0;
  std::vector<std::pair<WarpRun*, std::uint32_t>> waiters;  // and the phases that they need
};

struct NamedBarrier {
  std::uint32_t arrived = 0;
  std::vector<WarpRun*> waiters;
  std::unordered_map<const WarpRun*, std::uint32_t> lanes;
};

// The wgmmas of a warpgroup.
struct Warpgroup {
  std::vector<double> ends;  // of those that have started
  std::vector<std::uint8_t> issued;
  std::vector<std::pair<WarpRun*, std::size_t>> waiters;  // and how many wgmmas they need
};

// A warp's groups of asynchronous copies.
struct CopyGroups {
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

// ---- Of the program -----------------------------------------------------------------------------

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
  NamedBarrier barriers[16];
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
  double hoisted = 0;  // since when ptxas may have issued the arithmetic of this basic block
  bool starts_block = true;
  std::vector<double> ready;  // by register
  CopyGroups bulk, copies;
  std::vector<std::size_t> wgmma_groups;  // wgmmas issued at each commit
  std::size_t wgmmas = 0;
  std::uint32_t cluster_generation = 0;
  double blocked_at = 0;
  std::uint32_t wait_label = 0, wait_pc = 0;
  std::map<std::pair<std::uint32_t, std::uint32_t>, double> waits;  // by label and pc
};

}  // namespace torchext::sim::timing
