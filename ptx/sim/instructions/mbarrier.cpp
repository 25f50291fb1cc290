// mbarrier: init, inval, arrive, arrive_drop, expect_tx, complete_tx, test_wait, try_wait,
// pending_count.
#include "mbarrier.h"

#include <algorithm>
#include <cstdio>

#include "../frontend/decode.h"
#include "../timing/trace.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

constexpr std::int64_t kMaxTransactions = (1 << 20) - 1;

std::string name_of(const Cta& cta, U32 offset) {
  char text[64];
  std::snprintf(text, sizeof text, "mbarrier 0x%x", offset);
  return cta.cluster.ctas.size() > 1
             ? std::string(text) + " of CTA rank " + std::to_string(cta.rank)
             : text;
}

void complete_if_ready(Cta& cta, MBarrier& m) {
  if (m.pending != 0 || m.transactions != 0) return;
  m.completed.join(m.arriving);
  m.remote_completed.join(m.remote_arriving);
  // Copies that are still under way, where expect_tx was too small: nobody may rely on them, nor on
  // those that have landed, since bytes do not say whose they are.
  m.work.erase(std::remove_if(m.work.begin(), m.work.end(),
                              [](const auto& weak) {
                                const auto work = weak.lock();
                                return work == nullptr || work->done;
                              }),
               m.work.end());
  if (cta.cluster.grid.checks) {
    VectorClock known = *m.completed.known;
    if (m.work.empty()) known.raise(m.agent, static_cast<U32>(m.phase) + 1);
    for (const auto& [agent, clock] : m.map_reads) known.raise(agent, clock);
    m.completed.known = ClockRef::make(std::move(known));
  }
  m.map_reads.clear();
  m.arriving = m.remote_arriving = {};
  ++m.phase;
  m.pending = m.expected;
  ++cta.cluster.progress;
}

struct Operation {
  Space space = Space::generic;
  bool drop = false, expect = false, no_complete = false;  // arrivals
  bool parity = false, patient = false;                    // waits; patient: try_wait
  bool relaxed = false, cta_scope = false;
};

Space space_of(const Instruction& i) {
  return i.as<Operation>().space;
}

// ---- init, inval --------------------------------------------------------------------------------

Step init(Warp& w, const Instruction& i, U32 mask) {
  w.need(i.s[0], mask, "as an address");
  w.need(i.s[1], mask, "as an arrival count");
  for_lanes(mask, [&](int lane) {
    const U64 address = w.address(i.s[0], i.offset, lane);
    Place place;
    if (!w.resolve(lane, space_of(i), address, 8, true, &place)) return;
    if (place.cta != &w.cta()) {
      w.finding(FindingKind::mbarrier_misuse, "mbarrier.init of memory that is not this CTA's",
                1u << lane, address);
      return;
    }
    const auto offset = static_cast<U32>(place.offset);
    const auto count = static_cast<U32>(w.integer(i.s[1], lane));
    if (count == 0 || count > kMaxTransactions) {
      w.finding(FindingKind::mbarrier_misuse,
                "an arrival count of " + std::to_string(count) + " (1 to 1048575 are valid)",
                1u << lane, offset);
      return;
    }
    auto& all = w.cta().mbarriers;
    if (all.count(offset)) {
      w.finding(FindingKind::mbarrier_misuse,
                name_of(w.cta(), offset) + " is initialized again without inval", 1u << lane,
                offset);
    }
    w.check_write(place, w.actor(lane), 8, 1u << lane, address);
    MBarrier m;
    m.expected = count;
    m.pending = count;
    m.agent = w.cluster().new_agent();
    m.init_agent = w.agent(lane);
    m.init_clock = w.clock(lane);
    m.init_pc = w.pc();
    w.cluster().agent_names[m.agent] = "copies that signal " + name_of(w.cta(), offset);
    all[offset] = std::move(m);
    if (auto* const recorder = timing::recorder()) {
      timing::Action action;
      action.kind = timing::Action::init;
      action.id = offset;
      action.count = count;
      recorder->note(action);
    }
  });
  ++w.cluster().progress;
  return Step::next;
}

void decode_init(Decoder& d) {
  Space space = d.take_space();
  d.need_type(Type::b64);
  d.finish(2);
  d.keep(Operation{space});
  d.out.s[0] = d.address(d.arg(0), &d.out.offset, &space);
  d.out.s[1] = d.source(1, Type::u32);
  d.writes(space, 8);
  d.out.execute = init;
}

Step inval(Warp& w, const Instruction& i, U32 mask) {
  for_lanes(mask, [&](int lane) {
    Cta* owner;
    U32 offset;
    const U64 address = w.address(i.s[0], i.offset, lane);
    MBarrier* m = find_mbarrier(w, lane, space_of(i), address, &owner, &offset);
    if (m == nullptr) return;
    if (m->transactions != 0) {
      w.finding(FindingKind::mbarrier_misuse,
                name_of(*owner, offset) + " is invalidated with bytes outstanding", 1u << lane,
                offset);
    }
    Place place;
    if (w.resolve(lane, space_of(i), address, 8, true, &place))
      w.check_write(place, w.actor(lane), 8, 1u << lane, address);
    owner->mbarriers.erase(offset);
  });
  return Step::next;
}

void decode_inval(Decoder& d) {
  Space space = d.take_space();
  d.need_type(Type::b64);
  d.finish(1);
  d.keep(Operation{space});
  d.out.s[0] = d.address(d.arg(0), &d.out.offset, &space);
  d.writes(space, 8);
  d.out.execute = inval;
}

// ---- arrive, expect_tx, complete_tx -------------------------------------------------------------

// An arrival or a wait without a scope counts as .cluster, although PTX says .cta, because CUTLASS
// and others omit the scope where CTAs signal each other.
void take_scope(Decoder& d, Operation* operation) {
  operation->cta_scope = d.take_one_of({"cta", "cluster"}) == "cta";
}

// The knowledge that an arrival passes on. Only threads of the barrier's CTA can wait for it.
void pass_on(Warp& w, const Cta& owner, MBarrier& m, bool cta_scope, const Scoped& knowledge) {
  const bool remote = &owner != &w.cta();
  if (!remote) {
    m.arriving.join(knowledge[0]);
    return;
  }
  if (!cta_scope) m.remote_arriving.join(knowledge[1]);
  if (cta_scope || knowledge[0].known != knowledge[1].known)
    m.arriving.join(refused(knowledge[0], Scope::cta, Scope::cluster));
}

// Tells the clock of `count` arrivals and `bytes` expected bytes.
void note_arrival(const Cta& owner, U32 offset, U32 count, U32 bytes) {
  auto* const recorder = timing::recorder();
  if (recorder == nullptr) return;
  timing::Action action;
  action.kind = timing::Action::arrive;
  action.rank = static_cast<std::uint8_t>(owner.rank);
  action.id = offset;
  action.count = count;
  action.bytes = bytes;
  recorder->note(action);
}

Step arrive_at(Warp& w, const Instruction& i, U32 mask) {
  const auto form = i.as<Operation>();
  w.need(i.s[0], mask, "as an address");
  w.need(i.s[1], mask, "as a count");
  Scoped knowledge;
  if (!form.relaxed) knowledge.fill(w.release(mask));
  // The lanes of a warp that arrive at a barrier in one phase get the same token: the count of
  // pending arrivals before all of them (measured on an H200).
  const MBarrier* last = nullptr;
  U64 token = 0;
  for_lanes(mask, [&](int lane) {
    Cta* owner;
    U32 offset;
    MBarrier* m =
        find_mbarrier(w, lane, space_of(i), w.address(i.s[0], i.offset, lane), &owner, &offset);
    if (m == nullptr) return;
    if (m != last || m->phase != token >> 32) token = m->phase << 32 | static_cast<U64>(m->pending);
    last = m;
    const auto operand = static_cast<U32>(w.integer(i.s[1], lane));
    const U32 count = form.expect ? 1 : operand;
    if (form.expect) {
      expect_transactions(*m, operand);
      if (m->transactions > kMaxTransactions) {
        w.finding(FindingKind::mbarrier_misuse,
                  name_of(*owner, offset) + ": the transaction count exceeds 2^20 - 1", 1u << lane,
                  offset);
      }
    }
    if (!i.d.sink) w.put(i.d, lane, token);
    if (count == 0 || count > m->pending) {
      w.finding(FindingKind::mbarrier_misuse,
                name_of(*owner, offset) + ": " + std::to_string(count) +
                    " arrivals, but the phase lacks " + std::to_string(m->pending),
                1u << lane, offset);
      return;
    }
    if (form.no_complete && count == m->pending) {
      w.finding(FindingKind::mbarrier_misuse,
                name_of(*owner, offset) + ": .noComplete completes the phase", 1u << lane, offset);
    }
    if (form.drop) m->expected -= count;
    const bool fenced = form.relaxed && (w.fenced_lanes >> lane & 1);
    pass_on(w, *owner, *m, form.cta_scope, fenced ? w.fence_released[lane] : knowledge);
    note_arrival(*owner, offset, count, form.expect ? operand : 0);
    arrive(*owner, *m, count, {});
  });
  if (!i.d.sink) w.set_valid(i.d, mask, mask);
  ++w.cluster().progress;
  return Step::next;
}

void decode_arrive(Decoder& d, bool drop) {
  Operation operation;
  operation.drop = drop;
  operation.expect = d.take("expect_tx");
  operation.no_complete = d.take("noComplete");
  operation.relaxed = d.take("relaxed");
  if (!operation.relaxed) d.take("release");
  take_scope(d, &operation);
  Space space = d.take_space();
  d.need_type(Type::b64);
  operation.space = space;
  d.keep(operation);
  // A remote barrier may have no state operand.
  const bool has_state = d.arg(0).kind != Arg::memory;
  std::size_t k = has_state ? 1 : 0;
  if (has_state) {
    d.out.d = d.destination(0, 8);
  } else {
    d.out.d.sink = true;
    d.out.d.reg = 1;
  }
  d.finish(k + 1, k + 2);
  d.out.s[0] = d.address(d.arg(k), &d.out.offset, &space);
  const bool has_count = d.count() == k + 2;
  if ((operation.expect || operation.no_complete) && !has_count)
    d.fail("the last operand must be a count (got the barrier's address)");
  d.out.s[1] = has_count ? d.source(k + 1, Type::u32) : d.constant(1, 4);
  d.reads(space, 8);
  d.writes(space, 8);
  d.out.execute = arrive_at;
}

template <int sign>
Step transactions(Warp& w, const Instruction& i, U32 mask) {
  for_lanes(mask, [&](int lane) {
    Cta* owner;
    U32 offset;
    MBarrier* m =
        find_mbarrier(w, lane, space_of(i), w.address(i.s[0], i.offset, lane), &owner, &offset);
    if (m == nullptr) return;
    const auto bytes = static_cast<std::int64_t>(w.integer(i.s[1], lane));
    if (sign > 0) note_arrival(*owner, offset, 0, static_cast<U32>(bytes));
    if (sign > 0)
      expect_transactions(*m, bytes);
    else
      complete_transactions(*owner, offset, bytes);
  });
  ++w.cluster().progress;
  return Step::next;
}

template <int sign>
void decode_transactions(Decoder& d) {
  d.take("relaxed");
  d.take_one_of({"cta", "cluster"});
  Space space = d.take_space();
  d.need_type(Type::b64);
  d.finish(2);
  d.keep(Operation{space});
  d.out.s[0] = d.address(d.arg(0), &d.out.offset, &space);
  d.out.s[1] = d.source(1, Type::u32);
  d.reads(space, 8);
  d.writes(space, 8);
  d.out.execute = transactions<sign>;
}

// ---- test_wait, try_wait ------------------------------------------------------------------------

void note_wait(Warp& w, const Instruction& i, U32 mask, timing::Recorder& recorder) {
  timing::Action last;
  for_lanes(mask, [&](int lane) {
    Cta* owner;
    U32 offset;
    const MBarrier* m =
        find_mbarrier(w, lane, space_of(i), w.address(i.s[0], i.offset, lane), &owner, &offset);
    if (m == nullptr) return;
    timing::Action action;
    action.kind = timing::Action::wait;
    action.rank = static_cast<std::uint8_t>(owner->rank);
    action.id = offset;
    action.count =
        static_cast<U32>(i.as<Operation>().parity ? m->phase : (w.integer(i.s[1], lane) >> 32) + 1);
    if (!(action == last)) recorder.note(action);
    last = action;
  });
}

Step wait(Warp& w, const Instruction& i, U32 mask) {
  const auto form = i.as<Operation>();
  w.need(i.s[0], mask, "as an address");
  w.need(i.s[1], mask, form.parity ? "as a parity" : "as a state");
  Group& g = w.group();
  U32 complete = 0;
  Knowledge own, all;  // for .cta and for .cluster
  for_lanes(mask, [&](int lane) {
    Cta* owner;
    U32 offset;
    MBarrier* m =
        find_mbarrier(w, lane, space_of(i), w.address(i.s[0], i.offset, lane), &owner, &offset);
    if (m == nullptr) {
      complete |= 1u << lane;  // already reported; let the kernel continue
      return;
    }
    const U64 operand = w.integer(i.s[1], lane);
    const bool done = form.parity ? (m->phase & 1) != (operand & 1) : m->phase > operand >> 32;
    if (done) {
      complete |= 1u << lane;
      if (form.cta_scope || form.relaxed) {
        own.join(m->completed);
        if (m->remote_completed.known)
          own.join(refused(m->remote_completed, Scope::cluster, Scope::cta));
      }
      all.join(m->completed);
      all.join(m->remote_completed);
      m->waited = m->phase;
    } else {
      for (const auto& weak : m->work) {
        if (const auto work = weak.lock()) work->wanted = true;
      }
    }
  });
  auto* const recorder = timing::recorder();
  if (recorder != nullptr && complete == mask) note_wait(w, i, mask, *recorder);
  if (complete != mask) {
    const bool patient = form.patient && !g.give_up;
    if (patient && (g.blocked || w.cluster().random.below(4) != 0)) return Step::block;
    ++w.cluster().spins;
    if (recorder != nullptr) recorder->failed_wait();
  }
  const Knowledge& reached = form.cta_scope ? own : all;
  if (!form.relaxed) {
    if (complete != 0) w.acquire(complete, reached);
  } else if (w.grid().checks) {  // a later fence may acquire it
    for_lanes(complete, [&](int lane) {
      w.strong_acquired[lane][0].join(own);
      for (const std::size_t level : {1, 2}) w.strong_acquired[lane][level].join(reached);
    });
    w.acquired_lanes |= complete;
  }
  w.set_predicate(i.d, mask, complete);
  w.set_valid(i.d, mask, mask);
  return Step::next;
}

// What the current phase still needs.
std::string what_is_missing(const MBarrier& m) {
  const std::string arrivals =
      std::to_string(m.pending) + " of " + std::to_string(m.expected) + " arrivals";
  if (m.transactions >= 0)
    return "and lacks " + arrivals + " and " + std::to_string(m.transactions) + " bytes";
  const std::string surplus = std::to_string(-m.transactions) +
                              " more bytes arrived than were expected (expect_tx is too small)";
  if (m.pending == 0) return "and lacks no arrival, but " + surplus;
  return "and lacks " + arrivals + "; " + surplus;
}

std::string describe_wait(Warp& w, const Group& g) {
  const Instruction& i = w.program().code[g.pc];
  const auto lane = static_cast<int>(lane_of(g.mask));
  const auto at = static_cast<U32>(w.address(i.s[0], i.offset, lane));
  const U32 rank = at >> kSharedRankShift, offset = at & kSharedOffsetMask;
  Cta& cta = rank == 0 ? w.cta() : *w.cluster().ctas[rank - 1];
  const auto it = cta.mbarriers.find(offset);
  if (it == cta.mbarriers.end()) return "waits at " + w.program().opcodes[i.opcode];
  const MBarrier& m = it->second;
  const bool parity = i.as<Operation>().parity;
  const U64 operand = w.integer(i.s[1], lane);
  char text[128];
  std::snprintf(text, sizeof text, "waits for %s %llu of mbarrier 0x%x, which is in phase %llu ",
                parity ? "parity" : "phase",
                static_cast<unsigned long long>(parity ? operand & 1 : operand >> 32), offset,
                static_cast<unsigned long long>(m.phase));
  return text + what_is_missing(m);
}

template <bool patient>
void decode_wait(Decoder& d) {
  Operation operation;
  operation.patient = patient;
  operation.parity = d.take("parity");
  operation.relaxed = d.take("relaxed");
  if (!operation.relaxed) d.take("acquire");
  take_scope(d, &operation);
  Space space = d.take_space();
  d.need_type(Type::b64);
  d.finish(3, patient ? 4 : 3);
  operation.space = space;
  d.keep(operation);
  d.out.d = d.predicate_destination(d.arg(0));
  d.out.s[0] = d.address(d.arg(1), &d.out.offset, &space);
  d.out.s[1] = d.source(2, operation.parity ? Type::u32 : Type::b64);
  if (d.count() == 4) d.source(3, Type::u32);  // time hint
  if (patient) d.out.traits.wait = Wait::mbarrier;
  d.out.traits.times_out = patient;
  d.out.traits.describe_wait = describe_wait;
  d.reads(space, 8);
  d.out.execute = wait;
}

Step pending_count(Warp& w, const Instruction& i, U32 mask) {
  for_lanes(mask, [&](int l) { w.put(i.d, l, w.integer(i.s[0], l) & 0xfffff); });
  w.set_valid(i.d, mask, w.valid(i.s[0]));
  return Step::next;
}

void decode_mbarrier(Decoder& d) {
  if (d.take("init")) return decode_init(d);
  if (d.take("inval")) return decode_inval(d);
  if (d.take("arrive")) return decode_arrive(d, false);
  if (d.take("arrive_drop")) return decode_arrive(d, true);
  if (d.take("expect_tx")) return decode_transactions<1>(d);
  if (d.take("complete_tx")) return decode_transactions<-1>(d);
  if (d.take("test_wait")) return decode_wait<false>(d);
  if (d.take("try_wait")) return decode_wait<true>(d);
  if (d.take("pending_count")) {
    d.need_type(Type::b64);
    d.finish(2);
    d.out.d = d.destination(0, 4);
    d.out.s[0] = d.source(1, Type::b64);
    d.out.execute = pending_count;
    return;
  }
  d.need_one_of({"init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait",
                 "try_wait", "pending_count"});
}

}  // namespace

MBarrier* find_mbarrier(Warp& w, int lane, Space space, U64 address, Cta** owner, U32* offset) {
  Place place;
  if (!w.resolve(lane, space, address, 8, false, &place)) return nullptr;
  if (place.cta == nullptr) {
    w.finding(FindingKind::mbarrier_misuse, "the address is not in shared memory", 1u << lane,
              address);
    return nullptr;
  }
  *owner = place.cta;
  *offset = static_cast<U32>(place.offset);
  const auto it = place.cta->mbarriers.find(*offset);
  if (it == place.cta->mbarriers.end()) {
    w.finding(FindingKind::mbarrier_misuse, name_of(*place.cta, *offset) + " is not initialized",
              1u << lane, *offset);
    return nullptr;
  }
  MBarrier& m = it->second;
  if (w.grid().checks && m.init_agent != w.agent(lane) &&
      w.known(lane)->get(m.init_agent) < m.init_clock &&
      (m.published_agent == 0 || w.known(lane)->get(m.published_agent) == 0)) {
    const U32 line = w.program().code[m.init_pc].line;
    w.finding(FindingKind::mbarrier_misuse,
              name_of(*place.cta, *offset) +
                  " is used by a thread that nothing ordered after its "
                  "initialization",
              1u << lane, *offset, "mbarrier.init, line " + std::to_string(line), line);
  }
  const auto intact = [&](U64 at) {
    return place.shadow->last_write_is(at, m.init_agent, m.init_clock, m.init_pc);
  };
  if (w.grid().checks && !(intact(*offset) && intact(*offset + 4))) {
    w.finding(FindingKind::mbarrier_misuse,
              name_of(*place.cta, *offset) + " has been overwritten since its initialization",
              1u << lane, *offset);
  }
  return &m;
}

MBarrier* find_mbarrier_for_async(Warp& w, int lane, Space space, U64 address, Cta** owner,
                                  U32* offset) {
  MBarrier* m = find_mbarrier(w, lane, space, address, owner, offset);
  if (m != nullptr && !m->fenced && w.grid().checks) {
    const U32 line = w.program().code[m->init_pc].line;
    w.finding(FindingKind::missing_mbarrier_fence,
              name_of(**owner, *offset) +
                  " is signaled from the async proxy, but nothing fenced its "
                  "initialization",
              1u << lane, *offset, "mbarrier.init, line " + std::to_string(line), line);
    m->fenced = true;  // report it only once
  }
  return m;
}

void arrive(Cta& cta, MBarrier& m, U32 count, const Knowledge& knowledge) {
  m.pending -= count;
  m.arriving.join(knowledge);
  complete_if_ready(cta, m);
}

void expect_transactions(MBarrier& m, std::int64_t bytes) {
  m.transactions += bytes;
}

void complete_transactions(Cta& cta, U32 offset, std::int64_t bytes) {
  const auto it = cta.mbarriers.find(offset);
  if (it == cta.mbarriers.end()) return;  // inval has reported it
  it->second.transactions -= bytes;
  ++cta.cluster.progress;
  complete_if_ready(cta, it->second);
}

void add_mbarrier(OpcodeTable& t) {
  t["mbarrier"] = {decode_mbarrier, {OpClass::mbarrier}};
}

}  // namespace torchext::sim
