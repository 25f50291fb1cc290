// Integer arithmetic: add, sub, mul, mad, div, rem, min, max, abs, neg, sad, carries, dot products,
// bit counts and fields. Longer than 500 lines because PTX has so many of them, each short.
#include <algorithm>

#include "../frontend/decode.h"
#include "floating.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class T>
T wrap_add(T a, T b) {
  return static_cast<T>(
      static_cast<Unsigned<T>>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b)));
}
template <class T>
T wrap_sub(T a, T b) {
  return static_cast<T>(
      static_cast<Unsigned<T>>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b)));
}
template <class T>
T wrap_mul(T a, T b) {
  const auto x = static_cast<std::uint64_t>(a), y = static_cast<std::uint64_t>(b);
  return static_cast<T>(x * y);
}
template <class T>
T multiply_high(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> 64);
  } else {
    using Wide = std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>;
    return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
  }
}

struct Add {
  static constexpr Spread spread = Spread::carry;
  template <class T>
  T operator()(T a, T b) const {
    return wrap_add(a, b);
  }
};
struct Sub {
  static constexpr Spread spread = Spread::carry;
  template <class T>
  T operator()(T a, T b) const {
    return wrap_sub(a, b);
  }
};
struct MulLow {
  static constexpr Spread spread = Spread::carry;
  template <class T>
  T operator()(T a, T b) const {
    return wrap_mul(a, b);
  }
};
struct MulHigh {
  template <class T>
  T operator()(T a, T b) const {
    return multiply_high(a, b);
  }
};
struct AddSat {
  std::int32_t operator()(std::int32_t a, std::int32_t b) const {
    const std::int64_t r = std::int64_t{a} + b;
    return static_cast<std::int32_t>(std::clamp<std::int64_t>(r, INT32_MIN, INT32_MAX));
  }
};
struct SubSat {
  std::int32_t operator()(std::int32_t a, std::int32_t b) const {
    const std::int64_t r = std::int64_t{a} - b;
    return static_cast<std::int32_t>(std::clamp<std::int64_t>(r, INT32_MIN, INT32_MAX));
  }
};
struct MadLow {
  static constexpr Spread spread = Spread::carry;
  template <class T>
  T operator()(T a, T b, T c) const {
    return wrap_add(wrap_mul(a, b), c);
  }
};
struct MadHigh {
  template <class T>
  T operator()(T a, T b, T c) const {
    return wrap_add(multiply_high(a, b), c);
  }
};
template <class Wide>
struct MulWide {
  template <class T>
  Wide operator()(T a, T b) const {
    return wrap_mul(static_cast<Wide>(a), static_cast<Wide>(b));
  }
};
template <class Wide>
struct MadWide {
  template <class T>
  Wide operator()(T a, T b, Wide c) const {
    return wrap_add(wrap_mul(static_cast<Wide>(a), static_cast<Wide>(b)), c);
  }
};
// PTX leaves division by zero unspecified. Hardware sets all bits, and so does this.
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return static_cast<T>(~T{0});
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return wrap_sub(T{0}, a);
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return static_cast<T>(~T{0});
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
struct MinRelu {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(T{0}, std::min(a, b));
  }
};
struct MaxRelu {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(T{0}, std::max(a, b));
  }
};
struct Abs {
  template <class T>
  T operator()(T a) const {
    return a < 0 ? wrap_sub(T{0}, a) : a;
  }
};
struct Neg {
  static constexpr Spread spread = Spread::carry;
  template <class T>
  T operator()(T a) const {
    return wrap_sub(T{0}, a);
  }
};
struct Sad {
  template <class T>
  T operator()(T a, T b, T c) const {
    return wrap_add(c, a < b ? wrap_sub(b, a) : wrap_sub(a, b));
  }
};
struct Mul24 {
  template <class T>
  T operator()(T a, T b) const {
    return wrap_mul(static_cast<T>(static_cast<T>(a << 8) >> 8),
                    static_cast<T>(static_cast<T>(b << 8) >> 8));
  }
};
struct Mul24High {  // bits 16 to 47 of the product
  template <class T>
  T operator()(T a, T b) const {
    using Wide = std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>;
    const Wide x = static_cast<T>(a << 8) >> 8, y = static_cast<T>(b << 8) >> 8;
    return static_cast<T>((x * y) >> 16);
  }
};
template <class Product>
struct Mad24 {
  template <class T>
  T operator()(T a, T b, T c) const {
    return wrap_add(Product()(a, b), c);
  }
};
template <class Product>
struct AddSaturated {
  std::int32_t operator()(std::int32_t a, std::int32_t b, std::int32_t c) const {
    return AddSat()(Product()(a, b), c);
  }
};
template <class F>
struct Halves {  // u16x2, s16x2
  static constexpr Spread spread = Spread::halves;
  template <class T>
  T operator()(T a, T b) const {
    using H = std::conditional_t<std::is_signed_v<T>, std::int16_t, std::uint16_t>;
    const auto low = static_cast<std::uint16_t>(F()(static_cast<H>(a), static_cast<H>(b)));
    const auto high =
        static_cast<std::uint16_t>(F()(static_cast<H>(a >> 16), static_cast<H>(b >> 16)));
    return static_cast<T>(static_cast<std::uint32_t>(high) << 16 | low);
  }
};

template <class F>
Execute binary(Type t) {
  switch (t) {
    case Type::u16:
      return map2<std::uint16_t, std::uint16_t, std::uint16_t, F>;
    case Type::s16:
      return map2<std::int16_t, std::int16_t, std::int16_t, F>;
    case Type::u32:
    case Type::b32:
      return map2<std::uint32_t, std::uint32_t, std::uint32_t, F>;
    case Type::s32:
      return map2<std::int32_t, std::int32_t, std::int32_t, F>;
    case Type::u64:
    case Type::b64:
      return map2<std::uint64_t, std::uint64_t, std::uint64_t, F>;
    case Type::s64:
      return map2<std::int64_t, std::int64_t, std::int64_t, F>;
    case Type::u16x2:
      return map2<std::uint32_t, std::uint32_t, std::uint32_t, Halves<F>>;
    case Type::s16x2:
      return map2<std::int32_t, std::int32_t, std::int32_t, Halves<F>>;
    default:
      return nullptr;
  }
}
template <class F>
Execute ternary(Type t) {
  switch (t) {
    case Type::u16:
      return map3<std::uint16_t, std::uint16_t, std::uint16_t, std::uint16_t, F>;
    case Type::s16:
      return map3<std::int16_t, std::int16_t, std::int16_t, std::int16_t, F>;
    case Type::u32:
      return map3<std::uint32_t, std::uint32_t, std::uint32_t, std::uint32_t, F>;
    case Type::s32:
      return map3<std::int32_t, std::int32_t, std::int32_t, std::int32_t, F>;
    case Type::u64:
      return map3<std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t, F>;
    case Type::s64:
      return map3<std::int64_t, std::int64_t, std::int64_t, std::int64_t, F>;
    default:
      return nullptr;
  }
}
template <class F>
Execute unary_signed(Type t) {
  switch (t) {
    case Type::s16:
      return map1<std::int16_t, std::int16_t, F>;
    case Type::s32:
      return map1<std::int32_t, std::int32_t, F>;
    case Type::s64:
      return map1<std::int64_t, std::int64_t, F>;
    default:
      return nullptr;
  }
}

void set_binary(Decoder& d, Type type, Execute execute) {
  if (execute == nullptr) d.fail_type(type);
  d.finish(3);
  d.out.d = d.destination(0, size_of(type));
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, type);
  d.out.execute = execute;
}

void set_ternary(Decoder& d, Type type, Execute execute) {
  if (execute == nullptr) d.fail_type(type);
  d.finish(4);
  d.out.d = d.destination(0, size_of(type));
  for (std::size_t k = 0; k < 3; ++k) d.out.s[k] = d.source(k + 1, type);
  d.out.execute = execute;
}

// .sat: the sum of an s32 product and the third operand, clamped
template <class Product>
constexpr Execute saturated =
    map3<std::int32_t, std::int32_t, std::int32_t, std::int32_t, AddSaturated<Product>>;

bool is_integer(Type t) {
  switch (t) {
    case Type::u16:
    case Type::s16:
    case Type::u32:
    case Type::s32:
    case Type::u64:
    case Type::s64:
    case Type::u16x2:
    case Type::s16x2:
    case Type::b32:
    case Type::b64:
    case Type::b16:
      return true;
    default:
      return false;
  }
}

// add.cc and its like keep the carries, one bit per lane, at byte 256 of the register file, after
// the scratch bytes of sinks.
std::uint32_t* carry(Warp& w) {
  Slot s;
  s.offset = 256;
  return w.at<std::uint32_t>(s);
}

template <class T, bool subtract, bool use, bool set>
Step add_carry(Warp& w, const Instruction& i, std::uint32_t mask) {
  std::uint32_t& flags = *carry(w);
  for_lanes(mask, [&](int l) {
    const auto a = static_cast<T>(w.integer(i.s[0], l));
    auto b = static_cast<T>(w.integer(i.s[1], l));
    const T in = use ? static_cast<T>((flags >> l) & 1) : T{0};
    T r;
    bool out;
    if (subtract) {  // the flag is a borrow
      r = static_cast<T>(a - b - in);
      out = a < b || (a == b && in);
    } else {
      r = static_cast<T>(a + b + in);
      out = r < a || (in && r == a);
    }
    if (set) flags = (flags & ~(1u << l)) | static_cast<std::uint32_t>(out) << l;
    w.put(i.d, l, r);
  });
  w.set_valid(i.d, mask, w.valid(i.s[0]) & w.valid(i.s[1]));
  return Step::next;
}

template <class T, bool high, bool use, bool set>
Step mad_carry(Warp& w, const Instruction& i, std::uint32_t mask) {
  std::uint32_t& flags = *carry(w);
  for_lanes(mask, [&](int l) {
    const auto a = static_cast<T>(w.integer(i.s[0], l));
    const auto b = static_cast<T>(w.integer(i.s[1], l));
    const auto c = static_cast<T>(w.integer(i.s[2], l));
    const T product = high ? multiply_high(a, b) : wrap_mul(a, b);
    const T in = use ? static_cast<T>((flags >> l) & 1) : T{0};
    const T r = static_cast<T>(product + c + in);
    const bool out = r < product || (in && r == product);
    if (set) flags = (flags & ~(1u << l)) | static_cast<std::uint32_t>(out) << l;
    w.put(i.d, l, r);
  });
  w.set_valid(i.d, mask, w.valid(i.s[0]) & w.valid(i.s[1]) & w.valid(i.s[2]));
  return Step::next;
}

template <class T, bool subtract>
Execute carry_form(bool use, bool set) {
  if (use) return set ? add_carry<T, subtract, true, true> : add_carry<T, subtract, true, false>;
  return add_carry<T, subtract, false, true>;
}

void decode_add_sub(Decoder& d) {
  const bool subtract = d.opcode() == "sub" || d.opcode() == "subc";
  const bool use = d.opcode() == "addc" || d.opcode() == "subc";
  const bool set = d.take("cc");
  const auto& parts = d.raw.parts;
  const bool is_s32 = std::find(parts.begin(), parts.end(), "s32") != parts.end();
  const bool sat = is_s32 && !use && !set && d.take("sat");
  const Type type = d.take_type();
  if (use || set) {
    const bool wide = size_of(type) == 8;
    Execute e = subtract ? (wide ? carry_form<std::uint64_t, true>(use, set)
                                 : carry_form<std::uint32_t, true>(use, set))
                         : (wide ? carry_form<std::uint64_t, false>(use, set)
                                 : carry_form<std::uint32_t, false>(use, set));
    return set_binary(d, type, e);
  }
  if (!is_integer(type)) return decode_float_arithmetic(d, type);
  if (sat)
    return set_binary(d, type,
                      subtract ? map2<std::int32_t, std::int32_t, std::int32_t, SubSat>
                               : map2<std::int32_t, std::int32_t, std::int32_t, AddSat>);
  set_binary(d, type, subtract ? binary<Sub>(type) : binary<Add>(type));
}

void decode_mul(Decoder& d) {
  const bool lo = d.take("lo"), hi = d.take("hi"), wide = d.take("wide");
  const Type type = d.take_type();
  if (!is_integer(type)) {
    if (lo || hi || wide) d.fail_type(type);
    return decode_float_arithmetic(d, type);
  }
  if (lo + hi + wide != 1) d.fail("the modifiers must include one of .lo, .hi and .wide");
  if (!wide) return set_binary(d, type, lo ? binary<MulLow>(type) : binary<MulHigh>(type));
  d.finish(3);
  const int bytes = size_of(type);
  if (bytes > 4) d.fail_type(type);
  d.out.d = d.destination(0, 2 * bytes);
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, type);
  d.out.execute =
      type == Type::u16 ? map2<std::uint32_t, std::uint16_t, std::uint16_t, MulWide<std::uint32_t>>
      : type == Type::s16 ? map2<std::int32_t, std::int16_t, std::int16_t, MulWide<std::int32_t>>
      : type == Type::u32
          ? map2<std::uint64_t, std::uint32_t, std::uint32_t, MulWide<std::uint64_t>>
          : map2<std::int64_t, std::int32_t, std::int32_t, MulWide<std::int64_t>>;
}

void decode_mad(Decoder& d) {
  const bool use = d.opcode() == "madc";
  const bool lo = d.take("lo"), hi = d.take("hi"), wide = d.take("wide"), set = d.take("cc");
  const bool saturate = hi && !use && !set && d.take("sat");
  const Type type = d.take_type();
  if (!is_integer(type)) {
    if (lo || hi || wide || set || use) d.fail_type(type);
    return decode_float_arithmetic(d, type);
  }
  if (lo + hi + wide != 1) d.fail("the modifiers must include one of .lo, .hi and .wide");
  d.finish(4);
  const int bytes = size_of(type);
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, type);
  if (wide) {
    if (bytes > 4) d.fail_type(type);
    if (set || use) d.fail("the modifiers must include .lo or .hi with a carry");
    const Type wide_type = bytes == 4 ? Type::u64 : Type::u32;
    d.out.d = d.destination(0, 2 * bytes);
    d.out.s[2] = d.source(3, wide_type);
    d.out.execute = type == Type::u16   ? map3<U32, U16, U16, U32, MadWide<U32>>
                    : type == Type::s16 ? map3<S32, S16, S16, S32, MadWide<S32>>
                    : type == Type::u32 ? map3<U64, U32, U32, U64, MadWide<U64>>
                                        : map3<S64, S32, S32, S64, MadWide<S64>>;
    return;
  }
  d.out.d = d.destination(0, bytes);
  d.out.s[2] = d.source(3, type);
  if (set || use) {
    const auto pick = [&](auto tag, auto high) -> Execute {
      using T = decltype(tag);
      constexpr bool h = decltype(high)::value;
      if (use) return set ? mad_carry<T, h, true, true> : mad_carry<T, h, true, false>;
      return mad_carry<T, h, false, true>;
    };
    const auto pick_high = [&](auto tag) {
      return hi ? pick(tag, std::true_type{}) : pick(tag, std::false_type{});
    };
    d.out.execute = type == Type::u32   ? pick_high(std::uint32_t{})
                    : type == Type::s32 ? pick_high(std::int32_t{})
                    : type == Type::u64 ? pick_high(std::uint64_t{})
                                        : pick_high(std::int64_t{});
    return;
  }
  if (saturate && type != Type::s32) d.fail_type(type);
  d.out.execute = saturate ? saturated<MulHigh>
                  : lo     ? ternary<MadLow>(type)
                           : ternary<MadHigh>(type);
  if (d.out.execute == nullptr) d.fail_type(type);
}

template <class F, bool floats>
void decode_binary(Decoder& d) {
  const Type type = d.take_type();
  if (floats && !is_integer(type)) return decode_float_arithmetic(d, type);
  set_binary(d, type, binary<F>(type));
}

void decode_min_max(Decoder& d) {
  const bool is_max = d.opcode() == "max";
  const Type type = d.take_type();
  if (!is_integer(type)) return decode_float_arithmetic(d, type);
  if (d.take("relu"))
    return set_binary(d, type, is_max ? binary<MaxRelu>(type) : binary<MinRelu>(type));
  set_binary(d, type, is_max ? binary<Max>(type) : binary<Min>(type));
}

template <class F>
void decode_signed_unary(Decoder& d) {
  const Type type = d.take_type();
  if (!is_integer(type)) return decode_float_arithmetic(d, type);
  d.out.execute = unary_signed<F>(type);
  if (d.out.execute == nullptr) d.fail_type(type);
  d.finish(2);
  d.out.d = d.destination(0, size_of(type));
  d.out.s[0] = d.source(1, type);
}

template <class F>
void decode_ternary(Decoder& d) {
  const Type type = d.take_type();
  set_ternary(d, type, ternary<F>(type));
}

void decode_mul24(Decoder& d) {
  const bool mad = d.opcode() == "mad24", high = d.need_one_of({"lo", "hi"}) == "hi";
  const bool saturate = mad && high && d.take("sat");
  const Type type = d.take_type();
  if (size_of(type) != 4 || !is_integer(type) || (saturate && type != Type::s32)) d.fail_type(type);
  if (!mad) return set_binary(d, type, high ? binary<Mul24High>(type) : binary<Mul24>(type));
  set_ternary(d, type,
              saturate ? saturated<Mul24High>
              : high   ? ternary<Mad24<Mul24High>>(type)
                       : ternary<Mad24<Mul24>>(type));
}

template <class A, class B>
struct Dp4a {
  std::int32_t operator()(std::uint32_t a, std::uint32_t b, std::int32_t c) const {
    for (int k = 0; k < 4; ++k) {
      const auto x = static_cast<A>(a >> (8 * k));
      const auto y = static_cast<B>(b >> (8 * k));
      c = wrap_add(c, static_cast<std::int32_t>(x) * static_cast<std::int32_t>(y));
    }
    return c;
  }
};
template <class A, class B, int first>
struct Dp2a {
  std::int32_t operator()(std::uint32_t a, std::uint32_t b, std::int32_t c) const {
    for (int k = 0; k < 2; ++k) {
      const auto x = static_cast<A>(a >> (16 * k));
      const auto y = static_cast<B>(b >> (8 * (k + first)));
      c = wrap_add(c, static_cast<std::int32_t>(x) * static_cast<std::int32_t>(y));
    }
    return c;
  }
};

template <template <class, class> class F, class U, class S, class U2, class S2>
Execute dot(bool a_signed, bool b_signed) {
  if (a_signed) {
    return b_signed ? map3<S32, U32, U32, S32, F<S, S2>> : map3<S32, U32, U32, S32, F<S, U2>>;
  }
  return b_signed ? map3<S32, U32, U32, S32, F<U, S2>> : map3<S32, U32, U32, S32, F<U, U2>>;
}
template <class A, class B>
using Dp2aLow = Dp2a<A, B, 0>;
template <class A, class B>
using Dp2aHigh = Dp2a<A, B, 2>;

void decode_dot(Decoder& d) {
  const bool two = d.opcode() == "dp2a", low = d.take("lo"), high = d.take("hi");
  const bool a = is_signed(d.take_type()), b = is_signed(d.take_type());
  if (two && !low && !high) d.need_one_of({"lo", "hi"});
  if (!two && (low || high)) d.fail_modifier(low ? "lo" : "hi");
  d.finish(4);
  d.out.d = d.destination(0, 4);
  for (std::size_t k = 0; k < 3; ++k) d.out.s[k] = d.source(k + 1, Type::b32);
  d.out.execute = !two  ? dot<Dp4a, U8, S8, U8, S8>(a, b)
                  : low ? dot<Dp2aLow, U16, S16, U8, S8>(a, b)
                        : dot<Dp2aHigh, U16, S16, U8, S8>(a, b);
}

}  // namespace

void add_integer(OpcodeTable& t) {
  t["add"] =
      t["sub"] = {decode_add_sub, {OpClass::alu, OpClass::fp32, OpClass::fp16, OpClass::fp64}};
  t["addc"] = t["subc"] = {decode_add_sub, {OpClass::alu}};
  t["mul"] = {decode_mul, {OpClass::multiply, OpClass::fp32, OpClass::fp16, OpClass::fp64}};
  t["mad"] = {decode_mad, {OpClass::multiply, OpClass::fp32, OpClass::fp64}};
  t["madc"] = {decode_mad, {OpClass::multiply}};
  t["div"] = {decode_binary<Div, true>, {OpClass::multiply, OpClass::special, OpClass::fp64}};
  t["rem"] = {decode_binary<Rem, false>, {OpClass::multiply}};
  t["min"] = t["max"] = {decode_min_max, {OpClass::alu, OpClass::fp16, OpClass::fp64}};
  t["abs"] = {decode_signed_unary<Abs>, {OpClass::alu, OpClass::fp16, OpClass::fp64}};
  t["neg"] = {decode_signed_unary<Neg>, {OpClass::alu, OpClass::fp16, OpClass::fp64}};
  t["sad"] = {decode_ternary<Sad>, {OpClass::alu}};
  t["mul24"] = t["mad24"] = {decode_mul24, {OpClass::multiply}};
  t["dp4a"] = t["dp2a"] = {decode_dot, {OpClass::multiply}};
}

}  // namespace torchext::sim
