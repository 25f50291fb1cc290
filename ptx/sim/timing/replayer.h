// The replay: a discrete-event model of one group of SMs, which hold one cluster after another. All
// other SMs are taken to do the same at the same time: they share L2 and device memory with it.
//
// Times are in cycles. A warp issues its instructions in order (issue.cpp). A result is ready after
// its latency; ptxas is taken to order each basic block so that only the end of the block waits for
// it, except for memory instructions, which wait for their operands. A resource serves requests in
// the order of their times: shared memory, copies and loads are in accesses.cpp, barriers in
// barriers.cpp, wgmma in tensor_cores.cpp, L2 and device memory in memory_system.cpp. replay.cpp
// decides which clusters run, and makes the Prediction with what journal.cpp has noted.
#pragma once

#include <deque>
#include <functional>
#include <queue>

#include "journal.h"
#include "memory_system.h"
#include "replay.h"
#include "resources.h"

namespace torchext::sim::timing {

class Replay {
 public:
  Replay(const Gpu& gpu, const Program& program, const LaunchShapeOf& launch,
         const std::vector<std::unique_ptr<ClusterTrace>>& traces);
  Prediction run();

 private:
  using Samples = std::vector<const ClusterTrace*>;
  struct Item {  // something that happens at a time
    enum Kind : std::uint8_t { run, arrive, transactions };
    double time;
    std::uint64_t order;
    Kind kind;
    void* what;
    std::int64_t count, bytes;
    bool operator>(const Item& o) const { return time != o.time ? time > o.time : order > o.order; }
  };
  void push(double time, Item::Kind kind, void* what, std::int64_t count = 0,
            std::int64_t bytes = 0) {
    queue_.push({time, order_++, kind, what, count, bytes});
  }

  // The launch as a whole (replay.cpp).
  double simulate(const Samples& samples, std::uint64_t count, std::uint32_t resident,
                  std::uint64_t rest, double* middle);
  std::uint32_t ctas_that_fit() const;
  double share_of_others(const ClusterTrace& trace) const;
  void start_cluster(double time, std::uint64_t index);
  double one_wave();
  double many_waves(std::uint64_t queue, std::uint64_t rest);
  double dram_rate() const { return gpu_.gigabytes_per_second * 1e3 / out_.mhz; }
  void set_clock();
  void summarize(double cycles);

  // Instructions (issue.cpp)
  void step(WarpRun& w);
  double issue(WarpRun& w, const Cost& cost, double operands, bool has_result);
  bool act(WarpRun& w, const Event& e, const Cost& cost, double now);
  void block(WarpRun& w, double now, std::uint32_t label);
  void resume(WarpRun& w, double time);
  void wait_until(WarpRun& w, double now, double time, std::uint32_t label);
  void finish_warp(WarpRun& w);

  // Barriers (barriers.cpp)
  void arrive(WarpRun& w, const Action& a, double now);
  bool wait(WarpRun& w, const Action& a, double now);
  void change(Mbarrier& m, double time, std::int64_t arrivals, std::int64_t bytes);
  bool barrier(WarpRun& w, const Action& a, double now);
  bool cluster_wait(WarpRun& w, double now);
  void release(NamedBarrier& b, double time);
  void check_all(CtaRun& cta, double time);

  // Tensor cores (tensor_cores.cpp)
  void start_wgmma(WarpRun& w, const Action& a, double now);
  bool wait_for_wgmma(WarpRun& w, const Action& a, double now);

  // Memory (accesses.cpp)
  void load_tma(WarpRun& w, const Action& a, double now, bool more);
  void store_tma(WarpRun& w, const Action& a, double now);
  void shared(WarpRun& w, const Action& a, const Cost& cost, double now);
  void global(WarpRun& w, const Action& a, const Cost& cost, double now);
  double read(Sm& sm, double& port, double now, double bytes, double charged, std::uint16_t buffer,
              double multiplicity, double hit_latency, double miss_latency);
  double write(Sm& sm, double now, double bytes, double multiplicity);

  const Gpu& gpu_;
  const Program& program_;
  const LaunchShapeOf& launch_;
  const std::vector<std::unique_ptr<ClusterTrace>>& traces_;
  const Constants c_;
  const std::vector<Cost> costs_;  // by instruction
  Prediction out_;
  Journal journal_;
  DeviceMemory memory_;
  L2 l2_;

  std::priority_queue<Item, std::vector<Item>, std::greater<Item>> queue_;
  std::uint64_t order_ = 0;
  std::vector<Sm> sms_;
  std::deque<std::unique_ptr<ClusterRun>> running_;
  const Samples* samples_ = nullptr;
  std::uint64_t next_ = 0, count_ = 0, rest_ = 0, islands_ = 1, finished_ = 0;
  double end_ = 0, middle_ = 0;
  double share_ = 1;  // share_of_others of the replayed cluster
  double l2_bytes_ = 0;
  double copy_begin_ = 0, multicast_ = 0;  // of a multicast: its begin, and its issuer's arrival
  bool uses_tensor_cores_ = false;
};

}  // namespace torchext::sim::timing
