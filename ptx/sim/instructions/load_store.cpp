// ld, ldu, st: vectors, state spaces, orderings; cvta, isspacep, mapa, prefetch and policies.
#include <algorithm>
#include <cstring>

#include "../check/map_fences.h"
#include "../check/strong.h"
#include "../check/validity.h"
#include "../frontend/decode.h"
#include "../machine/machine.h"

namespace torchext::sim {

void decode_async_store(Decoder& d, bool reduce);  // bulk_copies.cpp

namespace {

struct Transfer {
  Space space;
  std::uint32_t bytes;  // of one element
  std::uint32_t elements;
  bool sign_extend = false;
  Scope scope = Scope::none;  // of a strong access
  bool acquire = false, release = false, noncoherent = false;
};

// An element extended to a register, with its sign or with zeros.
std::uint64_t extended(const Transfer& t, const std::uint8_t* element) {
  std::uint64_t value = 0;
  std::memcpy(&value, element, std::min<std::size_t>(t.bytes, 8));
  if (t.sign_extend && t.bytes < 8) {
    const int unused = 64 - 8 * static_cast<int>(t.bytes);
    value = static_cast<std::uint64_t>(static_cast<std::int64_t>(value << unused) >> unused);
  }
  return value;
}
std::uint64_t beyond(const Transfer& t) {
  return t.bytes == 8 ? 0 : ~std::uint64_t{0} << (8 * t.bytes);
}

Step load(Warp& w, const Instruction& i, std::uint32_t mask) {
  const auto& t = i.as<Transfer>();
  w.need(i.s[0], mask, "as an address");
  const bool strong = t.scope != Scope::none;
  if (strong) w.polled();
  const std::uint32_t total = t.bytes * t.elements;
  std::uint32_t valid[8];
  for (std::uint32_t e = 0; e < t.elements; ++e) valid[e] = mask;
  LaneBits local[8];  // for lanes that `valid` leaves out
  for_lanes(mask, [&](int lane) {
    const std::uint64_t address = w.address(i.s[0], i.offset, lane);
    Place place;
    std::uint8_t data[32] = {};
    if (w.resolve(lane, t.space, address, total, false, &place)) {
      const auto step = strong ? strong_step(place, address) : std::unique_lock<std::mutex>();
      Actor actor = w.actor(lane, t.scope);
      if (t.noncoherent) actor.proxy = Proxy::noncoherent;
      w.read(place, actor, data, total, 1u << lane, address);
      if (place.valid != nullptr) {
        for (std::uint32_t e = 0; e < t.elements; ++e) {
          const std::uint64_t bits = extended(t, place.valid + e * t.bytes);
          local[e].of[lane] = t.sign_extend ? bits : bits | beyond(t);
          if (~local[e].of[lane] != 0) valid[e] &= ~(1u << lane);
        }
      }
      if (strong) w.note_poll(lane, address, total);
      if (strong) strong_read(w, lane, place, address, t.scope, t.acquire);
    }
    for (std::uint32_t e = 0; e < t.elements; ++e) {
      w.put(i.list[e], lane, extended(t, data + e * t.bytes));
    }
  });
  for (std::uint32_t e = 0; e < t.elements; ++e) {
    w.set_valid(i.list[e], valid[e], valid[e]);
    if (valid[e] != mask) w.set_valid_bits(i.list[e], mask & ~valid[e], local[e]);
  }
  return Step::next;
}

Step store(Warp& w, const Instruction& i, std::uint32_t mask) {
  const auto& t = i.as<Transfer>();
  w.need(i.s[0], mask, "as an address");
  if (t.space != Space::local) {
    for (const Slot& s : i.list) w.need(s, mask, "as a value to store", ~beyond(t));
  }
  const std::uint32_t total = t.bytes * t.elements;
  const bool strong = t.scope != Scope::none;
  bool changed = false;
  for_lanes(mask, [&](int lane) {
    const std::uint64_t address = w.address(i.s[0], i.offset, lane);
    std::uint8_t data[32];
    for (std::uint32_t e = 0; e < t.elements; ++e) {
      const std::uint64_t value = w.integer(i.list[e], lane);
      std::memcpy(data + e * t.bytes, &value, t.bytes);
    }
    Place place;
    if (!w.resolve(lane, t.space, address, total, true, &place)) return;
    if (place.valid != nullptr) {
      for (std::uint32_t e = 0; e < t.elements; ++e) {
        const std::uint64_t bits = w.valid_bits(i.list[e], lane);
        std::memcpy(place.valid + e * t.bytes, &bits, t.bytes);
      }
      std::memcpy(place.host, data, total);
    } else {
      const auto step = strong ? strong_step(place, address) : std::unique_lock<std::mutex>();
      changed |= w.write(place, w.actor(lane, t.scope), data, total, 1u << lane, address);
      // The schedule must not depend on what an output held before the launch.
      changed |= !strong && place.buffer != nullptr;
      if (strong) strong_write(w, lane, place, address, t.scope, t.release);
    }
  });
  // Equal bytes, stored where other threads may poll for them, and local stores end no poll loop.
  if (changed) ++w.cluster().progress;
  return Step::next;
}

Transfer take_transfer(Decoder& d, bool is_store) {
  Transfer t{};
  bool strong = false;
  if (d.take("volatile") || d.take("relaxed") || d.take("mmio")) {
    strong = true;
    d.take("mmio");
  }
  if (!is_store && d.take("acquire")) strong = t.acquire = true;
  if (is_store && d.take("release")) strong = t.release = true;
  if (d.take("weak") && strong) d.fail_modifier("weak");
  if (strong) {
    t.scope = d.take_scope();
    if (t.scope == Scope::none) t.scope = Scope::sys;  // .volatile
  }
  t.space = d.take_space();
  t.noncoherent = !is_store && (d.take("nc") || d.opcode() == "ldu");
  if (t.noncoherent && t.space != Space::global && d.opcode() != "ldu") d.need({"global"});
  d.take("unified");
  d.take_cache_hints();
  t.elements = d.take("v2") ? 2 : d.take("v4") ? 4 : d.take("v8") ? 8 : 1;
  Type type = d.take_type();
  if (type == Type::b128) {
    if (t.elements > 1) d.fail_type(type);
    t.elements = 2;  // a .b128 register is two halves
    type = Type::b64;
  }
  t.bytes = static_cast<std::uint32_t>(size_of(type));
  t.sign_extend = is_signed(type);
  if (t.bytes * t.elements > 32 || t.bytes == 0) d.fail_type(type);
  return t;
}

std::vector<Arg> elements(Decoder& d, const Arg& arg, std::uint32_t count) {
  if (count == 1 && arg.kind != Arg::vector) return {arg};
  return d.vector(arg, count);
}

void decode_load(Decoder& d) {
  Transfer t = take_transfer(d, false);
  d.finish(d.has_cache_policy ? 3 : 2);
  for (const Arg& a : elements(d, d.arg(0), t.elements))
    d.out.list.push_back(d.destination_at_least(a, static_cast<int>(t.bytes)));
  d.out.s[0] = d.address(d.arg(1), &d.out.offset, &t.space);
  if (d.has_cache_policy) d.source(2, Type::b64);
  d.reads(t.space, t.bytes * t.elements, t.noncoherent ? Proxy::noncoherent : Proxy::generic);
  d.keep(t);
  d.out.execute = load;
}

void decode_store(Decoder& d) {
  if (d.take("async")) return decode_async_store(d, false);
  Transfer t = take_transfer(d, true);
  d.finish(d.has_cache_policy ? 3 : 2);
  d.out.s[0] = d.address(d.arg(0), &d.out.offset, &t.space);
  const Type type = t.bytes == 8   ? Type::b64
                    : t.bytes == 4 ? Type::b32
                    : t.bytes == 2 ? Type::b16
                                   : Type::b8;
  for (const Arg& a : elements(d, d.arg(1), t.elements))
    d.out.list.push_back(d.source_at_least(a, a.kind == Arg::real && t.bytes == 8 ? Type::f64
                                              : a.kind == Arg::real               ? Type::f32
                                                                                  : type));
  if (d.has_cache_policy) d.source(2, Type::b64);
  d.writes(t.space, t.bytes * t.elements);
  d.keep(t);
  d.out.execute = store;
}

// ---- Addresses ----------------------------------------------------------------------------------

struct WindowForm {
  std::uint64_t window = 0;  // where the state space begins in generic addresses
  bool to = false;           // from a generic address
};

Step convert_address(Warp& w, const Instruction& i, std::uint32_t mask) {
  const auto form = i.as<WindowForm>();
  for_lanes(mask, [&](int lane) {
    std::uint64_t a = w.integer(i.s[0], lane);
    if (!form.to)
      a |= form.window;
    else if (form.window == kSharedWindow)
      a = static_cast<std::uint32_t>(a);
    else
      a &= ~form.window;
    w.put(i.d, lane, a);
  });
  w.set_valid(i.d, mask, w.valid(i.s[0]));
  return Step::next;
}

void decode_cvta(Decoder& d) {
  WindowForm form;
  form.to = d.take("to");
  const Space space = d.take_space();
  const Type type = d.take_type();
  d.finish(2);
  d.out.d = d.destination(0, size_of(type));
  d.out.s[0] = d.source(1, type);
  if (space == Space::shared || space == Space::shared_cluster) {
    form.window = kSharedWindow;
  } else if (space == Space::local) {
    form.window = kLocalWindow;
  } else if (space == Space::param) {
    form.window = kParamWindow;
    form.to = !form.to;  // the address within the window is not the generic one
  } else if (space == Space::generic) {
    d.need_one_of(
        {"global", "shared", "shared::cta", "shared::cluster", "local", "param", "const"});
  }
  d.keep(form);
  d.out.execute = convert_address;
}

Step is_space(Warp& w, const Instruction& i, std::uint32_t mask) {
  const auto space = i.as<Space>();
  std::uint32_t result = 0;
  for_lanes(mask, [&](int lane) {
    const std::uint64_t a = w.integer(i.s[0], lane), window = a & kWindowMask;
    bool is = false;
    if (space == Space::shared || space == Space::shared_cluster) {
      const std::uint32_t rank = static_cast<std::uint32_t>(a) >> kSharedRankShift;
      is = window == kSharedWindow && (space == Space::shared_cluster || rank == 0);
    } else if (space == Space::local) {
      is = window == kLocalWindow;
    } else {
      is = window == 0;
    }
    if (is) result |= 1u << lane;
  });
  w.set_predicate(i.d, mask, result);
  w.set_valid(i.d, mask, w.valid(i.s[0]));
  return Step::next;
}

void decode_isspacep(Decoder& d) {
  const Space space = d.take_space();
  d.finish(2);
  d.out.d = d.predicate_destination(d.arg(0));
  d.out.s[0] = d.source(1, Type::u64);
  d.keep(space);
  d.out.execute = is_space;
}

struct Mapping {
  bool in_shared;  // gives an address in .shared::cluster, not a generic one
};

// mapa gives the address of a variable in another CTA of the cluster. getctarank is the reverse.
Step map_address(Warp& w, const Instruction& i, std::uint32_t mask) {
  for_lanes(mask, [&](int lane) {
    const std::uint64_t a = w.integer(i.s[0], lane);
    const auto rank = static_cast<std::uint32_t>(w.integer(i.s[1], lane));
    if (rank >= w.grid().cluster_size) {
      w.finding(FindingKind::invalid_operand,
                "CTA rank " + std::to_string(rank) + " of a cluster of " +
                    std::to_string(w.grid().cluster_size),
                1u << lane);
    }
    const std::uint64_t offset = a & kSharedOffsetMask;
    const std::uint64_t mapped = offset | (std::uint64_t{rank} + 1) << kSharedRankShift;
    w.put(i.d, lane, i.as<Mapping>().in_shared ? mapped : mapped | kSharedWindow);
  });
  w.set_valid(i.d, mask, w.valid(i.s[0]) & w.valid(i.s[1]));
  return Step::next;
}

void decode_mapa(Decoder& d) {
  const bool shared = d.take("shared::cluster");
  const Type type = d.take_type();
  d.finish(3);
  d.out.d = d.destination(0, size_of(type));
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, Type::u32);
  d.keep(Mapping{shared});
  d.out.execute = map_address;
}

Step cta_rank_of(Warp& w, const Instruction& i, std::uint32_t mask) {
  for_lanes(mask, [&](int lane) {
    const auto a = static_cast<std::uint32_t>(w.integer(i.s[0], lane));
    const std::uint32_t rank = a >> kSharedRankShift;
    w.put(i.d, lane, rank == 0 ? w.cta().rank : rank - 1);
  });
  w.set_valid(i.d, mask, w.valid(i.s[0]));
  return Step::next;
}

void decode_getctarank(Decoder& d) {
  d.take("shared::cluster");
  const Type type = d.take_type();
  d.finish(2);
  d.out.d = d.destination(0, 4);
  d.out.s[0] = d.source(1, type);
  d.out.execute = cta_rank_of;
}

// ---- Hints: no effect on values -----------------------------------------------------------------

Step prefetch_map(Warp& w, const Instruction& i, std::uint32_t mask) {
  w.need(i.s[0], mask, "as a tensor map's address");
  for_lanes(mask, [&](int lane) {
    Place place;
    std::uint64_t address = w.address(i.s[0], i.offset, lane);
    if (i.as<Space>() == Space::param) address &= ~kWindowMask;
    resolve_tensor_map(w, lane, address, &place);
  });
  return Step::next;
}

void decode_prefetch(Decoder& d) {
  const bool of_map = d.opcode() == "prefetch" && d.take("tensormap");
  Space space = Space::generic;
  if (d.opcode() == "prefetchu") {
    d.take("L1");
  } else if (!of_map) {
    d.take_space();
    d.need_one_of({"L1", "L2", "L2::evict_last", "L2::evict_normal"});
  } else {
    space = d.take_space();
  }
  d.keep(space);
  d.finish(1);
  d.out.s[0] = d.address(d.arg(0), &d.out.offset, &space);
  if (of_map) d.reads(Space::generic, 128, Proxy::tensormap);
  d.out.execute = of_map ? prefetch_map : no_operation;
}

Step discard(Warp& w, const Instruction& i, std::uint32_t mask) {
  for_lanes(mask, [&](int lane) {
    Place place;
    const std::uint64_t address = w.address(i.s[0], i.offset, lane);
    if (w.resolve(lane, Space::global, address, 128, true, &place))
      w.check_write(place, w.actor(lane), 128, 1u << lane, address);
  });
  return Step::next;
}

void decode_discard(Decoder& d) {
  Space space = d.take_space();
  d.need({"L2"});
  d.finish(2);
  d.need_immediate(1, 128);
  d.out.s[0] = d.address(d.arg(0), &d.out.offset, &space);
  d.writes(Space::global, 128);
  d.out.execute = discard;
}

void decode_applypriority(Decoder& d) {
  d.take_space();
  d.need({"L2::evict_normal"});
  d.finish(2);
  d.out.execute = no_operation;
}

Step policy(Warp& w, const Instruction& i, std::uint32_t mask) {
  for_lanes(mask, [&](int lane) { w.put(i.d, lane, 0x12f0000000000000ull); });
  w.set_valid(i.d, mask, mask);
  return Step::next;
}

void decode_createpolicy(Decoder& d) {
  d.need_one_of({"fractional", "range", "cvt"});
  d.take("L2");
  d.take("global");
  std::string rest;
  while (d.take_prefix("L2::", &rest)) {
    bool known = false;
    for (const char* hint :
         {"L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"}) {
      known |= rest == hint;
    }
    if (!known) d.fail_modifier(rest);
  }
  d.need_type(Type::b64);
  d.finish(1, 4);
  d.out.d = d.destination(0, 8);
  d.out.execute = policy;
}

}  // namespace

void add_load_store(OpcodeTable& t) {
  t["ld"] = {decode_load, {OpClass::load}};
  t["ldu"] = {decode_load, {OpClass::load}};
  t["st"] = {decode_store, {OpClass::store, OpClass::async_store}};
  t["cvta"] = {decode_cvta, {OpClass::move}};
  t["isspacep"] = {decode_isspacep, {OpClass::move}};
  t["mapa"] = {decode_mapa, {OpClass::move}};
  t["getctarank"] = {decode_getctarank, {OpClass::move}};
  t["prefetch"] = {decode_prefetch, {OpClass::hint}};
  t["prefetchu"] = {decode_prefetch, {OpClass::hint}};
  t["discard"] = {decode_discard, {OpClass::store}};
  t["applypriority"] = {decode_applypriority, {OpClass::hint}};
  t["createpolicy"] = {decode_createpolicy, {OpClass::hint}};
}

}  // namespace torchext::sim
