// Bitwise logic and shifts: and, or, xor, not, cnot, shl, shr, lop3, shf.
#include "../frontend/decode.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

struct And {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 2;
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 2;
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 2;
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Not {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 1;
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(~a);
  }
};
struct Cnot {
  template <class T>
  T operator()(T a) const {
    return a == 0;
  }
};

template <class F>
Step predicate_binary(Warp& w, const Instruction& i, U32 mask) {
  w.set_predicate(i.d, mask, F()(w.predicate(i.s[0]), w.predicate(i.s[1])));
  w.set_valid(i.d, mask, w.valid(i.s[0]) & w.valid(i.s[1]));
  return Step::next;
}

template <class F>
void decode_bitwise(Decoder& d) {
  const Type type = d.take_type();
  d.finish(3);
  if (type == Type::pred) {
    d.out.d = d.predicate_destination(d.arg(0));
    d.out.s[0] = d.predicate(1);
    d.out.s[1] = d.predicate(2);
    d.out.execute = predicate_binary<F>;
    return;
  }
  d.out.d = d.destination(0, size_of(type));
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, type);
  switch (size_of(type)) {
    case 2:
      d.out.execute = map2<U16, U16, U16, F>;
      break;
    case 4:
      d.out.execute = map2<U32, U32, U32, F>;
      break;
    case 8:
      d.out.execute = map2<U64, U64, U64, F>;
      break;
    default:
      d.fail_type(type);
  }
}

Step not_predicate(Warp& w, const Instruction& i, U32 mask) {
  w.set_predicate(i.d, mask, ~w.predicate(i.s[0]));
  w.set_valid(i.d, mask, w.valid(i.s[0]));
  return Step::next;
}

template <class F>
void decode_not(Decoder& d) {
  const Type type = d.take_type();
  d.finish(2);
  if (type == Type::pred) {
    if (d.opcode() != "not") d.fail_type(type);
    d.out.d = d.predicate_destination(d.arg(0));
    d.out.s[0] = d.predicate(1);
    d.out.execute = not_predicate;
    return;
  }
  d.out.d = d.destination(0, size_of(type));
  d.out.s[0] = d.source(1, type);
  switch (size_of(type)) {
    case 2:
      d.out.execute = map1<U16, U16, F>;
      break;
    case 4:
      d.out.execute = map1<U32, U32, F>;
      break;
    case 8:
      d.out.execute = map1<U64, U64, F>;
      break;
    default:
      d.fail_type(type);
  }
}

struct Shl {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 1;
  template <class T>
  T operator()(T a, U32 n) const {
    return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << n);
  }
};
struct Shr {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 1;
  template <class T>
  T operator()(T a, U32 n) const {
    constexpr U32 bits = 8 * sizeof(T);
    if (n >= bits) return std::is_signed_v<T> && a < 0 ? static_cast<T>(-1) : T{0};
    return static_cast<T>(a >> n);
  }
};

template <class F>
void decode_shift(Decoder& d) {
  const Type type = d.take_type();
  d.finish(3);
  d.out.d = d.destination(0, size_of(type));
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, Type::u32);
  switch (type) {
    case Type::b16:
    case Type::u16:
      d.out.execute = map2<U16, U16, U32, F>;
      break;
    case Type::s16:
      d.out.execute = map2<std::int16_t, std::int16_t, U32, F>;
      break;
    case Type::b32:
    case Type::u32:
      d.out.execute = map2<U32, U32, U32, F>;
      break;
    case Type::s32:
      d.out.execute = map2<S32, S32, U32, F>;
      break;
    case Type::b64:
    case Type::u64:
      d.out.execute = map2<U64, U64, U32, F>;
      break;
    case Type::s64:
      d.out.execute = map2<S64, S64, U32, F>;
      break;
    default:
      d.fail_type(type);
  }
}

struct TruthTable {
  U32 outputs;  // bit 4a + 2b + c: of the inputs a, b, c
};

struct Lop3 {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 3;
  U32 operator()(TruthTable table, U32 a, U32 b, U32 c) const {
    U32 r = 0;
    const U32 truth = table.outputs;
    if (truth & 0x01) r |= ~a & ~b & ~c;
    if (truth & 0x02) r |= ~a & ~b & c;
    if (truth & 0x04) r |= ~a & b & ~c;
    if (truth & 0x08) r |= ~a & b & c;
    if (truth & 0x10) r |= a & ~b & ~c;
    if (truth & 0x20) r |= a & ~b & c;
    if (truth & 0x40) r |= a & b & ~c;
    if (truth & 0x80) r |= a & b & c;
    return r;
  }
};

// lop3.or, lop3.and: p = (d != 0) op q
template <bool conjunction>
Step lop3_with_test(Warp& w, const Instruction& i, U32 mask) {
  const U32 q = w.predicate(i.s[3]), q_valid = w.valid(i.s[3]);
  map3_form<U32, U32, U32, U32, Lop3>(w, i, mask);
  U32 set = 0;
  for_lanes(mask, [&](int l) { set |= U32{w.integer(i.d, l) != 0} << l; });
  w.set_predicate(i.d2, mask, conjunction ? set & q : set | q);
  w.set_valid(i.d2, mask, w.valid(i.d) & q_valid);
  return Step::next;
}

void decode_lop3(Decoder& d) {
  const std::string test = d.take_one_of({"or", "and"});
  d.need_type(Type::b32);
  d.finish(test.empty() ? 5 : 6);
  if (test.empty()) {
    d.out.d = d.destination(0, 4);
  } else {
    const Arg& to = d.arg(0);
    if (to.kind != Arg::pair) d.fail_operand(to, "a pair of registers \'d|p\'");
    d.out.d = d.destination(to.args[0], 4);
    d.out.d2 = d.predicate_destination(to.args[1]);
    d.out.s[3] = d.predicate(5);
  }
  for (std::size_t k = 0; k < 3; ++k) d.out.s[k] = d.source(k + 1, Type::b32);
  d.keep(TruthTable{static_cast<U32>(d.immediate(4) & 0xff)});
  d.out.execute = test.empty()    ? map3_form<U32, U32, U32, U32, Lop3>
                  : test == "and" ? lop3_with_test<true>
                                  : lop3_with_test<false>;
}

struct FunnelForm {
  bool right, wrap;
};
struct Funnel {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 2;
  U32 operator()(FunnelForm form, U32 low, U32 high, U32 n) const {
    n = form.wrap ? n & 31 : n > 32 ? 32 : n;
    const U64 both = U64{high} << 32 | low;
    return form.right ? static_cast<U32>(both >> n) : static_cast<U32>((both << n) >> 32);
  }
};

void decode_shf(Decoder& d) {
  const bool right = d.need_one_of({"l", "r"}) == "r";
  const bool wrap = d.need_one_of({"wrap", "clamp"}) == "wrap";
  d.take_type();
  d.finish(4);
  d.out.d = d.destination(0, 4);
  for (std::size_t k = 0; k < 3; ++k) d.out.s[k] = d.source(k + 1, Type::b32);
  d.keep(FunnelForm{right, wrap});
  d.out.execute = map3_form<U32, U32, U32, U32, Funnel>;
}

}  // namespace

void add_logic(OpcodeTable& t) {
  t["and"] = {decode_bitwise<And>, {OpClass::alu}};
  t["or"] = {decode_bitwise<Or>, {OpClass::alu}};
  t["xor"] = {decode_bitwise<Xor>, {OpClass::alu}};
  t["not"] = {decode_not<Not>, {OpClass::alu}};
  t["cnot"] = {decode_not<Cnot>, {OpClass::alu}};
  t["shl"] = {decode_shift<Shl>, {OpClass::alu}};
  t["shr"] = {decode_shift<Shr>, {OpClass::alu}};
  t["lop3"] = {decode_lop3, {OpClass::alu}};
  t["shf"] = {decode_shf, {OpClass::alu}};
}

}  // namespace torchext::sim
