// CTA and cluster barriers: bar / barrier (sync, arrive, red), barrier.cluster (arrive, wait).
#include "collective.h"
#include "decode.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

using U16 = std::uint16_t;
using U32 = std::uint32_t;
using U64 = std::uint64_t;

enum : U16 { kSync, kArrive, kRedAnd, kRedOr, kRedPopc };

// Threads that a group counts for: a ragged last warp counts whole, as hardware counts warps.
U32 weight(Warp& w, U32 mask) {
  return mask == w.live() ? 32 : static_cast<U32>(__builtin_popcount(mask));
}

Step barrier(Warp& w, const Instruction& i, U32 mask) {
  const auto first = static_cast<int>(lane_of(mask));
  const auto id = static_cast<U32>(w.integer(i.s[0], first));
  Cta& cta = w.cta();
  if (id >= 16) {
    w.finding(FindingKind::barrier_misuse,
              "barrier " + std::to_string(id) + " does not exist (0 to 15)", mask);
    throw LaunchStopped{};
  }
  NamedBarrier& b = cta.barriers[id];
  Group& g = w.group();
  if (g.arrived) {
    if (b.generation == g.generation) return Step::block;
    w.acquire(mask, b.completed);
    if (i.small >= kRedAnd) {
      if (i.small == kRedPopc) {
        for_lanes(mask, [&](int l) { w.put(i.d, l, b.result_count); });
      } else {
        w.set_predicate(i.d, mask, (i.small == kRedAnd ? b.result_and : b.result_or) ? ~0u : 0);
      }
      w.set_valid(i.d, mask, mask);
    }
    return Step::next;
  }
  const bool counted = i.s[1].bytes != 0;
  U32 expected = cta.live_threads;
  if (counted) {
    expected = static_cast<U32>(w.integer(i.s[1], first));
    if (expected == 0 || expected % 32 != 0) {
      w.finding(
          FindingKind::barrier_misuse,
          "a thread count of " + std::to_string(expected) + " is not a positive multiple of 32",
          mask);
      throw LaunchStopped{};
    }
  }
  if (b.arrived != 0 && b.expected != expected && counted) {
    w.finding(FindingKind::barrier_misuse,
              "barrier " + std::to_string(id) + " expects " + std::to_string(b.expected) +
                  " threads from one participant and " + std::to_string(expected) + " from another",
              mask, 0, "line " + std::to_string(w.program().code[b.first_pc].line),
              w.program().code[b.first_pc].line);
  }
  if (b.arrived == 0) {
    b.expected = counted ? expected : 0;
    b.first_pc = w.pc();
    b.reduce_and = 1;
    b.reduce_or = b.reduce_count = 0;
  }
  if (i.small >= kRedAnd) {
    const U32 set = w.predicate(i.s[2]) & mask;
    b.reduce_and &= set == mask;
    b.reduce_or |= set != 0;
    b.reduce_count += static_cast<U32>(__builtin_popcount(set));
  }
  b.arrived += weight(w, mask);
  b.arriving.join(w.release(mask));
  const U64 generation = b.generation;
  complete_barrier_if_full(cta, b);
  ++w.cluster().progress;
  if (i.small == kArrive) return Step::next;
  g.arrived = true;
  g.generation = generation;
  if (b.generation == generation) return Step::block;
  return barrier(w, i, mask);
}

void decode_bar(Decoder& d) {
  const bool bar = d.opcode() == "bar";
  if (d.take("warp")) {
    if (!d.take("sync")) d.fail("expected .sync");
    d.finish(1);
    d.out.s[0] = d.source(0, Type::b32);
    d.out.execute = warp_barrier;
    return;
  }
  if (d.take("cluster")) return decode_cluster_barrier(d);
  d.take("cta");
  const bool red = d.take("red");
  std::string op;
  if (red) op = d.take_one_of({"and", "or", "popc"});
  const bool arrive = !red && d.take("arrive");
  if (!red && !arrive && !d.take("sync")) d.fail("unknown form");
  d.out.aligned = d.take("aligned") || bar;
  if (red) d.take_type();
  d.out.small = arrive        ? kArrive
                : !red        ? kSync
                : op == "and" ? kRedAnd
                : op == "or"  ? kRedOr
                              : kRedPopc;
  d.finish(1, 4);
  std::size_t k = 0;
  if (red) {
    d.out.d = op == "popc" ? d.destination(k++, 4) : d.predicate_destination(d.arg(k++));
    d.out.s[2] = d.predicate(d.count() - 1);
  }
  d.out.s[0] = d.source(k++, Type::u32);
  const std::size_t rest = d.count() - k - (red ? 1 : 0);
  d.out.s[1].bytes = 0;  // no thread count
  if (rest == 1)
    d.out.s[1] = d.source(k, Type::u32);
  else if (rest != 0)
    d.fail("too many operands");
  if (arrive && rest != 1) d.fail("arrive needs a thread count");
  d.out.execute = barrier;
}

// ---- barrier.cluster ----------------------------------------------------------------------------

Step cluster_arrive(Warp& w, const Instruction& i, U32 mask) {
  Cluster& c = w.cluster();
  const U32 again = mask & w.cluster_arrived;
  if (again) {
    w.finding(FindingKind::barrier_misuse, "barrier.cluster.arrive twice without a wait in between",
              again);
    return Step::next;
  }
  for_lanes(mask, [&](int l) { w.cluster_arrivals[l] = c.barrier.generation; });
  w.cluster_arrived |= mask;
  c.barrier.arrived += static_cast<U32>(__builtin_popcount(mask));
  if (i.small) {  // .relaxed: releases only what a fence before it did
    w.order_lanes(mask);
    for_lanes(mask & w.fenced_lanes, [&](int l) {
      const Scoped& k = w.fence_released[l];
      c.barrier.arriving.join(k[1]);
      if (k[0].known == k[1].known) return;
      w.cta().cluster_arriving.join(k[0]);
      c.barrier.arriving.join(refused(k[0], Scope::cta, Scope::cluster));
    });
  } else {
    c.barrier.arriving.join(w.release(mask));
  }
  complete_cluster_barrier_if_full(c);
  ++c.progress;
  return Step::next;
}

Step cluster_wait(Warp& w, const Instruction&, U32 mask) {
  Cluster& c = w.cluster();
  const U32 without = mask & ~w.cluster_arrived;
  if (without) {
    w.finding(FindingKind::barrier_misuse, "barrier.cluster.wait without barrier.cluster.arrive",
              without);
    return Step::next;
  }
  const auto first = static_cast<int>(lane_of(mask));
  if (c.barrier.generation == w.cluster_arrivals[first]) return Step::block;
  w.cluster_arrived &= ~mask;
  w.acquire(mask, c.barrier.completed);
  if (w.cta().cluster_completed.known) w.acquire(mask, w.cta().cluster_completed);
  return Step::next;
}

}  // namespace

void decode_cluster_barrier(Decoder& d) {
  const bool arrive = d.take("arrive");
  if (!arrive && !d.take("wait")) d.fail("expected .arrive or .wait");
  d.out.small = d.take("relaxed");
  d.take(arrive ? "release" : "acquire");
  d.out.aligned = d.take("aligned");
  d.finish(0);
  d.out.execute = arrive ? cluster_arrive : cluster_wait;
}

void complete_barrier_if_full(Cta& cta, NamedBarrier& b) {
  if (b.arrived == 0) return;
  const U32 expected = b.expected != 0 ? b.expected : cta.live_threads;
  if (b.arrived < expected) return;
  b.arrived = 0;
  ++b.generation;
  b.result_and = b.reduce_and;
  b.result_or = b.reduce_or;
  b.result_count = b.reduce_count;
  b.completed = std::move(b.arriving);
  b.arriving = {};
  ++cta.cluster.progress;
}

void complete_cluster_barrier_if_full(Cluster& c) {
  U32 live = 0;
  for (const Warp* w : c.all_warps) live += static_cast<U32>(__builtin_popcount(w->live()));
  if (c.barrier.arrived == 0 || c.barrier.arrived < live) return;
  c.barrier.arrived = 0;
  ++c.barrier.generation;
  c.barrier.completed = std::move(c.barrier.arriving);
  c.barrier.arriving = {};
  for (auto& cta : c.ctas) {
    cta->cluster_completed = std::move(cta->cluster_arriving);
    cta->cluster_arriving = {};
  }
  ++c.progress;
}

void add_barriers(DecodeTable& t) {
  t["bar"] = decode_bar;
  t["barrier"] = decode_bar;
}

}  // namespace torchext::sim
