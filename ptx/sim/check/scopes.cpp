// Synchronization through memory, within a cluster and between clusters.
#include "scopes.h"

#include <algorithm>

namespace torchext::sim {

namespace {

using Shared = std::shared_ptr<const ForeignClocks>;

Shared exported(const ClockRef& clock, std::uint32_t cluster) {
  if (!clock) return nullptr;
  auto all = clock->foreign ? std::make_shared<ForeignClocks>(*clock->foreign)
                            : std::make_shared<ForeignClocks>();
  (*all)[cluster] = std::make_shared<AgentClocks>(clock->agents);
  return all;
}

ClockRef imported(const Shared& clocks, std::uint32_t cluster) {
  if (clocks == nullptr) return {};
  VectorClock clock;
  auto others = std::make_shared<ForeignClocks>(*clocks);
  if (const auto own = others->find(cluster); own != others->end()) {
    clock.agents = *own->second;
    others->erase(own);
  }
  if (!others->empty()) clock.foreign = std::move(others);
  return ClockRef::make(std::move(clock));
}

// Neighboring elements are often the same clock, which is then converted once.
template <std::size_t n>
void export_all(const ClockRef (&clocks)[n], std::uint32_t cluster, Shared (&out)[n]) {
  for (std::size_t k = 0; k < n; ++k)
    out[k] = k > 0 && clocks[k] == clocks[k - 1] ? out[k - 1] : exported(clocks[k], cluster);
}

template <std::size_t n>
bool import_all(const Shared (&clocks)[n], std::uint32_t cluster, ClockRef (&out)[n]) {
  bool any = false;
  for (std::size_t k = 0; k < n; ++k) {
    out[k] = k > 0 && clocks[k] == clocks[k - 1] ? out[k - 1] : imported(clocks[k], cluster);
    any = any || out[k];
  }
  return any;
}

void join(Shared& into, const Shared& other) {
  if (other == nullptr || into == other) return;
  if (into == nullptr) {
    into = other;
    return;
  }
  auto both = std::make_shared<ForeignClocks>(*into);
  VectorClock::merge(*both, *other);
  into = std::move(both);
}

}  // namespace

const char* name_of(Scope scope) {
  switch (scope) {
    case Scope::cta:
      return ".cta";
    case Scope::cluster:
      return ".cluster";
    case Scope::gpu:
      return ".gpu";
    case Scope::sys:
      return ".sys";
    default:
      return "weak";
  }
}

Knowledge refused(const Knowledge& withheld, Scope released, Scope acquired) {
  Views views;
  views.refused = ClockRef::join(withheld.known, withheld.views->refused);
  views.released_at = released;
  views.acquired_at = acquired;
  return {{}, ViewsRef::make(std::move(views))};
}

void SyncCell::publish(std::uint32_t rank, const Scoped& knowledge, Scope scope) {
  if (from_.size() <= rank) from_.resize(rank + 1);
  FromCta& from = from_[rank];
  if (scope >= Scope::cluster) {
    from.wide.join(knowledge[1]);
    from.wide_scope = scope;
  }
  if (scope < Scope::cluster || knowledge[0].known != knowledge[1].known)
    from.narrow.join(knowledge[0]);
}

Knowledge SyncCell::observe(std::uint32_t rank, Scope scope) const {
  Knowledge all;
  if (rank < from_.size()) {
    all = from_[rank].wide;
    all.join(from_[rank].narrow);
  }
  for (std::uint32_t other = 0; other < from_.size(); ++other) {
    if (other == rank) continue;
    const FromCta& from = from_[other];
    if (scope >= Scope::cluster)
      all.join(from.wide);
    else if (from.wide.known)
      all.join(refused(from.wide, from.wide_scope, scope));
    if (from.narrow.known) all.join(refused(from.narrow, Scope::cta, scope));
  }
  return all;
}

void GridSync::publish(std::uint64_t address, std::uint32_t cluster, const Scoped& knowledge,
                       Scope scope) {
  const Knowledge& wide = knowledge[2];
  const bool reaches = scope >= Scope::gpu && wide.known;
  const Shared known = reaches ? exported(wide.known, cluster) : nullptr;
  const Shared narrow =
      reaches && knowledge[0].known == wide.known ? nullptr : exported(knowledge[0].known, cluster);
  Exported views;
  if (reaches && wide.views) {
    export_all(wide.views->async, cluster, views.async);
    export_all(wide.views->map_released, cluster, views.map_released);
    views.alias = exported(wide.views->alias, cluster);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  Cell& cell = cells_[address];
  join(cell.wide.known, known);
  for (std::size_t k = 0; k < kAsyncSpaces; ++k) join(cell.wide.async[k], views.async[k]);
  join(cell.wide.alias, views.alias);
  for (std::size_t k = 0; k < kScopeLevels; ++k)
    join(cell.wide.map_released[k], views.map_released[k]);
  if (narrow != nullptr) {
    join(cell.narrow, narrow);
    const bool both = knowledge[1].known == knowledge[0].known;
    cell.narrow_scope = std::min(scope, both ? Scope::cluster : Scope::cta);
  }
}

void GridSync::observe(std::uint64_t address, std::uint32_t cluster, Scope scope,
                       Knowledge* knowledge) {
  Cell cell;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = cells_.find(address);
    if (it == cells_.end()) return;
    cell = it->second;
  }
  Knowledge wide;
  wide.known = imported(cell.wide.known, cluster);
  Views views;
  const bool any = import_all(cell.wide.async, cluster, views.async) |
                   import_all(cell.wide.map_released, cluster, views.map_released);
  views.alias = imported(cell.wide.alias, cluster);
  if (any || views.alias) wide.views = ViewsRef::make(std::move(views));
  if (scope >= Scope::gpu)
    knowledge->join(wide);
  else if (!knowledge->known.covers(wide.known))
    knowledge->join(refused(wide, Scope::gpu, scope));
  if (cell.narrow != nullptr) {
    const Knowledge narrow{imported(cell.narrow, cluster), {}};
    if (!knowledge->known.covers(narrow.known))
      knowledge->join(refused(narrow, cell.narrow_scope, scope));
  }
}

}  // namespace torchext::sim
