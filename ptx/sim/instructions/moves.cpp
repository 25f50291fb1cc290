// mov: registers, predicates, packing and unpacking, clocks.
#include "../frontend/decode.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

Step move(Warp& w, const Instruction& i, U32 mask) {
  each_lane(mask, [&](int l) { w.put(i.d, l, w.integer(i.s[0], l)); });
  w.copy_valid(i.d, mask, i.s[0]);
  return Step::next;
}
Step move_predicate(Warp& w, const Instruction& i, U32 mask) {
  w.set_predicate(i.d, mask, w.predicate(i.s[0]));
  w.set_valid(i.d, mask, w.valid(i.s[0]));
  return Step::next;
}
struct Elements {
  U32 bits;  // of each
};

Step pack(Warp& w, const Instruction& i, U32 mask) {
  U32 valid = mask;
  for (const Slot& s : i.list) valid &= w.valid(s);
  const U32 each = i.as<Elements>().bits;
  const U64 field = each >= 64 ? ~U64{0} : (U64{1} << each) - 1;
  LaneBits bits;
  for_lanes(valid == mask ? 0 : mask, [&](int l) {
    bits.of[l] = each * i.list.size() >= 64 ? 0 : ~U64{0} << (each * i.list.size());
    for (std::size_t e = 0; e < i.list.size(); ++e)
      bits.of[l] |= (w.valid_bits(i.list[e], l) & field) << (each * e);
  });
  for_lanes(mask, [&](int l) {
    U64 value = 0;
    for (std::size_t e = 0; e < i.list.size(); ++e)
      value |= (w.integer(i.list[e], l) & field) << (each * e);
    w.put(i.d, l, value);
  });
  w.set_validity(i.d, mask, valid == mask, bits);
  return Step::next;
}
Step unpack(Warp& w, const Instruction& i, U32 mask) {
  const U32 each = i.as<Elements>().bits;
  const U64 field = (U64{1} << each) - 1;
  const bool whole = (mask & ~w.valid(i.s[0])) == 0;
  LaneBits source;
  for_lanes(whole ? 0 : mask, [&](int l) { source.of[l] = w.valid_bits(i.s[0], l); });
  for_lanes(mask, [&](int l) {
    const U64 value = w.integer(i.s[0], l);
    for (std::size_t e = 0; e < i.list.size(); ++e)
      w.put(i.list[e], l, (value >> (each * e)) & field);
  });
  for (std::size_t e = 0; e < i.list.size(); ++e) {
    LaneBits part;
    for_lanes(whole ? 0 : mask, [&](int l) { part.of[l] = source.of[l] >> (each * e) | ~field; });
    w.set_validity(i.list[e], mask, whole, part);
  }
  return Step::next;
}
// list: destinations, then as many sources
Step move_elements(Warp& w, const Instruction& i, U32 mask) {
  const std::size_t n = i.list.size() / 2;
  for_lanes(mask, [&](int l) {
    U64 values[4];
    for (std::size_t e = 0; e < n; ++e) values[e] = w.integer(i.list[n + e], l);
    for (std::size_t e = 0; e < n; ++e) w.put(i.list[e], l, values[e]);
  });
  U32 valid[4];
  for (std::size_t e = 0; e < n; ++e) valid[e] = w.valid(i.list[n + e]);
  for (std::size_t e = 0; e < n; ++e) w.set_valid(i.list[e], mask, valid[e]);
  return Step::next;
}
struct Clock {
  bool high;  // the upper half of the 64 bits
};

Step read_clock(Warp& w, const Instruction& i, U32 mask) {
  ++w.cluster().spins;
  const U64 now = w.cluster().executed * 4 + w.cluster().spins * 16;
  const U64 value = i.as<Clock>().high ? now >> 32 : now;
  for_lanes(mask, [&](int l) { w.put(i.d, l, value); });
  w.set_valid(i.d, mask, mask);
  return Step::next;
}

Type element_type(int bytes) {
  return bytes == 1 ? Type::b8 : bytes == 2 ? Type::b16 : bytes == 4 ? Type::b32 : Type::b64;
}

// mov.v4.u32 {a, b, c, d}, %tid
void decode_vector_mov(Decoder& d, std::size_t elements, Type type) {
  d.finish(2);
  for (const Arg& a : d.vector(d.arg(0), elements))
    d.out.list.push_back(d.destination(a, size_of(type)));
  for (const Arg& a : d.vector(d.arg(1), elements)) d.out.list.push_back(d.source(a, type));
  d.out.execute = move_elements;
}

void decode_mov(Decoder& d) {
  const std::size_t elements = d.take("v2") ? 2 : d.take("v4") ? 4 : 1;
  const Type type = d.take_type();
  if (elements > 1) return decode_vector_mov(d, elements, type);
  if (type == Type::b128) return decode_vector_mov(d, 2, Type::b64);  // two halves
  d.finish(2);
  if (type == Type::pred) {
    d.out.d = d.predicate_destination(d.arg(0));
    d.out.s[0] = d.predicate(1);
    d.out.execute = move_predicate;
    return;
  }
  const int bytes = size_of(type);
  const Arg &to = d.arg(0), &from = d.arg(1);
  if (from.kind == Arg::vector && !from.text.empty())
    d.fail_operand(from, "one number", "write mov.v4, or " + from.text + ".x");
  for (const Arg* arg : {&to, &from}) {
    if (arg->kind == Arg::vector && arg->args.empty())
      d.fail_operand(*arg, "a register, or a vector of 2 to 8 elements");
  }
  if (from.kind == Arg::vector) {
    const int each = bytes / static_cast<int>(from.args.size());
    d.out.d = d.destination(to, bytes);
    for (const Arg& a : from.args) d.out.list.push_back(d.source(a, element_type(each)));
    d.keep(Elements{static_cast<U32>(8 * each)});
    d.out.execute = pack;
    return;
  }
  if (to.kind == Arg::vector) {
    const int each = bytes / static_cast<int>(to.args.size());
    if (each == 0 || each == 8)
      d.fail_operand(to, "a vector of 2 to " + std::to_string(bytes) + " elements");
    for (const Arg& a : to.args) d.out.list.push_back(d.destination_at_least(a, each));
    d.out.s[0] = d.source(from, type);
    d.keep(Elements{static_cast<U32>(8 * each)});
    d.out.execute = unpack;
    return;
  }
  d.out.d = d.destination(to, bytes);
  if (from.kind == Arg::special) {
    for (const char* clock : {"%clock", "%clock64", "%globaltimer", "%globaltimer_lo"}) {
      if (from.text == clock) d.out.execute = read_clock, d.keep(Clock{false});
    }
    for (const char* clock : {"%clock_hi", "%globaltimer_hi"}) {
      if (from.text == clock) d.out.execute = read_clock, d.keep(Clock{true});
    }
    if (d.out.execute != nullptr) return;
  }
  d.out.s[0] = d.source(from, type);
  d.out.execute = move;
}

}  // namespace

void add_moves(OpcodeTable& t) {
  t["mov"] = {decode_mov, {OpClass::move}};
}

}  // namespace torchext::sim
