// Fences, setmaxnreg, griddepcontrol, nanosleep and other instructions about the machine itself.
#include <algorithm>

#include "../check/map_fences.h"
#include "../frontend/decode.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

// ---- fence, membar ------------------------------------------------------------------------------

struct MemoryFence {
  Scope scope = Scope::none;
  bool acquires = true, releases = true;
};

Step memory_fence(Warp& w, const Instruction& i, U32 mask) {
  const auto [scope, acquires, releases] = i.as<MemoryFence>();
  w.memory_fence(mask, scope, acquires, releases);
  return Step::next;
}

void mark_mbarriers_fenced(Warp& w, U32 mask) {
  for (auto& [offset, m] : w.cta().mbarriers) {
    const U32 first = w.agent(0);
    if (m.init_agent >= first && m.init_agent < first + 32 && (mask >> (m.init_agent - first)) & 1)
      m.fenced = true;
  }
}

struct AsyncFence {
  U32 spaces;  // a bit for each AsyncSpace
};

Step async_fence(Warp& w, const Instruction& i, U32 mask) {
  const U32 spaces = i.as<AsyncFence>().spaces;
  w.async_fence(mask, spaces);
  if ((spaces >> kOwnShared) & 1) mark_mbarriers_fenced(w, mask);
  return Step::next;
}

// fence.proxy.alias orders generic accesses through different addresses of the same memory. The
// simulator has no such aliases.
Step alias_fence(Warp& w, const Instruction&, U32 mask) {
  w.alias_fence(mask);
  return Step::next;
}

Step release_maps(Warp& w, const Instruction& i, U32 mask) {
  const auto scope = i.as<Scope>();
  w.release_maps(mask, scope);
  w.memory_fence(mask, scope, false, true);
  return Step::next;
}

Step acquire_map(Warp& w, const Instruction& i, U32 mask) {
  w.need(i.s[0], mask, "as a tensor map's address");
  const auto scope = i.as<Scope>();
  w.memory_fence(mask, scope, true, false);
  for_lanes(mask, [&](int lane) {
    acquire_tensor_map(w, lane, w.integer(i.s[0], lane) + static_cast<std::uint64_t>(i.offset),
                       scope);
  });
  return Step::next;
}

// A release fence for the initializations only. A later relaxed arrival publishes them.
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
    const Knowledge init{ClockRef::make(std::move(published)), {}};
    for (const std::size_t level : {0, 1}) w.fence_released[lane][level].join(init);
    w.fenced_lanes |= 1u << lane;
  }
  return Step::next;
}

void decode_proxy_fence(Decoder& d) {
  constexpr U32 own = 1 << kOwnShared, cluster = own | 1 << kClusterShared, global = 1 << kGlobal;
  if (d.take("alias")) {
    d.finish(0);
    d.out.execute = alias_fence;
  } else if (d.take("async")) {
    const bool is_global = d.take("global"), is_cluster = d.take("shared::cluster");
    const bool is_own = d.take("shared::cta") || d.take("shared");
    d.keep(AsyncFence{is_global    ? global
                      : is_cluster ? cluster
                      : is_own     ? own
                                   : (cluster | global)});
    d.finish(0);
    d.out.execute = async_fence;
  } else if (d.take("async::generic")) {  // only for shared memory
    d.need_one_of({"acquire", "release"});
    d.take_one_of({"sync_restrict::shared::cta", "sync_restrict::shared::cluster"});
    d.take_scope();
    d.finish(0);
    d.keep(AsyncFence{cluster});
    d.out.execute = async_fence;
  } else if (d.take("tensormap::generic")) {
    const bool acquire = d.need_one_of({"acquire", "release"}) == "acquire";
    const Scope scope = d.need_scope();
    d.keep(scope);
    d.finish(acquire ? 2 : 0);
    d.out.execute = acquire ? acquire_map : release_maps;
    if (!acquire) return;
    d.need_immediate(1, 128);
    Space space = Space::generic;
    d.out.s[0] = d.address(d.arg(0), &d.out.offset, &space);
  } else {
    d.need_one_of({"alias", "async", "async::generic", "tensormap::generic"});
  }
}

void decode_fence(Decoder& d) {
  d.out.execute = memory_fence;
  if (d.opcode() == "membar") {
    if (d.take("proxy")) return decode_proxy_fence(d);
    const std::string level = d.need_one_of({"cta", "gl", "sys"});
    d.finish(0);
    d.keep(MemoryFence{level == "cta" ? Scope::cta : level == "gl" ? Scope::gpu : Scope::sys});
    return;
  }
  if (d.take("mbarrier_init")) {
    d.need({"release", "cluster"});
    d.finish(0);
    d.out.execute = mbarrier_fence;
    return;
  }
  if (d.take("proxy")) return decode_proxy_fence(d);
  const std::string order = d.take_one_of({"sc", "acq_rel", "acquire", "release"});
  d.take_one_of({"sync_restrict::shared::cta", "sync_restrict::shared::cluster"});
  const Scope scope = d.need_scope();
  d.keep(MemoryFence{scope, order != "release", order != "acquire"});
  d.finish(0);
}

// ---- setmaxnreg ---------------------------------------------------------------------------------

struct Registers {
  U32 count;
  bool increase;  // .inc
};

Step set_registers(Warp& w, const Instruction& i, U32 mask) {
  const auto [count, increase] = i.as<Registers>();
  Cta& cta = w.cta();
  const std::int64_t more = (std::int64_t{count} - w.registers) * 32;
  if (increase) {
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

std::string describe_registers(Warp& w, const Group& g) {
  const Instruction& i = w.program().code[g.pc];
  return "waits for registers: setmaxnreg to " + std::to_string(i.as<Registers>().count) +
         " from " + std::to_string(w.registers) + ", but the CTA's pool has " +
         std::to_string(w.cta().register_pool) + " left";
}

void decode_setmaxnreg(Decoder& d) {
  const bool increase = d.need_one_of({"inc", "dec"}) == "inc";
  d.need({"sync", "aligned"});
  d.need_type(Type::u32);
  d.finish(1);
  const auto count = static_cast<U32>(d.immediate(0));
  if (count < 24 || count > 256 || count % 8 != 0)
    d.fail("operand 1 must be a multiple of 8 from 24 to 256 (got " + std::to_string(count) + ")");
  Program& program = d.builder().program();
  program.most_registers = std::max(program.most_registers, count);
  program.asks_for_registers |= increase;
  d.keep(Registers{count, increase});
  if (increase) d.out.traits.wait = Wait::registers;
  d.out.traits.describe_wait = describe_registers;
  d.out.aligned = true;
  d.out.execute = set_registers;
}

void decode_griddepcontrol(Decoder& d) {
  d.need_one_of({"launch_dependents", "wait"});
  d.finish(0);
  d.out.execute = no_operation;  // launches are serial: all earlier ones are complete
}

Step sleep(Warp& w, const Instruction&, U32) {
  w.polled();
  return Step::next;
}

void decode_nanosleep(Decoder& d) {
  d.need_type(Type::u32);
  d.finish(1);
  d.out.s[0] = d.source(0, Type::u32);
  d.out.execute = sleep;
}

void decode_pmevent(Decoder& d) {
  d.take("mask");
  d.finish(1);
  d.out.execute = no_operation;
}

}  // namespace

void add_system(OpcodeTable& t) {
  t["fence"] = t["membar"] = {decode_fence, {OpClass::fence}};
  t["setmaxnreg"] = {decode_setmaxnreg, {OpClass::machine}};
  t["griddepcontrol"] = {decode_griddepcontrol, {OpClass::machine}};
  t["nanosleep"] = {decode_nanosleep, {OpClass::machine}};
  t["pmevent"] = {decode_pmevent, {OpClass::machine}};
}

}  // namespace torchext::sim
