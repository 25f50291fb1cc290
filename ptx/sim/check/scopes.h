// The knowledge that strong operations publish at an address for later readers. A release and an
// acquire synchronize two threads only if the scope of each includes the other thread. Knowledge
// that a scope keeps back goes to Views::refused, for the report of the race.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "clock.h"

namespace torchext::sim {

// The same knowledge as refused: it orders nothing, but reports name it.
Knowledge refused(const Knowledge& withheld, Scope released, Scope acquired);

// Publications at one address between the threads of one cluster.
class SyncCell {
 public:
  // Called for an operation of this scope by a thread of CTA `rank`.
  void publish(std::uint32_t rank, const Scoped& knowledge, Scope scope);
  Knowledge observe(std::uint32_t rank, Scope scope) const;

 private:
  struct FromCta {
    Knowledge wide;  // for all of the cluster
    Scope wide_scope = Scope::none;
    Knowledge narrow;  // for this CTA alone
  };
  std::vector<FromCta> from_;  // by rank
};

// Publications at all addresses between threads of different clusters, of one grid or of a group of
// grids on several GPUs. Clusters may run on several host threads, so clocks travel as ForeignClocks,
// which are safe to share.
class GridSync {
 public:
  explicit GridSync(std::size_t gpus = 1) : cells_(gpus) {}
  std::size_t gpus() const { return cells_.size(); }
  void publish(std::uint64_t address, std::uint32_t cluster, const Scoped& knowledge, Scope scope);
  // Joins what other clusters have published into *knowledge.
  void observe(std::uint64_t address, std::uint32_t cluster, Scope scope, Knowledge* knowledge);
  // The accesses that some thread has released at .sys.
  ForeignClocks released_to_all() const;

 private:
  using Shared = std::shared_ptr<const ForeignClocks>;
  struct Exported {
    Shared known, async[kAsyncSpaces], alias, map_released[kScopeLevels];
  };
  static void merge(Exported& into, const Exported& from);
  static Exported export_of(const Knowledge& knowledge, std::uint32_t cluster);
  static Knowledge import_of(const Exported& published, std::uint32_t cluster);
  struct Cell {
    Exported wide;  // published at .gpu or .sys: for the publisher's GPU
    Exported all;   // published at .sys: for other GPUs. Empty if there are none.
    Shared narrow;  // at a narrower scope: for the report of the race
    Scope narrow_scope = Scope::none;
  };
  mutable std::mutex mutex_;
  std::vector<std::unordered_map<std::uint64_t, Cell>> cells_;  // by the publisher's GPU
};

}  // namespace torchext::sim
