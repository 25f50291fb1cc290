// CTA and cluster barriers: bar / barrier (sync, arrive, red), barrier.cluster (arrive, wait).
#include "../frontend/decode.h"
#include "../machine/collective.h"
#include "../timing/trace.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

enum BarrierForm : std::uint8_t { kSync, kArrive, kRedAnd, kRedOr, kRedPopc };

// The thread count of a barrier instruction that names none.
U32 all_threads(const Cta& cta) {
  U32 n = 0;
  for (const auto& w : cta.warps) n += w->finished() ? 0 : 32;
  return n;
}

Step barrier(Warp& w, const Instruction& i, U32 mask) {
  const auto first = static_cast<int>(lane_of(mask));
  const auto id = static_cast<U32>(w.integer(i.s[0], first));
  const auto form = i.as<BarrierForm>();
  const bool counted = i.s[1].bytes != 0;
  const auto count = counted ? static_cast<U32>(w.integer(i.s[1], first)) : 0;
  Cta& cta = w.cta();
  if (w.group().arrived) {
    NamedBarrier& b = cta.barriers[id];
    if (b.generation == w.group().generation) return Step::block;
    w.acquire(mask, b.completed);
    if (form >= kRedAnd) {
      if (form == kRedPopc) {
        for_lanes(mask, [&](int l) { w.put(i.d, l, b.result_count); });
      } else {
        w.set_predicate(i.d, mask, (form == kRedAnd ? b.result_and : b.result_or) ? ~0u : 0);
      }
      w.set_valid(i.d, mask, mask);
    }
    return Step::next;
  }
  w.need(i.s[0], mask, "as a barrier");
  U32 elsewhere = 0;  // lanes with another barrier or another count
  for_lanes(mask, [&](int l) {
    const bool same = w.integer(i.s[0], l) == id && (!counted || w.integer(i.s[1], l) == count);
    elsewhere |= U32{!same} << l;
  });
  if (elsewhere != 0) {
    w.part(elsewhere);
    mask &= ~elsewhere;
  }
  if (id >= 16) {
    w.finding(FindingKind::barrier_misuse,
              "barrier " + std::to_string(id) + " does not exist (0 to 15)", mask);
    throw LaunchStopped{};
  }
  if (counted && (count == 0 || count % 32 != 0)) {
    w.finding(FindingKind::barrier_misuse,
              "a thread count of " + std::to_string(count) + " is not a positive multiple of 32",
              mask);
    throw LaunchStopped{};
  }
  NamedBarrier& b = cta.barriers[id];
  const U32 here = counted ? count : all_threads(cta);
  const U32 there = b.expected != 0 ? b.expected : all_threads(cta);
  if (b.open && here != there) {
    w.finding(FindingKind::barrier_misuse,
              "barrier " + std::to_string(id) + " expects " + std::to_string(there) +
                  " threads from one participant and " + std::to_string(here) + " from another",
              mask, 0, w.program().place(w.program().code[b.first_pc].line),
              w.program().code[b.first_pc].line);
  }
  if (!b.open) {
    b.open = true;
    b.expected = count;
    b.first_pc = w.pc();
    b.reduce_and = 1;
    b.reduce_or = b.reduce_count = 0;
  }
  if (form >= kRedAnd) {
    const U32 set = w.predicate(i.s[2]) & mask;
    b.reduce_and &= set == mask;
    b.reduce_or |= set != 0;
    b.reduce_count += static_cast<U32>(__builtin_popcount(set));
  }
  U32& arrived = b.lanes[w.index()];
  if ((arrived & mask) != 0) b.again += (w.live() & ~mask) == 0 ? 32 : __builtin_popcount(mask);
  arrived |= mask;
  b.arriving.join(w.release(mask));
  if (auto* const recorder = timing::recorder()) {
    timing::Action action;
    action.kind = timing::Action::barrier;
    action.id = id;
    action.count = count;
    action.lanes = static_cast<std::uint8_t>(
        (w.live() & ~mask) == 0 && counted ? 32 : __builtin_popcount(mask));
    action.flag = form == kArrive;
    recorder->note(action);
  }
  Group& g = w.group();
  g.generation = b.generation;
  complete_barrier_if_full(cta, b);
  ++w.cluster().progress;
  if (form == kArrive) return Step::next;
  g.arrived = true;
  return b.generation == g.generation ? Step::block : barrier(w, i, mask);
}

std::string describe_barrier(Warp& w, const Group& g) {
  const Instruction& i = w.program().code[g.pc];
  const auto id = static_cast<U32>(w.integer(i.s[0], static_cast<int>(lane_of(g.mask))));
  if (id >= 16) return "waits at " + w.program().opcodes[i.opcode];
  const Attendance a = attendance(w.cta(), w.cta().barriers[id]);
  return "waits at barrier " + std::to_string(id) + ", where " + std::to_string(a.arrived) +
         " of " + std::to_string(a.expected) + " threads have arrived";
}

void decode_bar(Decoder& d) {
  const bool bar = d.opcode() == "bar";
  if (d.take("warp")) {
    decode_warp_barrier(d);
    return;
  }
  if (d.take("cluster")) return decode_cluster_barrier(d);
  d.take("cta");
  const bool red = d.take("red");
  std::string op;
  if (red) op = d.take_one_of({"and", "or", "popc"});
  const bool arrive = !red && d.take("arrive");
  if (!red && !arrive) d.need_one_of({"sync", "arrive", "red", "warp", "cluster"});
  d.out.aligned = d.take("aligned") || bar;
  if (red) d.take_type();
  d.keep(arrive ? kArrive : !red ? kSync : op == "and" ? kRedAnd : op == "or" ? kRedOr : kRedPopc);
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
    d.fail("the operands must be [d,] barrier [, threads] [, predicate] (got " +
           std::to_string(d.count()) + " operands)");
  if (arrive && rest != 1) d.fail("the operands of .arrive must be a barrier and a thread count");
  if (!arrive) d.out.traits.wait = Wait::barrier;
  d.out.traits.describe_wait = describe_barrier;
  d.out.execute = barrier;
}

// ---- barrier.cluster ----------------------------------------------------------------------------

struct ClusterArrival {
  bool relaxed;
};

Step cluster_arrive(Warp& w, const Instruction& i, U32 mask) {
  Cluster& c = w.cluster();
  const U32 again = mask & w.cluster_arrived;
  if (again) {
    w.finding(FindingKind::barrier_misuse, "barrier.cluster.arrive twice without a wait in between",
              again);
    return Step::next;
  }
  w.cluster_arrived |= mask;
  w.cluster_pending |= mask;
  if (i.as<ClusterArrival>().relaxed) {  // releases only what an earlier fence released
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
  if (auto* const recorder = timing::recorder()) {
    timing::Action action;
    action.kind = timing::Action::cluster_arrive;
    action.lanes = static_cast<std::uint8_t>(__builtin_popcount(mask));
    recorder->note(action);
  }
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
  const U32 early = mask & w.cluster_pending;
  if (early == mask) return Step::block;
  if (early != 0) {
    w.part(early);
    mask &= ~early;
  }
  w.cluster_arrived &= ~mask;
  if (auto* const recorder = timing::recorder()) recorder->note_group(timing::Action::cluster_wait);
  w.acquire(mask, c.barrier.completed);
  if (w.cta().cluster_completed.known) w.acquire(mask, w.cta().cluster_completed);
  return Step::next;
}

std::string describe_cluster_barrier(Warp& w, const Group&) {
  const Attendance a = cluster_attendance(w.cluster());
  return "waits at barrier.cluster, where " + std::to_string(a.arrived) + " of " +
         std::to_string(a.expected) + " threads have arrived";
}

}  // namespace

void decode_cluster_barrier(Decoder& d) {
  d.is(OpClass::cluster_barrier);
  const bool arrive = d.need_one_of({"arrive", "wait"}) == "arrive";
  d.keep(ClusterArrival{d.take("relaxed")});
  d.take(arrive ? "release" : "acquire");
  d.out.aligned = d.take("aligned");
  d.finish(0);
  if (!arrive) d.out.traits.wait = Wait::cluster_barrier;
  d.out.traits.describe_wait = describe_cluster_barrier;
  d.out.execute = arrive ? cluster_arrive : cluster_wait;
}

// A barrier with a thread count counts 32 for each warp whose live lanes have all arrived, even if
// the warp has fewer threads. A barrier without a count waits for every thread of the CTA.
Attendance attendance(const Cta& cta, const NamedBarrier& b) {
  Attendance a{b.again, b.expected};
  for (std::size_t n = 0; n < cta.warps.size(); ++n) {
    const U32 lanes = b.lanes[n], live = cta.warps[n]->live();
    if (b.expected == 0)
      a.arrived += static_cast<U32>(__builtin_popcount(lanes & live));
    else if (lanes != 0)
      a.arrived += (live & ~lanes) == 0 ? 32 : static_cast<U32>(__builtin_popcount(lanes));
  }
  if (b.expected == 0) a.expected = cta.live_threads;
  return a;
}

void complete_barrier_if_full(Cta& cta, NamedBarrier& b) {
  if (!b.open) return;
  const Attendance a = attendance(cta, b);
  if (a.arrived < a.expected) return;
  b.open = false;
  b.lanes.fill(0);
  b.again = 0;
  ++b.generation;
  b.result_and = b.reduce_and;
  b.result_or = b.reduce_or;
  b.result_count = b.reduce_count;
  b.completed = std::move(b.arriving);
  b.arriving = {};
  ++cta.cluster.progress;
}

Attendance cluster_attendance(const Cluster& c) {
  Attendance a{0, 0};
  for (const Warp* w : c.all_warps) {
    a.arrived += static_cast<U32>(__builtin_popcount(w->cluster_pending & w->live()));
    a.expected += static_cast<U32>(__builtin_popcount(w->live()));
  }
  return a;
}

void complete_cluster_barrier_if_full(Cluster& c) {
  const Attendance a = cluster_attendance(c);
  if (a.arrived == 0 || a.arrived < a.expected) return;
  for (Warp* w : c.all_warps) w->cluster_pending = 0;
  c.barrier.completed = std::move(c.barrier.arriving);
  c.barrier.arriving = {};
  for (auto& cta : c.ctas) {
    cta->cluster_completed = std::move(cta->cluster_arriving);
    cta->cluster_arriving = {};
  }
  ++c.progress;
}

void add_barriers(OpcodeTable& t) {
  t["bar"] = {decode_bar, {OpClass::barrier, OpClass::cluster_barrier, OpClass::warp}};
  t["barrier"] = {decode_bar, {OpClass::barrier, OpClass::cluster_barrier, OpClass::warp}};
}

}  // namespace torchext::sim
