// Warp matrices: ldmatrix, stmatrix, movmatrix, mma.sync.
#include <cstring>

#include "decode.h"
#include "lanes.h"
#include "number_formats.h"
#include "tensor_core.h"

namespace torchext::sim {

namespace {

using U16 = std::uint16_t;
using U32 = std::uint32_t;
using U64 = std::uint64_t;

void order(Warp& w, U32 mask) {
  if (w.grid().options.lane_order == LaunchOptions::converged) w.order_lanes(mask);
}

// ---- ldmatrix, stmatrix -------------------------------------------------------------------------

struct Matrices {
  Space space = Space::generic;
  U32 count = 1;
  bool transposed = false;
};

U64 row_address(Warp& w, const Instruction& i, int lane) {
  const U64 a = w.integer(i.s[0], lane) + static_cast<U64>(i.offset);
  return i.s[0].bytes == 4 ? static_cast<U32>(a) : a;
}

Step load_matrix(Warp& w, const Instruction& i, U32 mask) {
  const auto& m = *static_cast<const Matrices*>(i.extra);
  const U32 used = m.count == 4 ? ~0u : (1u << (8 * m.count)) - 1;
  w.need(i.s[0], mask & used, "as an address");
  order(w, mask);
  std::uint8_t rows[32][16] = {};
  for_lanes(mask & used, [&](int lane) {
    Place place;
    const U64 address = row_address(w, i, lane);
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
  order(w, mask);
  return Step::next;
}

Step store_matrix(Warp& w, const Instruction& i, U32 mask) {
  const auto& m = *static_cast<const Matrices*>(i.extra);
  const U32 used = m.count == 4 ? ~0u : (1u << (8 * m.count)) - 1;
  w.need(i.s[0], mask & used, "as an address");
  for (const Slot& s : i.list) w.need(s, mask, "as a value to store");
  order(w, mask);
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
    const U64 address = row_address(w, i, lane);
    if (!w.resolve(lane, m.space, address, 16, true, &place)) return;
    w.write(place, w.actor(lane), rows[lane], 16, 1u << lane, address);
  });
  order(w, mask);
  ++w.cluster().progress;
  return Step::next;
}

template <bool load>
void decode_matrices(Decoder& d) {
  Matrices m;
  if (!d.take("sync") || !d.take("aligned")) d.fail("expected .sync.aligned");
  if (!d.take("m8n8")) d.fail("only .m8n8 is supported");
  m.count = d.take("x1") ? 1 : d.take("x2") ? 2 : d.take("x4") ? 4 : 0;
  if (m.count == 0) d.fail("expected .x1, .x2 or .x4");
  m.transposed = d.take("trans");
  m.space = d.take_space();
  if (d.take_type() != Type::b16) d.fail("only .b16 is supported");
  d.finish(2);
  const Arg& registers = d.arg(load ? 0 : 1);
  std::vector<Arg> each =
      registers.kind == Arg::vector ? registers.args : std::vector<Arg>{registers};
  if (each.size() != m.count) d.fail("expected " + std::to_string(m.count) + " registers");
  for (const Arg& a : each)
    d.out.list.push_back(load ? d.destination(a, 4) : d.source(a, Type::b32));
  d.out.s[0] = d.address(d.arg(load ? 1 : 0), &d.out.offset, &m.space);
  d.out.aligned = true;
  d.own(m);
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
  order(w, mask);
  return Step::next;
}

void decode_movmatrix(Decoder& d) {
  if (!d.take("sync") || !d.take("aligned") || !d.take("m8n8") || !d.take("trans"))
    d.fail("expected .sync.aligned.m8n8.trans");
  if (d.take_type() != Type::b16) d.fail("expected .b16");
  d.finish(2);
  d.out.d = d.destination(0, 4);
  d.out.s[0] = d.source(1, Type::b32);
  d.out.aligned = true;
  d.out.execute = move_matrix;
}

// ---- mma.sync -----------------------------------------------------------------------------------

// A is 16 x k by rows, B k x 8 by columns, C and D 16 x 8. Element (row, k) of A: lane
// 4 * (row % 8) + (k / per) % 4, register (row / 8) + 2 * (k / (4 * per)), element k % per, where a
// register holds `per` elements; B alike with its column in place of the row.
struct Mma {
  int k = 0;
  NumberFormat a = NumberFormat::f16, b = NumberFormat::f16;
  bool integer = false, a_signed = false, b_signed = false, saturate = false;
  bool f16_accumulator = false, f16_result = false;
  std::size_t nd = 0, na = 0, nb = 0, nc = 0;  // registers
  MmaModel model{};
};

std::size_t registers_of(const Arg& a, std::size_t* count) {
  *count = a.kind == Arg::vector ? a.args.size() : 1;
  return *count;
}

template <class Get>
void gather(Warp& w, const Slot* slots, std::size_t count, int element_bytes, int k,
            std::uint8_t* image, Get&& register_row) {
  const int per = 4 / element_bytes;
  for (int lane = 0; lane < 32; ++lane) {
    for (std::size_t r = 0; r < count; ++r) {
      int row, kk;
      register_row(lane, static_cast<int>(r), per, &row, &kk);
      const auto value = static_cast<U32>(w.integer(slots[r], lane));
      std::memcpy(image + (row * k + kk) * element_bytes, &value, 4);
    }
  }
}

void a_position(int lane, int r, int per, int* row, int* k) {
  *row = lane / 4 + (r & 1) * 8;
  *k = lane % 4 * per + (r >> 1) * 4 * per;
}
void b_position(int lane, int r, int per, int* row, int* k) {
  *row = lane / 4;
  *k = lane % 4 * per + r * 4 * per;
}

Step multiply(Warp& w, const Instruction& i, U32 mask) {
  const auto& m = *static_cast<const Mma*>(i.extra);
  const Slot* d = i.list.data();
  const Slot *a = d + m.nd, *b = a + m.na, *c = b + m.nb;
  for (std::size_t r = m.nd; r < i.list.size(); ++r) w.need(i.list[r], mask, "by mma.sync");
  order(w, mask);
  std::uint8_t a_image[16 * 64], b_image[8 * 64];
  const int element = m.integer ? 1 : size_in_bytes(m.a);
  gather(w, a, m.na, element, m.k, a_image, a_position);
  gather(w, b, m.nb, element, m.k, b_image, b_position);
  if (m.integer) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + 8 * (r >> 1), column = 2 * (lane % 4) + (r & 1);
        std::int64_t sum = static_cast<std::int32_t>(w.integer(c[r], lane));
        for (int k = 0; k < m.k; ++k) {
          const std::uint8_t x = a_image[row * m.k + k], y = b_image[column * m.k + k];
          sum += std::int64_t{m.a_signed ? static_cast<std::int8_t>(x) : static_cast<int>(x)} *
                 (m.b_signed ? static_cast<std::int8_t>(y) : static_cast<int>(y));
        }
        if (m.saturate)
          sum = std::min<std::int64_t>(std::max<std::int64_t>(sum, INT32_MIN), INT32_MAX);
        w.put(d[r], lane, static_cast<U32>(sum));
      }
    }
  } else {
    thread_local MmaOperand left, right;
    decode_operand(left, m.a, a_image, 16, m.k, m.k * element, element);
    decode_operand(right, m.b, b_image, 8, m.k, m.k * element, element);
    float product[16 * 8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int h = 0; h < 2; ++h) {
        float* at = product + (lane / 4 + 8 * h) * 8 + 2 * (lane % 4);
        if (m.f16_accumulator) {
          const auto bits = static_cast<U32>(w.integer(c[h], lane));
          at[0] = f16_to_float(static_cast<U16>(bits));
          at[1] = f16_to_float(static_cast<U16>(bits >> 16));
        } else {
          at[0] = float_from_bits(static_cast<U32>(w.integer(c[2 * h], lane)));
          at[1] = float_from_bits(static_cast<U32>(w.integer(c[2 * h + 1], lane)));
        }
      }
    }
    multiply_accumulate(m.model, left, right, product, 8);
    for (int lane = 0; lane < 32; ++lane) {
      for (int h = 0; h < 2; ++h) {
        const float* at = product + (lane / 4 + 8 * h) * 8 + 2 * (lane % 4);
        if (m.f16_result) {
          w.put(d[h], lane, static_cast<U32>(encode_f16(at[1])) << 16 | encode_f16(at[0]));
        } else {
          w.put(d[2 * h], lane, bits_from_float(at[0]));
          w.put(d[2 * h + 1], lane, bits_from_float(at[1]));
        }
      }
    }
  }
  for (std::size_t r = 0; r < m.nd; ++r) w.set_valid(d[r], mask, mask);
  return Step::next;
}

void decode_mma(Decoder& d) {
  if (d.take("sp") || d.take("sp::ordered_metadata")) d.fail("sparse mma is not supported");
  if (!d.take("sync") || !d.take("aligned")) d.fail("expected .sync.aligned");
  Mma m;
  std::string shape;
  if (!d.take_prefix("m16n8k", &shape)) d.fail("only shapes m16n8k* are supported");
  m.k = std::stoi(shape.substr(6));
  if (!d.take("row") || !d.take("col")) d.fail("expected .row.col");
  m.saturate = d.take("satfinite");
  d.take("kind::f8f6f4");
  const Type result = d.take_type(), a = d.take_type(), b = d.take_type(), c = d.take_type();
  d.finish(4);
  m.integer = size_of(a) == 1 && a != Type::e4m3 && a != Type::e5m2;
  const auto format = [&](Type t) {
    switch (t) {
      case Type::e4m3:
        return NumberFormat::e4m3;
      case Type::e5m2:
        return NumberFormat::e5m2;
      case Type::f16:
        return NumberFormat::f16;
      case Type::bf16:
        return NumberFormat::bf16;
      case Type::tf32:
        return NumberFormat::tf32;
      default:
        d.fail("unsupported operand type");
    }
  };
  int element = 1;
  if (m.integer) {
    m.a_signed = is_signed(a);
    m.b_signed = is_signed(b);
    if (result != Type::s32 || c != Type::s32) d.fail("expected .s32 accumulators");
  } else {
    m.a = format(a);
    m.b = format(b);
    element = size_in_bytes(m.a);
    if (size_in_bytes(m.b) != element) d.fail("operands of different sizes");
    m.f16_result = result == Type::f16;
    m.f16_accumulator = c == Type::f16;
    if (m.f16_result != m.f16_accumulator) d.fail("C and D of different types are not supported");
    if (!m.f16_result && (result != Type::f32 || c != Type::f32)) d.fail("bad accumulator type");
    try {
      m.model = mma_sync_model(d.target(), m.a,
                               m.f16_accumulator ? NumberFormat::f16 : NumberFormat::f32);
    } catch (const std::invalid_argument& e) {
      d.fail(e.what());
    }
  }
  const std::size_t accumulators = m.f16_result ? 2 : 4;
  const auto k_registers = static_cast<std::size_t>(m.k * element / 16);
  if (k_registers != 1 && k_registers != 2) d.fail("bad shape");
  registers_of(d.arg(0), &m.nd);
  registers_of(d.arg(1), &m.na);
  registers_of(d.arg(2), &m.nb);
  registers_of(d.arg(3), &m.nc);
  if (m.nd != accumulators || m.nc != accumulators || m.na != 2 * k_registers ||
      m.nb != k_registers)
    d.fail("wrong number of registers");
  const auto add = [&](std::size_t n, bool destination) {
    const Arg& arg = d.arg(n);
    const std::vector<Arg> each = arg.kind == Arg::vector ? arg.args : std::vector<Arg>{arg};
    const Type type = n == 1 || n == 2 || m.f16_result ? Type::b32
                      : m.integer                      ? Type::s32
                                                       : Type::f32;
    for (const Arg& x : each)
      d.out.list.push_back(destination ? d.destination(x, 4) : d.source(x, type));
  };
  add(0, true);
  for (std::size_t n = 1; n < 4; ++n) add(n, false);
  d.out.aligned = true;
  d.own(m);
  d.out.execute = multiply;
}

}  // namespace

void add_matrix(DecodeTable& t) {
  t["ldmatrix"] = decode_matrices<true>;
  t["stmatrix"] = decode_matrices<false>;
  t["movmatrix"] = decode_movmatrix;
  t["mma"] = decode_mma;
}

}  // namespace torchext::sim
