// Moves, bits, comparisons and selections: mov, and/or/xor/not/cnot, shifts, lop3, shf, prmt, bit
// fields and counts, setp, set, selp, slct.
#include "decode.h"
#include "lanes.h"
#include "number_formats.h"

namespace torchext::sim {

namespace {

using U16 = std::uint16_t;
using U32 = std::uint32_t;
using U64 = std::uint64_t;
using S32 = std::int32_t;
using S64 = std::int64_t;

// ---- mov ----------------------------------------------------------------------------------------

Step move(Warp& w, const Instruction& i, U32 mask) {
  each_lane(mask, [&](int l) { w.put(i.d, l, w.integer(i.s[0], l)); });
  w.set_valid(i.d, mask, w.valid(i.s[0]));
  return Step::next;
}
Step move_predicate(Warp& w, const Instruction& i, U32 mask) {
  w.set_predicate(i.d, mask, w.predicate(i.s[0]));
  w.set_valid(i.d, mask, w.valid(i.s[0]));
  return Step::next;
}
// small: bits of one element
Step pack(Warp& w, const Instruction& i, U32 mask) {
  U32 valid = mask;
  for (const Slot& s : i.list) valid &= w.valid(s);
  const U64 field = i.small >= 64 ? ~U64{0} : (U64{1} << i.small) - 1;
  for_lanes(mask, [&](int l) {
    U64 value = 0;
    for (std::size_t e = 0; e < i.list.size(); ++e)
      value |= (w.integer(i.list[e], l) & field) << (i.small * e);
    w.put(i.d, l, value);
  });
  w.set_valid(i.d, mask, valid);
  return Step::next;
}
Step unpack(Warp& w, const Instruction& i, U32 mask) {
  const U64 field = (U64{1} << i.small) - 1;
  for_lanes(mask, [&](int l) {
    const U64 value = w.integer(i.s[0], l);
    for (std::size_t e = 0; e < i.list.size(); ++e)
      w.put(i.list[e], l, (value >> (i.small * e)) & field);
  });
  for (const Slot& s : i.list) w.set_valid(s, mask, w.valid(i.s[0]));
  return Step::next;
}
Step read_clock(Warp& w, const Instruction& i, U32 mask) {
  ++w.cluster().spins;
  const U64 now = w.cluster().executed * 4 + w.cluster().spins * 16;
  const U64 value = i.small ? now >> 32 : now;
  for_lanes(mask, [&](int l) { w.put(i.d, l, value); });
  w.set_valid(i.d, mask, mask);
  return Step::next;
}

Type element_type(int bytes) {
  return bytes == 1 ? Type::b8 : bytes == 2 ? Type::b16 : bytes == 4 ? Type::b32 : Type::b64;
}

void decode_mov(Decoder& d) {
  const Type type = d.take_type();
  d.finish(2);
  if (type == Type::pred) {
    d.out.d = d.predicate_destination(d.arg(0));
    d.out.s[0] = d.predicate(1);
    d.out.execute = move_predicate;
    return;
  }
  const int bytes = size_of(type);
  const Arg &to = d.arg(0), &from = d.arg(1);
  if (from.kind == Arg::vector) {
    const int each = bytes / static_cast<int>(from.args.size());
    d.out.d = d.destination(to, bytes);
    for (const Arg& a : from.args) d.out.list.push_back(d.source(a, element_type(each)));
    d.out.small = static_cast<U16>(8 * each);
    d.out.execute = pack;
    return;
  }
  if (to.kind == Arg::vector) {
    const int each = bytes / static_cast<int>(to.args.size());
    if (each == 0 || each == 8) d.fail("bad vector");
    for (const Arg& a : to.args) d.out.list.push_back(d.destination_at_least(a, each));
    d.out.s[0] = d.source(from, type);
    d.out.small = static_cast<U16>(8 * each);
    d.out.execute = unpack;
    return;
  }
  d.out.d = d.destination(to, bytes);
  if (from.kind == Arg::special) {
    for (const char* clock : {"%clock", "%clock64", "%globaltimer", "%globaltimer_lo"}) {
      if (from.text == clock) d.out.execute = read_clock;
    }
    for (const char* clock : {"%clock_hi", "%globaltimer_hi"}) {
      if (from.text == clock) d.out.execute = read_clock, d.out.small = 1;
    }
    if (d.out.execute != nullptr) return;
  }
  d.out.s[0] = d.source(from, type);
  d.out.execute = move;
}

// ---- Bitwise ------------------------------------------------------------------------------------

struct And { template <class T> T operator()(T a, T b) const { return a & b; } };
struct Or { template <class T> T operator()(T a, T b) const { return a | b; } };
struct Xor { template <class T> T operator()(T a, T b) const { return a ^ b; } };
struct Not { template <class T> T operator()(T a) const { return static_cast<T>(~a); } };
struct Cnot { template <class T> T operator()(T a) const { return a == 0; } };

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
    case 2: d.out.execute = map2<U16, U16, U16, F>; break;
    case 4: d.out.execute = map2<U32, U32, U32, F>; break;
    case 8: d.out.execute = map2<U64, U64, U64, F>; break;
    default: d.fail("not for this type");
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
    if (d.opcode() != "not") d.fail("not for predicates");
    d.out.d = d.predicate_destination(d.arg(0));
    d.out.s[0] = d.predicate(1);
    d.out.execute = not_predicate;
    return;
  }
  d.out.d = d.destination(0, size_of(type));
  d.out.s[0] = d.source(1, type);
  switch (size_of(type)) {
    case 2: d.out.execute = map1<U16, U16, F>; break;
    case 4: d.out.execute = map1<U32, U32, F>; break;
    case 8: d.out.execute = map1<U64, U64, F>; break;
    default: d.fail("not for this type");
  }
}

struct Shl {
  template <class T> T operator()(T a, U32 n) const {
    return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << n);
  }
};
struct Shr {
  template <class T> T operator()(T a, U32 n) const {
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
    case Type::b16: case Type::u16: d.out.execute = map2<U16, U16, U32, F>; break;
    case Type::s16: d.out.execute = map2<std::int16_t, std::int16_t, U32, F>; break;
    case Type::b32: case Type::u32: d.out.execute = map2<U32, U32, U32, F>; break;
    case Type::s32: d.out.execute = map2<S32, S32, U32, F>; break;
    case Type::b64: case Type::u64: d.out.execute = map2<U64, U64, U32, F>; break;
    case Type::s64: d.out.execute = map2<S64, S64, U32, F>; break;
    default: d.fail("not for this type");
  }
}

struct Lop3 {
  U32 operator()(const Instruction& i, U32 a, U32 b, U32 c) const {
    U32 r = 0;
    if (i.small & 0x01) r |= ~a & ~b & ~c;
    if (i.small & 0x02) r |= ~a & ~b & c;
    if (i.small & 0x04) r |= ~a & b & ~c;
    if (i.small & 0x08) r |= ~a & b & c;
    if (i.small & 0x10) r |= a & ~b & ~c;
    if (i.small & 0x20) r |= a & ~b & c;
    if (i.small & 0x40) r |= a & b & ~c;
    if (i.small & 0x80) r |= a & b & c;
    return r;
  }
};

void decode_lop3(Decoder& d) {
  if (d.take_type() != Type::b32) d.fail("expected .b32");
  d.finish(5);
  d.out.d = d.destination(0, 4);
  for (std::size_t k = 0; k < 3; ++k) d.out.s[k] = d.source(k + 1, Type::b32);
  d.out.small = static_cast<U16>(d.immediate(4) & 0xff);
  d.out.execute = map3i<U32, U32, U32, U32, Lop3>;
}

enum : U16 { kRight = 1, kWrap = 2 };
struct Funnel {
  U32 operator()(const Instruction& i, U32 low, U32 high, U32 n) const {
    n = i.small & kWrap ? n & 31 : n > 32 ? 32 : n;
    const U64 both = U64{high} << 32 | low;
    return i.small & kRight ? static_cast<U32>(both >> n) : static_cast<U32>((both << n) >> 32);
  }
};

void decode_shf(Decoder& d) {
  const bool right = d.take("r");
  if (!right && !d.take("l")) d.fail("expected .l or .r");
  const bool wrap = d.take("wrap");
  if (!wrap && !d.take("clamp")) d.fail("expected .wrap or .clamp");
  d.take_type();
  d.finish(4);
  d.out.d = d.destination(0, 4);
  for (std::size_t k = 0; k < 3; ++k) d.out.s[k] = d.source(k + 1, Type::b32);
  d.out.small = static_cast<U16>((right ? kRight : 0) | (wrap ? kWrap : 0));
  d.out.execute = map3i<U32, U32, U32, U32, Funnel>;
}

enum PermuteMode : U16 { kIndex, kF4e, kB4e, kRc8, kEcl, kEcr, kRc16 };
struct Permute {
  U32 operator()(const Instruction& i, U32 a, U32 b, U32 c) const {
    const U64 bytes = U64{b} << 32 | a;
    U32 selector[4];
    const U32 n = c & 3;
    for (U32 k = 0; k < 4; ++k) {
      switch (i.small) {
        case kIndex: selector[k] = (c >> (4 * k)) & 15; break;
        case kF4e: selector[k] = n + k; break;
        case kB4e: selector[k] = (n + 8 - k) & 7; break;
        case kRc8: selector[k] = n; break;
        case kEcl: selector[k] = k < n ? n : k; break;
        case kEcr: selector[k] = k < n ? k : n; break;
        default: selector[k] = (n & 1) * 2 + (k & 1); break;
      }
    }
    U32 r = 0;
    for (U32 k = 0; k < 4; ++k) {
      U32 byte = static_cast<U32>(bytes >> (8 * (selector[k] & 7))) & 0xff;
      if (i.small == kIndex && (selector[k] & 8)) byte = byte & 0x80 ? 0xff : 0;
      r |= byte << (8 * k);
    }
    return r;
  }
};

void decode_prmt(Decoder& d) {
  if (d.take_type() != Type::b32) d.fail("expected .b32");
  const std::string mode = d.take_one_of({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
  d.finish(4);
  d.out.small = mode.empty()    ? kIndex
                : mode == "f4e" ? kF4e
                : mode == "b4e" ? kB4e
                : mode == "rc8" ? kRc8
                : mode == "ecl" ? kEcl
                : mode == "ecr" ? kEcr
                                : kRc16;
  d.out.d = d.destination(0, 4);
  for (std::size_t k = 0; k < 3; ++k) d.out.s[k] = d.source(k + 1, Type::b32);
  d.out.execute = map3i<U32, U32, U32, U32, Permute>;
}

struct Bfe {
  template <class T> T operator()(T a, U32 at, U32 length) const {
    constexpr U32 bits = 8 * sizeof(T);
    at &= 0xff;
    length &= 0xff;
    using U = std::make_unsigned_t<T>;
    const U u = static_cast<U>(a);
    bool sign = false;
    if (std::is_signed_v<T> && length != 0) {
      const U32 top = at + length - 1 < bits - 1 ? at + length - 1 : bits - 1;
      sign = (u >> top) & 1;
    }
    U r = 0;
    for (U32 k = 0; k < bits; ++k) {
      const bool bit = k < length && at + k < bits ? (u >> (at + k)) & 1 : sign;
      r |= static_cast<U>(bit) << k;
    }
    return static_cast<T>(r);
  }
};

void decode_bfe(Decoder& d) {
  const Type type = d.take_type();
  d.finish(4);
  d.out.d = d.destination(0, size_of(type));
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, Type::u32);
  d.out.s[2] = d.source(3, Type::u32);
  switch (type) {
    case Type::u32: d.out.execute = map3<U32, U32, U32, U32, Bfe>; break;
    case Type::s32: d.out.execute = map3<S32, S32, U32, U32, Bfe>; break;
    case Type::u64: d.out.execute = map3<U64, U64, U32, U32, Bfe>; break;
    case Type::s64: d.out.execute = map3<S64, S64, U32, U32, Bfe>; break;
    default: d.fail("not for this type");
  }
}

template <class T>
Step insert_field(Warp& w, const Instruction& i, U32 mask) {
  constexpr U32 bits = 8 * sizeof(T);
  for_lanes(mask, [&](int l) {
    const auto a = static_cast<T>(w.integer(i.s[0], l));
    auto r = static_cast<T>(w.integer(i.s[1], l));
    const U32 at = w.integer(i.s[2], l) & 0xff, length = w.integer(i.s[3], l) & 0xff;
    for (U32 k = 0; k < length && at + k < bits; ++k) {
      const T bit = T{1} << (at + k);
      r = (a >> k) & 1 ? r | bit : r & ~bit;
    }
    w.put(i.d, l, r);
  });
  w.set_valid(i.d, mask, w.valid(i.s[0]) & w.valid(i.s[1]) & w.valid(i.s[2]) & w.valid(i.s[3]));
  return Step::next;
}

void decode_bfi(Decoder& d) {
  const Type type = d.take_type();
  d.finish(5);
  d.out.d = d.destination(0, size_of(type));
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, type);
  d.out.s[2] = d.source(3, Type::u32);
  d.out.s[3] = d.source(4, Type::u32);
  d.out.execute = size_of(type) == 8 ? insert_field<U64> : insert_field<U32>;
}

struct Bmsk {
  U32 operator()(const Instruction& i, U32 at, U32 length, U32) const {
    if (i.small) at &= 31, length &= 31;
    if (at >= 32 || length == 0) return 0;
    const U64 ones = length >= 32 ? 0xffffffffull : (1ull << length) - 1;
    return static_cast<U32>(ones << at);
  }
};
void decode_bmsk(Decoder& d) {
  d.out.small = d.take("wrap");
  if (!d.out.small) d.take("clamp");
  d.take_type();
  d.finish(3);
  d.out.d = d.destination(0, 4);
  d.out.s[0] = d.source(1, Type::u32);
  d.out.s[1] = d.source(2, Type::u32);
  d.out.s[2] = d.constant(0, 4);
  d.out.execute = map3i<U32, U32, U32, U32, Bmsk>;
}

struct Szext {
  U32 operator()(const Instruction& i, U32 a, U32 n, U32) const {
    n = i.small & kWrap ? n & 31 : n > 32 ? 32 : n;
    if (n == 0) return 0;
    if (n >= 32) return a;
    const U32 field = a & ((1u << n) - 1);
    return i.small & 1 && (field >> (n - 1)) & 1 ? field | ~((1u << n) - 1) : field;
  }
};
void decode_szext(Decoder& d) {
  d.out.small = d.take("wrap") ? kWrap : 0;
  if (!d.out.small) d.take("clamp");
  if (is_signed(d.take_type())) d.out.small |= 1;
  d.finish(3);
  d.out.d = d.destination(0, 4);
  d.out.s[0] = d.source(1, Type::u32);
  d.out.s[1] = d.source(2, Type::u32);
  d.out.s[2] = d.constant(0, 4);
  d.out.execute = map3i<U32, U32, U32, U32, Szext>;
}

struct Popc { template <class T> U32 operator()(T a) const { return static_cast<U32>(__builtin_popcountll(a)); } };
struct Clz {
  U32 operator()(U32 a) const { return a ? static_cast<U32>(__builtin_clz(a)) : 32; }
  U32 operator()(U64 a) const { return a ? static_cast<U32>(__builtin_clzll(a)) : 64; }
};
struct Bfind {  // position of the highest bit unlike the sign
  U32 operator()(U32 a) const { return a ? 31 - static_cast<U32>(__builtin_clz(a)) : ~0u; }
  U32 operator()(S32 a) const { return (*this)(static_cast<U32>(a < 0 ? ~a : a)); }
  U32 operator()(U64 a) const { return a ? 63 - static_cast<U32>(__builtin_clzll(a)) : ~0u; }
  U32 operator()(S64 a) const { return (*this)(static_cast<U64>(a < 0 ? ~a : a)); }
};
struct BfindShift {
  template <class T> U32 operator()(T a) const {
    const U32 at = Bfind()(a);
    return at == ~0u ? at : static_cast<U32>(8 * sizeof(T) - 1) - at;
  }
};
struct Brev {
  template <class T> T operator()(T a) const {
    T r = 0;
    for (std::size_t k = 0; k < 8 * sizeof(T); ++k) r |= ((a >> k) & 1) << (8 * sizeof(T) - 1 - k);
    return r;
  }
};
struct Fns {
  U32 operator()(U32 mask, U32 base, S32 n) const {
    const int step = n < 0 ? -1 : 1;
    int left = n < 0 ? -n : n;
    for (int at = static_cast<int>(base); at >= 0 && at < 32; at += step) {
      if (n == 0) return (mask >> at) & 1 ? static_cast<U32>(at) : ~0u;
      if ((mask >> at) & 1 && --left == 0) return static_cast<U32>(at);
    }
    return ~0u;
  }
};

template <class F, bool same_size>
void decode_count(Decoder& d) {
  const bool shift = d.opcode() == "bfind" && d.take("shiftamt");
  const Type type = d.take_type();
  d.finish(2);
  const bool wide = size_of(type) == 8;
  d.out.d = d.destination(0, same_size && wide ? 8 : 4);
  d.out.s[0] = d.source(1, type);
  if (d.opcode() == "bfind") {
    switch (type) {
      case Type::u32: d.out.execute = shift ? map1<U32, U32, BfindShift> : map1<U32, U32, Bfind>; break;
      case Type::s32: d.out.execute = shift ? map1<U32, S32, BfindShift> : map1<U32, S32, Bfind>; break;
      case Type::u64: d.out.execute = shift ? map1<U32, U64, BfindShift> : map1<U32, U64, Bfind>; break;
      case Type::s64: d.out.execute = shift ? map1<U32, S64, BfindShift> : map1<U32, S64, Bfind>; break;
      default: d.fail("not for this type");
    }
    return;
  }
  if constexpr (same_size) {
    d.out.execute = wide ? map1<U64, U64, F> : map1<U32, U32, F>;
  } else {
    d.out.execute = wide ? map1<U32, U64, F> : map1<U32, U32, F>;
  }
}

void decode_fns(Decoder& d) {
  d.take_type();
  d.finish(4);
  d.out.d = d.destination(0, 4);
  for (std::size_t k = 0; k < 3; ++k) d.out.s[k] = d.source(k + 1, Type::b32);
  d.out.execute = map3<U32, U32, U32, S32, Fns>;
}

// ---- Comparisons --------------------------------------------------------------------------------

struct Eq { template <class T> bool operator()(T a, T b) const { return a == b; } };
struct Ne { template <class T> bool operator()(T a, T b) const { return a != b && !(a != a) && !(b != b); } };
struct Lt { template <class T> bool operator()(T a, T b) const { return a < b; } };
struct Le { template <class T> bool operator()(T a, T b) const { return a <= b; } };
struct Gt { template <class T> bool operator()(T a, T b) const { return a > b; } };
struct Ge { template <class T> bool operator()(T a, T b) const { return a >= b; } };
template <class F>
struct Unordered {
  template <class T> bool operator()(T a, T b) const { return a != a || b != b || F()(a, b); }
};
struct Num { template <class T> bool operator()(T a, T b) const { return a == a && b == b; } };
struct Nan { template <class T> bool operator()(T a, T b) const { return a != a || b != b; } };

enum Combine : U16 { kNone, kAnd, kOr, kXor };
enum : U16 { kFtz = 16 };

struct AsF16 { U16 bits; };
struct AsBf16 { U16 bits; };
template <class T> T widen(T v) { return v; }
inline float widen(AsF16 v) { return f16_to_float(v.bits); }
inline float widen(AsBf16 v) { return bf16_to_float(v.bits); }
inline float flush(float v) { return std::abs(v) < 1.17549435e-38f ? 0.0f * v : v; }
template <class T> T flush(T v) { return v; }

template <class T, class F>
U32 compare(Warp& w, const Instruction& i, U32 mask) {
  const auto* a = w.at(i.s[0]);
  const auto* b = w.at(i.s[1]);
  U32 result = 0;
  const bool ftz = i.small & kFtz;
  each_lane(mask, [&](int l) {
    auto x = widen(Element<T>::load(a, l));
    auto y = widen(Element<T>::load(b, l));
    if (ftz) x = flush(x), y = flush(y);
    result |= static_cast<U32>(F()(x, y)) << l;
  });
  return result;
}

U32 combine(Warp& w, const Instruction& i, U32 result, U32* valid) {
  const U32 mode = i.small & 15;
  if (mode == kNone) return result;
  const U32 c = w.predicate(i.s[2]);
  *valid &= w.valid(i.s[2]);
  return mode == kAnd ? result & c : mode == kOr ? result | c : result ^ c;
}

template <class T, class F>
Step set_predicates(Warp& w, const Instruction& i, U32 mask) {
  const U32 result = compare<T, F>(w, i, mask);
  U32 valid = w.valid(i.s[0]) & w.valid(i.s[1]);
  if (i.d2.sink) {
    w.set_predicate(i.d, mask, combine(w, i, result, &valid));
    w.set_valid(i.d, mask, valid);
    return Step::next;
  }
  const U32 q = combine(w, i, ~result, &valid);
  w.set_predicate(i.d, mask, combine(w, i, result, &valid));
  w.set_valid(i.d, mask, valid);
  w.set_predicate(i.d2, mask, q);
  w.set_valid(i.d2, mask, valid);
  return Step::next;
}

// set: all ones (or 1.0f) where true
template <class T, class F>
Step set_register(Warp& w, const Instruction& i, U32 mask) {
  U32 valid = w.valid(i.s[0]) & w.valid(i.s[1]);
  const U32 result = combine(w, i, compare<T, F>(w, i, mask), &valid);
  const auto truth = static_cast<U64>(i.offset);
  for_lanes(mask, [&](int l) { w.put(i.d, l, (result >> l) & 1 ? truth : 0); });
  w.set_valid(i.d, mask, valid);
  return Step::next;
}

template <class T, bool floating>
Execute comparison(const std::string& op, bool to_register) {
#define TORCHEXT_COMPARE(name, F) \
  if (op == name) return to_register ? set_register<T, F> : set_predicates<T, F>;
  TORCHEXT_COMPARE("eq", Eq)
  TORCHEXT_COMPARE("ne", Ne)
  TORCHEXT_COMPARE("lt", Lt)
  TORCHEXT_COMPARE("le", Le)
  TORCHEXT_COMPARE("gt", Gt)
  TORCHEXT_COMPARE("ge", Ge)
  if constexpr (!floating) {
    TORCHEXT_COMPARE("lo", Lt)
    TORCHEXT_COMPARE("ls", Le)
    TORCHEXT_COMPARE("hi", Gt)
    TORCHEXT_COMPARE("hs", Ge)
  } else {
    TORCHEXT_COMPARE("equ", Unordered<Eq>)
    TORCHEXT_COMPARE("neu", Unordered<Ne>)
    TORCHEXT_COMPARE("ltu", Unordered<Lt>)
    TORCHEXT_COMPARE("leu", Unordered<Le>)
    TORCHEXT_COMPARE("gtu", Unordered<Gt>)
    TORCHEXT_COMPARE("geu", Unordered<Ge>)
    TORCHEXT_COMPARE("num", Num)
    TORCHEXT_COMPARE("nan", Nan)
  }
#undef TORCHEXT_COMPARE
  return nullptr;
}

Execute comparison_of(Type type, const std::string& op, bool to_register) {
  switch (type) {
    case Type::b16: case Type::u16: return comparison<U16, false>(op, to_register);
    case Type::s16: return comparison<std::int16_t, false>(op, to_register);
    case Type::b32: case Type::u32: return comparison<U32, false>(op, to_register);
    case Type::s32: return comparison<S32, false>(op, to_register);
    case Type::b64: case Type::u64: return comparison<U64, false>(op, to_register);
    case Type::s64: return comparison<S64, false>(op, to_register);
    case Type::f32: return comparison<float, true>(op, to_register);
    case Type::f64: return comparison<double, true>(op, to_register);
    case Type::f16: return comparison<AsF16, true>(op, to_register);
    case Type::bf16: return comparison<AsBf16, true>(op, to_register);
    default: return nullptr;
  }
}

std::string take_comparison(Decoder& d) {
  const std::string op =
      d.take_one_of({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu",
                     "ltu", "leu", "gtu", "geu", "num", "nan"});
  if (op.empty()) d.fail("no comparison");
  return op;
}
U16 take_combine(Decoder& d) {
  const std::string mode = d.take_one_of({"and", "or", "xor"});
  return mode.empty() ? kNone : mode == "and" ? kAnd : mode == "or" ? kOr : kXor;
}

// f16x2, bf16x2: the low half sets p, the high half q.
template <class T, class F>
Step set_pair(Warp& w, const Instruction& i, U32 mask) {
  U32 low = 0, high = 0;
  for_lanes(mask, [&](int l) {
    const U64 a = w.integer(i.s[0], l), b = w.integer(i.s[1], l);
    const auto at = [](U64 v, int h) { return widen(T{static_cast<U16>(v >> (16 * h))}); };
    low |= static_cast<U32>(F()(at(a, 0), at(b, 0))) << l;
    high |= static_cast<U32>(F()(at(a, 1), at(b, 1))) << l;
  });
  U32 valid = w.valid(i.s[0]) & w.valid(i.s[1]);
  low = combine(w, i, low, &valid);
  high = combine(w, i, high, &valid);
  w.set_predicate(i.d, mask, low);
  w.set_predicate(i.d2, mask, high);
  w.set_valid(i.d, mask, valid);
  w.set_valid(i.d2, mask, valid);
  return Step::next;
}
template <class T>
Execute pair_comparison(const std::string& op) {
#define TORCHEXT_COMPARE(name, F) if (op == name) return set_pair<T, F>;
  TORCHEXT_COMPARE("eq", Eq) TORCHEXT_COMPARE("ne", Ne) TORCHEXT_COMPARE("lt", Lt)
  TORCHEXT_COMPARE("le", Le) TORCHEXT_COMPARE("gt", Gt) TORCHEXT_COMPARE("ge", Ge)
  TORCHEXT_COMPARE("equ", Unordered<Eq>) TORCHEXT_COMPARE("neu", Unordered<Ne>)
  TORCHEXT_COMPARE("ltu", Unordered<Lt>) TORCHEXT_COMPARE("leu", Unordered<Le>)
  TORCHEXT_COMPARE("gtu", Unordered<Gt>) TORCHEXT_COMPARE("geu", Unordered<Ge>)
  TORCHEXT_COMPARE("num", Num) TORCHEXT_COMPARE("nan", Nan)
#undef TORCHEXT_COMPARE
  return nullptr;
}

void decode_setp(Decoder& d) {
  const std::string op = take_comparison(d);
  d.out.small = take_combine(d);
  const bool combined = d.out.small != kNone;
  if (d.take("ftz")) d.out.small |= kFtz;
  const Type type = d.take_type();
  d.finish(combined ? 4 : 3);
  const Arg& to = d.arg(0);
  const bool pair = to.kind == Arg::pair;
  d.out.d = d.predicate_destination(pair ? to.args[0] : to);
  d.out.d2.sink = true;
  d.out.d2.reg = 1;
  if (pair) d.out.d2 = d.predicate_destination(to.args[1]);
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, type);
  if (combined) d.out.s[2] = d.predicate(3);
  d.out.execute = type == Type::f16x2    ? pair_comparison<AsF16>(op)
                  : type == Type::bf16x2 ? pair_comparison<AsBf16>(op)
                                         : comparison_of(type, op, false);
  if (d.out.execute == nullptr) d.fail("no such comparison for this type");
}

void decode_set(Decoder& d) {
  const std::string op = take_comparison(d);
  d.out.small = take_combine(d);
  const bool combined = d.out.small != kNone;
  if (d.take("ftz")) d.out.small |= kFtz;
  const Type result = d.take_type(), type = d.take_type();
  d.finish(combined ? 4 : 3);
  d.out.d = d.destination(0, size_of(result));
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, type);
  if (combined) d.out.s[2] = d.predicate(3);
  d.out.offset = result == Type::f32                               ? 0x3f800000
                 : result == Type::f16                             ? 0x3c00
                 : result == Type::bf16                            ? 0x3f80
                 : size_of(result) == 2                            ? 0xffff
                 : size_of(result) == 4                            ? 0xffffffff
                                                                   : -1;
  d.out.execute = comparison_of(type, op, true);
  if (d.out.execute == nullptr) d.fail("no such comparison for this type");
}

Step select(Warp& w, const Instruction& i, U32 mask) {
  const U32 p = w.predicate(i.s[2]);
  each_lane(mask, [&](int l) { w.put(i.d, l, w.integer((p >> l) & 1 ? i.s[0] : i.s[1], l)); });
  w.set_valid(i.d, mask,
              w.valid(i.s[2]) & ((p & w.valid(i.s[0])) | (~p & w.valid(i.s[1]))));
  return Step::next;
}

void decode_selp(Decoder& d) {
  const Type type = d.take_type();
  d.finish(4);
  d.out.d = d.destination(0, size_of(type));
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, type);
  d.out.s[2] = d.predicate(3);
  d.out.execute = select;
}

template <bool floating>
Step select_by_sign(Warp& w, const Instruction& i, U32 mask) {
  for_lanes(mask, [&](int l) {
    const auto bits = static_cast<U32>(w.integer(i.s[2], l));
    bool first = static_cast<S32>(bits) >= 0;
    if (floating) {
      float c = float_from_bits(bits);
      if (i.small) c = flush(c);
      first = c >= 0;
    }
    w.put(i.d, l, w.integer(first ? i.s[0] : i.s[1], l));
  });
  w.set_valid(i.d, mask, w.valid(i.s[0]) & w.valid(i.s[1]) & w.valid(i.s[2]));
  return Step::next;
}

void decode_slct(Decoder& d) {
  d.out.small = d.take("ftz");
  const Type type = d.take_type(), by = d.take_type();
  d.finish(4);
  d.out.d = d.destination(0, size_of(type));
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, type);
  d.out.s[2] = d.source(3, by);
  d.out.execute = by == Type::f32 ? select_by_sign<true> : select_by_sign<false>;
}

}  // namespace

void add_logic(DecodeTable& t) {
  t["mov"] = decode_mov;
  t["and"] = decode_bitwise<And>;
  t["or"] = decode_bitwise<Or>;
  t["xor"] = decode_bitwise<Xor>;
  t["not"] = decode_not<Not>;
  t["cnot"] = decode_not<Cnot>;
  t["shl"] = decode_shift<Shl>;
  t["shr"] = decode_shift<Shr>;
  t["lop3"] = decode_lop3;
  t["shf"] = decode_shf;
  t["prmt"] = decode_prmt;
  t["bfe"] = decode_bfe;
  t["bfi"] = decode_bfi;
  t["bmsk"] = decode_bmsk;
  t["szext"] = decode_szext;
  t["popc"] = decode_count<Popc, false>;
  t["clz"] = decode_count<Clz, false>;
  t["bfind"] = decode_count<Popc, false>;
  t["brev"] = decode_count<Brev, true>;
  t["fns"] = decode_fns;
  t["setp"] = decode_setp;
  t["set"] = decode_set;
  t["selp"] = decode_selp;
  t["slct"] = decode_slct;
}

}  // namespace torchext::sim
