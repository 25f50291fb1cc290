// Permutations, bit fields and counts: prmt, bfe, bfi, bmsk, szext, popc, clz, bfind, brev, fns.
#include "../frontend/decode.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

enum PermuteMode : std::uint8_t { kIndex, kF4e, kB4e, kRc8, kEcl, kEcr, kRc16 };
struct Permute {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 2;
  U32 operator()(PermuteMode mode, U32 a, U32 b, U32 c) const {
    const U64 bytes = U64{b} << 32 | a;
    U32 selector[4];
    const U32 n = c & 3;
    for (U32 k = 0; k < 4; ++k) {
      switch (mode) {
        case kIndex:
          selector[k] = (c >> (4 * k)) & 15;
          break;
        case kF4e:
          selector[k] = n + k;
          break;
        case kB4e:
          selector[k] = (n + 8 - k) & 7;
          break;
        case kRc8:
          selector[k] = n;
          break;
        case kEcl:
          selector[k] = k < n ? n : k;
          break;
        case kEcr:
          selector[k] = k < n ? k : n;
          break;
        default:
          selector[k] = (n & 1) * 2 + (k & 1);
          break;
      }
    }
    U32 r = 0;
    for (U32 k = 0; k < 4; ++k) {
      U32 byte = static_cast<U32>(bytes >> (8 * (selector[k] & 7))) & 0xff;
      if (mode == kIndex && (selector[k] & 8)) byte = byte & 0x80 ? 0xff : 0;
      r |= byte << (8 * k);
    }
    return r;
  }
};

void decode_prmt(Decoder& d) {
  d.need_type(Type::b32);
  const std::string mode = d.take_one_of({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
  d.finish(4);
  d.keep(mode.empty()    ? kIndex
         : mode == "f4e" ? kF4e
         : mode == "b4e" ? kB4e
         : mode == "rc8" ? kRc8
         : mode == "ecl" ? kEcl
         : mode == "ecr" ? kEcr
                         : kRc16);
  d.out.d = d.destination(0, 4);
  for (std::size_t k = 0; k < 3; ++k) d.out.s[k] = d.source(k + 1, Type::b32);
  d.out.execute = map3_form<U32, U32, U32, U32, Permute>;
}

struct Bfe {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 1;
  template <class T>
  T operator()(T a, U32 at, U32 length) const {
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
    case Type::u32:
      d.out.execute = map3<U32, U32, U32, U32, Bfe>;
      break;
    case Type::s32:
      d.out.execute = map3<S32, S32, U32, U32, Bfe>;
      break;
    case Type::u64:
      d.out.execute = map3<U64, U64, U32, U32, Bfe>;
      break;
    case Type::s64:
      d.out.execute = map3<S64, S64, U32, U32, Bfe>;
      break;
    default:
      d.fail_type(type);
  }
}

template <class T>
struct InsertField {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 2;
  T operator()(T a, T r, U32 at, U32 length) const {
    constexpr U32 bits = 8 * sizeof(T);
    at &= 0xff;
    length &= 0xff;
    for (U32 k = 0; k < length && at + k < bits; ++k) {
      const T bit = T{1} << (at + k);
      r = (a >> k) & 1 ? r | bit : r & ~bit;
    }
    return r;
  }
};

template <class T>
Step insert_field(Warp& w, const Instruction& i, U32 mask) {
  with_validity<T, InsertField<T>, T, T, U32, U32>(w, i, mask, [&] {
    for_lanes(mask, [&](int l) {
      w.put(i.d, l,
            InsertField<T>()(
                static_cast<T>(w.integer(i.s[0], l)), static_cast<T>(w.integer(i.s[1], l)),
                static_cast<U32>(w.integer(i.s[2], l)), static_cast<U32>(w.integer(i.s[3], l))));
    });
  });
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

struct FieldForm {  // bmsk, szext
  bool wrap = false, sign = false;
};

struct Bmsk {
  U32 operator()(FieldForm form, U32 at, U32 length, U32) const {
    if (form.wrap) at &= 31, length &= 31;
    if (at >= 32 || length == 0) return 0;
    const U64 ones = length >= 32 ? 0xffffffffull : (1ull << length) - 1;
    return static_cast<U32>(ones << at);
  }
};
void decode_bmsk(Decoder& d) {
  FieldForm form;
  form.wrap = d.take("wrap");
  if (!form.wrap) d.take("clamp");
  d.keep(form);
  d.take_type();
  d.finish(3);
  d.out.d = d.destination(0, 4);
  d.out.s[0] = d.source(1, Type::u32);
  d.out.s[1] = d.source(2, Type::u32);
  d.out.s[2] = d.constant(0, 4);
  d.out.execute = map3_form<U32, U32, U32, U32, Bmsk>;
}

struct Szext {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 1;
  U32 operator()(FieldForm form, U32 a, U32 n, U32) const {
    n = form.wrap ? n & 31 : n > 32 ? 32 : n;
    if (n == 0) return 0;
    if (n >= 32) return a;
    const U32 field = a & ((1u << n) - 1);
    return form.sign && (field >> (n - 1)) & 1 ? field | ~((1u << n) - 1) : field;
  }
};
void decode_szext(Decoder& d) {
  FieldForm form;
  form.wrap = d.take("wrap");
  if (!form.wrap) d.take("clamp");
  form.sign = is_signed(d.take_type());
  d.keep(form);
  d.finish(3);
  d.out.d = d.destination(0, 4);
  d.out.s[0] = d.source(1, Type::u32);
  d.out.s[1] = d.source(2, Type::u32);
  d.out.s[2] = d.constant(0, 4);
  d.out.execute = map3_form<U32, U32, U32, U32, Szext>;
}

struct Popc {
  template <class T>
  U32 operator()(T a) const {
    return static_cast<U32>(__builtin_popcountll(a));
  }
};
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
  template <class T>
  U32 operator()(T a) const {
    const U32 at = Bfind()(a);
    return at == ~0u ? at : static_cast<U32>(8 * sizeof(T) - 1) - at;
  }
};
struct Brev {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 1;
  template <class T>
  T operator()(T a) const {
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
      case Type::u32:
        d.out.execute = shift ? map1<U32, U32, BfindShift> : map1<U32, U32, Bfind>;
        break;
      case Type::s32:
        d.out.execute = shift ? map1<U32, S32, BfindShift> : map1<U32, S32, Bfind>;
        break;
      case Type::u64:
        d.out.execute = shift ? map1<U32, U64, BfindShift> : map1<U32, U64, Bfind>;
        break;
      case Type::s64:
        d.out.execute = shift ? map1<U32, S64, BfindShift> : map1<U32, S64, Bfind>;
        break;
      default:
        d.fail_type(type);
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

}  // namespace

void add_bits(OpcodeTable& t) {
  t["prmt"] = {decode_prmt, {OpClass::alu}};
  t["bfe"] = {decode_bfe, {OpClass::alu}};
  t["bfi"] = {decode_bfi, {OpClass::alu}};
  t["bmsk"] = {decode_bmsk, {OpClass::alu}};
  t["szext"] = {decode_szext, {OpClass::alu}};
  t["popc"] = {decode_count<Popc, false>, {OpClass::special}};
  t["clz"] = {decode_count<Clz, false>, {OpClass::special}};
  t["bfind"] = {decode_count<Popc, false>, {OpClass::special}};
  t["brev"] = {decode_count<Brev, true>, {OpClass::special}};
  t["fns"] = {decode_fns, {OpClass::alu}};
}

}  // namespace torchext::sim
