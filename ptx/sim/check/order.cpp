// Happens-before: what lanes know, and how barriers, fences and strong accesses pass it on.
#include <algorithm>

#include "../machine/machine.h"

namespace torchext::sim {

void Warp::order_lanes(std::uint32_t mask) {
  if (!grid_.checks || (mask & (mask - 1)) == 0) return;
  const auto first = static_cast<int>(lane_of(mask));
  bool equal = true;
  for_lanes(mask, [&](int l) {
    equal &= known_[l] == known_[first] && views_[l] == views_[first] && clock_[l] == clock_[first];
  });
  if (equal && (dirty_ & mask) == 0) return;
  VectorClock all = *known_[first];
  ViewsRef views = views_[first];
  const ClockRef* last = &known_[first];
  std::uint32_t top = 0;
  for_lanes(mask, [&](int l) {
    if (known_[l] != *last && known_[l] != known_[first]) all.join(*known_[l]);
    last = &known_[l];
    views = ViewsRef::join(views, views_[l]);
    top = std::max(top, clock_[l]);
  });
  for_lanes(mask, [&](int l) { all.raise(agent(l), clock_[l]); });
  const ClockRef shared = ClockRef::make(std::move(all));
  for_lanes(mask, [&](int l) {
    known_[l] = shared;
    views_[l] = views;
    clock_[l] = top + 1;
  });
  dirty_ &= ~mask;
}

void Warp::order_if_converged(std::uint32_t mask) {
  if (grid_.options.lane_order == LaunchOptions::converged) order_lanes(mask);
}

Knowledge Warp::release(std::uint32_t mask) {
  Knowledge k;
  if (!grid_.checks || mask == 0) return k;
  const auto first = static_cast<int>(lane_of(mask));
  VectorClock all = *known_[first];
  k.views = views_[first];
  const ClockRef* last = &known_[first];
  for_lanes(mask, [&](int l) {
    if (known_[l] != *last && known_[l] != known_[first]) all.join(*known_[l]);
    last = &known_[l];
    k.views = ViewsRef::join(k.views, views_[l]);
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
  ClockRef before, after;
  ViewsRef views_before, views_after;
  bool have = false;
  for_lanes(mask, [&](int l) {
    if (!have || known_[l] != before) {
      before = known_[l];
      after = ClockRef::join(knowledge.known, before);
    }
    if (!have || views_[l] != views_before) {
      views_before = views_[l];
      views_after = ViewsRef::join(knowledge.views, views_before);
    }
    have = true;
    known_[l] = after;
    views_[l] = views_after;
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

// Calls change(views, known) for each lane; `known` includes the lane's own accesses.
template <class Change>
void Warp::change_views(std::uint32_t mask, Change&& change) {
  if (!grid_.checks) return;
  for_lanes(mask, [&](int l) {
    const ClockRef all = release(1u << l).known;
    Views views = *views_[l];
    change(views, all);
    views_[l] = ViewsRef::make(std::move(views));
  });
}

void Warp::async_fence(std::uint32_t mask, std::uint32_t spaces) {
  change_views(mask, [&](Views& views, const ClockRef& all) {
    for (std::uint32_t k = 0; k < kAsyncSpaces; ++k) {
      if ((spaces >> k) & 1) views.async[k] = all;
    }
  });
}

void Warp::alias_fence(std::uint32_t mask) {
  change_views(mask, [](Views& views, const ClockRef& all) { views.alias = all; });
}

void Warp::release_maps(std::uint32_t mask, Scope scope) {
  change_views(mask, [&](Views& views, const ClockRef& all) {
    for (std::size_t k = 0; k <= level_of(scope); ++k) views.map_released[k] = all;
  });
}

void Warp::memory_fence(std::uint32_t mask, Scope scope, bool acquires, bool releases) {
  if (!grid_.checks) return;
  const std::size_t level = level_of(scope);
  if (acquires) {
    const std::uint32_t taking = mask & acquired_lanes;
    for_lanes(taking, [&](int l) { acquire(1u << l, strong_acquired[l][level]); });
    const std::size_t widest = level_of(grid_.sync.gpus() == 1 ? Scope::gpu : Scope::sys);
    if (level >= widest) {  // otherwise a later, wider fence may take in more
      for_lanes(taking, [&](int l) { strong_acquired[l] = {}; });
      acquired_lanes &= ~taking;
    }
  }
  if (!releases) return;
  for_lanes(mask, [&](int l) {
    const Knowledge k = release(1u << l);
    for (std::size_t at = 0; at <= level; ++at) fence_released[l][at] = k;
  });
  fenced_lanes |= mask;
}

}  // namespace torchext::sim
