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

// True if the clock of a thread of cluster `own` includes all of these accesses.
bool knows_all(const VectorClock& clock, std::uint32_t own, const ForeignClocks& accesses) {
  for (const auto& [cluster, clocks] : accesses) {
    for (std::uint32_t agent = 0; agent < clocks->size(); ++agent) {
      if ((*clocks)[agent] != 0 && !clock.knows(own, cluster, agent, (*clocks)[agent]))
        return false;
    }
  }
  return true;
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

GridSync::Exported GridSync::export_of(const Knowledge& knowledge, std::uint32_t cluster) {
  Exported out;
  out.known = exported(knowledge.known, cluster);
  if (knowledge.views) {
    export_all(knowledge.views->async, cluster, out.async);
    export_all(knowledge.views->map_released, cluster, out.map_released);
    out.alias = exported(knowledge.views->alias, cluster);
  }
  return out;
}

Knowledge GridSync::import_of(const Exported& published, std::uint32_t cluster) {
  Knowledge knowledge;
  knowledge.known = imported(published.known, cluster);
  Views views;
  const bool any = import_all(published.async, cluster, views.async) |
                   import_all(published.map_released, cluster, views.map_released);
  views.alias = imported(published.alias, cluster);
  if (any || views.alias) knowledge.views = ViewsRef::make(std::move(views));
  return knowledge;
}

void GridSync::merge(Exported& into, const Exported& from) {
  join(into.known, from.known);
  for (std::size_t k = 0; k < kAsyncSpaces; ++k) join(into.async[k], from.async[k]);
  join(into.alias, from.alias);
  for (std::size_t k = 0; k < kScopeLevels; ++k) join(into.map_released[k], from.map_released[k]);
}

void GridSync::publish(std::uint64_t address, std::uint32_t cluster, const Scoped& knowledge,
                       Scope scope) {
  const Knowledge &gpu = knowledge[level_of(Scope::gpu)], &sys = knowledge[level_of(Scope::sys)];
  const bool reaches = scope >= Scope::gpu && gpu.known;
  const bool reaches_all = gpus() > 1 && scope == Scope::sys && sys.known;
  const Exported wide = reaches ? export_of(gpu, cluster) : Exported();
  const Exported all = !reaches_all                                       ? Exported()
                       : sys.known == gpu.known && sys.views == gpu.views ? wide
                                                                          : export_of(sys, cluster);
  const Shared narrow =
      reaches && knowledge[0].known == gpu.known ? nullptr : exported(knowledge[0].known, cluster);
  const std::lock_guard<std::mutex> lock(mutex_);
  Cell& cell = cells_[gpu_of(cluster)][address];
  merge(cell.wide, wide);
  merge(cell.all, all);
  if (narrow != nullptr) {
    join(cell.narrow, narrow);
    const bool both = knowledge[1].known == knowledge[0].known;
    cell.narrow_scope = std::min(scope, both ? Scope::cluster : Scope::cta);
  }
}

void GridSync::observe(std::uint64_t address, std::uint32_t cluster, Scope scope,
                       Knowledge* knowledge) {
  for (std::uint32_t gpu = 0; gpu < gpus(); ++gpu) {
    Cell cell;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto it = cells_[gpu].find(address);
      if (it == cells_[gpu].end()) continue;
      cell = it->second;
    }
    const auto refuse = [&](const Shared& clocks, const Knowledge& withheld, Scope released) {
      if (clocks != nullptr && !knowledge->known.covers(withheld.known) &&
          !knows_all(*knowledge->known, cluster, *clocks))
        knowledge->join(refused(withheld, released, scope));
    };
    const bool own = gpu == gpu_of(cluster);
    if (!own) {
      const Knowledge all = import_of(cell.all, cluster);
      if (scope == Scope::sys)
        knowledge->join(all);
      else
        refuse(cell.all.known, all, Scope::sys);
    }
    const Knowledge wide = import_of(cell.wide, cluster);
    if (own && scope >= Scope::gpu)
      knowledge->join(wide);
    else
      refuse(cell.wide.known, wide, Scope::gpu);
    refuse(cell.narrow, {imported(cell.narrow, cluster), {}}, cell.narrow_scope);
  }
}

ForeignClocks GridSync::released_to_all() const {
  ForeignClocks released;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& cells : cells_) {
    for (const auto& [address, cell] : cells) {
      if (cell.all.known != nullptr) VectorClock::merge(released, *cell.all.known);
    }
  }
  return released;
}

}  // namespace torchext::sim
