// Moving 8 x 8 matrices: ldmatrix, stmatrix, movmatrix.
#include <cstring>

#include "../frontend/decode.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

// ---- ldmatrix, stmatrix -------------------------------------------------------------------------

struct Matrices {
  Space space = Space::generic;
  U32 count = 1;
  bool transposed = false;
};

Step load_matrix(Warp& w, const Instruction& i, U32 mask) {
  const auto& m = i.as<Matrices>();
  const U32 used = m.count == 4 ? ~0u : (1u << (8 * m.count)) - 1;
  w.need(i.s[0], mask & used, "as an address");
  w.order_if_converged(mask);
  std::uint8_t rows[32][16] = {};
  for_lanes(mask & used, [&](int lane) {
    Place place;
    const U64 address = w.address(i.s[0], i.offset, lane);
    if (!w.resolve(lane, m.space, address, 16, false, &place)) return;
    w.check_read(place, w.actor(lane), 16, 1u << lane, address);
    std::memcpy(rows[lane], place.host, 16);
  });
  for (U32 j = 0; j < m.count; ++j) {
    for_lanes(mask, [&](int lane) {
      U32 value = 0;
      for (int e = 0; e < 2; ++e) {
        const int r = m.transposed ? 2 * (lane % 4) + e : lane / 4;
        const int c = m.transposed ? lane / 4 : 2 * (lane % 4) + e;
        U16 element;
        std::memcpy(&element, rows[8 * static_cast<int>(j) + r] + 2 * c, 2);
        value |= static_cast<U32>(element) << (16 * e);
      }
      w.put(i.list[j], lane, value);
    });
    w.set_valid(i.list[j], mask, mask);
  }
  w.order_if_converged(mask);
  return Step::next;
}

Step store_matrix(Warp& w, const Instruction& i, U32 mask) {
  const auto& m = i.as<Matrices>();
  const U32 used = m.count == 4 ? ~0u : (1u << (8 * m.count)) - 1;
  w.need(i.s[0], mask & used, "as an address");
  for (const Slot& s : i.list) w.need(s, mask, "as a value to store");
  w.order_if_converged(mask);
  std::uint8_t rows[32][16] = {};
  for (U32 j = 0; j < m.count; ++j) {
    for_lanes(mask, [&](int lane) {
      const auto value = static_cast<U32>(w.integer(i.list[j], lane));
      for (int e = 0; e < 2; ++e) {
        const int r = m.transposed ? 2 * (lane % 4) + e : lane / 4;
        const int c = m.transposed ? lane / 4 : 2 * (lane % 4) + e;
        const auto element = static_cast<U16>(value >> (16 * e));
        std::memcpy(rows[8 * static_cast<int>(j) + r] + 2 * c, &element, 2);
      }
    });
  }
  for_lanes(mask & used, [&](int lane) {
    Place place;
    const U64 address = w.address(i.s[0], i.offset, lane);
    if (!w.resolve(lane, m.space, address, 16, true, &place)) return;
    w.write(place, w.actor(lane), rows[lane], 16, 1u << lane, address);
  });
  w.order_if_converged(mask);
  ++w.cluster().progress;
  return Step::next;
}

template <bool load>
void decode_matrices(Decoder& d) {
  Matrices m;
  d.need({"sync", "aligned"});
  d.need({"m8n8"});
  m.count = std::stoul(d.need_one_of({"x1", "x2", "x4"}).substr(1));
  m.transposed = d.take("trans");
  m.space = d.take_space();
  d.need_type(Type::b16);
  d.finish(2);
  for (const Arg& a : d.vector_or_one(d.arg(load ? 0 : 1), m.count))
    d.out.list.push_back(load ? d.destination(a, 4) : d.source(a, Type::b32));
  d.out.s[0] = d.address(d.arg(load ? 1 : 0), &d.out.offset, &m.space);
  d.out.aligned = true;
  const auto bytes = static_cast<std::uint32_t>(4 * m.count);  // of each lane's registers
  if (load)
    d.reads(m.space, bytes);
  else
    d.writes(m.space, bytes);
  d.keep(m);
  d.out.execute = load ? load_matrix : store_matrix;
}

Step move_matrix(Warp& w, const Instruction& i, U32 mask) {
  w.need(i.s[0], mask, "by movmatrix");
  U16 matrix[8][8] = {};
  for_lanes(mask, [&](int lane) {
    const auto value = static_cast<U32>(w.integer(i.s[0], lane));
    matrix[lane / 4][2 * (lane % 4)] = static_cast<U16>(value);
    matrix[lane / 4][2 * (lane % 4) + 1] = static_cast<U16>(value >> 16);
  });
  for_lanes(mask, [&](int lane) {
    const int r = lane / 4, c = 2 * (lane % 4);
    w.put(i.d, lane, static_cast<U32>(matrix[c + 1][r]) << 16 | matrix[c][r]);
  });
  w.set_valid(i.d, mask, mask);
  w.order_if_converged(mask);
  return Step::next;
}

void decode_movmatrix(Decoder& d) {
  d.need({"sync", "aligned", "m8n8", "trans"});
  d.need_type(Type::b16);
  d.finish(2);
  d.out.d = d.destination(0, 4);
  d.out.s[0] = d.source(1, Type::b32);
  d.out.aligned = true;
  d.out.execute = move_matrix;
}

}  // namespace

void add_matrix(OpcodeTable& t) {
  t["ldmatrix"] = {decode_matrices<true>, {OpClass::matrix_memory}};
  t["stmatrix"] = {decode_matrices<false>, {OpClass::matrix_memory}};
  t["movmatrix"] = {decode_movmatrix, {OpClass::shuffle}};
}

}  // namespace torchext::sim
