// Happens-before: what lanes know, and how barriers, fences and strong accesses pass it on.
#include <algorithm>

#include "machine.h"

namespace torchext::sim {

Actor Warp::actor(int lane, bool strong) const {
  Actor a;
  a.cluster = cluster_.number;
  a.agent = a.issuer = agent(lane);
  a.clock = a.issuer_clock = clock_[lane];
  a.known = &*known_[lane];
  a.proxied = &*proxied_[lane];
  a.pc = groups_[current_].pc;
  a.strong = strong;
  return a;
}

void Warp::order_lanes(std::uint32_t mask) {
  if (!grid_.checks || (mask & (mask - 1)) == 0) return;
  const auto first = static_cast<int>(lane_of(mask));
  bool equal = true;
  for_lanes(mask, [&](int l) {
    equal &=
        known_[l] == known_[first] && proxied_[l] == proxied_[first] && clock_[l] == clock_[first];
  });
  if (equal && (dirty_ & mask) == 0) return;
  VectorClock all = *known_[first];
  ClockRef proxied = proxied_[first];
  const ClockRef* last = &known_[first];
  std::uint32_t top = 0;
  for_lanes(mask, [&](int l) {
    if (known_[l] != *last && known_[l] != known_[first]) all.join(*known_[l]);
    last = &known_[l];
    proxied = ClockRef::join(proxied, proxied_[l]);
    top = std::max(top, clock_[l]);
  });
  for_lanes(mask, [&](int l) { all.raise(agent(l), clock_[l]); });
  const ClockRef shared = ClockRef::make(std::move(all));
  for_lanes(mask, [&](int l) {
    known_[l] = shared;
    proxied_[l] = proxied;
    clock_[l] = top + 1;
  });
  dirty_ &= ~mask;
}

Knowledge Warp::release(std::uint32_t mask) {
  Knowledge k;
  if (!grid_.checks || mask == 0) return k;
  const auto first = static_cast<int>(lane_of(mask));
  VectorClock all = *known_[first];
  k.proxied = proxied_[first];
  const ClockRef* last = &known_[first];
  for_lanes(mask, [&](int l) {
    if (known_[l] != *last && known_[l] != known_[first]) all.join(*known_[l]);
    last = &known_[l];
    k.proxied = ClockRef::join(k.proxied, proxied_[l]);
  });
  for_lanes(mask, [&](int l) {
    all.raise(agent(l), clock_[l]);
    ++clock_[l];
  });
  k.known = ClockRef::make(std::move(all));
  return k;
}

void Warp::acquire(std::uint32_t mask, const Knowledge& knowledge) {
  if (!grid_.checks) return;
  ClockRef before, after, proxied_before, proxied_after;
  bool have = false;
  for_lanes(mask, [&](int l) {
    if (!have || known_[l] != before) {
      before = known_[l];
      after = ClockRef::join(knowledge.known, before);
    }
    if (!have || proxied_[l] != proxied_before) {
      proxied_before = proxied_[l];
      proxied_after = ClockRef::join(knowledge.proxied, proxied_before);
    }
    have = true;
    known_[l] = after;
    proxied_[l] = proxied_after;
  });
}

void Warp::learn(std::uint32_t mask, std::uint32_t of, std::uint32_t upto) {
  if (!grid_.checks) return;
  ClockRef before, after;
  bool have = false;
  for_lanes(mask, [&](int l) {
    if (known_[l]->get(of) >= upto) return;
    if (!have || known_[l] != before) {
      VectorClock more = *known_[l];
      more.raise(of, upto);
      before = known_[l];
      after = ClockRef::make(std::move(more));
      have = true;
    }
    known_[l] = after;
  });
}

// What the lane knows, its own accesses included, becomes visible to the async proxy.
void Warp::proxy_fence(std::uint32_t mask) {
  if (!grid_.checks) return;
  ClockRef before, proxied_before;
  for_lanes(mask, [&](int l) {
    VectorClock all = *known_[l];
    all.raise(agent(l), clock_[l]);
    ++clock_[l];
    proxied_[l] = ClockRef::make(std::move(all));
  });
}

void Warp::memory_fence(std::uint32_t mask) {
  if (!grid_.checks) return;
  const std::uint32_t taking = mask & acquired_lanes;
  for_lanes(taking, [&](int l) {
    acquire(1u << l, strong_acquired[l]);
    strong_acquired[l] = {};
  });
  acquired_lanes &= ~taking;
  for_lanes(mask, [&](int l) { fence_released[l] = release(1u << l); });
  fenced_lanes |= mask;
}

}  // namespace torchext::sim
