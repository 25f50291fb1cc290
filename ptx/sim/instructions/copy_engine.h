// The common part of bulk and tensor copies: runs of bytes, their order and their completion.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../machine/machine.h"

namespace torchext::sim {

enum class ReduceOp : std::uint8_t { none, add, min, max, inc, dec, bit_and, bit_or, bit_xor };

// Reductions and their element types.
struct Reduction {
  ReduceOp op = ReduceOp::none;
  Type type = Type::b8;
};
Reduction take_reduction(class Decoder& d, bool with_type);
void reduce_bytes(const Reduction& r, std::uint8_t* to, const std::uint8_t* from,
                  std::size_t bytes);

struct CopyRun {
  std::uint8_t* to = nullptr;
  const std::uint8_t* from = nullptr;  // nullptr: use `fill`
  std::uint32_t bytes = 0;
  std::uint32_t fill = 0;  // index into CopyJob::fills
};

// A copy: its runs execute later, then it signals.
struct CopyJob {
  GlobalBuffer* global = nullptr;  // that the runs read or write
  std::vector<CopyRun> runs;
  std::vector<std::vector<std::uint8_t>> fills;
  Reduction reduction;
};

// The actor, in the async proxy, of a copy that `lane` issues.
Actor copy_actor(Warp& w, int lane, std::uint32_t agent, std::uint32_t clock);

// For copies into shared memory: when they are done, the mbarrier at (cta, offset) counts `bytes`.
struct Signal {
  Cta* cta;
  std::uint32_t offset;
  std::uint32_t agent, clock;  // of the writes
};
Signal make_signal(Cta& cta, std::uint32_t offset, const MBarrier& m);
void start_signaled(Warp& w, CopyJob job, const Signal& signal, std::uint32_t bytes,
                    std::string what, std::uint32_t receivers = 1);

// For copies out of shared memory, which belong to the lane's current bulk group.
CopyGroups& bulk_group(Warp& w, int lane);
void start_grouped(Warp& w, int lane, CopyJob job, std::string what);
// Adds the copy that lane `leader` has just started to this lane's bulk group.
void join_group(Warp& w, int lane, int leader);

// Host address of `bytes` bytes of global memory, or nullptr after a finding.
bool resolve_global(Warp& w, int lane, std::uint64_t address, std::uint64_t bytes, bool write,
                    Place* place);
bool resolve_shared(Warp& w, int lane, std::uint64_t address, std::uint64_t bytes,
                    std::uint32_t align, bool cluster, Place* place);

}  // namespace torchext::sim
