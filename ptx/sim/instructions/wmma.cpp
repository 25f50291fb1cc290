// wmma.load, wmma.store, wmma.mma, to which nvcuda::wmma compiles. PTX does not say which lane
// holds which element; warp_matrix.h has the placement that is assumed.
#include <algorithm>
#include <cstring>

#include "../frontend/decode.h"
#include "lanes.h"
#include "warp_matrix.h"

namespace torchext::sim {

namespace {

// One fragment in memory.
struct Tile {
  enum Part : std::uint8_t { a, b, c };
  Part part = a;
  OperandLayout operand;          // a, b
  AccumulatorLayout accumulator;  // c
  int bits = 0;                   // of an element
  bool rows_contiguous = false;   // .row
  Space space = Space::generic;
  int registers = 0;
  int per() const { return bits >= 32 ? 1 : 32 / bits; }  // elements of a register
  int distinct() const { return part == c ? accumulator.elements() / per() : operand.distinct(); }
  // The place of element e of register r in the matrix.
  void position(int lane, int r, int e, int* row, int* column) const {
    if (part == c) return accumulator.position(lane, r * per() + e, row, column);
    int vector, k;
    operand.position(lane, r, &vector, &k);
    *row = part == a ? vector : k + e;
    *column = part == a ? k + e : vector;
  }
  // Offset, in elements, of element e of register r from the start of the matrix.
  U64 index(int lane, int r, int e, U64 stride) const {
    int row, column;
    position(lane, r, e, &row, &column);
    return rows_contiguous ? static_cast<U64>(row) * stride + static_cast<U64>(column)
                           : static_cast<U64>(column) * stride + static_cast<U64>(row);
  }
};

// Both manuals require more than hardware does: PTX wants rows aligned to the fragment, and CUDA
// wants an alignment of 32 bytes and strides of 16. A finding is an access that breaks both.
void check_operands(Warp& w, const Instruction& i, const Tile& t, U32 mask) {
  if (!w.grid().checks) return;
  need_whole_warp(w, mask);
  const auto first = static_cast<int>(lane_of(mask));
  const U64 address = w.address(i.s[0], i.offset, first);
  const auto stride = static_cast<U32>(w.integer(i.s[1], first));
  U32 differ = 0;
  for_lanes(mask, [&](int lane) {
    if (w.address(i.s[0], i.offset, lane) != address ||
        static_cast<U32>(w.integer(i.s[1], lane)) != stride)
      differ |= 1u << lane;
  });
  if (differ != 0) {
    w.finding(FindingKind::invalid_operand,
              "the lanes of a warp give different addresses or strides", differ | 1u << first,
              address);
  }
  const U64 fragment = static_cast<U64>(t.registers) * (t.bits == 64 ? 8 : 4);
  const U64 align = std::min<U64>(fragment, 32), pitch = std::min<U64>(fragment, 16);
  if (address % align != 0) {
    w.finding(FindingKind::misaligned_access,
              "the matrix must be aligned to " + std::to_string(align) + " bytes", mask, address);
  }
  if (U64{stride} * static_cast<U64>(t.bits) % (8 * pitch) != 0) {
    w.finding(FindingKind::misaligned_access,
              "a stride of " + std::to_string(stride) + " elements is not a multiple of " +
                  std::to_string(pitch) + " bytes",
              mask, address);
  }
}

// Calls access(register, its first bit, address, bytes) for each access of a lane: a register whose
// elements are adjacent in memory is one access, otherwise each element is.
template <class F>
void each_access(Warp& w, const Instruction& i, const Tile& t, int lane, F&& access) {
  const U64 address = w.address(i.s[0], i.offset, lane);
  const U64 stride = static_cast<U32>(w.integer(i.s[1], lane));
  const int per = t.per();
  for (int r = 0; r < t.distinct(); ++r) {
    const U64 at = t.index(lane, r, 0, stride);
    const bool together = t.index(lane, r, per - 1, stride) == at + static_cast<U64>(per) - 1;
    const int pieces = together ? 1 : per;
    const auto bytes = static_cast<U32>(t.bits * (together ? per : 1) / 8);
    for (int e = 0; e < pieces; ++e) {
      const U64 index = together ? at : t.index(lane, r, e, stride);
      access(r, e * t.bits, address + index * static_cast<U64>(t.bits) / 8, bytes);
    }
  }
}

bool resolve_tile(Warp& w, const Tile& t, int lane, U64 address, U32 bytes, bool write,
                  Place* place) {
  if (!w.resolve(lane, t.space, address, bytes, write, place)) return false;
  if (place->valid == nullptr) return true;
  w.finding(FindingKind::invalid_operand, "a warp-wide matrix in local memory", 1u << lane,
            address);
  return false;
}

Step load_tile(Warp& w, const Instruction& i, U32 mask) {
  const auto& t = i.as<Tile>();
  w.need(i.s[0], mask, "as an address");
  w.need(i.s[1], mask, "as a stride");
  check_operands(w, i, t, mask);
  w.order_if_converged(mask);
  for_lanes(mask, [&](int lane) {
    U64 values[8] = {};
    each_access(w, i, t, lane, [&](int r, int bit, U64 address, U32 bytes) {
      Place place;
      if (!resolve_tile(w, t, lane, address, bytes, false, &place)) return;
      U64 value = 0;
      w.read(place, w.actor(lane), &value, bytes, 1u << lane, address);
      values[r] |= value << bit;
    });
    for (int r = 0; r < t.registers; ++r)
      w.put(i.list[static_cast<std::size_t>(r)], lane, values[r % t.distinct()]);
  });
  for (const Slot& s : i.list) w.set_valid(s, mask, mask);
  w.order_if_converged(mask);
  return Step::next;
}

Step store_tile(Warp& w, const Instruction& i, U32 mask) {
  const auto& t = i.as<Tile>();
  w.need(i.s[0], mask, "as an address");
  w.need(i.s[1], mask, "as a stride");
  for (const Slot& s : i.list) w.need(s, mask, "as a value to store");
  check_operands(w, i, t, mask);
  w.order_if_converged(mask);
  for_lanes(mask, [&](int lane) {
    each_access(w, i, t, lane, [&](int r, int bit, U64 address, U32 bytes) {
      Place place;
      if (!resolve_tile(w, t, lane, address, bytes, true, &place)) return;
      w.check_write(place, w.actor(lane), bytes, 1u << lane, address);
      const U64 value = w.integer(i.list[static_cast<std::size_t>(r)], lane) >> bit;
      const auto guard = place.guard();
      std::memcpy(place.host, &value, bytes);
    });
  });
  w.order_if_converged(mask);
  ++w.cluster().progress;
  return Step::next;
}

void decode_tile(Decoder& d, bool load) {
  Tile t;
  if (load) {
    const std::string part = d.need_one_of({"a", "b", "c"});
    t.part = part == "a" ? Tile::a : part == "b" ? Tile::b : Tile::c;
  } else {
    d.need({"d"});
    t.part = Tile::c;
  }
  d.need({"sync", "aligned"});
  t.rows_contiguous = d.need_one_of({"row", "col"}) == "row";
  const MatrixShape shape = take_shape(d);
  t.space = d.take_space();
  if (t.space != Space::generic && t.space != Space::global && t.space != Space::shared)
    d.fail("the state space must be .global, .shared or none");
  const std::string type =
      d.take_first_of({"f16", "bf16", "tf32", "f32", "f64", "s8", "u8", "s4", "u4", "b1", "s32"});
  if (type.empty()) d.fail("the modifiers must include a type");
  require_wmma_shape(d, t.part == Tile::c, type, shape);
  t.bits = element_bits(type);
  const bool sub_byte = t.bits < 8;
  if (sub_byte && t.rows_contiguous != (t.part == Tile::a))
    d.fail("the layout must be .row for A and .col for B if elements have less than a byte");
  t.operand = {t.part == Tile::a ? shape.m : shape.n, shape.k, t.bits, t.part == Tile::b, 0};
  t.accumulator = {shape.m, shape.n};
  t.registers = t.distinct();
  if (t.part != Tile::c && type == "f16") t.registers = 8;

  d.finish(2, 3);
  const std::size_t memory = load ? 1 : 0;
  const std::vector<Arg> each =
      d.vector_or_one(d.arg(1 - memory), static_cast<std::size_t>(t.registers));
  const Type held = type == "f64"   ? Type::f64
                    : type == "f32" ? Type::f32
                    : type == "s32" ? Type::s32
                                    : Type::b32;
  for (const Arg& x : each)
    d.out.list.push_back(load ? d.destination(x, size_of(held)) : d.source(x, held));
  d.out.s[0] = d.address(d.arg(memory), &d.out.offset, &t.space);
  const bool along_rows = t.rows_contiguous;
  const int dense = t.part == Tile::a   ? (along_rows ? shape.k : shape.m)
                    : t.part == Tile::b ? (along_rows ? shape.n : shape.k)
                                        : (along_rows ? shape.n : shape.m);
  d.out.s[1] = d.count() == 3 ? d.source(2, Type::u32) : d.constant(static_cast<U64>(dense), 4);
  d.is(OpClass::matrix_memory);
  const auto bytes = static_cast<U32>(t.distinct() * size_of(held));
  if (load)
    d.reads(t.space, bytes);
  else
    d.writes(t.space, bytes);
  d.out.aligned = true;
  d.keep(t);
  d.out.execute = load ? load_tile : store_tile;
}

void decode_wmma(Decoder& d) {
  if (d.take("load")) return decode_tile(d, true);
  if (d.take("store")) return decode_tile(d, false);
  if (!d.take("mma")) d.need_one_of({"load", "store", "mma"});
  d.need({"sync", "aligned"});
  // The placement of elements does not depend on the layout of the matrix in memory.
  const std::string a = d.take_first_of({"row", "col"}), b = d.take_first_of({"row", "col"});
  if (a.empty() || b.empty())
    d.fail("the modifiers must include the layouts of A and B, .row or .col");
  decode_product(d, take_product(d, true));
}

}  // namespace

void add_wmma(OpcodeTable& t) {
  t["wmma"] = {decode_wmma, {OpClass::mma, OpClass::matrix_memory}};
}

}  // namespace torchext::sim
