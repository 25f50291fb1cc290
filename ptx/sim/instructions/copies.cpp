// cp.async: the per-thread asynchronous copies of sm_80, their groups and mbarrier arrival. The
// decoder of `cp` also dispatches to the bulk copies.
#include <cstring>

#include "../frontend/decode.h"
#include "../timing/trace.h"
#include "bulk_copies.h"
#include "lanes.h"
#include "mbarrier.h"

namespace torchext::sim {

namespace {

struct AsyncCopy {
  U32 bytes = 0;
  Slot to, from, size, ignore;
  std::int64_t to_offset = 0, from_offset = 0;
  bool has_size = false, has_ignore = false;
};

// All copies of a warp share one agent, because its lanes issue and await them together.
void need_agent(Warp& w) {
  if (w.cp_async.write_agent != 0) return;
  w.cp_async.write_agent = w.cluster().new_agent();
  w.cluster().agent_names[w.cp_async.write_agent] = "cp.async of warp " + std::to_string(w.index());
}

Step copy(Warp& w, const Instruction& i, U32 mask) {
  const auto& c = i.as<AsyncCopy>();
  w.need(c.to, mask, "as an address");
  w.need(c.from, mask, "as an address");
  need_agent(w);
  CopyGroups& g = w.cp_async;
  g.open = true;
  struct Piece {
    std::uint8_t* to;
    Place source;
    U32 bytes;
  };
  std::vector<Piece> pieces;
  for_lanes(mask, [&](int lane) {
    const U64 to = w.address(c.to, c.to_offset, lane),
              from = w.address(c.from, c.from_offset, lane);
    U32 bytes = c.has_size ? static_cast<U32>(w.integer(c.size, lane)) : c.bytes;
    if (c.has_ignore && (w.predicate(c.ignore) >> lane) & 1) bytes = 0;
    if (bytes > c.bytes) {
      w.finding(FindingKind::invalid_operand, "src-size exceeds cp-size", 1u << lane);
      return;
    }
    Place target, source;
    if (!w.resolve(lane, Space::shared, to, c.bytes, true, &target)) return;
    if (from % c.bytes) {
      w.finding(FindingKind::misaligned_access,
                "the source of cp.async is not a multiple of cp-size", 1u << lane, from);
      return;
    }
    Actor actor = w.actor(lane);
    actor.agent = g.write_agent;
    actor.clock = g.current;
    if (bytes != 0) {
      if (!w.resolve(lane, Space::global, from, 1, false, &source)) return;
      if (from + bytes > source.buffer->end) {
        w.finding(FindingKind::out_of_bounds,
                  "cp.async reads " + w.grid().memory.describe(from) + " and past its end",
                  1u << lane, from);
        return;
      }
      w.check_read(source, w.actor(lane), bytes, 1u << lane, from);
    }
    w.check_write(target, actor, c.bytes, 1u << lane, to);
    pieces.push_back({target.host, source, bytes});
  });
  if (auto* const recorder = timing::recorder()) {
    U64 from[32] = {};
    for_lanes(mask, [&](int lane) { from[lane] = w.address(c.from, c.from_offset, lane); });
    recorder->note_copy(w, from, mask, c.bytes);
  }
  auto work = std::make_shared<AsyncWork>();
  work->what = "a cp.async";
  work->finish = [pieces = std::move(pieces), size = c.bytes] {
    for (const Piece& p : pieces) {
      const auto guard = p.source.guard();
      if (p.bytes != 0) std::memcpy(p.to, p.source.host, p.bytes);
      std::memset(p.to + p.bytes, 0, size - p.bytes);
    }
  };
  g.work[g.current].push_back(work);
  w.cluster().start(work);
  ++w.cluster().progress;
  return Step::next;
}

void decode_copy(Decoder& d) {
  AsyncCopy c;
  const bool cg = d.need_one_of({"ca", "cg"}) == "cg";
  d.need({"global"});
  d.need_one_of({"shared", "shared::cta"});
  d.take_cache_hints();
  const std::size_t extra = d.has_cache_policy ? 1 : 0;
  d.finish(3, 4 + extra);
  Space space = Space::shared;
  c.to = d.address(d.arg(0), &c.to_offset, &space);
  space = Space::global;
  c.from = d.address(d.arg(1), &c.from_offset, &space);
  c.bytes = static_cast<U32>(d.immediate(2));
  if (c.bytes != 16 && (cg || (c.bytes != 4 && c.bytes != 8)))
    d.fail("operand 3 must be " + std::string(cg ? "16" : "4, 8 or 16") + " (got " +
           std::to_string(c.bytes) + ")");
  if (d.count() > 3 + extra) {
    const Arg& a = d.arg(3);
    if (d.register_type(a) == Type::pred) {
      c.has_ignore = true;
      c.ignore = d.predicate(a);
    } else {
      c.has_size = true;
      c.size = d.source(a, Type::u32);
    }
  }
  d.reads(Space::global, c.bytes);
  d.writes(Space::shared, c.bytes);
  d.out.traits.completion = Completion::copy_group;
  d.keep(c);
  d.out.execute = copy;
}

Step commit(Warp& w, const Instruction&, U32) {
  ++w.cp_async.current;
  w.cp_async.open = false;
  if (auto* const recorder = timing::recorder()) recorder->note_group(timing::Action::copy_commit);
  return Step::next;
}

// True if all groups up to a clock are done. If not, marks them as awaited.
bool groups_done(Warp& w, U32 upto) {
  bool ready = true;
  for (auto& [clock, work] : w.cp_async.work) {
    if (clock > upto) break;
    for (const auto& each : work) {
      if (each->done) continue;
      each->wanted = true;
      ready = false;
    }
  }
  return ready;
}

struct GroupWait {
  U32 allowed = 0;   // groups that may go on
  bool all = false;  // wait_all: also what has not been committed
};

Step wait(Warp& w, const Instruction& i, U32 mask) {
  const auto form = i.as<GroupWait>();
  CopyGroups& g = w.cp_async;
  const U32 committed = g.current - 1;
  const U32 upto = form.all ? g.current : committed > form.allowed ? committed - form.allowed : 0;
  if (!groups_done(w, upto)) return Step::block;
  if (auto* const recorder = timing::recorder())
    recorder->note_group(timing::Action::copy_wait, form.all ? 0 : form.allowed, form.all);
  if (form.all) {
    ++g.current;
    g.open = false;
  }
  if (upto == 0 || g.write_agent == 0) return Step::next;
  g.work.erase(g.work.begin(), g.work.upper_bound(upto));
  w.learn(mask, g.write_agent, upto);
  return Step::next;
}

struct Arrival {
  Space space = Space::generic;
  bool counted = false;  // .noinc: the barrier's count includes this arrival already
};

// Arrives when the lane's earlier copies are done. Without .noinc the phase expects one more.
Step arrive_later(Warp& w, const Instruction& i, U32 mask) {
  CopyGroups& g = w.cp_async;
  const Knowledge base = w.release(mask);
  for_lanes(mask, [&](int lane) {
    Cta* owner;
    U32 offset;
    MBarrier* m = find_mbarrier(w, lane, i.as<Arrival>().space, w.address(i.s[0], i.offset, lane),
                                &owner, &offset);
    if (m == nullptr) return;
    if (auto* const recorder = timing::recorder()) {
      timing::Action action;
      action.kind = timing::Action::arrive;
      action.rank = static_cast<std::uint8_t>(owner->rank);
      action.id = offset;
      action.count = 1;
      action.ideal = i.as<Arrival>().counted ? 0 : 1;
      action.flag = true;
      recorder->note(action);
    }
    if (!i.as<Arrival>().counted) ++m->pending;
    Knowledge k = base;
    if (g.write_agent != 0 && w.grid().checks) {
      VectorClock known = *k.known;
      known.raise(g.write_agent, g.current);
      k.known = ClockRef::make(std::move(known));
    }
    auto before = std::make_shared<std::vector<std::shared_ptr<AsyncWork>>>();
    for (const auto& [clock, work] : g.work)
      before->insert(before->end(), work.begin(), work.end());
    auto work = std::make_shared<AsyncWork>();
    work->what = "cp.async.mbarrier.arrive";
    Cluster* cluster = &w.cluster();
    work->finish = [before, cluster, owner, offset, k] {
      for (const auto& each : *before) cluster->finish(*each);
      const auto it = owner->mbarriers.find(offset);
      if (it != owner->mbarriers.end()) arrive(*owner, it->second, 1, k);
    };
    m->work.push_back(work);
    cluster->start(work);
  });
  if (g.open) ++g.current;  // later copies are not covered
  g.open = false;
  ++w.cluster().progress;
  return Step::next;
}

void decode_arrive(Decoder& d) {
  d.need({"arrive"});
  const bool counted = d.take("noinc");
  Space space = d.take_space();
  d.need_type(Type::b64);
  d.finish(1);
  d.keep(Arrival{space, counted});
  d.out.s[0] = d.address(d.arg(0), &d.out.offset, &space);
  d.is(OpClass::mbarrier);
  d.reads(space, 8);
  d.writes(space, 8);
  d.out.traits.completion = Completion::mbarrier;
  d.out.execute = arrive_later;
}

void set_wait(Decoder& d) {
  d.is(OpClass::async_group);
  d.out.traits.wait = Wait::copy_group;
  d.out.execute = wait;
}

void decode_cp(Decoder& d) {
  const bool reduce = d.take("reduce");
  d.need({"async"});
  if (d.take("bulk")) {
    if (d.take("tensor")) return decode_bulk_tensor(d, reduce);
    return decode_bulk(d, reduce);
  }
  if (reduce) d.need({"bulk"});
  if (d.take("commit_group")) {
    d.finish(0);
    d.is(OpClass::async_group);
    d.out.execute = commit;
    return;
  }
  if (d.take("wait_group")) {
    d.finish(1);
    d.keep(GroupWait{static_cast<U32>(d.immediate(0)), false});
    return set_wait(d);
  }
  if (d.take("wait_all")) {
    d.finish(0);
    d.keep(GroupWait{0, true});
    return set_wait(d);
  }
  if (d.take("mbarrier")) return decode_arrive(d);
  decode_copy(d);
}

}  // namespace

void add_copies(OpcodeTable& t) {
  t["cp"] = {decode_cp,
             {OpClass::async_copy, OpClass::async_group, OpClass::bulk_copy, OpClass::mbarrier}};
}

}  // namespace torchext::sim
