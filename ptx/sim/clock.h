// Vector clocks: which accesses of which agent an agent knows to be done. Agents are the threads of
// a cluster, then whatever works asynchronously on their behalf (an mbarrier's copies, a warp's
// wgmma stream, a thread's bulk groups). Clocks are shared between lanes and never changed once
// shared; knowledge of other clusters, which only strong accesses to global memory create, hangs
// on as a map.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace torchext::sim {

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
    for (const auto& [cluster, clocks] : other) {
      auto& mine = (*merged)[cluster];
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
    foreign = std::move(merged);
  }
};

// A counted pointer to a clock, without the atomics of shared_ptr: a cluster runs on one thread.
class ClockRef {
 public:
  ClockRef() = default;
  ClockRef(const ClockRef& o) : node_(o.node_) {
    if (node_) ++node_->count;
  }
  ClockRef(ClockRef&& o) noexcept : node_(o.node_) { o.node_ = nullptr; }
  ClockRef& operator=(ClockRef o) noexcept {
    std::swap(node_, o.node_);
    return *this;
  }
  ~ClockRef() {
    if (node_ && --node_->count == 0) delete node_;
  }
  static ClockRef make(VectorClock clock) {
    ClockRef r;
    r.node_ = new Node{1, std::move(clock)};
    return r;
  }
  const VectorClock& operator*() const { return node_ ? node_->clock : empty(); }
  const VectorClock* operator->() const { return &**this; }
  bool operator==(const ClockRef& o) const { return node_ == o.node_; }
  bool operator!=(const ClockRef& o) const { return node_ != o.node_; }

  // The join of both, sharing whichever already includes the other.
  static ClockRef join(const ClockRef& a, const ClockRef& b) {
    if (a == b || b.node_ == nullptr || a->includes(*b)) return a;
    if (a.node_ == nullptr || b->includes(*a)) return b;
    VectorClock both = *a;
    both.join(*b);
    return make(std::move(both));
  }

 private:
  static const VectorClock& empty() {
    static const VectorClock clock;
    return clock;
  }
  struct Node {
    std::uint32_t count;
    VectorClock clock;
  };
  Node* node_ = nullptr;
};

// What a synchronisation passes on: accesses known to be done, and those among them that a proxy
// fence has made visible to the async proxy.
struct Knowledge {
  ClockRef known, proxied;
  void join(const Knowledge& other) {
    known = ClockRef::join(known, other.known);
    proxied = ClockRef::join(proxied, other.proxied);
  }
};

}  // namespace torchext::sim
