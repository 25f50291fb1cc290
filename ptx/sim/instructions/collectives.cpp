// Warp collectives: shfl, vote, match, redux, elect, activemask, bar.warp.sync.
//
// Each lane passes its own member mask. Lanes with the same mask meet as soon as all live members
// are at an instruction of the same kind, at whatever address. Lanes with different masks do not
// affect each other, even if they execute the same instruction together.
#include <algorithm>
#include <cstdio>
#include <type_traits>

#include "../check/validity.h"
#include "../frontend/decode.h"
#include "../machine/collective.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

// The operand in which every collective keeps its member mask.
constexpr std::size_t kMembers = 3;

// Lanes that execute a collective together, and the instruction of each.
class Meeting {
 public:
  Meeting(U32 among, const Instruction& all) : lanes(among), all_(&all) {}
  Meeting(U32 among, const Instruction* const* each) : lanes(among), each_(each) {}
  const Instruction& at(int lane) const { return all_ != nullptr ? *all_ : *each_[lane]; }
  // Calls f(instruction, lanes at it) for each instruction.
  template <class F>
  void each(F&& f) const {
    if (all_ != nullptr) return f(*all_, lanes);
    for (U32 left = lanes; left != 0;) {
      const Instruction* i = each_[lane_of(left)];
      U32 here = 0;
      for_lanes(left, [&](int lane) { here |= U32{each_[lane] == i} << lane; });
      f(*i, here);
      left &= ~here;
    }
  }
  const U32 lanes;

 private:
  const Instruction* all_ = nullptr;
  const Instruction* const* each_ = nullptr;
};

// Computes the results of all lanes of a meeting.
using Hold = void (*)(Warp&, const Meeting&);

void hold(Warp& w, const Meeting& m, Hold f) {
  w.order_if_converged(m.lanes);
  f(w, m);
}

// Whether lanes at `a` and lanes at `b` can meet. Form: what the decoders of both keep, or void.
template <class Form>
bool same_kind(const Instruction& a, const Instruction& b) {
  if (a.execute != b.execute || a.s[0].bytes != b.s[0].bytes) return false;
  if constexpr (std::is_void_v<Form>)
    return true;
  else
    return a.as<Form>() == b.as<Form>();
}
using SameKind = bool (*)(const Instruction&, const Instruction&);

// Handles lanes with different masks, or with partners at another instruction.
Step meet(Warp& w, const Instruction& i, U32 mask, Hold f, SameKind same_kind) {
  U32 masks[32];
  const Instruction* at[32];
  U32 waiting = 0;
  const auto come = [&](const Instruction& here, U32 lanes) {
    for_lanes(lanes, [&](int lane) {
      masks[lane] = w.at<U32>(here.s[kMembers])[lane];
      at[lane] = &here;
    });
    waiting |= lanes;
  };
  come(i, mask);
  for (const Group& g : w.groups()) {  // all lanes of a waiting group have passed its guard
    const Instruction& other = w.program().code[g.pc];
    if (&g != &w.group() && g.blocked && !g.parked && !g.released && same_kind(other, i))
      come(other, g.mask);
  }
  U32 outside = 0;
  for_lanes(mask, [&](int lane) { outside |= ~masks[lane] & 1u << lane; });
  if (outside != 0) {
    w.finding(FindingKind::invalid_operand,
              "a lane executes a .sync instruction whose member mask leaves it out", outside);
    for_lanes(outside, [&](int lane) { hold(w, Meeting(1u << lane, at), f); });
  }
  U32 done = outside;
  for (U32 left = mask & ~outside; left != 0;) {
    const U32 members = masks[lane_of(left)];
    U32 here = 0;
    for_lanes(waiting & members, [&](int lane) { here |= U32{masks[lane] == members} << lane; });
    left &= ~here;
    if ((members & w.live() & ~here) != 0) continue;
    hold(w, Meeting(here, at), f);
    done |= here;
  }
  if ((done & mask) == 0) return Step::block;
  if (const U32 rest = mask & ~done) {
    Group& g = w.part(rest);
    g.blocked = true;
    g.blocked_at = w.cluster().progress;
  }
  if ((done & ~mask) == 0) return Step::next;
  for (std::size_t n = 0; n < w.groups().size(); ++n) {
    const U32 met = w.groups()[n].mask & done;
    if (met == 0 || &w.groups()[n] == &w.group()) continue;
    Group& g = met == w.groups()[n].mask ? w.groups()[n] : w.groups()[w.part(n, met)];
    g.released = true;
  }
  w.absorb(done & ~mask);
  ++w.cluster().progress;
  return Step::next;
}

template <Hold f, class Form = void>
Step collective(Warp& w, const Instruction& i, U32 mask) {
  if (w.group().released) return Step::next;
  const Slot& slot = i.s[kMembers];
  w.need(slot, mask, "as a member mask");
  const U32* masks = w.at<U32>(slot);
  const U32 members = masks[lane_of(mask)];
  bool together = (members & w.live()) == mask;
  if (together && slot.bank == 0)
    for_lanes(mask, [&](int lane) { together &= masks[lane] == members; });
  if (!together) return meet(w, i, mask, f, same_kind<Form>);
  hold(w, Meeting(mask, i), f);
  return Step::next;
}

std::string describe_members(Warp& w, const Group& g) {
  const Instruction& i = w.program().code[g.pc];
  const U32 members = w.at<U32>(i.s[kMembers])[lane_of(g.mask)];
  char text[128];
  std::snprintf(text, sizeof text,
                ", member mask 0x%x, for lanes 0x%x, which do not come with that mask", members,
                members & w.live() & ~g.mask);
  return "waits at " + w.program().opcodes[i.opcode] + text;
}

// The last step of decoding a collective.
void set_collective(Decoder& d, const Arg& members, Execute execute) {
  d.out.s[kMembers] = d.source(members, Type::b32);
  d.out.traits.wait = Wait::members;
  d.out.traits.describe_wait = describe_members;
  d.out.execute = execute;
}

// ---- shfl ---------------------------------------------------------------------------------------

enum ShuffleMode : std::uint8_t { kUp, kDown, kBfly, kIdx };

void shuffle(Warp& w, const Meeting& m) {
  U32 result[32] = {}, in_range = 0;
  LaneBits valid;
  bool whole = true;
  m.each([&](const Instruction& i, U32 lanes) { whole &= (lanes & ~w.valid(i.s[0])) == 0; });
  for_lanes(m.lanes, [&](int lane) {
    const Instruction& i = m.at(lane);
    const auto b = static_cast<int>(w.integer(i.s[1], lane) & 31);
    const auto c = static_cast<U32>(w.integer(i.s[2], lane));
    const int segment = static_cast<int>((c >> 8) & 31), clamp = static_cast<int>(c & 31);
    const int max_lane = (lane & segment) | (clamp & ~segment), min_lane = lane & segment;
    int j;
    bool p;
    switch (i.as<ShuffleMode>()) {
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
    if (!((m.lanes >> j) & 1)) {
      w.finding(FindingKind::invalid_operand,
                "shfl reads lane " + std::to_string(j) + ", which does not take part", 1u << lane);
      j = lane;
    }
    const Slot& source = m.at(j).s[0];
    result[lane] = w.at<U32>(source)[j];
    if (!whole) valid.of[lane] = w.valid_bits(source, j);
  });
  m.each([&](const Instruction& i, U32 lanes) {
    for_lanes(lanes, [&](int lane) { w.put(i.d, lane, result[lane]); });
    w.set_validity(i.d, lanes, whole, valid);
    if (i.d2.sink) return;
    w.set_predicate(i.d2, lanes, in_range);
    w.set_valid(i.d2, lanes, lanes);
  });
}

// The destination "d" or "d|p".
void take_result_and_predicate(Decoder& d) {
  const Arg& to = d.arg(0);
  d.out.d2.sink = true;
  d.out.d2.reg = 1;
  if (to.kind == Arg::pair) {
    d.out.d = d.destination(to.args[0], 4);
    d.out.d2 = d.predicate_destination(to.args[1]);
  } else {
    d.out.d = d.destination(to, 4);
  }
}

void decode_shfl(Decoder& d) {
  const bool sync = d.take("sync");
  const std::string mode = d.need_one_of({"up", "down", "bfly", "idx"});
  d.need_type(Type::b32);
  d.finish(sync ? 5 : 4);
  if (!sync) d.fail("the modifiers must include .sync; PTX 6.4 removed shfl without it");
  d.keep(mode == "up" ? kUp : mode == "down" ? kDown : mode == "bfly" ? kBfly : kIdx);
  take_result_and_predicate(d);
  for (std::size_t k = 0; k < kMembers; ++k) d.out.s[k] = d.source(k + 1, Type::b32);
  set_collective(d, d.arg(4), collective<shuffle, ShuffleMode>);
}

// ---- vote, activemask, match, redux, elect ------------------------------------------------------

enum VoteMode : std::uint8_t { kAll, kAny, kUni, kBallot };

void vote(Warp& w, const Meeting& m) {
  U32 set = 0;
  m.each([&](const Instruction& i, U32 lanes) {
    w.need(i.s[0], lanes, "in a vote");
    set |= w.predicate(i.s[0]) & lanes;
  });
  m.each([&](const Instruction& i, U32 lanes) {
    const auto mode = i.as<VoteMode>();
    if (mode == kBallot) {
      for_lanes(lanes, [&](int lane) { w.put(i.d, lane, set); });
    } else {
      const bool yes = mode == kAll   ? set == m.lanes
                       : mode == kAny ? set != 0
                                      : set == 0 || set == m.lanes;
      w.set_predicate(i.d, lanes, yes ? ~0u : 0);
    }
    w.set_valid(i.d, lanes, lanes);
  });
}

void decode_vote(Decoder& d) {
  if (!d.take("sync")) d.fail("the modifiers must include .sync; PTX 6.4 removed vote without it");
  const std::string name = d.need_one_of({"all", "any", "uni", "ballot"});
  const Type type = d.take_type();
  d.finish(3);
  const VoteMode mode = name == "all"   ? kAll
                        : name == "any" ? kAny
                        : name == "uni" ? kUni
                                        : kBallot;
  d.keep(mode);
  if (type != (mode == kBallot ? Type::b32 : Type::pred)) d.fail_type(type);
  d.out.d = mode == kBallot ? d.destination(0, 4) : d.predicate_destination(d.arg(0));
  d.out.s[0] = d.predicate(1);
  set_collective(d, d.arg(2), collective<vote, VoteMode>);
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

enum class MatchMode : std::uint8_t { any, all };

void match(Warp& w, const Meeting& m) {
  U64 value[32];
  U32 result[32] = {}, all = ~0u;
  for_lanes(m.lanes, [&](int lane) { value[lane] = w.integer(m.at(lane).s[0], lane); });
  for_lanes(m.lanes, [&](int lane) {
    for_lanes(m.lanes, [&](int other) {
      if (value[lane] == value[other]) result[lane] |= 1u << other;
    });
    if (result[lane] != m.lanes) all = 0;
  });
  m.each([&](const Instruction& i, U32 lanes) {
    const bool none = i.as<MatchMode>() == MatchMode::all && !all;
    for_lanes(lanes, [&](int lane) { w.put(i.d, lane, none ? 0 : result[lane]); });
    w.set_valid(i.d, lanes, w.valid(i.s[0]));
    if (i.d2.sink) return;
    w.set_predicate(i.d2, lanes, all);
    w.set_valid(i.d2, lanes, lanes);
  });
}

void decode_match(Decoder& d) {
  const bool all = d.need_one_of({"any", "all"}) == "all";
  d.keep(all ? MatchMode::all : MatchMode::any);
  d.need({"sync"});
  const Type type = d.take_type();
  d.finish(3);
  take_result_and_predicate(d);
  d.out.s[0] = d.source(1, type);
  set_collective(d, d.arg(2), collective<match, MatchMode>);
}

template <class T, class F>
void reduce(Warp& w, const Meeting& m) {
  m.each([&](const Instruction& i, U32 lanes) { w.need(i.s[0], lanes, "in redux"); });
  const auto value = [&](int lane) { return static_cast<T>(w.integer(m.at(lane).s[0], lane)); };
  T total = value(static_cast<int>(lane_of(m.lanes)));
  for_lanes(m.lanes & (m.lanes - 1), [&](int lane) { total = F()(total, value(lane)); });
  m.each([&](const Instruction& i, U32 lanes) {
    for_lanes(lanes, [&](int lane) { w.put(i.d, lane, static_cast<U32>(total)); });
    w.set_valid(i.d, lanes, lanes);
  });
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
  d.need({"sync"});
  const std::string op = d.need_one_of({"add", "min", "max", "and", "or", "xor"});
  const Type type = d.take_type();
  d.finish(3);
  d.out.d = d.destination(0, 4);
  d.out.s[0] = d.source(1, type);
  if (size_of(type) != 4 || type == Type::f32) d.fail_type(type);
  const bool sign = is_signed(type);
  Execute execute = nullptr;
  if (op == "add")
    execute = collective<reduce<U32, Add>>;
  else if (op == "and")
    execute = collective<reduce<U32, And>>;
  else if (op == "or")
    execute = collective<reduce<U32, Or>>;
  else if (op == "xor")
    execute = collective<reduce<U32, Xor>>;
  else if (op == "min")
    execute = sign ? collective<reduce<S32, Min>> : collective<reduce<U32, Min>>;
  else
    execute = sign ? collective<reduce<S32, Max>> : collective<reduce<U32, Max>>;
  set_collective(d, d.arg(2), execute);
}

// Elects the lowest member. Hardware elects some member, always the same one for a mask.
void elect(Warp& w, const Meeting& m) {
  const U32 leader = lane_of(m.lanes);
  m.each([&](const Instruction& i, U32 lanes) {
    for_lanes(lanes, [&](int lane) { w.put(i.d, lane, leader); });
    w.set_valid(i.d, lanes, lanes);
    w.set_predicate(i.d2, lanes, 1u << leader);
    w.set_valid(i.d2, lanes, lanes);
  });
}

void decode_elect(Decoder& d) {
  d.need({"sync"});
  d.finish(2);
  const Arg& to = d.arg(0);
  if (to.kind != Arg::pair) d.fail_operand(to, "a pair of registers \'d|p\'");
  d.out.d = d.destination(to.args[0], 4);
  d.out.d2 = d.predicate_destination(to.args[1]);
  set_collective(d, d.arg(1), collective<elect>);
}

// Orders the lanes in both lane orders.
void warp_barrier(Warp& w, const Meeting& m) {
  w.order_lanes(m.lanes);
}

}  // namespace

void decode_warp_barrier(Decoder& d) {
  d.need({"sync"});
  d.finish(1);
  d.is(OpClass::warp);
  set_collective(d, d.arg(0), collective<warp_barrier>);
}

void add_collectives(OpcodeTable& t) {
  t["shfl"] = {decode_shfl, {OpClass::shuffle}};
  t["vote"] = {decode_vote, {OpClass::warp}};
  t["activemask"] = {decode_activemask, {OpClass::warp}};
  t["match"] = {decode_match, {OpClass::warp}};
  t["redux"] = {decode_redux, {OpClass::warp}};
  t["elect"] = {decode_elect, {OpClass::warp}};
}

}  // namespace torchext::sim
