// Vector clocks: for each agent, how many accesses of every other agent it knows to be done. Agents
// are the threads of a cluster, followed by the asynchronous workers that act for them: an
// mbarrier's copies, a warp's wgmma stream, a thread's bulk groups. Lanes share clocks; a shared
// clock never changes. Only strong accesses to global memory create knowledge of other clusters,
// which a separate map (`foreign`) holds. Clusters of all grids of a group have different numbers.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace torchext::sim {

// The upper bits of a cluster's number say which grid of a group it belongs to. Each grid has a GPU of
// its own.
constexpr int kGpuShift = 28;
inline std::uint32_t gpu_of(std::uint32_t cluster) {
  return cluster >> kGpuShift;
}

using AgentClocks = std::vector<std::uint32_t>;
using ForeignClocks = std::map<std::uint32_t, std::shared_ptr<const AgentClocks>>;  // by cluster

struct VectorClock {
  AgentClocks agents;
  std::shared_ptr<const ForeignClocks> foreign;

  std::uint32_t get(std::uint32_t agent) const { return agent < agents.size() ? agents[agent] : 0; }
  void raise(std::uint32_t agent, std::uint32_t clock) {
    if (agent >= agents.size()) agents.resize(agent + 1, 0);
    if (agents[agent] < clock) agents[agent] = clock;
  }
  bool includes(const VectorClock& other) const {
    for (std::size_t i = 0; i < other.agents.size(); ++i) {
      if (other.agents[i] > get(static_cast<std::uint32_t>(i))) return false;
    }
    return other.foreign == nullptr || other.foreign == foreign;
  }
  void join(const VectorClock& other) {
    if (agents.size() < other.agents.size()) agents.resize(other.agents.size(), 0);
    for (std::size_t i = 0; i < other.agents.size(); ++i) {
      if (agents[i] < other.agents[i]) agents[i] = other.agents[i];
    }
    if (other.foreign != nullptr && other.foreign != foreign) join_foreign(*other.foreign);
  }
  void join_foreign(const ForeignClocks& other) {
    auto merged =
        foreign ? std::make_shared<ForeignClocks>(*foreign) : std::make_shared<ForeignClocks>();
    merge(*merged, other);
    foreign = std::move(merged);
  }
  // True if this clock includes the given access of any cluster. `own`: the cluster of `agents`.
  bool knows(std::uint32_t own, std::uint32_t cluster, std::uint32_t agent,
             std::uint32_t clock) const {
    if (cluster == own) return get(agent) >= clock;
    if (foreign == nullptr) return false;
    const auto it = foreign->find(cluster);
    return it != foreign->end() && agent < it->second->size() && (*it->second)[agent] >= clock;
  }
  static void merge(ForeignClocks& into, const ForeignClocks& other) {
    for (const auto& [cluster, clocks] : other) {
      auto& mine = into[cluster];
      if (mine == nullptr || mine == clocks) {
        mine = clocks;
        continue;
      }
      auto both = std::make_shared<AgentClocks>(*mine);
      if (both->size() < clocks->size()) both->resize(clocks->size(), 0);
      for (std::size_t i = 0; i < clocks->size(); ++i) {
        if ((*both)[i] < (*clocks)[i]) (*both)[i] = (*clocks)[i];
      }
      mine = std::move(both);
    }
  }
};

// A reference-counted pointer to an immutable value. Its count is not atomic, unlike shared_ptr's,
// because a cluster runs on one host thread. T must have includes, join and an empty value.
template <class T>
class Ref {
 public:
  Ref() = default;
  Ref(const Ref& o) : node_(o.node_) {
    if (node_) ++node_->count;
  }
  Ref(Ref&& o) noexcept : node_(o.node_) { o.node_ = nullptr; }
  Ref& operator=(Ref o) noexcept {
    std::swap(node_, o.node_);
    return *this;
  }
  ~Ref() {
    if (node_ && --node_->count == 0) delete node_;
  }
  static Ref make(T value) {
    Ref r;
    r.node_ = new Node{1, std::move(value)};
    return r;
  }
  const T& operator*() const { return node_ ? node_->value : empty(); }
  const T* operator->() const { return &**this; }
  explicit operator bool() const { return node_ != nullptr; }
  bool operator==(const Ref& o) const { return node_ == o.node_; }
  bool operator!=(const Ref& o) const { return node_ != o.node_; }
  bool covers(const Ref& o) const {
    return node_ == o.node_ || o.node_ == nullptr ||
           (node_ != nullptr && node_->value.includes(o.node_->value));
  }

  // The join of both, sharing whichever already includes the other.
  static Ref join(const Ref& a, const Ref& b) {
    if (a.covers(b)) return a;
    if (b.covers(a)) return b;
    T both = *a;
    both.join(*b);
    return make(std::move(both));
  }

 private:
  static const T& empty() {
    static const T value;
    return value;
  }
  struct Node {
    std::uint32_t count;
    T value;
  };
  Node* node_ = nullptr;
};
using ClockRef = Ref<VectorClock>;

// How far a strong operation reaches. `none` means that the operation is weak. Only sys reaches
// other GPUs.
enum class Scope : std::uint8_t { none, cta, cluster, gpu, sys };
constexpr std::size_t kScopeLevels = 4;  // cta, cluster, gpu, sys
inline std::size_t level_of(Scope scope) {
  return scope == Scope::none ? 0 : static_cast<std::size_t>(scope) - 1;
}
const char* name_of(Scope scope);  // ".cta"

// The parts of memory that fence.proxy.async tells apart, as the fencing thread sees them.
enum AsyncSpace : std::uint8_t { kOwnShared, kClusterShared, kGlobal, kAsyncSpaces };

// What a thread knows beyond happens-before. Most threads have no views.
struct Views {
  // Accesses that fence.proxy.async made visible to the async proxy, and accesses that
  // fence.proxy.alias made visible to aliases.
  ClockRef async[kAsyncSpaces], alias;
  // Accesses that a release fence offered to the tensormap proxy, by the fence's scope.
  ClockRef map_released[kScopeLevels];
  // Accesses that a synchronization would have ordered if both scopes had been wide enough. Only
  // reports read this.
  ClockRef refused;
  Scope released_at = Scope::none, acquired_at = Scope::none;

  bool includes(const Views& other) const {
    bool all = alias.covers(other.alias) && refused.covers(other.refused);
    for (std::size_t k = 0; k < kAsyncSpaces; ++k) all = all && async[k].covers(other.async[k]);
    for (std::size_t k = 0; k < kScopeLevels; ++k)
      all = all && map_released[k].covers(other.map_released[k]);
    return all;
  }
  void join(const Views& other) {
    for (std::size_t k = 0; k < kAsyncSpaces; ++k)
      async[k] = ClockRef::join(async[k], other.async[k]);
    for (std::size_t k = 0; k < kScopeLevels; ++k)
      map_released[k] = ClockRef::join(map_released[k], other.map_released[k]);
    alias = ClockRef::join(alias, other.alias);
    if (!refused) {
      released_at = other.released_at;
      acquired_at = other.acquired_at;
    }
    refused = ClockRef::join(refused, other.refused);
  }
};
using ViewsRef = Ref<Views>;

// The knowledge that a synchronization passes on.
struct Knowledge {
  ClockRef known;  // accesses that are done
  ViewsRef views;
  void join(const Knowledge& other) {
    known = ClockRef::join(known, other.known);
    views = ViewsRef::join(views, other.views);
  }
};
// Knowledge by the readers it reaches: [0] this CTA, [1] this cluster, [2] this GPU, [3] every GPU.
using Scoped = std::array<Knowledge, kScopeLevels>;

}  // namespace torchext::sim
