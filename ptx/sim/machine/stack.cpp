// The stack of a lane, with the frames of functions that may call themselves (calls.cpp), and the
// instructions alloca, stacksave, stackrestore.
#include <algorithm>

#include "../frontend/decode.h"
#include "calls.h"
#include "machine.h"

namespace torchext::sim {

namespace {

struct Allocation {
  U32 align;
};

Step take_stack(Warp& w, const Instruction& i, U32 mask) {
  w.need(i.s[0], mask, "as a size");
  const U32 align = i.as<Allocation>().align;
  for_lanes(mask, [&](int l) { w.put(i.d, l, w.grow_stack(l, w.integer(i.s[0], l), align)); });
  w.set_valid(i.d, mask, mask);
  ++w.cluster().progress;
  return Step::next;
}

Step save_stack(Warp& w, const Instruction& i, U32 mask) {
  for_lanes(mask, [&](int l) { w.put(i.d, l, w.stack_top(l)); });
  w.set_valid(i.d, mask, mask);
  return Step::next;
}

Step restore_stack(Warp& w, const Instruction& i, U32 mask) {
  w.need(i.s[0], mask, "as a stack pointer");
  for_lanes(mask, [&](int l) {
    if (w.cut_stack(l, w.integer(i.s[0], l))) return;
    w.finding(FindingKind::invalid_operand,
              "stackrestore of what is no earlier result of stacksave in this function", 1u << l);
    throw LaunchStopped{};
  });
  ++w.cluster().progress;
  return Step::next;
}

int address_bytes(Decoder& d) {
  const Type type = d.take_type();
  if (type != Type::u32 && type != Type::u64) d.fail_type(type);
  return size_of(type);
}

void decode_alloca(Decoder& d) {
  const int bytes = address_bytes(d);
  d.finish(2, 3);
  d.out.d = d.destination(0, bytes);
  d.out.s[0] = d.source(1, bytes == 8 ? Type::u64 : Type::u32);
  const U64 align = d.count() == 3 ? d.immediate(2) : 8;
  if (align == 0 || align > 4096 || (align & (align - 1)) != 0)
    d.fail("operand 3 must be a power of two up to 4096 (got " + std::to_string(align) + ")");
  d.keep(Allocation{static_cast<U32>(align)});
  d.builder().program().uses_stack = true;
  d.out.execute = take_stack;
}

void decode_stacksave(Decoder& d) {
  const int bytes = address_bytes(d);
  d.finish(1);
  d.out.d = d.destination(0, bytes);
  d.builder().program().uses_stack = true;
  d.out.execute = save_stack;
}

void decode_stackrestore(Decoder& d) {
  const int bytes = address_bytes(d);
  d.finish(1);
  d.out.s[0] = d.source(0, bytes == 8 ? Type::u64 : Type::u32);
  d.builder().program().uses_stack = true;
  d.out.execute = restore_stack;
}

}  // namespace

U32 Warp::grow_stack(int lane, U64 bytes, U32 align) {
  const auto l = static_cast<std::size_t>(lane);
  const U64 begin = align_up(stack_top_[l], align), used = begin - kStackBase;
  if (bytes > kStackBytes || used + bytes > kStackBytes) {
    finding(FindingKind::stack_overflow,
            "the thread's stack would hold " + std::to_string(used + bytes) + " bytes; it has " +
                std::to_string(kStackBytes),
            1u << lane);
    throw LaunchStopped{};
  }
  stack_[l].resize(used + bytes);
  stack_valid_[l].resize(used + bytes);
  std::fill_n(stack_valid_[l].begin() + static_cast<std::ptrdiff_t>(used), bytes, 0);
  stack_top_[l] = static_cast<U32>(begin + bytes);
  return static_cast<U32>(begin);
}

bool Warp::cut_stack(int lane, U64 top) {
  auto& now = stack_top_[static_cast<std::size_t>(lane)];
  if (top < kStackBase || top > now) return false;
  now = static_cast<U32>(top);
  return true;
}

void add_stack(OpcodeTable& t) {
  t["alloca"] = {decode_alloca, {OpClass::move}};
  t["stacksave"] = {decode_stacksave, {OpClass::move}};
  t["stackrestore"] = {decode_stackrestore, {OpClass::move}};
}

}  // namespace torchext::sim
