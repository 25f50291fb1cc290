// atom and red: read-modify-write on global and shared memory.
#include <cmath>
#include <cstring>
#include <limits>

#include "../check/strong.h"
#include "../frontend/decode.h"
#include "copy_engine.h"
#include "lanes.h"

namespace torchext::sim {

void decode_async_store(Decoder& d, bool reduce);  // bulk_copies.cpp

namespace {

struct Atomic {
  Space space;
  Type type;
  U32 bytes = 0, elements = 1;
  bool compare_and_swap = false, exchange = false, returns = false;
  bool acquire = false, release = false;
  Scope scope = Scope::gpu;
  Reduction reduction;
};

// PTX reduces the two halves of f16x2 and bf16x2 separately.
Reduction elementwise(const Atomic& a) {
  Reduction r = a.reduction;
  if (a.type == Type::f16x2)
    r.type = Type::f16;
  else if (a.type == Type::bf16x2)
    r.type = Type::bf16;
  else
    r.type = a.type;
  return r;
}

// True if the result depends on every bit that the memory held. A red that clears or sets bits does
// not: cooperative groups initialize barriers with such a red in memory that nothing has written.
bool observes(const Atomic& a) {
  return a.returns || (a.reduction.op != ReduceOp::bit_and && a.reduction.op != ReduceOp::bit_or);
}

// atom.add.f32 flushes subnormals to zero in global memory, and not in shared memory.
void add_flushing(std::uint8_t* to, const std::uint8_t* from, U32 bytes) {
  const auto flushed = [](float v) {
    return std::fabs(v) < std::numeric_limits<float>::min() ? std::copysign(0.0f, v) : v;
  };
  for (U32 at = 0; at < bytes; at += 4) {
    float a, b;
    std::memcpy(&a, to + at, 4);
    std::memcpy(&b, from + at, 4);
    a = flushed(flushed(a) + flushed(b));
    std::memcpy(to + at, &a, 4);
  }
}

Step atomic(Warp& w, const Instruction& i, U32 mask) {
  const auto& a = i.as<Atomic>();
  w.need(i.s[0], mask, "as an address");
  const std::size_t values = a.returns ? a.elements : 0;  // list: results, then values
  for (std::size_t e = values; e < i.list.size(); ++e)
    w.need(i.list[e], mask, "as a value", a.bytes == 8 ? ~U64{0} : (U64{1} << (8 * a.bytes)) - 1);
  const U32 total = a.bytes * a.elements;
  bool changed = false;
  for_lanes(mask, [&](int lane) {
    const U64 address = w.address(i.s[0], i.offset, lane);
    Place place;
    std::uint8_t old[16] = {}, value[16] = {};
    if (w.resolve(lane, a.space, address, total, true, &place)) {
      if (place.valid != nullptr) {
        w.finding(FindingKind::invalid_operand, "an atomic on local memory", 1u << lane, address);
        return;
      }
      for (U32 e = 0; e < a.elements; ++e) {
        const U64 v = w.integer(i.list[values + e], lane);
        std::memcpy(value + e * a.bytes, &v, a.bytes);
      }
      if (a.returns) w.note_poll(lane, address, total);
      const auto step = strong_step(place, address);
      if (observes(a)) w.check_read(place, w.actor(lane, a.scope), total, 1u << lane, address);
      if (a.returns || a.acquire) strong_read(w, lane, place, address, a.scope, a.acquire);
      bool written = true;
      const auto modify = [&] {
        std::memcpy(old, place.host, total);
        if (a.compare_and_swap) {
          written = std::memcmp(old, value, total) == 0;
          if (!written) return;
          for (U32 e = 0; e < a.elements; ++e) {
            const U64 next = w.integer(i.list[values + a.elements + e], lane);
            std::memcpy(place.host + e * a.bytes, &next, a.bytes);
          }
        } else if (a.exchange) {
          std::memcpy(place.host, value, total);
        } else if (a.type == Type::f32 && place.buffer != nullptr) {
          add_flushing(place.host, value, total);
        } else {
          reduce_bytes(elementwise(a), place.host, value, total);
        }
        changed |= std::memcmp(old, place.host, total) != 0;
      };
      if (place.buffer != nullptr) {
        const std::lock_guard<SpinLock> lock(place.buffer->lock);
        modify();
      } else {
        modify();
      }
      if (written) {  // a failed comparison is a read and releases nothing
        w.check_write(place, w.actor(lane, a.scope), total, 1u << lane, address);
        strong_write(w, lane, place, address, a.scope, a.release);
      }
    }
    if (!a.returns) return;
    for (U32 e = 0; e < a.elements; ++e) {
      U64 v = 0;
      std::memcpy(&v, old + e * a.bytes, a.bytes);
      w.put(i.list[e], lane, v);
    }
  });
  if (changed)
    ++w.cluster().progress;
  else
    w.polled();
  for (std::size_t e = 0; e < values; ++e) w.set_valid(i.list[e], mask, mask);
  return Step::next;
}

void decode_atomic(Decoder& d) {
  const bool red = d.opcode() == "red";
  if (red && d.take("async")) return decode_async_store(d, true);
  Atomic a{};
  a.returns = !red;
  if (d.take("acquire")) a.acquire = true;
  if (d.take("release")) a.release = true;
  if (d.take("acq_rel")) a.acquire = a.release = true;
  d.take("relaxed");
  if (const Scope scope = d.take_scope(); scope != Scope::none) a.scope = scope;
  a.space = d.take_space();
  a.compare_and_swap = d.take("cas");
  a.exchange = !a.compare_and_swap && d.take("exch");
  if (!a.compare_and_swap && !a.exchange) a.reduction = take_reduction(d, false);
  d.take("noftz");
  d.take_cache_hints();
  a.elements = d.take("v2") ? 2 : d.take("v4") ? 4 : d.take("v8") ? 8 : 1;
  a.type = d.take_type();
  if (a.type == Type::b128) {  // a .b128 register is two halves
    if (a.elements > 1 || (!a.exchange && !a.compare_and_swap))
      d.fail("the operation on .b128 must be .exch or .cas, and not on a vector");
    a.type = Type::b64;
    a.elements = 2;
  }
  if ((a.type == Type::f32 || a.type == Type::f64) && a.reduction.op != ReduceOp::add &&
      a.reduction.op != ReduceOp::none)
    d.fail("the operation on .f32 and .f64 must be .add, .exch or .cas");
  a.bytes = static_cast<U32>(size_of(a.type));
  if (a.bytes < 2 || a.bytes > 8 || a.bytes * a.elements > 16) {
    d.fail("an element must have 2 to 8 bytes, and all elements at most 16 (got " +
           std::to_string(a.elements) + " of " + std::to_string(a.bytes) + " bytes)");
  }
  std::size_t k = red ? 0 : 1;
  const std::size_t sources = a.compare_and_swap ? 2 : 1;
  d.finish(k + 1 + sources + (d.has_cache_policy ? 1 : 0));
  const auto each = [&](const Arg& arg, auto&& add) {
    if (a.elements == 1) return add(arg);
    for (const Arg& element : d.vector(arg, a.elements)) add(element);
  };
  if (!red) {
    if (d.arg(0).kind == Arg::sink)
      a.returns = false;
    else
      each(d.arg(0), [&](const Arg& x) {
        d.out.list.push_back(d.destination(x, static_cast<int>(a.bytes)));
      });
  }
  d.out.s[0] = d.address(d.arg(k++), &d.out.offset, &a.space);
  for (std::size_t n = 0; n < sources; ++n, ++k)
    each(d.arg(k), [&](const Arg& x) { d.out.list.push_back(d.source(x, a.type)); });
  d.reads(a.space, a.bytes * a.elements);
  d.writes(a.space, a.bytes * a.elements);
  d.keep(a);
  d.out.execute = atomic;
}

}  // namespace

void add_atomics(OpcodeTable& t) {
  t["atom"] = {decode_atomic, {OpClass::atomic}};
  t["red"] = {decode_atomic, {OpClass::atomic, OpClass::async_store}};
}

}  // namespace torchext::sim
