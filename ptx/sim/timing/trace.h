// What a launch did, without its data: for each warp of the traced clusters, the instructions that
// it executed and their effects on shared resources. A Recorder listens to one cluster while it runs.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "../frontend/ir.h"

namespace torchext::sim {

class Cta;
class Cluster;
class Warp;
struct GlobalBuffer;

namespace timing {

// One effect of a warp-instruction. The meaning of the numbers depends on the kind.
struct Action {
  enum Kind : std::uint8_t {
    none,
    shared,  // bytes; count: wavefronts, ideal: without bank conflicts; rank: of the CTA
    global,  // bytes; count: sectors that L1 lacks, ideal: of full lines; lines
    init,    // mbarrier `id`, count: arrivals
    arrive,  // mbarrier `id` of CTA `rank`, count: arrivals, bytes: expect_tx;
             // flag: when the warp's cp.asyncs are done; ideal: arrivals more to expect
    wait,    // mbarrier `id` of CTA `rank`, count: phases that must be complete
    load,    // TMA to CTA `rank`: bytes of transactions at mbarrier `id`; global_bytes;
             // flag: in several rows
    store,   // TMA out of shared memory: bytes
    bulk_commit,
    bulk_wait,  // count: groups that may go on; flag: only reads
    wgmma,      // count: N; flag: A in registers
    wgmma_commit,
    wgmma_wait,      // count: groups that may go on
    barrier,         // id, count: threads (0: all); flag: arrive only; lanes: threads that arrive
    cluster_arrive,  // lanes
    cluster_wait,
    copy,  // cp.async: as global
    copy_commit,
    copy_wait,  // count: groups that may go on; flag: commits first
  };
  static constexpr std::uint16_t kNoBuffer = 0xffff;
  Kind kind = none;
  std::uint8_t rank = 0, receivers = 1, lanes = 0;
  std::uint16_t buffer = kNoBuffer;
  bool flag = false, writes = false;
  std::uint32_t id = 0, count = 0, ideal = 0, bytes = 0, global_bytes = 0;
  bool operator==(const Action& o) const {
    return kind == o.kind && rank == o.rank && receivers == o.receivers && lanes == o.lanes &&
           buffer == o.buffer && flag == o.flag && writes == o.writes && id == o.id &&
           count == o.count && ideal == o.ideal && bytes == o.bytes &&
           global_bytes == o.global_bytes;
  }
};

// An executed instruction. An instruction with several actions has several events; all but the
// first have kMore set in their pc.
struct Event {
  static constexpr std::uint32_t kMore = 0x8000'0000;
  std::uint32_t pc;
  std::uint32_t action;  // index into ClusterTrace::actions; 0: none
};

struct BufferUse {
  std::uint64_t loaded = 0, stored = 0;  // bytes, repetitions included
  std::vector<std::uint64_t> touched;    // a bit for each line of 128 bytes
  std::uint64_t unique() const;          // bytes of touched lines
};

struct ClusterTrace {
  std::uint32_t number = 0;
  std::vector<std::vector<std::vector<Event>>> ctas;  // by rank, by warp
  std::vector<Action> actions{Action{}};
  std::vector<BufferUse> buffers;  // by index in Memory::buffers()
  std::uint64_t events() const;
};

// Notes what the warps of one cluster do. Warp::run calls begin and end around each instruction;
// instructions call note for their effects.
class Recorder {
 public:
  Recorder(const Cluster& cluster, std::uint32_t warps_per_cta);
  void begin(Warp& warp, const Instruction& instruction, std::uint32_t pc, std::uint32_t mask);
  void end(bool blocked);
  void note(const Action& action) { noted_.push_back(action); }
  // A commit or a wait of the warp's groups.
  void note_group(Action::Kind kind, std::uint32_t allowed = 0, bool flag = false) {
    Action action;
    action.kind = kind;
    action.count = allowed;
    action.flag = flag;
    note(action);
  }
  // A cp.async of `bytes` from each lane's address.
  void note_copy(Warp& warp, const std::uint64_t (&from)[32], std::uint32_t mask,
                 std::uint32_t bytes);
  // A copy by TMA from or to a buffer; runs are its pieces in global memory.
  void touch(const GlobalBuffer* buffer, std::uint64_t address, std::uint64_t bytes, bool writes,
             std::uint64_t times);
  std::uint16_t index_of(const GlobalBuffer* buffer) const;
  // A wait without success: what the warp does until it tries again is left out.
  void failed_wait() { failed_ = true; }
  std::unique_ptr<ClusterTrace> take() { return std::move(trace_); }

 private:
  struct WarpState {
    std::vector<Event>* events;
    std::uint32_t spin_pc = ~0u;
    std::size_t spin_begin = 0;
  };
  struct ActionHash {
    std::size_t operator()(const Action& a) const;
  };
  struct L1 {  // lines that a CTA has loaded, as many as fit
    std::unordered_map<std::uint64_t, std::uint32_t> sectors;  // of a line, as bits
    std::size_t capacity = 0;
  };
  void memory(Warp& warp, const Instruction& i, std::uint32_t mask);
  void note_shared(const std::uint64_t (&address)[32], std::uint32_t mask, std::uint32_t bytes,
                   bool writes, std::uint8_t rank, std::uint32_t width);
  void note_global(Warp& warp, const std::uint64_t (&address)[32], std::uint32_t mask,
                   std::uint32_t bytes, bool reads, bool writes, bool cached);

  const Cluster& cluster_;
  const std::vector<bool> past_l1_;  // by instruction
  std::unique_ptr<ClusterTrace> trace_;
  std::vector<WarpState> warps_;
  std::vector<L1> caches_;
  std::map<const GlobalBuffer*, std::uint16_t> index_;
  std::unordered_map<Action, std::uint32_t, ActionHash> interned_;
  std::vector<Action> noted_;
  WarpState* current_ = nullptr;
  const Instruction* instruction_ = nullptr;
  std::uint32_t pc_ = 0;
  bool failed_ = false;
};

// The recorder of the cluster that this host thread runs; nullptr if it is not traced.
Recorder* recorder();
// True if the launch is run for its trace only, so that wgmma need not compute.
bool without_products();

// Sets both, for the time that a host thread runs a cluster.
class Listening {
 public:
  Listening(Recorder* recorder, bool without_products);
  ~Listening();
  Listening(const Listening&) = delete;
  Listening& operator=(const Listening&) = delete;
};

}  // namespace timing
}  // namespace torchext::sim
