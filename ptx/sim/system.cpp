// Fences, setmaxnreg, griddepcontrol, nanosleep and other instructions about the machine itself.
#include "decode.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

using U32 = std::uint32_t;

Step nothing(Warp&, const Instruction&, U32) {
  return Step::next;
}

// ---- fence, membar ------------------------------------------------------------------------------

Step memory_fence(Warp& w, const Instruction&, U32 mask) {
  w.memory_fence(mask);
  return Step::next;
}

void mark_mbarriers_fenced(Warp& w, U32 mask) {
  for (auto& [offset, m] : w.cta().mbarriers) {
    const U32 first = w.agent(0);
    if (m.init_agent >= first && m.init_agent < first + 32 && (mask >> (m.init_agent - first)) & 1)
      m.fenced = true;
  }
}

Step proxy_fence(Warp& w, const Instruction&, U32 mask) {
  w.proxy_fence(mask);
  mark_mbarriers_fenced(w, mask);
  return Step::next;
}

// A release fence for the initialisations alone: a later relaxed arrival passes those on.
Step mbarrier_fence(Warp& w, const Instruction&, U32 mask) {
  mark_mbarriers_fenced(w, mask);
  if (!w.grid().checks) return Step::next;
  for (auto& [offset, m] : w.cta().mbarriers) {
    const U32 lane = m.init_agent - w.agent(0);
    if (lane >= 32 || !(mask >> lane & 1)) continue;
    if (m.published_agent == 0) m.published_agent = w.cluster().new_agent();
    w.learn(1u << lane, m.published_agent, 1);
    VectorClock published;
    published.raise(m.published_agent, 1);
    w.fence_released[lane].join(Knowledge{ClockRef::make(std::move(published)), {}});
    w.fenced_lanes |= 1u << lane;
  }
  return Step::next;
}

void decode_fence(Decoder& d) {
  if (d.opcode() == "membar") {
    if (d.take("proxy")) {
      if (d.take_one_of({"alias", "async"}).empty()) d.fail("unknown proxy");
      d.finish(0);
      d.out.execute = proxy_fence;
      return;
    }
    if (d.take_one_of({"cta", "gl", "sys"}).empty()) d.fail("no level");
    d.finish(0);
    d.out.execute = memory_fence;
    return;
  }
  if (d.take("mbarrier_init")) {
    if (!d.take("release") || !d.take("cluster")) d.fail("expected .release.cluster");
    d.finish(0);
    d.out.execute = mbarrier_fence;
    return;
  }
  if (d.take("proxy")) {
    if (d.take("alias")) {
      d.finish(0);
      d.out.execute = memory_fence;
    } else if (d.take("tensormap::generic")) {
      const bool acquire = d.take("acquire");
      if (!acquire && !d.take("release")) d.fail("expected .acquire or .release");
      if (d.take_one_of({"cta", "cluster", "gpu", "sys"}).empty()) d.fail("no scope");
      d.finish(acquire ? 2 : 0);
      d.out.execute = proxy_fence;
    } else if (d.take("async")) {
      d.take_space();
      d.finish(0);
      d.out.execute = proxy_fence;
    } else if (d.take("async::generic")) {
      if (d.take_one_of({"acquire", "release"}).empty()) d.fail("expected .acquire or .release");
      d.take_one_of({"sync_restrict::shared::cta", "sync_restrict::shared::cluster"});
      d.take_one_of({"cta", "cluster", "gpu", "sys"});
      d.finish(0);
      d.out.execute = proxy_fence;
    } else {
      d.fail("unknown proxy");
    }
    return;
  }
  d.take_one_of({"sc", "acq_rel", "acquire", "release"});
  d.take_one_of({"sync_restrict::shared::cta", "sync_restrict::shared::cluster"});
  if (d.take_one_of({"cta", "cluster", "gpu", "sys"}).empty()) d.fail("no scope");
  d.finish(0);
  d.out.execute = memory_fence;
}

// ---- setmaxnreg ---------------------------------------------------------------------------------

Step set_registers(Warp& w, const Instruction& i, U32 mask) {
  const U32 count = i.target;
  Cta& cta = w.cta();
  const std::int64_t more = (std::int64_t{count} - w.registers) * 32;
  if (i.small) {  // inc
    if (count < w.registers) {
      w.finding(FindingKind::register_pool,
                "setmaxnreg.inc to " + std::to_string(count) + " of a warp with " +
                    std::to_string(w.registers),
                mask);
    }
    if (more > cta.register_pool) return Step::block;
  } else if (count > w.registers) {
    w.finding(FindingKind::register_pool,
              "setmaxnreg.dec to " + std::to_string(count) + " of a warp with " +
                  std::to_string(w.registers),
              mask);
  }
  cta.register_pool -= more;
  w.registers = count;
  ++w.cluster().progress;
  w.order_lanes(mask);
  return Step::next;
}

void decode_setmaxnreg(Decoder& d) {
  d.out.small = d.take("inc");
  if (!d.out.small && !d.take("dec")) d.fail("expected .inc or .dec");
  if (!d.take("sync") || !d.take("aligned")) d.fail("expected .sync.aligned");
  if (d.take_type() != Type::u32) d.fail("expected .u32");
  d.finish(1);
  d.out.target = static_cast<U32>(d.immediate(0));
  if (d.out.target < 24 || d.out.target > 256 || d.out.target % 8 != 0)
    d.fail("the count must be a multiple of 8 from 24 to 256");
  d.out.aligned = true;
  d.out.execute = set_registers;
}

void decode_griddepcontrol(Decoder& d) {
  if (d.take_one_of({"launch_dependents", "wait"}).empty()) d.fail("unknown form");
  d.finish(0);
  d.out.execute = nothing;  // one launch at a time: what came before is complete
}

Step sleep(Warp& w, const Instruction&, U32) {
  ++w.cluster().spins;
  return Step::next;
}

void decode_nanosleep(Decoder& d) {
  if (d.take_type() != Type::u32) d.fail("expected .u32");
  d.finish(1);
  d.out.s[0] = d.source(0, Type::u32);
  d.out.execute = sleep;
}

void decode_pmevent(Decoder& d) {
  d.take("mask");
  d.finish(1);
  d.out.execute = nothing;
}

}  // namespace

void add_system(DecodeTable& t) {
  t["fence"] = t["membar"] = decode_fence;
  t["setmaxnreg"] = decode_setmaxnreg;
  t["griddepcontrol"] = decode_griddepcontrol;
  t["nanosleep"] = decode_nanosleep;
  t["pmevent"] = decode_pmevent;
}

}  // namespace torchext::sim
