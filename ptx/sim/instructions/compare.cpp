// Comparisons and selections: setp, set, testp, selp, slct.
#include <cmath>
#include <cstring>

#include "../frontend/decode.h"
#include "../numerics/number_formats.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

struct Eq {
  template <class T>
  bool operator()(T a, T b) const {
    return a == b;
  }
};
struct Ne {
  template <class T>
  bool operator()(T a, T b) const {
    return a != b && !(a != a) && !(b != b);
  }
};
struct Lt {
  template <class T>
  bool operator()(T a, T b) const {
    return a < b;
  }
};
struct Le {
  template <class T>
  bool operator()(T a, T b) const {
    return a <= b;
  }
};
struct Gt {
  template <class T>
  bool operator()(T a, T b) const {
    return a > b;
  }
};
struct Ge {
  template <class T>
  bool operator()(T a, T b) const {
    return a >= b;
  }
};
template <class F>
struct Unordered {
  template <class T>
  bool operator()(T a, T b) const {
    return a != a || b != b || F()(a, b);
  }
};
struct Num {
  template <class T>
  bool operator()(T a, T b) const {
    return a == a && b == b;
  }
};
struct Nan {
  template <class T>
  bool operator()(T a, T b) const {
    return a != a || b != b;
  }
};

enum Combine : std::uint8_t { kNone, kAnd, kOr, kXor };
struct Comparison {
  Combine combine = kNone;
  bool ftz = false;
  U64 truth = 0;  // what set writes for true
};

struct AsF16 {
  U16 bits;
};
struct AsBf16 {
  U16 bits;
};
template <class T>
T widen(T v) {
  return v;
}
inline float widen(AsF16 v) {
  return f16_to_float(v.bits);
}
inline float widen(AsBf16 v) {
  return bf16_to_float(v.bits);
}

// The value of an operand. .ftz flushes subnormals to zero.
template <class T>
auto operand(T v, bool ftz) {
  if constexpr (std::is_same_v<T, AsF16>) {
    if (ftz && (v.bits & 0x7c00) == 0) v.bits &= 0x8000;
  } else if constexpr (std::is_same_v<T, float>) {
    if (ftz) v = flush_subnormal(v);
  }
  return widen(v);
}

template <class T, class F>
U32 compare(Warp& w, const Instruction& i, U32 mask) {
  const auto* a = w.at(i.s[0]);
  const auto* b = w.at(i.s[1]);
  U32 result = 0;
  const bool ftz = i.as<Comparison>().ftz;
  each_lane(mask, [&](int l) {
    const auto x = operand(Element<T>::load(a, l), ftz), y = operand(Element<T>::load(b, l), ftz);
    result |= static_cast<U32>(F()(x, y)) << l;
  });
  return result;
}

U32 combine(Warp& w, const Instruction& i, U32 result, U32* valid) {
  const Combine mode = i.as<Comparison>().combine;
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

// set: all ones (or 1.0f) if true, else 0
template <class T, class F>
Step set_register(Warp& w, const Instruction& i, U32 mask) {
  U32 valid = w.valid(i.s[0]) & w.valid(i.s[1]);
  const U32 result = combine(w, i, compare<T, F>(w, i, mask), &valid);
  const auto truth = i.as<Comparison>().truth;
  for_lanes(mask, [&](int l) { w.put(i.d, l, (result >> l) & 1 ? truth : 0); });
  w.set_valid(i.d, mask, valid);
  return Step::next;
}

template <class T, bool floating>
Execute comparison(const std::string& op, bool to_register) {
#define TORCHEXT_COMPARE(name, F) \
  if (op == name) return to_register ? set_register<T, F> : set_predicates<T, F>
  TORCHEXT_COMPARE("eq", Eq);
  TORCHEXT_COMPARE("ne", Ne);
  TORCHEXT_COMPARE("lt", Lt);
  TORCHEXT_COMPARE("le", Le);
  TORCHEXT_COMPARE("gt", Gt);
  TORCHEXT_COMPARE("ge", Ge);
  if constexpr (!floating) {
    TORCHEXT_COMPARE("lo", Lt);
    TORCHEXT_COMPARE("ls", Le);
    TORCHEXT_COMPARE("hi", Gt);
    TORCHEXT_COMPARE("hs", Ge);
  } else {
    TORCHEXT_COMPARE("equ", Unordered<Eq>);
    TORCHEXT_COMPARE("neu", Unordered<Ne>);
    TORCHEXT_COMPARE("ltu", Unordered<Lt>);
    TORCHEXT_COMPARE("leu", Unordered<Le>);
    TORCHEXT_COMPARE("gtu", Unordered<Gt>);
    TORCHEXT_COMPARE("geu", Unordered<Ge>);
    TORCHEXT_COMPARE("num", Num);
    TORCHEXT_COMPARE("nan", Nan);
  }
#undef TORCHEXT_COMPARE
  return nullptr;
}

Execute comparison_of(Type type, const std::string& op, bool to_register) {
  switch (type) {
    case Type::b16:
    case Type::u16:
      return comparison<U16, false>(op, to_register);
    case Type::s16:
      return comparison<std::int16_t, false>(op, to_register);
    case Type::b32:
    case Type::u32:
      return comparison<U32, false>(op, to_register);
    case Type::s32:
      return comparison<S32, false>(op, to_register);
    case Type::b64:
    case Type::u64:
      return comparison<U64, false>(op, to_register);
    case Type::s64:
      return comparison<S64, false>(op, to_register);
    case Type::f32:
      return comparison<float, true>(op, to_register);
    case Type::f64:
      return comparison<double, true>(op, to_register);
    case Type::f16:
      return comparison<AsF16, true>(op, to_register);
    case Type::bf16:
      return comparison<AsBf16, true>(op, to_register);
    default:
      return nullptr;
  }
}

std::string take_comparison(Decoder& d) {
  return d.need_one_of({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu",
                        "ltu", "leu", "gtu", "geu", "num", "nan"});
}
Comparison take_form(Decoder& d) {
  Comparison form;
  const std::string mode = d.take_one_of({"and", "or", "xor"});
  form.combine = mode.empty() ? kNone : mode == "and" ? kAnd : mode == "or" ? kOr : kXor;
  form.ftz = d.take("ftz");
  return form;
}

// f16x2, bf16x2: the combined results of both halves, and the lanes in which they are valid.
struct HalfResults {
  U32 low = 0, high = 0, low_valid = 0, high_valid = 0;
};
template <class T, class F>
HalfResults compare_halves(Warp& w, const Instruction& i, U32 mask) {
  HalfResults r;
  const bool ftz = i.as<Comparison>().ftz;
  for_lanes(mask, [&](int l) {
    const U64 a = w.integer(i.s[0], l), b = w.integer(i.s[1], l);
    const auto at = [&](U64 v, int h) { return operand(T{static_cast<U16>(v >> (16 * h))}, ftz); };
    r.low |= static_cast<U32>(F()(at(a, 0), at(b, 0))) << l;
    r.high |= static_cast<U32>(F()(at(a, 1), at(b, 1))) << l;
  });
  r.low_valid = r.high_valid = w.valid(i.s[0]) & w.valid(i.s[1]);
  for_lanes(mask & ~r.low_valid, [&](int l) {
    const U64 bits = w.valid_bits(i.s[0], l) & w.valid_bits(i.s[1], l);
    r.low_valid |= static_cast<U32>((bits & 0xffff) == 0xffff) << l;
    r.high_valid |= static_cast<U32>((bits >> 16 & 0xffff) == 0xffff) << l;
  });
  r.low = combine(w, i, r.low, &r.low_valid);
  r.high = combine(w, i, r.high, &r.high_valid);
  return r;
}

// setp: the low half sets p, the high half q.
template <class T, class F>
Step set_pair(Warp& w, const Instruction& i, U32 mask) {
  const HalfResults r = compare_halves<T, F>(w, i, mask);
  w.set_predicate(i.d, mask, r.low);
  w.set_predicate(i.d2, mask, r.high);
  w.set_valid(i.d, mask, r.low_valid);
  w.set_valid(i.d2, mask, r.high_valid);
  return Step::next;
}

// set: all ones (or 1.0) in each half that is true
template <class T, class F>
Step set_halves(Warp& w, const Instruction& i, U32 mask) {
  const HalfResults r = compare_halves<T, F>(w, i, mask);
  const auto truth = static_cast<U32>(i.as<Comparison>().truth);
  LaneBits bits;
  for_lanes(mask, [&](int l) {
    w.put(i.d, l, ((r.low >> l) & 1 ? truth : 0) | ((r.high >> l) & 1 ? truth << 16 : 0));
    bits.of[l] = ~U64{0};
    if (!((r.low_valid >> l) & 1)) bits.of[l] &= ~U64{0xffff};
    if (!((r.high_valid >> l) & 1)) bits.of[l] &= ~U64{0xffff0000};
  });
  w.set_validity(i.d, mask, (mask & ~(r.low_valid & r.high_valid)) == 0, bits);
  return Step::next;
}
template <class T>
Execute pair_comparison(const std::string& op, bool to_register) {
#define TORCHEXT_COMPARE(name, F) \
  if (op == name) return to_register ? set_halves<T, F> : set_pair<T, F>
  TORCHEXT_COMPARE("eq", Eq);
  TORCHEXT_COMPARE("ne", Ne);
  TORCHEXT_COMPARE("lt", Lt);
  TORCHEXT_COMPARE("le", Le);
  TORCHEXT_COMPARE("gt", Gt);
  TORCHEXT_COMPARE("ge", Ge);
  TORCHEXT_COMPARE("equ", Unordered<Eq>);
  TORCHEXT_COMPARE("neu", Unordered<Ne>);
  TORCHEXT_COMPARE("ltu", Unordered<Lt>);
  TORCHEXT_COMPARE("leu", Unordered<Le>);
  TORCHEXT_COMPARE("gtu", Unordered<Gt>);
  TORCHEXT_COMPARE("geu", Unordered<Ge>);
  TORCHEXT_COMPARE("num", Num);
  TORCHEXT_COMPARE("nan", Nan);
#undef TORCHEXT_COMPARE
  return nullptr;
}

void decode_setp(Decoder& d) {
  const std::string op = take_comparison(d);
  const Comparison form = take_form(d);
  const bool combined = form.combine != kNone;
  d.keep(form);
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
  d.out.execute = type == Type::f16x2    ? pair_comparison<AsF16>(op, false)
                  : type == Type::bf16x2 ? pair_comparison<AsBf16>(op, false)
                                         : comparison_of(type, op, false);
  if (d.out.execute == nullptr) d.fail_type(type);
  if (type == Type::f64) d.is(OpClass::fp64);
  d.out.traits.compares = std::strchr("bsu", *name_of(type)) != nullptr;
}

void decode_set(Decoder& d) {
  const std::string op = take_comparison(d);
  Comparison form = take_form(d);
  const bool combined = form.combine != kNone;
  const Type result = d.take_type(), type = d.take_type();
  d.finish(combined ? 4 : 3);
  d.out.d = d.destination(0, size_of(result));
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, type);
  if (combined) d.out.s[2] = d.predicate(3);
  const bool halves = type == Type::f16x2 || type == Type::bf16x2;
  form.truth = result == Type::f32                              ? 0x3f800000
               : result == Type::f16 || result == Type::f16x2   ? 0x3c00
               : result == Type::bf16 || result == Type::bf16x2 ? 0x3f80
               : size_of(result) == 2 || halves                 ? 0xffff
               : size_of(result) == 4                           ? 0xffffffff
                                                                : ~U64{0};
  d.keep(form);
  if (halves && size_of(result) != 4)
    d.fail("the first type must have 32 bits, for two halves (got ." +
           std::string(name_of(result)) + ")");
  d.out.execute = type == Type::f16x2    ? pair_comparison<AsF16>(op, true)
                  : type == Type::bf16x2 ? pair_comparison<AsBf16>(op, true)
                                         : comparison_of(type, op, true);
  if (d.out.execute == nullptr) d.fail_type(type);
  if (type == Type::f64) d.is(OpClass::fp64);
}

// Each lane copies s[0] if its bit of `first` is set, else s[1], together with the valid bits.
// `decided`: lanes whose selecting operand is valid.
void take_either(Warp& w, const Instruction& i, U32 mask, U32 first, U32 decided) {
  const U32 valid = decided & ((first & w.valid(i.s[0])) | (~first & w.valid(i.s[1])));
  LaneBits bits;
  for_lanes((mask & ~valid) == 0 ? 0 : mask, [&](int l) {
    bits.of[l] = (decided >> l) & 1 ? w.valid_bits((first >> l) & 1 ? i.s[0] : i.s[1], l) : 0;
  });
  each_lane(mask, [&](int l) { w.put(i.d, l, w.integer((first >> l) & 1 ? i.s[0] : i.s[1], l)); });
  w.set_validity(i.d, mask, (mask & ~valid) == 0, bits);
}

template <class T>
bool test_property(const std::string& property, T v) {
  const int c = std::fpclassify(v);
  if (property == "finite") return std::isfinite(v);
  if (property == "infinite") return c == FP_INFINITE;
  if (property == "number") return c != FP_NAN;
  if (property == "notanumber") return c == FP_NAN;
  if (property == "normal") return c == FP_NORMAL;
  return c == FP_SUBNORMAL;
}

Step test_float(Warp& w, const Instruction& i, U32 mask) {
  const auto& property = i.as<std::string>();
  U32 result = 0;
  for_lanes(mask, [&](int l) {
    const bool yes = i.s[0].bytes == 8
                         ? test_property(property, Element<double>::load(w.at(i.s[0]), l))
                         : test_property(property, Element<float>::load(w.at(i.s[0]), l));
    result |= static_cast<U32>(yes) << l;
  });
  w.set_predicate(i.d, mask, result);
  w.set_valid(i.d, mask, w.valid(i.s[0]));
  return Step::next;
}

void decode_testp(Decoder& d) {
  const std::string property =
      d.need_one_of({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  const Type type = d.take_type();
  d.finish(2);
  d.out.d = d.predicate_destination(d.arg(0));
  d.out.s[0] = d.source(1, type);
  d.keep(property);
  d.out.execute = test_float;
}

Step select(Warp& w, const Instruction& i, U32 mask) {
  take_either(w, i, mask, w.predicate(i.s[2]), w.valid(i.s[2]));
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
  U32 not_negative = 0;
  for_lanes(mask, [&](int l) {
    const auto bits = static_cast<U32>(w.integer(i.s[2], l));
    bool first = static_cast<S32>(bits) >= 0;
    if (floating) {
      float c = float_from_bits(bits);
      if (i.as<Comparison>().ftz) c = flush_subnormal(c);
      first = c >= 0;
    }
    not_negative |= static_cast<U32>(first) << l;
  });
  take_either(w, i, mask, not_negative, w.valid(i.s[2]));
  return Step::next;
}

void decode_slct(Decoder& d) {
  d.keep(Comparison{kNone, d.take("ftz"), 0});
  const Type type = d.take_type(), by = d.take_type();
  d.finish(4);
  d.out.d = d.destination(0, size_of(type));
  d.out.s[0] = d.source(1, type);
  d.out.s[1] = d.source(2, type);
  d.out.s[2] = d.source(3, by);
  d.out.execute = by == Type::f32 ? select_by_sign<true> : select_by_sign<false>;
}

}  // namespace

void add_compare(OpcodeTable& t) {
  t["setp"] = {decode_setp, {OpClass::alu, OpClass::fp64}};
  t["set"] = {decode_set, {OpClass::alu, OpClass::fp64}};
  t["testp"] = {decode_testp, {OpClass::alu}};
  t["selp"] = {decode_selp, {OpClass::alu}};
  t["slct"] = {decode_slct, {OpClass::alu}};
}

}  // namespace torchext::sim
