// Divergence and reconvergence. A branch splits a group of lanes; the parts wait for each other at
// the branch's immediate post-dominator.
#include <algorithm>

#include "machine.h"

namespace torchext::sim {

namespace {
bool is_barrier(const Instruction& i) {  // of a CTA or a cluster
  return i.traits.op_class == OpClass::barrier || i.traits.op_class == OpClass::cluster_barrier;
}
}  // namespace

void Warp::branch(const Instruction& i, std::uint32_t taken) {
  Group& g = groups_[current_];
  const std::uint32_t rest = g.mask & ~taken;
  g.blocked = g.arrived = g.released = g.alone = g.give_up = false;
  if (rest == 0) {
    g.pc = i.targets[0];
    return;
  }
  if (i.reconverge != ~0u && (g.tokens.empty() || g.tokens.back()->pc != i.reconverge ||
                              g.tokens.back()->depth != g.calls.size())) {
    auto token = std::make_shared<JoinPoint>();
    token->pc = i.reconverge;
    token->depth = g.calls.size();
    token->expected = g.mask;
    g.tokens.push_back(std::move(token));
  }
  Group other = g;
  other.pc = i.targets[0];
  other.mask = taken;
  g.mask = rest;
  ++g.pc;
  groups_.push_back(std::move(other));
}

void Warp::branch_each(const std::uint32_t (&targets)[32], std::uint32_t mask,
                       std::uint32_t reconverge) {
  Group base = groups_[current_];
  base.blocked = base.arrived = base.released = base.alone = base.give_up = false;
  const std::uint32_t rest = base.mask & ~mask;
  std::vector<Group> parts;
  const auto add = [&](std::uint32_t pc, std::uint32_t lanes) {
    for (Group& p : parts) {
      if (p.pc == pc) {
        p.mask |= lanes;
        return;
      }
    }
    Group p = base;
    p.pc = pc;
    p.mask = lanes;
    parts.push_back(std::move(p));
  };
  if (rest != 0) add(base.pc + 1, rest);
  for_lanes(mask, [&](int lane) { add(targets[lane], 1u << lane); });
  if (parts.size() > 1 && reconverge != ~0u) {
    auto token = std::make_shared<JoinPoint>();
    token->pc = reconverge;
    token->depth = base.calls.size();
    token->expected = base.mask;
    for (Group& p : parts) p.tokens.push_back(token);
  }
  groups_[current_] = parts[0];
  groups_.insert(groups_.end(), parts.begin() + 1, parts.end());
}

// Called when the current group has reached the pc where the lanes of its innermost branch meet.
// True if the group must wait there, false if it may execute.
bool Warp::at_token() {
  Group* g = &groups_[current_];
  while (!g->tokens.empty() && g->tokens.back()->pc == g->pc &&
         g->tokens.back()->depth == g->calls.size()) {
    JoinPoint& token = *g->tokens.back();
    token.parked |= g->mask;
    if ((token.expected & ~token.parked) != 0) {
      g->parked = true;
      return true;
    }
    // All lanes are here: they continue as one group, without the token.
    const std::shared_ptr<JoinPoint> done = g->tokens.back();
    std::uint32_t mask = g->mask;
    Group merged = *g;
    for (std::size_t i = 0; i < groups_.size();) {
      if (i != current_ && groups_[i].parked && !groups_[i].tokens.empty() &&
          groups_[i].tokens.back() == done) {
        mask |= groups_[i].mask;
        groups_.erase(groups_.begin() + static_cast<std::ptrdiff_t>(i));
        if (i < current_) --current_;
      } else {
        ++i;
      }
    }
    merged.mask = mask;
    merged.parked = false;
    merged.tokens.pop_back();
    groups_[current_] = std::move(merged);
    g = &groups_[current_];
  }
  return false;
}

// Merges groups that are at the same instruction with the same tokens and calls.
void Warp::merge_equal() {
  for (std::size_t i = 0; i < groups_.size();) {
    Group& g = groups_[current_];
    Group& o = groups_[i];
    if (i != current_ && o.pc == g.pc && !o.parked && o.tokens == g.tokens && o.calls == g.calls &&
        o.arrived == g.arrived && o.generation == g.generation && o.released == g.released &&
        o.alone == g.alone) {
      g.mask |= o.mask;
      groups_.erase(groups_.begin() + static_cast<std::ptrdiff_t>(i));
      if (i < current_) --current_;
    } else {
      ++i;
    }
  }
}

void Warp::exit_lanes(std::uint32_t mask) {
  live_ &= ~mask;
  for (Group& g : groups_) {
    if ((g.mask & mask) == 0) continue;
    for (const auto& token : g.tokens) {
      token->expected &= ~mask;
      token->parked &= ~mask;
    }
    g.mask &= ~mask;
  }
  if (groups_[current_].mask != 0) ++groups_[current_].pc;  // lanes whose guard is false continue
  for (std::size_t i = 0; i < groups_.size();) {
    if (groups_[i].mask == 0)
      groups_.erase(groups_.begin() + static_cast<std::ptrdiff_t>(i));
    else
      ++i;
  }
  current_ = 0;
  settle_tokens();
}

// Releases parked groups whose partners have all left.
void Warp::settle_tokens() {
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    Group& g = groups_[i];
    if (g.parked && !g.tokens.empty() &&
        (g.tokens.back()->expected & ~g.tokens.back()->parked) == 0) {
      g.parked = false;  // at_token merges it with the others when it runs
      g.blocked = false;
    }
  }
}

// Removes the group's lanes from every token after the first `keep`.
void Warp::drop_from_tokens(Group& g, std::size_t keep) {
  while (g.tokens.size() > keep) {
    JoinPoint& token = *g.tokens.back();
    token.expected &= ~g.mask;
    token.parked &= ~g.mask;
    g.tokens.pop_back();
  }
}

bool Warp::passed_by(std::uint32_t mask) const {
  return std::any_of(groups_.begin(), groups_.end(), [&](const Group& g) {
    return g.parked && (g.tokens.back()->expected & mask) != 0;
  });
}

bool Warp::unpark() {
  bool any = false;
  for (Group& g : groups_) {  // groups that waited for lanes which are now parked
    if (waits_for_warp(g) && !is_barrier(program_.code[g.pc]) && passed_by(g.mask))
      g.give_up = any = true;
  }
  if (any) return true;
  for (Group& g : groups_) {
    if (!g.parked) continue;
    g.parked = false;
    drop_from_tokens(g, g.tokens.size() - 1);
    any = true;
  }
  if (any) settle_tokens();
  parked_for_ = 0;
  return any;
}

std::size_t Warp::part(std::size_t index, std::uint32_t lanes) {
  Group& g = groups_[index];
  const std::uint32_t behind = g.pc + 1;
  if (g.tokens.empty() || g.tokens.back()->pc != behind ||
      g.tokens.back()->depth != g.calls.size()) {
    auto token = std::make_shared<JoinPoint>();
    token->pc = behind;
    token->depth = g.calls.size();
    token->expected = g.mask;
    g.tokens.push_back(std::move(token));
  }
  Group other = g;
  other.mask = lanes;
  g.mask &= ~lanes;
  groups_.push_back(std::move(other));
  return groups_.size() - 1;
}

void Warp::absorb(std::uint32_t lanes) {
  const auto joins = [&](std::size_t i) {
    const Group &g = groups_[i], &mine = groups_[current_];
    return i != current_ && (g.mask & ~lanes) == 0 && g.pc == mine.pc && !g.parked &&
           g.calls == mine.calls;
  };
  // They meet here, although the tokens of their branches lie elsewhere.
  const auto& tokens = groups_[current_].tokens;
  std::size_t common = tokens.size();
  bool any = false;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    if (!joins(i)) continue;
    const auto& other = groups_[i].tokens;
    std::size_t n = 0;
    while (n < common && n < other.size() && other[n] == tokens[n]) ++n;
    common = n;
    any = true;
  }
  if (!any) return;
  drop_from_tokens(groups_[current_], common);
  for (std::size_t i = 0; i < groups_.size();) {
    if (!joins(i)) {
      ++i;
      continue;
    }
    drop_from_tokens(groups_[i], common);
    groups_[current_].mask |= groups_[i].mask;
    groups_.erase(groups_.begin() + static_cast<std::ptrdiff_t>(i));
    if (i < current_) --current_;
  }
  settle_tokens();
}

// True if the current group may execute this .aligned instruction with the lanes in *mask. Other
// lanes may still come to it (lanes that went on alone), or may exit before a barrier.
bool Warp::together(const Instruction& i, std::uint32_t* mask) {
  Group& g = groups_[current_];
  if (g.arrived || g.alone) return true;
  std::uint32_t here = *mask;
  for (const Group& o : groups_) {
    if (waits_for_warp(o) && o.pc == g.pc && o.calls == g.calls) here |= o.mask;
  }
  if ((live_ & ~here) == 0 && *mask == g.mask) {
    absorb(here);
    *mask = here;
    return true;
  }
  const bool others_left = *mask != g.mask || passed_by(*mask);
  if (!g.give_up && (is_barrier(i) || !others_left)) return false;
  if (grid_.checks) {
    finding(FindingKind::divergent_collective,
            "only some lanes of the warp execute an .aligned instruction (the others are at "
            "another instruction or predicated off)",
            *mask);
  }
  g.alone = true;
  return true;
}

// Handles the case that all lanes wait at .aligned instructions, and not all at the same one.
bool Warp::let_go_alone() {
  bool any = false;
  for (const Group& g : groups_) {
    if (!waits_for_warp(g) && !g.arrived) return false;
  }
  for (Group& g : groups_) {
    if (waits_for_warp(g) && !g.give_up) g.give_up = any = true;
  }
  return any;
}

bool Warp::waits_for_warp(const Group& g) const {
  return g.blocked && !g.parked && !g.arrived && !g.alone && g.mask != live_ &&
         program_.code[g.pc].aligned;
}

}  // namespace torchext::sim
