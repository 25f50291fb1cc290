// tensormap.replace and tensormap.cp_fenceproxy: tensor maps that kernels make or change (PTX ISA
// "Data Movement and Conversion Instructions: Tensormap"; sm_90a). tensor_map.h has the maps.
#include <cstring>

#include "../frontend/decode.h"
#include "../machine/machine.h"
#include "../numerics/tensor_map.h"

namespace torchext::sim {

namespace {

struct Replace {
  TensorMapField field;
  Space space;
  U32 ordinal = 0;
};

Step replace(Warp& w, const Instruction& i, U32 mask) {
  const auto& r = i.as<Replace>();
  w.need(i.s[0], mask, "as an address");
  w.need(i.s[1], mask, "as the new value");
  for_lanes(mask, [&](int lane) {
    const U64 address = w.address(i.s[0], i.offset, lane);
    Place place;
    if (!w.resolve(lane, r.space, address, kTensorMapBytes, true, &place)) return;
    w.check_read(place, w.actor(lane), kTensorMapBytes, 1u << lane, address);
    w.check_write(place, w.actor(lane), kTensorMapBytes, 1u << lane, address);
    try {
      const auto guard = place.guard();
      replace_tensor_map_field(place.host, r.field, r.ordinal, w.integer(i.s[1], lane));
    } catch (const TensorMapError& e) {
      w.finding(FindingKind::tensor_map, e.what(), 1u << lane, address);
    }
  });
  ++w.cluster().progress;
  return Step::next;
}

void decode_replace(Decoder& d) {
  d.need({"tile"});
  Replace r{};
  bool known = false;
  for (const auto& [name, field] : tensor_map_field_names()) {
    if (!d.take(name.c_str())) continue;
    r.field = field;
    known = true;
  }
  if (!known) {
    std::string names;
    for (const auto& [name, field] : tensor_map_field_names()) names += " ." + name;
    d.fail("the modifiers must include one of" + names);
  }
  r.space = d.take_space();
  d.need({"b1024"});
  const Type type = d.take_type();
  const bool wide =
      r.field == TensorMapField::global_address || r.field == TensorMapField::global_stride;
  if (type != (wide ? Type::b64 : Type::b32)) d.fail_type(type);
  const bool has_ordinal =
      r.field == TensorMapField::box_dim || r.field == TensorMapField::global_dim ||
      r.field == TensorMapField::global_stride || r.field == TensorMapField::element_stride;
  d.finish(has_ordinal ? 3 : 2);
  if (has_ordinal) r.ordinal = static_cast<U32>(d.immediate(1));
  d.out.s[0] = d.address(d.arg(0), &d.out.offset, &r.space);
  d.out.s[1] = d.source(has_ordinal ? 2 : 1, type);
  d.keep(r);
  d.writes(r.space, 8);
  d.out.execute = replace;
}

struct CopyAndFence {
  std::int64_t from_offset;
  Scope scope;
};

// The warp copies one map and releases it to the tensormap proxy.
Step copy_and_fence(Warp& w, const Instruction& i, U32 mask) {
  w.need(i.s[0], mask, "as an address");
  w.need(i.s[1], mask, "as an address");
  const auto form = i.as<CopyAndFence>();
  const bool converged = w.grid().options.lane_order == LaunchOptions::converged;
  if (converged) w.order_lanes(mask);
  const int lane = static_cast<int>(lane_of(mask));
  const U64 to = w.address(i.s[0], i.offset, lane);
  const U64 from = w.address(i.s[1], form.from_offset, lane);
  for_lanes(mask, [&](int other) {
    if (w.address(i.s[0], i.offset, other) == to &&
        w.address(i.s[1], form.from_offset, other) == from) {
      return;
    }
    w.finding(FindingKind::invalid_operand,
              "the lanes of tensormap.cp_fenceproxy disagree on an address", 1u << other, to);
  });
  Place target, source;
  if (!w.resolve(lane, Space::global, to, kTensorMapBytes, true, &target) ||
      !w.resolve(lane, Space::shared, from, kTensorMapBytes, false, &source)) {
    return Step::next;
  }
  w.check_read(source, w.actor(lane), kTensorMapBytes, 1u << lane, from);
  w.check_write(target, w.actor(lane), kTensorMapBytes, 1u << lane, to);
  {
    const auto guard = target.guard();
    std::memcpy(target.host, source.host, kTensorMapBytes);
  }
  if (converged) w.order_lanes(mask);
  const Scope scope = form.scope;
  w.release_maps(mask, scope);
  w.memory_fence(mask, scope, false, true);
  ++w.cluster().progress;
  return Step::next;
}

void decode_copy_and_fence(Decoder& d) {
  d.need({"global", "shared::cta", "tensormap::generic", "release"});
  const Scope scope = d.need_scope();
  d.need({"sync", "aligned"});
  d.finish(3);
  d.need_immediate(2, kTensorMapBytes);
  Space to = Space::global, from = Space::shared;
  std::int64_t from_offset = 0;
  d.out.s[0] = d.address(d.arg(0), &d.out.offset, &to);
  d.out.s[1] = d.address(d.arg(1), &from_offset, &from);
  d.keep(CopyAndFence{from_offset, scope});
  d.out.aligned = true;
  d.is(OpClass::fence);
  d.reads(Space::shared, kTensorMapBytes);
  d.writes(Space::global, kTensorMapBytes);
  d.out.execute = copy_and_fence;
}

void decode_tensormap(Decoder& d) {
  if (d.take("replace")) return decode_replace(d);
  if (d.take("cp_fenceproxy")) return decode_copy_and_fence(d);
  d.need_one_of({"replace", "cp_fenceproxy"});
}

}  // namespace

void add_tensormap(OpcodeTable& t) {
  t["tensormap"] = {decode_tensormap, {OpClass::store, OpClass::fence}};
}

}  // namespace torchext::sim
