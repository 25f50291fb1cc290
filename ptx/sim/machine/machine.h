// The simulated machine: grid, cluster, CTA, warp. A Cluster runs on one host thread. The Grid is
// shared by all clusters.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "../check/clock.h"
#include "../check/scopes.h"
#include "../check/shadow.h"
#include "../frontend/ir.h"
#include "../instructions/wgmma_stream.h"
#include "calls.h"
#include "device_heap.h"
#include "launch.h"
#include "memory.h"

namespace torchext::sim {

class Cluster;
class Cta;
class Warp;
class Grid;

// Thrown to stop the whole launch, after a finding such as a deadlock or a trap.
struct LaunchStopped {};

class Random {  // splitmix64
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  std::uint32_t below(std::uint32_t n) {
    return static_cast<std::uint32_t>(((next() >> 32) * n) >> 32);
  }

 private:
  std::uint64_t state_;
};

// A point where diverged lanes wait for each other: the immediate post-dominator of the branch at
// which they diverged.
struct JoinPoint {
  std::uint32_t pc = 0;
  std::uint32_t expected = 0;  // lanes still in the region or parked
  std::uint32_t parked = 0;
  std::size_t depth = 0;  // number of calls it lies within
};

// Lanes that share a pc.
struct Group {
  std::uint32_t pc = 0;
  std::uint32_t mask = 0;
  std::vector<std::shared_ptr<JoinPoint>> tokens;
  std::vector<CallFrame> calls;  // calls to return from, innermost last
  bool blocked = false;          // the instruction at pc must be tried again
  bool parked = false;           // waits at tokens.back()
  bool arrived = false;          // a barrier has counted this group already
  bool released = false;         // the collective at pc is done for this group
  bool alone = false;            // may execute an .aligned instruction without the other lanes
  bool give_up = false;          // has waited in vain: a try_wait may now return false
  bool ran = false;              // since Warp::repeats last looked at its state
  bool cycles = false;           // it has returned to an earlier state
  std::uint64_t generation = 0;  // of the barrier it waits for
  std::uint64_t blocked_at = 0;  // Cluster::progress at that time
};

// Asynchronous work. `read` (optional) reads its source, `finish` writes its result.
struct AsyncWork {
  std::function<void()> read, finish;
  bool read_done = false, done = false;
  bool wanted = false;  // something waits for it
  std::string what;
};

struct MBarrier {
  std::uint32_t expected = 0;  // arrivals per phase
  std::int64_t pending = 0;    // arrivals missing in this phase
  std::int64_t transactions = 0;
  std::uint64_t phase = 0;
  std::uint32_t agent = 0;  // acts for the copies of each phase; its clock is phase + 1
  std::uint32_t init_agent = 0, init_clock = 0, init_pc = 0;
  bool fenced = false;                // fence.mbarrier_init or fence.proxy.async since init
  std::uint32_t published_agent = 0;  // by fence.mbarrier_init; to know it is to know the init
  Knowledge arriving, completed;      // by the CTA's own threads and by copies
  Knowledge remote_arriving, remote_completed;  // by threads of other CTAs
  std::vector<std::weak_ptr<AsyncWork>> work;   // copies that signal it
  // Agents and clocks of the tensor copies of this phase that read their map from memory.
  std::vector<std::pair<std::uint32_t, std::uint32_t>> map_reads;
  // Phases, counted from 1: the last one that a copy signals, the last one that a thread awaited.
  std::uint64_t signaled = 0, waited = 0;
  std::uint32_t signaled_pc = 0;
};

struct NamedBarrier {
  std::uint32_t expected = 0;             // threads; 0: all that the CTA still has
  std::array<std::uint32_t, 32> lanes{};  // that have arrived, by warp
  std::uint32_t again = 0;                // threads of warps that arrived more than once
  bool open = false;                      // somebody has arrived
  std::uint64_t generation = 0;
  std::uint32_t first_pc = 0;
  Knowledge arriving, completed;
  std::uint32_t reduce_and = 1, reduce_or = 0, reduce_count = 0;
  std::uint32_t result_and = 0, result_or = 0, result_count = 0;
};

// barrier.cluster. Warp::cluster_pending holds the lanes that have arrived.
struct ClusterBarrier {
  Knowledge arriving, completed;
};

// A thread's cp.async.bulk groups, or a warp's cp.async groups.
struct CopyGroups {
  std::uint32_t read_agent = 0, write_agent = 0;  // 0: not yet assigned
  std::uint32_t current = 1;                      // clock of the group being filled
  bool open = false;                              // the group being filled is not empty
  std::uint32_t read_waited = 0, waited = 0;      // groups up to this clock are known done
  std::uint32_t last_pc = 0;
  // The last group that stores to another GPU's memory; 0: none.
  std::uint32_t remote = 0, remote_pc = 0;
  int remote_device = -1;
  // Reads of tensor maps in memory by the thread's loads. A thread's loads read maps in order, so
  // one clock covers all earlier reads.
  std::uint32_t map_agent = 0, map_clock = 0;
  std::map<std::uint32_t, std::uint32_t> map_clocks;  // at the commit of each group
  std::map<std::uint32_t, std::vector<std::shared_ptr<AsyncWork>>> work;  // by group
};

// A lane's acquire of a tensor map. A thread that knows the lane up to this clock may use the map,
// for those writes that the lane's views then had as released.
struct MapFence {
  std::uint32_t agent, clock;
  Scope scope;
  ViewsRef views;
};

struct LaneBits;  // validity.h

// Bytes of a lane's local memory, and the validity of their bits.
struct LocalBytes {
  std::uint8_t *data, *valid;
};

class Warp {
 public:
  Warp(Cta& cta, std::uint32_t index);
  ~Warp();

  // Runs up to `quantum` instructions of one group and returns their number.
  std::uint32_t run(std::uint32_t quantum);
  bool runnable() const;  // some group might make progress
  bool finished() const { return live_ == 0; }

  // ---- for instructions ----
  template <class T = std::uint8_t>
  T* at(const Slot& slot) const {
    return reinterpret_cast<T*>(banks_[slot.bank] + slot.offset);
  }
  std::uint32_t predicate(const Slot& slot) const {
    const std::uint32_t mask = *at<std::uint32_t>(slot);
    return slot.negate ? ~mask : mask;
  }
  void set_predicate(const Slot& slot, std::uint32_t mask, std::uint32_t value) {
    auto* p = at<std::uint32_t>(slot);
    *p = (*p & ~mask) | (value & mask);
  }
  // Lanes whose register is valid whole. set_valid makes all bits of the other lanes invalid.
  std::uint32_t valid(const Slot& slot) const { return valid_[slot.reg]; }
  void set_valid(const Slot& slot, std::uint32_t mask, std::uint32_t value) {
    std::uint32_t& v = valid_[slot.reg];
    v = (v & ~mask) | (value & mask);
    if ((mask & ~value) != 0 && !partly_valid_.empty()) forget_valid_bits(slot, mask & ~value);
  }
  // Valid bits of a lane (validity.cpp). Bits beyond the register's width do not count.
  std::uint64_t valid_bits(const Slot& slot, int lane) const {
    return (valid_[slot.reg] >> lane) & 1 ? ~std::uint64_t{0} : partly_valid_bits(slot, lane);
  }
  void set_valid_bits(const Slot& slot, std::uint32_t mask, const LaneBits& bits);
  void set_validity(const Slot& slot, std::uint32_t mask, bool whole, const LaneBits& bits) {
    if (whole)
      set_valid(slot, mask, mask);
    else
      set_valid_bits(slot, mask, bits);
  }
  void copy_valid(const Slot& to, std::uint32_t mask, const Slot& from);
  // Reports the lanes of `mask` in which any of these bits of the register was never assigned.
  void need(const Slot& slot, std::uint32_t mask, const char* use,
            std::uint64_t bits = ~std::uint64_t{0});
  std::uint64_t integer(const Slot& slot, int lane) const {
    return slot.bytes == 8 ? at<std::uint64_t>(slot)[lane] : at<std::uint32_t>(slot)[lane];
  }
  // The address that `lane` has for [slot + offset]. It wraps at 32 bits in a 32-bit register.
  std::uint64_t address(const Slot& slot, std::int64_t offset, int lane) const {
    const std::uint64_t at = integer(slot, lane) + static_cast<std::uint64_t>(offset);
    return slot.bytes == 4 ? static_cast<std::uint32_t>(at) : at;
  }
  void put(const Slot& slot, int lane, std::uint64_t value) {
    if (slot.bytes == 8)
      at<std::uint64_t>(slot)[lane] = value;
    else
      at<std::uint32_t>(slot)[lane] = static_cast<std::uint32_t>(value);
  }

  Cta& cta() const { return cta_; }
  Cluster& cluster() const { return cluster_; }
  Grid& grid() const { return grid_; }
  const Program& program() const { return program_; }
  std::uint32_t index() const { return index_; }
  std::uint32_t live() const { return live_; }
  Group& group() { return groups_[current_]; }
  std::vector<Group>& groups() { return groups_; }
  std::uint32_t pc() const { return groups_[current_].pc; }

  void finding(FindingKind kind, const std::string& message, std::uint32_t lanes,
               std::uint64_t address = 0, const std::string& other = "",
               std::uint32_t other_line = 0);
  void finding_at(std::uint32_t pc, FindingKind kind, const std::string& message,
                  std::uint32_t lanes, std::uint64_t address = 0, const OtherAccess& other = {},
                  const std::string& remedy = "");

  // Control flow (divergence.cpp).
  void branch(const Instruction& i, std::uint32_t taken);
  void branch_each(const std::uint32_t (&targets)[32], std::uint32_t mask,
                   std::uint32_t reconverge);
  // Calls (calls.cpp) and the lanes' stacks (stack.cpp).
  void enter(const Callee* const* by_lane, std::uint32_t mask);
  void leave(std::uint32_t mask);
  LocalBytes local_bytes(int lane, const CallValue& value);
  std::uint32_t grow_stack(int lane, std::uint64_t bytes, std::uint32_t align);  // its address
  bool cut_stack(int lane, std::uint64_t top);  // false if that is no earlier top
  std::uint32_t stack_top(int lane) const { return stack_top_[static_cast<std::size_t>(lane)]; }
  void start_block(std::uint64_t address, std::uint64_t bytes);  // that malloc returns
  void exit_lanes(std::uint32_t mask);
  // Splits `lanes` off the current group into a new group at the same instruction, and returns it.
  // The two merge again after the instruction.
  Group& part(std::uint32_t lanes) { return groups_[part(current_, lanes)]; }
  std::size_t part(std::size_t group, std::uint32_t lanes);
  // Moves those of `lanes` that are at the current group's instruction into that group.
  void absorb(std::uint32_t lanes);
  bool unpark();  // lets parked lanes run on alone; false if there are none
  bool waits_for_warp(const Group& g) const;  // for the other lanes, at an .aligned instruction
  bool let_go_alone();                        // lets such groups execute it alone
  bool time_out();                            // lets try_waits return false
  bool repeats();                             // true if every group waits or loops without change
  void forget_states();

  // Order (order.cpp).
  std::uint32_t agent(int lane) const { return first_agent_ + static_cast<std::uint32_t>(lane); }
  Actor actor(int lane, Scope scope = Scope::none) const {
    Actor a = self_;
    a.agent = a.issuer = agent(lane);
    a.clock = a.issuer_clock = clock_[lane];
    a.known = &*known_[lane];
    a.views = &*views_[lane];
    a.pc = groups_[current_].pc;
    a.scope = scope;
    return a;
  }
  void order_lanes(std::uint32_t mask);         // as bar.warp.sync does
  void order_if_converged(std::uint32_t mask);  // order_lanes, unless the lane order is "strict"
  Knowledge release(std::uint32_t mask);
  void acquire(std::uint32_t mask, const Knowledge& knowledge);
  // Makes what the lanes know visible to the async proxy (`spaces`: bits of AsyncSpace) or to
  // aliases, or releases it to the tensormap proxy.
  void async_fence(std::uint32_t mask, std::uint32_t spaces);
  void alias_fence(std::uint32_t mask);
  void release_maps(std::uint32_t mask, Scope scope);
  void memory_fence(std::uint32_t mask, Scope scope, bool acquires = true, bool releases = true);
  void learn(std::uint32_t mask, std::uint32_t agent, std::uint32_t clock);
  void touched(std::uint32_t mask) { dirty_ |= mask; }
  // Notes that an instruction has read memory or waited, and has changed nothing.
  void polled();
  // Notes what a lane has just read that other threads may change, for deadlock reports.
  void note_poll(int lane, std::uint64_t address, std::uint32_t bytes);
  struct Poll {
    std::uint64_t address = 0, progress = 0;  // Cluster::progress at that time
    std::uint32_t bytes = 0, pc = 0;
  };
  const Poll& last_poll(int lane) const { return polls_of_[static_cast<std::size_t>(lane)]; }
  const ClockRef& known(int lane) const { return known_[lane]; }
  const ViewsRef& views(int lane) const { return views_[lane]; }
  std::uint32_t clock(int lane) const { return clock_[lane]; }
  void tick(std::uint32_t mask) {
    for (; mask; mask &= mask - 1) ++clock_[__builtin_ctz(mask)];
  }
  Scoped fence_released[32];   // at the last memory fence; a later strong write publishes it
  Scoped strong_acquired[32];  // seen by strong reads; a later memory fence acquires it
  std::uint32_t fenced_lanes = 0, acquired_lanes = 0;

  // Memory (memory.cpp).
  bool resolve(int lane, Space space, std::uint64_t address, std::uint32_t bytes, bool write,
               Place* place);
  void check_read(const Place& place, const Actor& actor, std::uint32_t bytes, std::uint32_t lanes,
                  std::uint64_t address);
  void check_write(const Place& place, const Actor& actor, std::uint32_t bytes, std::uint32_t lanes,
                   std::uint64_t address);
  // These check a load or a store of `data` and make it, in one step.
  void read(const Place& place, const Actor& actor, void* data, std::uint32_t bytes,
            std::uint32_t lanes, std::uint64_t address);
  bool write(const Place& place, const Actor& actor, const std::uint8_t* data, std::uint32_t bytes,
             std::uint32_t lanes, std::uint64_t address);  // true if the bytes have changed
  void conflict(const Conflict& c, const Actor& actor, const Place& place, bool write,
                std::uint32_t lanes, std::uint64_t address);

  std::vector<std::uint8_t> local, local_valid;  // 32 lanes, one after another; valid by bit

  // Async state.
  std::map<int, CopyGroups> bulk_groups;  // by lane
  CopyGroups cp_async;
  std::vector<std::shared_ptr<PendingWgmma>> wgmma_pending;
  std::uint32_t wgmma_agent = 0;
  std::uint32_t wgmma_group = 1;  // clock of the group being filled
  bool wgmma_open = false;
  std::uint32_t wgmma_issued = 0;
  std::uint32_t fence_count = 1;              // wgmma.fence executed
  std::vector<std::uint32_t> register_fence;  // by tracked register: fence_count at last access
  std::vector<std::uint32_t> in_flight;       // by tracked register: pending wgmmas that use it
  std::uint32_t registers = 0;                // setmaxnreg
  std::uint32_t cluster_arrived = 0;          // lanes that wait, or will, at barrier.cluster
  std::uint32_t cluster_pending = 0;          // those lanes whose barrier is not complete

 private:
  friend class Cluster;
  std::size_t pick_group();
  std::size_t pick();
  bool at_token();
  bool together(const Instruction& i, std::uint32_t* mask);
  bool passed_by(
      std::uint32_t mask) const;  // other lanes wait ahead, where those of `mask` come later
  void merge_equal();
  void look_after_parked(std::uint32_t executed);
  void drop_from_tokens(Group& g, std::size_t keep);
  void check_tracked(const Instruction& i, std::uint32_t mask);
  template <class Change>
  void change_views(std::uint32_t mask, Change&& change);
  void settle_tokens();
  std::shared_ptr<const Activation> activate(const Callee& callee, std::uint32_t lanes);
  void deactivate(const CallFrame& frame, std::uint32_t lanes);
  std::uint64_t partly_valid_bits(const Slot& slot, int lane) const;
  void forget_valid_bits(const Slot& slot, std::uint32_t lanes);

  Cta& cta_;
  Cluster& cluster_;
  Grid& grid_;
  const Program& program_;
  std::uint32_t index_;
  std::uint32_t live_ = 0;
  std::uint32_t first_agent_ = 0;
  std::uint8_t* banks_[2] = {nullptr, nullptr};
  std::vector<std::uint64_t> register_file_;
  std::vector<std::uint32_t> valid_;  // by register: lanes that are valid whole
  std::unordered_map<std::uint32_t, std::array<std::uint64_t, 32>> partly_valid_;  // of the others
  std::array<std::uint32_t, 32> stack_top_, frame_;                                // addresses
  std::array<std::vector<std::uint8_t>, 32> stack_, stack_valid_;
  std::vector<Group> groups_;
  std::size_t current_ = 0;
  Actor self_;  // what all lanes' accesses have in common
  ClockRef known_[32];
  ViewsRef views_[32];
  std::uint32_t clock_[32];
  std::uint32_t dirty_ = 0;  // lanes with accesses since they were last ordered
  std::array<Poll, 32> polls_of_;
  std::uint32_t polls_ = 0;       // since the warp last changed anything
  std::uint32_t parked_for_ = 0;  // instructions executed while lanes were parked
  std::unordered_set<std::uint64_t> states_;
};

class Cta {
 public:
  Cta(Cluster& cluster, Dim3 index, std::uint32_t rank);

  Cluster& cluster;
  Dim3 index;          // in the grid
  std::uint32_t rank;  // in the cluster
  std::vector<std::uint8_t> shared;
  Shadow shadow;
  std::vector<std::unique_ptr<Warp>> warps;
  std::array<NamedBarrier, 16> barriers;
  std::map<std::uint32_t, MBarrier> mbarriers;
  std::uint32_t live_threads = 0;
  std::int64_t register_pool = 0;                 // free, in registers
  std::map<std::uint32_t, Warpgroup> warpgroups;  // those that use wgmma
  // From barrier.cluster.arrive.relaxed after a .cta fence: for this CTA's threads only.
  Knowledge cluster_arriving, cluster_completed;
  bool exited() const { return live_threads == 0; }
};

class Cluster {
 public:
  Cluster(Grid& grid, std::uint32_t number);  // the number in the grid
  ~Cluster();

  enum class State { finished, running };
  // Runs about `budget` warp-instructions.
  State run(std::uint64_t budget);

  Grid& grid;
  std::uint32_t number;  // linear, in the grid
  std::uint32_t key;     // among the clusters of all grids of a group (clock.h)
  Random random;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::uint64_t progress = 0;         // counts events that may unblock a group
  std::uint64_t spins = 0;            // failed polls
  std::vector<std::uint64_t> counts;  // executions, by pc
  std::uint64_t executed = 0;
  ClusterBarrier barrier;

  std::uint32_t new_agent() { return agents_++; }
  void start(const std::shared_ptr<AsyncWork>& work);
  // Completes the work, or only its reads.
  void finish_read(AsyncWork& work);
  void finish(AsyncWork& work);
  bool has_work() const { return !pending_.empty(); }
  std::vector<Warp*> all_warps;
  std::unordered_map<std::uint64_t, SyncCell> sync;  // by address: strong accesses (strong.cpp)
  // By address of a tensor map in memory: the fence.proxy.tensormap::generic.acquire of it.
  std::unordered_map<std::uint64_t, std::vector<MapFence>> map_fences;

  std::string describe_agent(std::uint32_t agent) const;
  std::map<std::uint32_t, std::string> agent_names;
  void report_deadlock();
  // Who waits for what, as (reason, "warp 0, warp 1") pairs, which it adds to. `where` comes before
  // the name of a warp. Returns a group that waits, or nullptr.
  using Waits = std::vector<std::pair<std::string, std::string>>;
  std::pair<Warp*, const Group*> add_waits(const std::string& where, Waits* waits) const;
  // For a cluster that polls. True if every group of lanes has returned to an earlier state and no
  // cluster has changed anything since, so that the cluster would loop for ever.
  bool repeats();
  std::uint64_t idle_at = ~0ull;  // Grid::global_progress when it last repeated
  bool let_go_alone();

 private:
  bool complete_some();
  bool stalled();
  bool time_out();
  bool unpark();

  std::uint32_t agents_ = 0;
  std::vector<std::shared_ptr<AsyncWork>> pending_;
  std::uint64_t progress_seen_ = 0, world_seen_ = 0;  // when states were last forgotten
  std::uint64_t stalled_at_ = ~0ull;                  // progress when nothing could run
  std::uint64_t idle_rounds_ = 0;
};

// The state that the grids of a group share. A launch on one GPU is a group of one.
struct World {
  explicit World(std::size_t gpus = 1) : sync(gpus) {}
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> executed{0};
  std::atomic<std::uint64_t> global_progress{0};
  GridSync sync;  // strong accesses to global memory, between clusters
  std::vector<Grid*> grids;
  std::vector<std::shared_ptr<GlobalBuffer>> buffers;  // that all grids may access
};

class Grid {
 public:
  // Adds itself to the world.
  Grid(World& world, const Module& module, std::shared_ptr<const Program> program,
       const LaunchOptions& options, const std::vector<ParamBytes>& params, int device = -1);

  Report run();
  // The index in the grid of a CTA of a cluster.
  Dim3 cta_index(std::uint32_t cluster, std::uint32_t rank) const;
  // A finding about an instruction; its kind, message and thread are the caller's to say.
  Finding finding_of(std::uint32_t pc) const;
  // The report of a grid whose clusters have executed each instruction so often.
  Report report_of(const std::vector<std::uint64_t>& counts);

  std::shared_ptr<const Program> program;
  const LaunchOptions& options;
  Memory memory;
  FindingSink sink;
  Dim3 cluster_dim;
  std::uint32_t cluster_size = 1;
  std::uint32_t threads = 0, warps_per_cta = 0;
  std::uint32_t registers_per_thread = 0;
  std::uint32_t shared_bytes = 0;
  std::uint32_t shared_begin = kSharedBase;  // 0 for kernels that use the reserved kilobyte
  bool explicit_cluster = false;             // the launch or the kernel says what a cluster is
  bool reuses_shared = false;            // a CTA that exits may be followed by another on its SM
  std::vector<std::uint64_t> constants;  // bank 1
  std::vector<std::uint64_t> param_block;
  bool checks;
  World& world;
  std::uint32_t gpu;  // the grid's place in the group
  int device;         // the GPU's name in the group; -1 if there is one
  std::atomic<bool>& stop;
  std::atomic<std::uint64_t>& executed;
  std::atomic<std::uint64_t>& global_progress;
  GridSync& sync;
  Grid& of_cluster(std::uint32_t key) const { return *world.grids[gpu_of(key)]; }

  // The grid workspace of cooperative groups: its size in bytes, and the grid's barrier.
  std::uint64_t workspace_address() const { return reinterpret_cast<std::uint64_t>(workspace_); }
  DeviceHeap& heap() const { return heap_; }
  std::uint64_t heap_launch() const { return heap_launch_; }  // this launch's number, to the heap
  void print(const std::string& text);
  const std::vector<std::string>& files() const { return files_; }

 private:
  void note_kept_blocks();
  const std::vector<std::string>& files_;
  DeviceHeap& heap_;
  std::uint64_t heap_launch_;
  alignas(8) std::uint32_t workspace_[2] = {8, 0};
  std::mutex output_mutex_;
  std::string output_;
};

inline std::uint32_t lane_of(std::uint32_t mask) {
  return static_cast<std::uint32_t>(__builtin_ctz(mask));
}

template <class F>
void for_lanes(std::uint32_t mask, F&& f) {
  for (; mask != 0; mask &= mask - 1) f(static_cast<int>(lane_of(mask)));
}

}  // namespace torchext::sim
