// cp.async.bulk (without a tensor map), its reductions and groups; st.async and red.async.
#include "bulk_copies.h"

#include <cstring>
#include <iterator>

#include "../frontend/decode.h"
#include "../timing/trace.h"
#include "copy_engine.h"
#include "mbarrier.h"

namespace torchext::sim {

namespace {

struct BulkCopy {
  bool to_global = false, from_global = false, multicast = false, own_cta_only = false;
  Reduction reduction;
  Slot to, from, size, barrier, mask;
  std::int64_t to_offset = 0, from_offset = 0, barrier_offset = 0;
};

void copy_one(Warp& w, const BulkCopy& c, int lane) {
  const auto bytes = static_cast<U32>(w.integer(c.size, lane));
  const U64 to = w.address(c.to, c.to_offset, lane);
  const U64 from = w.address(c.from, c.from_offset, lane);
  const U32 bit = 1u << lane;
  if (bytes == 0 || bytes % 16 != 0) {
    w.finding(FindingKind::misaligned_access,
              "a bulk copy's size must be a positive multiple of 16, not " + std::to_string(bytes),
              bit);
    return;
  }
  for (const bool destination : {true, false}) {
    if ((destination ? c.to_global : c.from_global) && (destination ? to : from) % 16) {
      w.finding(FindingKind::misaligned_access,
                "the global address of a bulk copy must be a multiple of 16", bit,
                destination ? to : from);
      return;
    }
  }
  if (c.to_global) {
    Place source, target;
    if (!resolve_shared(w, lane, from, bytes, 16, false, &source)) return;
    if (!resolve_global(w, lane, to, bytes, true, &target)) return;
    CopyGroups& group = bulk_group(w, lane);
    w.check_read(source, copy_actor(w, lane, group.read_agent, group.current), bytes, bit, from);
    Actor writer = copy_actor(w, lane, group.write_agent, group.current);
    const bool reduces = c.reduction.op != ReduceOp::none;
    if (reduces) writer.scope = Scope::gpu;
    if (reduces) w.check_read(target, writer, bytes, bit, to);
    w.check_write(target, writer, bytes, bit, to);
    CopyJob job;
    job.global = target.buffer;
    job.reduction = c.reduction;
    job.runs.push_back({target.host, source.host, bytes, 0});
    start_grouped(w, lane, std::move(job), "a bulk store");
    return;
  }
  Place source, target;
  if (c.from_global ? !resolve_global(w, lane, from, bytes, false, &source)
                    : !resolve_shared(w, lane, from, bytes, 16, false, &source)) {
    return;
  }
  if (!resolve_shared(w, lane, to, bytes, 16, !c.own_cta_only, &target)) return;
  Cta* barrier_cta;
  U32 barrier_offset;
  MBarrier* m = find_mbarrier_for_async(w, lane, Space::shared_cluster,
                                        w.address(c.barrier, c.barrier_offset, lane), &barrier_cta,
                                        &barrier_offset);
  if (m == nullptr) return;
  const auto offset = static_cast<std::size_t>(target.host - target.cta->shared.data());
  std::vector<Cta*> ctas{target.cta};
  if (c.multicast) {
    ctas.clear();
    for_lanes(static_cast<U32>(w.integer(c.mask, lane)) & 0xffff, [&](int rank) {
      if (static_cast<U32>(rank) >= w.grid().cluster_size ||
          w.cluster().ctas[static_cast<std::size_t>(rank)]->exited()) {
        w.finding(FindingKind::exited_cta,
                  "multicast to CTA rank " + std::to_string(rank) +
                      ", which does not exist or has exited",
                  bit);
        return;
      }
      ctas.push_back(w.cluster().ctas[static_cast<std::size_t>(rank)].get());
    });
    barrier_cta = nullptr;
  } else if (barrier_cta != target.cta) {
    w.finding(FindingKind::invalid_operand, "destination and mbarrier are in different CTAs", bit);
    return;
  }
  for (Cta* cta : ctas) {
    const auto it = cta->mbarriers.find(barrier_offset);
    if (it == cta->mbarriers.end()) {
      w.finding(FindingKind::mbarrier_misuse,
                "the mbarrier of CTA rank " + std::to_string(cta->rank) + " is not initialized",
                bit, barrier_offset);
      continue;
    }
    const Signal signal = make_signal(*cta, barrier_offset, it->second);
    Actor actor = copy_actor(w, lane, signal.agent, signal.clock);
    const bool reduces = c.reduction.op != ReduceOp::none;
    if (reduces) actor.scope = Scope::cluster;
    w.check_read(source, actor, bytes, bit, from);
    Place there = target;
    there.shadow = w.grid().checks ? &cta->shadow : nullptr;
    there.offset = offset;
    if (reduces) w.check_read(there, actor, bytes, bit, offset);
    w.check_write(there, actor, bytes, bit, offset);
    CopyJob job;
    job.global = source.buffer;
    job.reduction = c.reduction;
    job.runs.push_back({cta->shared.data() + offset, source.host, bytes, 0});
    start_signaled(w, std::move(job), signal, bytes, "a bulk copy", static_cast<U32>(ctas.size()));
  }
}

Step copy(Warp& w, const Instruction& i, U32 mask) {
  const auto& c = i.as<BulkCopy>();
  w.need(c.to, mask, "as an address");
  w.need(c.from, mask, "as an address");
  w.need(c.size, mask, "as a size");
  for_lanes(mask, [&](int lane) { copy_one(w, c, lane); });
  ++w.cluster().progress;
  return Step::next;
}

// ---- Groups -------------------------------------------------------------------------------------

Step commit(Warp& w, const Instruction&, U32 mask) {
  for_lanes(mask, [&](int lane) {
    CopyGroups& g = bulk_group(w, lane);
    if (g.map_clock != 0) g.map_clocks[g.current] = g.map_clock;
    ++g.current;  // an empty group counts too
    g.open = false;
  });
  if (auto* const recorder = timing::recorder()) recorder->note_group(timing::Action::bulk_commit);
  return Step::next;
}

struct GroupWait {
  U32 allowed;     // groups that may go on
  bool read_only;  // .read: until the sources have been read
};

Step wait_groups(Warp& w, const Instruction& i, U32 mask) {
  const U32 allowed = i.as<GroupWait>().allowed;
  const bool read_only = i.as<GroupWait>().read_only;
  bool ready = true;
  for_lanes(mask, [&](int lane) {
    const auto it = w.bulk_groups.find(lane);
    if (it == w.bulk_groups.end()) return;
    CopyGroups& g = it->second;
    const U32 committed = g.current - 1, upto = committed > allowed ? committed - allowed : 0;
    for (auto& [clock, work] : g.work) {
      if (clock > upto) break;
      for (const auto& each : work) {
        if (read_only ? each->read_done : each->done) continue;
        each->wanted = true;
        ready = false;
      }
    }
  });
  if (!ready) return Step::block;
  if (auto* const recorder = timing::recorder())
    recorder->note_group(timing::Action::bulk_wait, allowed, read_only);
  for_lanes(mask, [&](int lane) {
    const auto it = w.bulk_groups.find(lane);
    if (it == w.bulk_groups.end()) return;
    CopyGroups& g = it->second;
    const U32 committed = g.current - 1, upto = committed > allowed ? committed - allowed : 0;
    if (upto == 0) return;
    g.read_waited = std::max(g.read_waited, upto);
    w.learn(1u << lane, g.read_agent, upto);
    if (const auto after = g.map_clocks.upper_bound(upto); after != g.map_clocks.begin()) {
      w.learn(1u << lane, g.map_agent, std::prev(after)->second);
      g.map_clocks.erase(g.map_clocks.begin(), after);
    }
    if (read_only) return;
    g.waited = std::max(g.waited, upto);
    w.learn(1u << lane, g.write_agent, upto);
    g.work.erase(g.work.begin(), g.work.upper_bound(upto));
  });
  return Step::next;
}

// ---- st.async, red.async ------------------------------------------------------------------------

struct AsyncStore {
  U32 bytes, elements;
  Reduction reduction;
  Slot barrier;
  std::int64_t barrier_offset = 0;
};

Step async_store(Warp& w, const Instruction& i, U32 mask) {
  const auto& t = i.as<AsyncStore>();
  w.need(i.s[0], mask, "as an address");
  for (const Slot& s : i.list) w.need(s, mask, "as a value to store");
  const U32 total = t.bytes * t.elements;
  for_lanes(mask, [&](int lane) {
    const U64 address = w.address(i.s[0], i.offset, lane);
    Place place;
    if (!w.resolve(lane, Space::shared_cluster, address, total, true, &place)) return;
    Cta* owner;
    U32 offset;
    MBarrier* m =
        find_mbarrier_for_async(w, lane, Space::shared_cluster,
                                w.address(t.barrier, t.barrier_offset, lane), &owner, &offset);
    if (m == nullptr) return;
    if (owner != place.cta) {
      w.finding(FindingKind::invalid_operand, "destination and mbarrier are in different CTAs",
                1u << lane);
      return;
    }
    const Signal signal = make_signal(*owner, offset, *m);
    Actor actor = copy_actor(w, lane, signal.agent, signal.clock);
    const bool reduces = t.reduction.op != ReduceOp::none;
    if (reduces) actor.scope = Scope::cluster;
    if (reduces) w.check_read(place, actor, total, 1u << lane, address);
    w.check_write(place, actor, total, 1u << lane, address);
    CopyJob job;
    job.reduction = t.reduction;
    job.fills.emplace_back(total);
    for (U32 e = 0; e < t.elements; ++e) {
      const U64 value = w.integer(i.list[e], lane);
      std::memcpy(job.fills[0].data() + e * t.bytes, &value, t.bytes);
    }
    job.runs.push_back({place.host, nullptr, total, 0});
    start_signaled(w, std::move(job), signal, total, "an asynchronous store");
  });
  ++w.cluster().progress;
  return Step::next;
}

}  // namespace

void decode_async_store(Decoder& d, bool reduce) {
  d.take("weak");
  d.take("relaxed");
  d.take("cluster");
  d.need({"shared::cluster"});
  d.need({"mbarrier::complete_tx::bytes"});
  AsyncStore t{};
  t.elements = d.take("v2") ? 2 : d.take("v4") ? 4 : 1;
  Type type;
  if (reduce) {
    t.reduction = take_reduction(d, true);
    type = t.reduction.type;
  } else {
    type = d.take_type();
  }
  t.bytes = static_cast<U32>(size_of(type));
  if (t.bytes < 4) d.fail_type(type);
  d.finish(3);
  Space space = Space::shared_cluster;
  d.out.s[0] = d.address(d.arg(0), &d.out.offset, &space);
  const Arg& value = d.arg(1);
  if (t.elements == 1 && value.kind != Arg::vector) {
    d.out.list.push_back(d.source(value, type));
  } else {
    for (const Arg& a : d.vector(value, t.elements)) d.out.list.push_back(d.source(a, type));
  }
  t.barrier = d.address(d.arg(2), &t.barrier_offset, &space);
  d.is(OpClass::async_store);
  if (reduce) d.reads(Space::shared_cluster, t.bytes * t.elements, Proxy::async);
  d.writes(Space::shared_cluster, t.bytes * t.elements, Proxy::async);
  d.out.traits.completion = Completion::mbarrier;
  d.keep(t);
  d.out.execute = async_store;
}

void decode_bulk(Decoder& d, bool reduce) {
  d.is(OpClass::bulk_copy);
  if (!reduce) {
    if (d.take("commit_group")) {
      d.finish(0);
      d.is(OpClass::async_group);
      d.out.execute = commit;
      return;
    }
    if (d.take("wait_group")) {
      const bool read_only = d.take("read");
      d.finish(1);
      d.keep(GroupWait{static_cast<U32>(d.immediate(0)), read_only});
      d.is(OpClass::async_group);
      d.out.traits.wait = Wait::bulk_group;
      d.out.execute = wait_groups;
      return;
    }
    if (d.take("prefetch")) {
      d.take("L2");
      d.take("global");
      d.take_cache_hints();
      d.finish(d.has_cache_policy ? 3 : 2);
      d.out.execute = no_operation;
      return;
    }
  }
  BulkCopy c;
  // Destination first, then source.
  std::vector<std::string> spaces;
  for (const std::string& part : d.raw.parts) {
    if (part == "global" || part == "shared::cta" || part == "shared::cluster")
      spaces.push_back(part);
  }
  if (spaces.size() != 2) {
    d.fail("the modifiers must include a destination's and a source's state space (got " +
           std::to_string(spaces.size()) + ")");
  }
  for (const std::string& s : spaces) d.take(s.c_str());
  c.to_global = spaces[0] == "global";
  c.from_global = spaces[1] == "global";
  c.own_cta_only = spaces[0] == "shared::cta";
  if (spaces[1] == "shared::cluster" || (c.to_global && c.from_global)) {
    d.fail(
        "a copy must be between global and shared memory, from .shared::cta if from shared (got ." +
        spaces[0] + "." + spaces[1] + ")");
  }
  if (c.to_global) {
    d.need({"bulk_group"});
  } else {
    d.need({"mbarrier::complete_tx::bytes"});
    c.multicast = d.take("multicast::cluster");
  }
  if (reduce) c.reduction = take_reduction(d, true);
  d.take_cache_hints();
  const std::size_t extra = (c.multicast ? 1u : 0u) + (d.has_cache_policy ? 1u : 0u);
  d.finish((c.to_global ? 3 : 4) + extra);
  Space space = Space::shared;
  c.to = d.address(d.arg(0), &c.to_offset, &space);
  c.from = d.address(d.arg(1), &c.from_offset, &space);
  c.size = d.source(2, Type::u32);
  if (!c.to_global) {
    c.barrier = d.address(d.arg(3), &c.barrier_offset, &space);
    if (c.multicast) c.mask = d.source(4, Type::u16);
  }
  d.reads(c.from_global ? Space::global : Space::shared, 0, Proxy::async);
  d.writes(c.to_global      ? Space::global
           : c.own_cta_only ? Space::shared
                            : Space::shared_cluster,
           0, Proxy::async);
  d.out.traits.completion = c.to_global ? Completion::bulk_group : Completion::mbarrier;
  d.keep(c);
  d.out.execute = copy;
}

}  // namespace torchext::sim
