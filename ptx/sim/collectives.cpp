// Warp collectives: shfl, vote, match, redux, elect, activemask, bar.warp.sync.
#include <algorithm>

#include "collective.h"
#include "decode.h"
#include "lanes.h"

namespace torchext::sim {

bool gather(Warp& w, std::uint32_t members, std::uint32_t mask) {
  if ((members & w.live() & ~mask) == 0) return true;
  const std::uint32_t before = w.group().mask;
  w.converge(members);
  if (w.group().mask != before) ++w.cluster().progress;  // again, now with the others
  return false;
}

namespace {

using U16 = std::uint16_t;
using U32 = std::uint32_t;
using U64 = std::uint64_t;

// The member mask of a .sync instruction; false: wait for the other members.
bool meet(Warp& w, const Slot& members_slot, U32 mask, U32* members) {
  w.need(members_slot, mask, "as a member mask");
  *members = static_cast<U32>(w.integer(members_slot, static_cast<int>(lane_of(mask))));
  if (mask & ~*members) {
    w.finding(FindingKind::invalid_operand,
              "a lane executes a .sync instruction whose member mask leaves it out",
              mask & ~*members);
  }
  if (!gather(w, *members, mask)) return false;
  if (w.grid().options.lane_order == LaunchOptions::converged) w.order_lanes(mask);
  return true;
}

// ---- shfl ---------------------------------------------------------------------------------------

enum ShuffleMode : U16 { kUp, kDown, kBfly, kIdx };

Step shuffle(Warp& w, const Instruction& i, U32 mask) {
  U32 members = mask;
  if (i.s[3].reg != 0 || i.s[3].bank == 1) {
    if (!meet(w, i.s[3], mask, &members)) return Step::block;
  }
  U32 result[32] = {}, in_range = 0;
  LaneBits valid;
  const bool whole = (mask & ~w.valid(i.s[0])) == 0;
  for_lanes(mask, [&](int lane) {
    const auto b = static_cast<int>(w.integer(i.s[1], lane) & 31);
    const auto c = static_cast<U32>(w.integer(i.s[2], lane));
    const int segment = static_cast<int>((c >> 8) & 31), clamp = static_cast<int>(c & 31);
    const int max_lane = (lane & segment) | (clamp & ~segment), min_lane = lane & segment;
    int j;
    bool p;
    switch (i.small) {
      case kUp:
        j = lane - b;
        p = j >= max_lane;
        break;
      case kDown:
        j = lane + b;
        p = j <= max_lane;
        break;
      case kBfly:
        j = lane ^ b;
        p = j <= max_lane;
        break;
      default:
        j = min_lane | (b & ~segment);
        p = j <= max_lane;
        break;
    }
    if (!p)
      j = lane;
    else
      in_range |= 1u << lane;
    if (!((mask >> j) & 1)) {
      w.finding(FindingKind::invalid_operand,
                "shfl reads lane " + std::to_string(j) + ", which does not take part", 1u << lane);
      j = lane;
    }
    result[lane] = static_cast<U32>(w.integer(i.s[0], j));
    if (!whole) valid.of[lane] = w.valid_bits(i.s[0], j);
  });
  for_lanes(mask, [&](int lane) { w.put(i.d, lane, result[lane]); });
  w.set_validity(i.d, mask, whole, valid);
  if (!i.d2.sink) {
    w.set_predicate(i.d2, mask, in_range);
    w.set_valid(i.d2, mask, mask);
  }
  return Step::next;
}

void decode_shfl(Decoder& d) {
  const bool sync = d.take("sync");
  const std::string mode = d.take_one_of({"up", "down", "bfly", "idx"});
  if (mode.empty()) d.fail("no mode");
  if (d.take_type() != Type::b32) d.fail("expected .b32");
  d.finish(sync ? 5 : 4);
  if (!sync) d.fail("shfl without .sync was removed in PTX 6.4");
  d.out.small = mode == "up" ? kUp : mode == "down" ? kDown : mode == "bfly" ? kBfly : kIdx;
  const Arg& to = d.arg(0);
  d.out.d2.sink = true;
  d.out.d2.reg = 1;
  if (to.kind == Arg::pair) {
    d.out.d = d.destination(to.args[0], 4);
    d.out.d2 = d.predicate_destination(to.args[1]);
  } else {
    d.out.d = d.destination(to, 4);
  }
  for (std::size_t k = 0; k < 4; ++k) d.out.s[k] = d.source(k + 1, Type::b32);
  d.out.execute = shuffle;
}

// ---- vote, activemask, match, redux, elect ------------------------------------------------------

enum VoteMode : U16 { kAll, kAny, kUni, kBallot };

Step vote(Warp& w, const Instruction& i, U32 mask) {
  U32 members;
  if (!meet(w, i.s[1], mask, &members)) return Step::block;
  w.need(i.s[0], mask, "in a vote");
  const U32 set = w.predicate(i.s[0]) & mask;
  if (i.small == kBallot) {
    for_lanes(mask, [&](int lane) { w.put(i.d, lane, set); });
  } else {
    const bool yes = i.small == kAll   ? set == mask
                     : i.small == kAny ? set != 0
                                       : set == 0 || set == mask;
    w.set_predicate(i.d, mask, yes ? ~0u : 0);
  }
  w.set_valid(i.d, mask, mask);
  return Step::next;
}

void decode_vote(Decoder& d) {
  if (!d.take("sync")) d.fail("vote without .sync was removed in PTX 6.4");
  const std::string mode = d.take_one_of({"all", "any", "uni", "ballot"});
  if (mode.empty()) d.fail("no mode");
  const Type type = d.take_type();
  d.finish(3);
  d.out.small = mode == "all" ? kAll : mode == "any" ? kAny : mode == "uni" ? kUni : kBallot;
  if ((type == Type::b32) != (d.out.small == kBallot)) d.fail("bad type");
  d.out.d = d.out.small == kBallot ? d.destination(0, 4) : d.predicate_destination(d.arg(0));
  d.out.s[0] = d.predicate(1);
  d.out.s[1] = d.source(2, Type::b32);
  d.out.execute = vote;
}

Step active_mask(Warp& w, const Instruction& i, U32 mask) {
  for_lanes(mask, [&](int lane) { w.put(i.d, lane, mask); });
  w.set_valid(i.d, mask, mask);
  return Step::next;
}

void decode_activemask(Decoder& d) {
  d.take_type();
  d.finish(1);
  d.out.d = d.destination(0, 4);
  d.out.execute = active_mask;
}

Step match(Warp& w, const Instruction& i, U32 mask) {
  U32 members;
  if (!meet(w, i.s[1], mask, &members)) return Step::block;
  U32 result[32] = {}, all = ~0u;
  for_lanes(mask, [&](int lane) {
    for_lanes(mask, [&](int other) {
      if (w.integer(i.s[0], lane) == w.integer(i.s[0], other)) result[lane] |= 1u << other;
    });
    if (result[lane] != mask) all = 0;
  });
  for_lanes(mask, [&](int lane) { w.put(i.d, lane, i.small && !all ? 0 : result[lane]); });
  w.set_valid(i.d, mask, w.valid(i.s[0]));
  if (!i.d2.sink) {
    w.set_predicate(i.d2, mask, all);
    w.set_valid(i.d2, mask, mask);
  }
  return Step::next;
}

void decode_match(Decoder& d) {
  d.out.small = d.take("all");
  if (!d.out.small && !d.take("any")) d.fail("expected .any or .all");
  if (!d.take("sync")) d.fail("expected .sync");
  const Type type = d.take_type();
  d.finish(3);
  const Arg& to = d.arg(0);
  d.out.d2.sink = true;
  d.out.d2.reg = 1;
  if (to.kind == Arg::pair) {
    d.out.d = d.destination(to.args[0], 4);
    d.out.d2 = d.predicate_destination(to.args[1]);
  } else {
    d.out.d = d.destination(to, 4);
  }
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, Type::b32);
  d.out.execute = match;
}

template <class T, class F>
Step reduce(Warp& w, const Instruction& i, U32 mask) {
  U32 members;
  if (!meet(w, i.s[1], mask, &members)) return Step::block;
  w.need(i.s[0], mask, "in redux");
  auto total = static_cast<T>(w.integer(i.s[0], static_cast<int>(lane_of(mask))));
  for_lanes(mask & (mask - 1),
            [&](int lane) { total = F()(total, static_cast<T>(w.integer(i.s[0], lane))); });
  for_lanes(mask, [&](int lane) { w.put(i.d, lane, static_cast<U32>(total)); });
  w.set_valid(i.d, mask, mask);
  return Step::next;
}
struct Add {
  U32 operator()(U32 a, U32 b) const { return a + b; }
};
struct And {
  U32 operator()(U32 a, U32 b) const { return a & b; }
};
struct Or {
  U32 operator()(U32 a, U32 b) const { return a | b; }
};
struct Xor {
  U32 operator()(U32 a, U32 b) const { return a ^ b; }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};

void decode_redux(Decoder& d) {
  if (!d.take("sync")) d.fail("expected .sync");
  const std::string op = d.take_one_of({"add", "min", "max", "and", "or", "xor"});
  const Type type = d.take_type();
  d.finish(3);
  d.out.d = d.destination(0, 4);
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, Type::b32);
  if (size_of(type) != 4 || type == Type::f32) d.fail("not for this type");
  using S32 = std::int32_t;
  const bool sign = is_signed(type);
  if (op == "add")
    d.out.execute = reduce<U32, Add>;
  else if (op == "and")
    d.out.execute = reduce<U32, And>;
  else if (op == "or")
    d.out.execute = reduce<U32, Or>;
  else if (op == "xor")
    d.out.execute = reduce<U32, Xor>;
  else if (op == "min")
    d.out.execute = sign ? reduce<S32, Min> : reduce<U32, Min>;
  else if (op == "max")
    d.out.execute = sign ? reduce<S32, Max> : reduce<U32, Max>;
  else
    d.fail("no operation");
}

// Deterministic in hardware for a given member mask; here the lowest member.
Step elect(Warp& w, const Instruction& i, U32 mask) {
  U32 members;
  if (!meet(w, i.s[0], mask, &members)) return Step::block;
  const U32 leader = lane_of(mask);
  for_lanes(mask, [&](int lane) { w.put(i.d, lane, leader); });
  w.set_valid(i.d, mask, mask);
  w.set_predicate(i.d2, mask, 1u << leader);
  w.set_valid(i.d2, mask, mask);
  return Step::next;
}

void decode_elect(Decoder& d) {
  if (!d.take("sync")) d.fail("expected .sync");
  d.finish(2);
  const Arg& to = d.arg(0);
  if (to.kind != Arg::pair) d.fail("expected d|p");
  d.out.d = d.destination(to.args[0], 4);
  d.out.d2 = d.predicate_destination(to.args[1]);
  d.out.s[0] = d.source(1, Type::b32);
  d.out.execute = elect;
}

}  // namespace

// Lanes may wait for each other at different bar.warp.sync instructions.
Step warp_barrier(Warp& w, const Instruction& i, U32 mask) {
  const auto first = static_cast<int>(lane_of(mask));
  w.need(i.s[0], mask, "as a member mask");
  const auto members = static_cast<U32>(w.integer(i.s[0], first));
  Group& mine = w.group();
  if (mine.released) return Step::next;
  const U32 needed = members & w.live();
  if ((needed & ~mask) == 0) {
    w.order_lanes(needed);
    return Step::next;
  }
  U32 here = mask;
  for (const Group& g : w.groups()) {
    if (&g != &mine && g.blocked && !g.parked && w.program().code[g.pc].execute == warp_barrier) {
      here |= g.mask;
    }
  }
  if (needed & ~here) return Step::block;
  w.order_lanes(needed);
  for (Group& g : w.groups()) {
    if (&g != &mine && g.blocked && !g.parked && (g.mask & needed) != 0 &&
        w.program().code[g.pc].execute == warp_barrier) {
      g.released = true;
    }
  }
  ++w.cluster().progress;
  return Step::next;
}

void add_collectives(DecodeTable& t) {
  t["shfl"] = decode_shfl;
  t["vote"] = decode_vote;
  t["activemask"] = decode_activemask;
  t["match"] = decode_match;
  t["redux"] = decode_redux;
  t["elect"] = decode_elect;
}

}  // namespace torchext::sim
