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

// Publications at all addresses between threads of different clusters. Clusters may run on several
// host threads, so clocks travel as ForeignClocks, which are safe to share.
class GridSync {
 public:
  void publish(std::uint64_t address, std::uint32_t cluster, const Scoped& knowledge, Scope scope);
  // Joins what other clusters have published into *knowledge.
  void observe(std::uint64_t address, std::uint32_t cluster, Scope scope, Knowledge* knowledge);

 private:
  using Shared = std::shared_ptr<const ForeignClocks>;
  struct Exported {
    Shared known, async[kAsyncSpaces], alias, map_released[kScopeLevels];
  };
  struct Cell {
    Exported wide;  // published at .gpu or .sys
    Shared narrow;  // at a narrower scope: for the report of the race
    Scope narrow_scope = Scope::none;
  };
  std::mutex mutex_;
  std::unordered_map<std::uint64_t, Cell> cells_;
};

}  // namespace torchext::sim
