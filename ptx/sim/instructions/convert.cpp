// cvt between integers and floating-point formats, cvt.pack.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../frontend/decode.h"
#include "../numerics/number_formats.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

struct Conversion {
  Type to, from;
  CvtModifiers modifiers;
  bool integral = false;  // .rni, .rzi, .rmi, .rpi
  bool ftz = false, sat = false;
};

bool is_float(Type t) {
  return t == Type::f16 || t == Type::bf16 || t == Type::f32 || t == Type::f64 || t == Type::tf32;
}

double round_integral(double v, Rounding rounding) {
  switch (rounding) {
    case Rounding::toward_zero:
      return std::trunc(v);
    case Rounding::downward:
      return std::floor(v);
    case Rounding::upward:
      return std::ceil(v);
    case Rounding::nearest_away:
      return std::round(v);
    default:
      return std::nearbyint(v);
  }
}

double decode_float(Type type, U64 bits, bool ftz) {
  switch (type) {
    case Type::f16:
      return f16_to_float(static_cast<U16>(bits));
    case Type::bf16:
      return bf16_to_float(static_cast<U16>(bits));
    case Type::f64: {
      double v;
      std::memcpy(&v, &bits, 8);
      return v;
    }
    default: {
      const float v = float_from_bits(static_cast<U32>(bits));
      if (ftz && std::fabs(v) < std::numeric_limits<float>::min()) return std::copysign(0.0, v);
      return v;
    }
  }
}

U64 encode_float(const Conversion& c, double v) {
  if (c.sat) v = v > 0 ? std::min(v, 1.0) : 0;  // NaN and -0 give +0
  switch (c.to) {
    case Type::f16:
      return encode_f16(v, c.modifiers);
    case Type::bf16:
      return encode_bf16(v, c.modifiers);
    case Type::tf32:
      return encode_tf32(v, c.modifiers);
    case Type::f64: {
      U64 bits;
      std::memcpy(&bits, &v, 8);
      return v != v ? 0x7fffffffffffffffull : bits;
    }
    default: {
      U32 bits = encode_f32(v, c.modifiers);
      if (c.ftz && (bits & 0x7f800000) == 0) bits &= 0x80000000;
      return bits;
    }
  }
}

// Clamps to the range. NaN gives only the highest bit set if f64 or 64 bits are involved, else 0.
U64 to_integer(Type type, Type from, double v, Rounding rounding) {
  const int bits = 8 * size_of(type);
  if (v != v) return bits == 64 || from == Type::f64 ? U64{1} << (bits - 1) : 0;
  v = round_integral(v, rounding);
  if (is_signed(type)) {
    const double limit = std::ldexp(1.0, bits - 1);
    const std::int64_t low =
        bits == 64 ? std::numeric_limits<std::int64_t>::min() : -(std::int64_t{1} << (bits - 1));
    if (v < -limit) return static_cast<U64>(low);
    if (v >= limit) return ~static_cast<U64>(low);
    return static_cast<U64>(static_cast<std::int64_t>(v));
  }
  if (v < 0) return 0;
  if (v >= std::ldexp(1.0, bits)) return bits == 64 ? ~U64{0} : (U64{1} << bits) - 1;
  return static_cast<U64>(v);
}

U64 low_bits(int count) {
  return count >= 64 ? ~U64{0} : (U64{1} << count) - 1;
}

U64 narrow(Type type, U64 value) {  // sign- or zero-extended to 64 bits
  const int unused = 64 - 8 * size_of(type);
  if (unused == 0) return value;
  if (is_signed(type))
    return static_cast<U64>(static_cast<std::int64_t>(value << unused) >> unused);
  return value << unused >> unused;
}

U64 saturate_integer(int bits, bool to_signed, Type from, U64 value) {
  const bool negative = is_signed(from) && static_cast<std::int64_t>(value) < 0;
  if (to_signed) {
    const std::int64_t high = static_cast<std::int64_t>((U64{1} << (bits - 1)) - 1);
    if (!negative && value > static_cast<U64>(high)) return static_cast<U64>(high);
    if (negative && static_cast<std::int64_t>(value) < ~high) return static_cast<U64>(~high);
    return value;
  }
  if (negative) return 0;
  const U64 high = bits == 64 ? ~U64{0} : (U64{1} << bits) - 1;
  return value > high ? high : value;
}

// A double cannot hold every 64-bit integer. Rounding to odd keeps a second rounding correct.
double round_to_odd(U64 magnitude) {
  if (magnitude >> 53 == 0) return static_cast<double>(magnitude);
  const bool lost = (magnitude & 0x7ff) != 0;
  return static_cast<double>((magnitude & ~U64{0x7ff}) | (lost ? 0x800 : 0));
}

double round_to_f64(U64 magnitude, bool negative, Rounding rounding) {
  const auto near = static_cast<double>(magnitude);
  const auto nearest = static_cast<unsigned __int128>(near);
  if (rounding == Rounding::nearest_even || nearest == magnitude) return near;
  const bool away = rounding == (negative ? Rounding::downward : Rounding::upward);
  if (nearest > magnitude) return away ? near : std::nextafter(near, 0.0);
  return away ? std::nextafter(near, HUGE_VAL) : near;
}

U64 convert_one(const Conversion& c, U64 bits) {
  if (is_float(c.from)) {
    double v = decode_float(c.from, bits, c.ftz);
    if (!is_float(c.to)) return to_integer(c.to, c.from, v, c.modifiers.rounding);
    if (c.integral) {
      v = round_integral(v, c.modifiers.rounding);
      Conversion exact = c;
      exact.modifiers.rounding = Rounding::nearest_even;
      return encode_float(exact, v);
    }
    return encode_float(c, v);
  }
  const U64 value = narrow(c.from, bits);
  if (!is_float(c.to))
    return c.sat ? saturate_integer(8 * size_of(c.to), is_signed(c.to), c.from, value)
                 : narrow(c.to, value);
  const bool negative = is_signed(c.from) && static_cast<std::int64_t>(value) < 0;
  const U64 magnitude = negative ? 0 - value : value;
  const double v = c.to == Type::f64 ? round_to_f64(magnitude, negative, c.modifiers.rounding)
                                     : round_to_odd(magnitude);
  return encode_float(c, negative ? -v : v);
}

Step convert(Warp& w, const Instruction& i, U32 mask) {
  const auto& c = i.as<Conversion>();
  const bool whole = (mask & ~w.valid(i.s[0])) == 0;
  // Without saturation, each bit of an integer result is a bit of the source, or its sign.
  const bool by_bit = !is_float(c.from) && !is_float(c.to) && !c.sat;
  const U64 width = low_bits(8 * size_of(c.from));
  LaneBits bits;
  for_lanes(whole ? 0 : mask, [&](int l) {
    const U64 value = w.integer(i.s[0], l), invalid = ~w.valid_bits(i.s[0], l) & width;
    bits.of[l] = by_bit ? settled_bits(&value, &invalid, 1, 1,
                                       [&](const U64* x) { return convert_one(c, *x); })
                        : spread_invalid(Spread::all, &invalid, 1);
    if (i.d.bytes == 4 && size_of(c.to) < 4 && !by_bit) bits.of[l] |= ~low_bits(8 * size_of(c.to));
  });
  for_lanes(mask, [&](int l) {
    const U64 r = convert_one(c, w.integer(i.s[0], l));
    w.put(i.d, l, r);
  });
  w.set_validity(i.d, mask, whole, bits);
  return Step::next;
}

template <class To, class From>
struct Resize {
  static constexpr Spread spread = Spread::bits;
  static constexpr std::size_t data = 1;
  To operator()(From v) const { return static_cast<To>(v); }
};
struct U32ToFloat {
  float operator()(U32 v) const { return static_cast<float>(v); }
};
struct S32ToFloat {
  float operator()(std::int32_t v) const { return static_cast<float>(v); }
};

// ---- Packed -------------------------------------------------------------------------------------

U32 encode_element(Type packed, double v, const CvtModifiers& m) {
  switch (packed) {
    case Type::e4m3x2:
      return encode_e4m3(v, m);
    case Type::e5m2x2:
      return encode_e5m2(v, m);
    case Type::ue8m0x2:
      return encode_ue8m0(v, m);
    case Type::f16x2:
      return encode_f16(v, m);
    default:
      return encode_bf16(v, m);
  }
}
double decode_element(Type packed, U32 bits) {
  switch (packed) {
    case Type::e4m3x2:
      return e4m3_to_float(static_cast<std::uint8_t>(bits));
    case Type::e5m2x2:
      return e5m2_to_float(static_cast<std::uint8_t>(bits));
    case Type::ue8m0x2:
      return ue8m0_to_float(static_cast<std::uint8_t>(bits));
    case Type::f16x2:
      return f16_to_float(static_cast<U16>(bits));
    default:
      return bf16_to_float(static_cast<U16>(bits));
  }
}
int element_bits(Type packed) {
  return 4 * size_of(packed);
}

// Valid bits of two packed elements, each wholly valid or not. Bits above them are 0.
U64 pair_validity(bool low, bool high, int bits) {
  return (low ? low_bits(bits) : 0) | (high ? low_bits(bits) << bits : 0) | ~low_bits(2 * bits);
}

// d = {high: a, low: b}, from two f32
Step pack_two(Warp& w, const Instruction& i, U32 mask) {
  const auto& c = i.as<Conversion>();
  const int bits = element_bits(c.to);
  const bool whole = (mask & ~(w.valid(i.s[0]) & w.valid(i.s[1]))) == 0;
  LaneBits valid;
  for_lanes(whole ? 0 : mask, [&](int l) {
    valid.of[l] = pair_validity((w.valid(i.s[1]) >> l) & 1, (w.valid(i.s[0]) >> l) & 1, bits);
  });
  for_lanes(mask, [&](int l) {
    const double high = decode_float(Type::f32, w.integer(i.s[0], l), c.ftz);
    const double low = decode_float(Type::f32, w.integer(i.s[1], l), c.ftz);
    w.put(i.d, l,
          encode_element(c.to, high, c.modifiers) << bits | encode_element(c.to, low, c.modifiers));
  });
  w.set_validity(i.d, mask, whole, valid);
  return Step::next;
}
// pair to pair
Step convert_pair(Warp& w, const Instruction& i, U32 mask) {
  const auto& c = i.as<Conversion>();
  const int in = element_bits(c.from), out = element_bits(c.to);
  const U32 field = in == 8 ? 0xff : 0xffff;
  const bool whole = (mask & ~w.valid(i.s[0])) == 0;
  LaneBits valid;
  for_lanes(whole ? 0 : mask, [&](int l) {
    const U64 source = w.valid_bits(i.s[0], l);
    valid.of[l] = pair_validity((source & field) == field, (source >> in & field) == field, out);
  });
  for_lanes(mask, [&](int l) {
    const auto a = static_cast<U32>(w.integer(i.s[0], l));
    const U32 low = encode_element(c.to, decode_element(c.from, a & field), c.modifiers);
    const U32 high = encode_element(c.to, decode_element(c.from, (a >> in) & field), c.modifiers);
    w.put(i.d, l, high << out | low);
  });
  w.set_validity(i.d, mask, whole, valid);
  return Step::next;
}

struct PackIntegers {
  int bits;  // of each result
  bool is_signed;
  Type from;
};
Step pack_integers(Warp& w, const Instruction& i, U32 mask) {
  const auto& c = i.as<PackIntegers>();
  const int bits = c.bits;
  const U64 field = (U64{1} << bits) - 1;
  const bool whole = (mask & ~(w.valid(i.s[0]) & w.valid(i.s[1]) & w.valid(i.s[2]))) == 0;
  const U64 width = low_bits(8 * size_of(c.from));
  LaneBits valid;
  for_lanes(whole ? 0 : mask, [&](int l) {
    const bool high = (w.valid_bits(i.s[0], l) & width) == width;
    const bool low = (w.valid_bits(i.s[1], l) & width) == width;
    valid.of[l] = (pair_validity(low, high, bits) & low_bits(2 * bits)) | w.valid_bits(i.s[2], l)
                                                                              << (2 * bits);
  });
  for_lanes(mask, [&](int l) {
    const auto part = [&](const Slot& s) {
      const U64 value = narrow(c.from, w.integer(s, l));
      return saturate_integer(bits, c.is_signed, c.from, value) & field;
    };
    const U64 a = part(i.s[0]), b = part(i.s[1]);
    const U64 rest = w.integer(i.s[2], l) << (2 * bits);
    w.put(i.d, l, static_cast<U32>(rest | a << bits | b));
  });
  w.set_validity(i.d, mask, whole, valid);
  return Step::next;
}

bool is_pair(Type t) {
  return t == Type::f16x2 || t == Type::bf16x2 || t == Type::e4m3x2 || t == Type::e5m2x2 ||
         t == Type::ue8m0x2;
}

void decode_pack(Decoder& d) {
  d.need({"sat"});
  const std::string to = d.take_first_of({"u16", "s16", "u8", "s8", "u4", "s4", "u2", "s2"});
  if (to.empty()) d.fail("the first type must be .u16, .s16, .u8, .s8, .u4, .s4, .u2 or .s2");
  const int bits = std::stoi(to.substr(1));
  const Type from = d.take_type();
  const bool more = d.take_type_if_any() != Type::none;  // .b32: a third operand, placed above
  d.finish(more ? 4 : 3);
  d.out.d = d.destination(0, 4);
  d.out.s[0] = d.source(1, from);
  d.out.s[1] = d.source(2, from);
  d.out.s[2] = more ? d.source(3, Type::b32) : d.constant(0, 4);
  if (bits < 8 && !more)
    d.fail("the last type must be .b32, that of a third source, if a result has less than 8 bits");
  d.keep(PackIntegers{bits, to[0] == 's', from});
  d.out.execute = pack_integers;
}

// Whether every value of the integer type `from` is one of `to`.
bool contains(Type to, Type from) {
  const int more = size_of(to) - size_of(from);
  return is_signed(to) == is_signed(from) ? more >= 0 : is_signed(to) && more > 0;
}

void decode_cvt(Decoder& d) {
  if (d.take("pack")) return decode_pack(d);
  Conversion c{};
  const std::string integral = d.take_one_of({"rni", "rzi", "rmi", "rpi"});
  const std::string r = d.take_one_of({"rn", "rz", "rm", "rp", "rna"});
  c.integral = !integral.empty();
  const std::string mode = c.integral ? integral.substr(0, 2) : r;
  c.modifiers.rounding = mode == "rz"    ? Rounding::toward_zero
                         : mode == "rm"  ? Rounding::downward
                         : mode == "rp"  ? Rounding::upward
                         : mode == "rna" ? Rounding::nearest_away
                                         : Rounding::nearest_even;
  c.ftz = d.take("ftz");
  c.sat = d.take("sat");
  c.modifiers.satfinite = d.take("satfinite");
  c.modifiers.relu = d.take("relu");
  c.to = d.take_type();
  c.from = d.take_type();
  if (is_pair(c.to) && c.from == Type::f32) {
    d.finish(3);
    d.out.d = d.destination(0, size_of(c.to));
    d.out.s[0] = d.source(1, Type::f32);
    d.out.s[1] = d.source(2, Type::f32);
    d.keep(c);
    d.out.execute = pack_two;
    return;
  }
  d.finish(2);
  if (is_pair(c.to) || is_pair(c.from)) {
    if (!is_pair(c.to)) d.fail_type(c.to);
    if (!is_pair(c.from)) d.fail_type(c.from);
    d.out.d = d.destination(0, size_of(c.to));
    d.out.s[0] = d.source(1, c.from);
    d.keep(c);
    d.out.execute = convert_pair;
    return;
  }
  if (!is_float(c.to) && is_float(c.from) && !c.integral)
    d.need_one_of({"rni", "rzi", "rmi", "rpi"});
  if (c.sat && !is_float(c.to) && !is_float(c.from) && contains(c.to, c.from))
    d.fail("the destination type must lack values of the source type with .sat");
  d.out.d = d.destination_at_least(d.arg(0), size_of(c.to));
  d.out.s[0] = d.source_at_least(d.arg(1), c.from);
  d.keep(c);
  d.out.execute = convert;
  const bool exact_slots = d.out.d.bytes == (size_of(c.to) == 8 ? 8 : 4) &&
                           d.out.s[0].bytes == (size_of(c.from) == 8 ? 8 : 4);
  if (!exact_slots || c.sat || c.ftz) return;
  if (c.to == Type::u64 && c.from == Type::u32) d.out.execute = map1<U64, U32, Resize<U64, U32>>;
  if ((c.to == Type::s64 || c.to == Type::u64) && c.from == Type::s32)
    d.out.execute = map1<S64, S32, Resize<S64, S32>>;
  if (size_of(c.to) == 4 && size_of(c.from) == 8 && !is_float(c.to) && !is_float(c.from))
    d.out.execute = map1<U32, U64, Resize<U32, U64>>;
  if (c.to == Type::f32 && mode == "rn" && c.from == Type::u32)
    d.out.execute = map1<float, U32, U32ToFloat>;
  if (c.to == Type::f32 && mode == "rn" && c.from == Type::s32)
    d.out.execute = map1<float, S32, S32ToFloat>;
}

}  // namespace

void add_convert(OpcodeTable& t) {
  t["cvt"] = {decode_cvt, {OpClass::convert}};
}

}  // namespace torchext::sim
