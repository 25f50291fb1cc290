// Floating-point arithmetic: f32, f16, bf16 and their packed pairs, with PTX's rounding modes, NaN
// rules, .ftz, .sat and .relu; and the approximate functions. floating64.cpp has f64.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../frontend/decode.h"
#include "../numerics/number_formats.h"
#include "floating.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

// The modifiers of an instruction.
struct Modes {
  Rounding rounding = Rounding::nearest_even;
  bool ftz = false, sat = false, relu = false;
  bool nan = false, xorsign = false, abs = false;  // min, max
};
float canonical(float v) {
  return v != v ? float_from_bits(kCanonicalNanF32) : v;
}

// a + b rounded to odd. Rounding that once more, to at most 51 bits, gives the correct result.
double add_to_odd(double a, double b) {
  const double s = a + b;
  if (!std::isfinite(s)) return s;
  const double bb = s - a;
  const double error = (a - (s - bb)) + (b - bb);
  if (error == 0) return s;
  U64 bits;
  std::memcpy(&bits, &s, 8);
  if (bits & 1) return s;
  const bool away = (error > 0) == (s > 0);
  bits = away ? bits + 1 : bits - 1;
  double odd;
  std::memcpy(&odd, &bits, 8);
  return odd;
}

double div_to_odd(double a, double b) {
  const double q = a / b;
  if (!std::isfinite(q) || q == 0) return q;
  const double remainder = std::fma(-q, b, a);
  if (remainder == 0) return q;
  U64 bits;
  std::memcpy(&bits, &q, 8);
  if (bits & 1) return q;
  const bool larger = (remainder > 0) == (b > 0);  // the true quotient exceeds q
  bits = larger == (q > 0) ? bits + 1 : bits - 1;
  double odd;
  std::memcpy(&odd, &bits, 8);
  return odd;
}

double sqrt_to_odd(double a) {
  const double r = std::sqrt(a);
  if (!std::isfinite(r) || r == 0) return r;
  const double remainder = std::fma(-r, r, a);
  if (remainder == 0) return r;
  U64 bits;
  std::memcpy(&bits, &r, 8);
  if (bits & 1) return r;
  bits = remainder > 0 ? bits + 1 : bits - 1;
  double odd;
  std::memcpy(&odd, &bits, 8);
  return odd;
}

// ---- f32 ----------------------------------------------------------------------------------------

float finish32(double exact_to_odd, Modes modes) {
  float v = modes.rounding == Rounding::nearest_even
                ? static_cast<float>(exact_to_odd)
                : float_from_bits(encode_f32(exact_to_odd, {modes.rounding, false, false}));
  if (modes.ftz) v = flush_subnormal(v);
  if (modes.sat) v = v > 0 ? std::min(v, 1.0f) : 0.0f;  // NaN and -0 give +0
  return canonical(v);
}
float in32(float v, Modes modes) {
  return modes.ftz ? flush_subnormal(v) : v;
}

struct Add32 {
  float operator()(Modes modes, float a, float b, float) const {
    return finish32(add_to_odd(in32(a, modes), in32(b, modes)), modes);
  }
};
struct Sub32 {
  float operator()(Modes modes, float a, float b, float) const {
    return finish32(add_to_odd(in32(a, modes), -double{in32(b, modes)}), modes);
  }
};
struct Mul32 {
  float operator()(Modes modes, float a, float b, float) const {
    return finish32(double{in32(a, modes)} * in32(b, modes), modes);
  }
};
struct Fma32 {
  float operator()(Modes modes, float a, float b, float c) const {
    return finish32(add_to_odd(double{in32(a, modes)} * in32(b, modes), in32(c, modes)), modes);
  }
};
// The common forms: round to nearest, no .ftz, no .sat.
struct PlainAdd {
  float operator()(float a, float b) const { return canonical(a + b); }
};
struct PlainSub {
  float operator()(float a, float b) const { return canonical(a - b); }
};
struct PlainMul {
  float operator()(float a, float b) const { return canonical(a * b); }
};
struct PlainFma {
  float operator()(float a, float b, float c) const { return canonical(std::fma(a, b, c)); }
};
struct Div32 {
  float operator()(Modes modes, float a, float b, float) const {
    return finish32(div_to_odd(in32(a, modes), in32(b, modes)), modes);
  }
};
struct ApproximateDiv32 {  // gives a zero if |b| > 2^126
  float operator()(Modes modes, float a, float b, float) const {
    a = in32(a, modes);
    if (std::isfinite(b) && std::fabs(b) > 0x1p126f)
      return std::isfinite(a)
                 ? std::copysign(0.0f, std::signbit(a) != std::signbit(b) ? -1.0f : 1.0f)
                 : canonical(NAN);
    return Div32()(modes, a, b, 0);
  }
};
struct Rcp32 {
  float operator()(Modes modes, float a, float, float) const {
    return finish32(div_to_odd(1.0, in32(a, modes)), modes);
  }
};
struct Sqrt32 {
  float operator()(Modes modes, float a, float, float) const {
    return finish32(sqrt_to_odd(in32(a, modes)), modes);
  }
};

// Approximate functions. Their error is within the documented one.
struct Rsqrt32 {
  float operator()(Modes modes, float a, float, float) const {
    a = in32(a, modes);
    if (a == 0) return std::copysign(std::numeric_limits<float>::infinity(), a);
    return finish32(1.0 / std::sqrt(double{a}), modes);
  }
};
struct Ex2 {
  float operator()(Modes modes, float a, float, float) const {
    return finish32(std::exp2(double{in32(a, modes)}), modes);
  }
};
struct Lg2 {
  float operator()(Modes modes, float a, float, float) const {
    return finish32(std::log2(double{in32(a, modes)}), modes);
  }
};
struct Sin {
  float operator()(Modes modes, float a, float, float) const {
    return finish32(std::sin(double{in32(a, modes)}), modes);
  }
};
struct Cos {
  float operator()(Modes modes, float a, float, float) const {
    return finish32(std::cos(double{in32(a, modes)}), modes);
  }
};
struct Tanh {
  float operator()(Modes modes, float a, float, float) const {
    return finish32(std::tanh(double{in32(a, modes)}), modes);
  }
};

float select_minmax(float a, float b, Modes modes, bool is_max) {
  if (modes.nan && (a != a || b != b)) return canonical(NAN);
  if (a != a && b != b) return float_from_bits(kCanonicalNanF32);
  float r;
  const float x = modes.xorsign || modes.abs ? std::fabs(a) : a;
  const float y = modes.xorsign || modes.abs ? std::fabs(b) : b;
  if (a != a)
    r = y;
  else if (b != b)
    r = x;
  else if (x == y)
    r = (is_max ? std::signbit(x) : !std::signbit(x)) ? y : x;  // -0 < +0
  else
    r = (x > y) == is_max ? x : y;
  if (modes.xorsign) r = std::copysign(r, std::signbit(a) != std::signbit(b) ? -1.0f : 1.0f);
  return r;
}

template <bool is_max>
struct MinMax32 {
  float operator()(Modes modes, float a, float b, float) const {
    return select_minmax(in32(a, modes), in32(b, modes), modes, is_max);
  }
};
template <bool is_max>
struct MinMax3 {
  float operator()(Modes modes, float a, float b, float c) const {
    return select_minmax(select_minmax(in32(a, modes), in32(b, modes), modes, is_max),
                         in32(c, modes), modes, is_max);
  }
};
struct Neg32 {
  float operator()(Modes modes, float a, float, float) const {
    return float_from_bits(bits_from_float(in32(a, modes)) ^ 0x80000000u);
  }
};
struct Abs32 {
  float operator()(Modes modes, float a, float, float) const {
    return float_from_bits(bits_from_float(in32(a, modes)) & 0x7fffffffu);
  }
};
struct CopySign32 {
  float operator()(Modes, float a, float b, float) const {
    return float_from_bits((bits_from_float(b) & 0x7fffffffu) | (bits_from_float(a) & 0x80000000u));
  }
};

// ---- f16, bf16 and pairs ------------------------------------------------------------------------

struct F16 {
  static float decode(U16 bits) { return f16_to_float(bits); }
  static U16 encode(double v, Modes modes) {
    if (modes.sat) v = v != v ? 0 : v < 0 ? 0 : v > 1 ? 1 : v;
    U16 r = encode_f16(v, {modes.rounding, false, modes.relu});
    if (modes.ftz && (r & 0x7c00) == 0) r &= 0x8000;
    return r;
  }
  static U16 input(U16 bits, Modes modes) {
    return modes.ftz && (bits & 0x7c00) == 0 ? bits & 0x8000 : bits;
  }
};
struct Bf16 {
  static float decode(U16 bits) { return bf16_to_float(bits); }
  static U16 encode(double v, Modes modes) {
    if (modes.sat) v = v != v ? 0 : v < 0 ? 0 : v > 1 ? 1 : v;
    return encode_bf16(v, {modes.rounding, false, modes.relu});
  }
  static U16 input(U16 bits, Modes) { return bits; }
};

struct HAdd {
  double operator()(float a, float b, float, Modes) const { return add_to_odd(a, b); }
};
struct HSub {
  double operator()(float a, float b, float, Modes) const { return add_to_odd(a, -double{b}); }
};
struct HMul {
  double operator()(float a, float b, float, Modes) const { return double{a} * b; }
};
struct HFma {
  double operator()(float a, float b, float c, Modes) const { return add_to_odd(double{a} * b, c); }
};
template <bool is_max>
struct HMinMax {
  double operator()(float a, float b, float, Modes modes) const {
    return select_minmax(a, b, modes, is_max);
  }
};
struct HEx2 {
  double operator()(float a, float, float, Modes) const { return std::exp2(double{a}); }
};
struct HTanh {
  double operator()(float a, float, float, Modes) const { return std::tanh(double{a}); }
};

template <class Format, class F>
struct Half {
  U16 operator()(Modes modes, U16 a, U16 b, U16 c) const {
    return Format::encode(
        F()(Format::decode(Format::input(a, modes)), Format::decode(Format::input(b, modes)),
            Format::decode(Format::input(c, modes)), modes),
        modes);
  }
};
template <class One>
struct Pair {
  static constexpr Spread spread = Spread::halves;
  U32 operator()(Modes modes, U32 a, U32 b, U32 c) const {
    const U32 low = One()(modes, static_cast<U16>(a), static_cast<U16>(b), static_cast<U16>(c));
    const U32 high = One()(modes, static_cast<U16>(a >> 16), static_cast<U16>(b >> 16),
                           static_cast<U16>(c >> 16));
    return high << 16 | low;
  }
};
template <U16 and_mask, U16 xor_mask>
struct HSign {  // .ftz: f16 only
  U16 operator()(Modes modes, U16 a, U16, U16) const {
    a = F16::input(a, modes);
    return static_cast<U16>((a & and_mask) ^ xor_mask);
  }
};

template <class F>
Execute half_form(Type type) {
  switch (type) {
    case Type::f16:
      return map3_form<U16, U16, U16, U16, Half<F16, F>>;
    case Type::bf16:
      return map3_form<U16, U16, U16, U16, Half<Bf16, F>>;
    case Type::f16x2:
      return map3_form<U32, U32, U32, U32, Pair<Half<F16, F>>>;
    case Type::bf16x2:
      return map3_form<U32, U32, U32, U32, Pair<Half<Bf16, F>>>;
    default:
      return nullptr;
  }
}
template <class One>
Execute sign_form(Type type) {
  switch (type) {
    case Type::f16:
    case Type::bf16:
      return map3_form<U16, U16, U16, U16, One>;
    case Type::f16x2:
    case Type::bf16x2:
      return map3_form<U32, U32, U32, U32, Pair<One>>;
    default:
      return nullptr;
  }
}
template <class F>
Execute f32_form() {
  return map3_form<float, float, float, float, F>;
}

// ---- Decoding -----------------------------------------------------------------------------------

// Returns whether there was one.
bool take_rounding(Decoder& d, Modes* modes) {
  const std::string r = d.take_one_of({"rn", "rz", "rm", "rp"});
  modes->rounding = r == "rz"   ? Rounding::toward_zero
                    : r == "rm" ? Rounding::downward
                    : r == "rp" ? Rounding::upward
                                : Rounding::nearest_even;
  return !r.empty();
}
void take_modes(Decoder& d, Modes* modes) {
  modes->ftz = d.take("ftz");
  modes->sat = d.take("sat");
  modes->relu = d.take("relu");
}

void operands(Decoder& d, const Modes& modes, Type type, std::size_t sources, Execute execute) {
  if (execute == nullptr) d.fail_type(type);
  d.keep(modes);
  d.finish(1 + sources);
  d.out.d = d.destination(0, size_of(type));
  for (std::size_t k = 0; k < sources; ++k) d.out.s[k] = d.source(k + 1, type);
  for (std::size_t k = sources; k < 3; ++k) d.out.s[k] = d.constant(0, size_of(type) == 8 ? 8 : 4);
  d.out.execute = execute;
}

}  // namespace

void decode_float_arithmetic(Decoder& d, Type type) {
  if (type == Type::f64) return decode_f64_arithmetic(d);
  const std::string& op = d.opcode();
  const bool sum = op == "add" || op == "sub" || op == "mul" || op == "fma" || op == "mad";
  d.is(type != Type::f32 ? OpClass::fp16
       : sum             ? OpClass::fp32
       : op == "div"     ? OpClass::special
                         : OpClass::alu);
  Modes modes;
  const bool rounded = take_rounding(d, &modes);
  take_modes(d, &modes);
  const bool full = d.take("full"), approximate = d.take("approx");
  if ((full || approximate) && op != "div") d.fail_modifier(full ? "full" : "approx");
  if (op == "min" || op == "max") {
    modes.nan = d.take("NaN");
    modes.xorsign = d.take("xorsign");
    modes.abs = d.take("abs");
    if (modes.xorsign && !modes.abs) d.fail("the modifiers must include .abs after .xorsign");
  }
  if (type == Type::f32) {
    if (modes.relu) d.fail_modifier("relu");
    const bool plain = modes.rounding == Rounding::nearest_even && !modes.ftz && !modes.sat;
    if (op == "add")
      return operands(d, modes, type, 2,
                      plain ? map2<float, float, float, PlainAdd> : f32_form<Add32>());
    if (op == "sub")
      return operands(d, modes, type, 2,
                      plain ? map2<float, float, float, PlainSub> : f32_form<Sub32>());
    if (op == "mul")
      return operands(d, modes, type, 2,
                      plain ? map2<float, float, float, PlainMul> : f32_form<Mul32>());
    if (op == "fma" || op == "mad") {
      return operands(d, modes, type, 3,
                      plain ? map3<float, float, float, float, PlainFma> : f32_form<Fma32>());
    }
    if (op == "div") {
      if (rounded + full + approximate != 1)
        d.fail("the modifiers must include one of .approx, .full, .rn, .rz, .rm and .rp");
      return operands(d, modes, type, 2,
                      approximate ? f32_form<ApproximateDiv32>() : f32_form<Div32>());
    }
    if (op == "min")
      return d.count() == 4 ? operands(d, modes, type, 3, f32_form<MinMax3<false>>())
                            : operands(d, modes, type, 2, f32_form<MinMax32<false>>());
    if (op == "max")
      return d.count() == 4 ? operands(d, modes, type, 3, f32_form<MinMax3<true>>())
                            : operands(d, modes, type, 2, f32_form<MinMax32<true>>());
    if (op == "neg") return operands(d, modes, type, 1, f32_form<Neg32>());
    if (op == "abs") return operands(d, modes, type, 1, f32_form<Abs32>());
    if (op == "copysign") return operands(d, modes, type, 2, f32_form<CopySign32>());
  } else {
    if (modes.rounding != Rounding::nearest_even)
      d.fail("the rounding must be .rn for a type other than .f32 and .f64");
    if (op == "add") return operands(d, modes, type, 2, half_form<HAdd>(type));
    if (op == "sub") return operands(d, modes, type, 2, half_form<HSub>(type));
    if (op == "mul") return operands(d, modes, type, 2, half_form<HMul>(type));
    if (op == "fma") return operands(d, modes, type, 3, half_form<HFma>(type));
    if (op == "min") return operands(d, modes, type, 2, half_form<HMinMax<false>>(type));
    if (op == "max") return operands(d, modes, type, 2, half_form<HMinMax<true>>(type));
    if (op == "neg") return operands(d, modes, type, 1, sign_form<HSign<0xffff, 0x8000>>(type));
    if (op == "abs") return operands(d, modes, type, 1, sign_form<HSign<0x7fff, 0>>(type));
  }
  d.fail_type(type);
}

namespace {

void decode_with_type(Decoder& d) {
  decode_float_arithmetic(d, d.take_type());
}

template <class F>
void decode_root(Decoder& d) {  // rcp, sqrt, rsqrt
  const Type type = d.take_type();
  if (type == Type::f64) return decode_f64_root(d);
  const bool approximate = d.take("approx");
  Modes modes;
  if (approximate == take_rounding(d, &modes))
    d.fail("the modifiers must include one of .approx, .rn, .rz, .rm and .rp");
  if (!approximate && d.opcode() == "rsqrt") d.need({"approx"});
  take_modes(d, &modes);
  if (type != Type::f32) d.fail_type(type);
  operands(d, modes, type, 1, f32_form<F>());  // correctly rounded is within any documented error
}

template <class F, class H>
void decode_approximate(Decoder& d) {
  d.need({"approx"});
  Modes modes;
  take_modes(d, &modes);
  const Type type = d.take_type();
  if (type == Type::f32) return operands(d, modes, type, 1, f32_form<F>());
  if constexpr (!std::is_same_v<H, void>) return operands(d, modes, type, 1, half_form<H>(type));
  d.fail_type(type);
}

}  // namespace

void add_floating(OpcodeTable& t) {
  t["fma"] = {decode_with_type, {OpClass::fp32, OpClass::fp16, OpClass::fp64}};
  t["copysign"] = {decode_with_type, {OpClass::alu, OpClass::fp64}};
  t["rcp"] = {decode_root<Rcp32>, {OpClass::special, OpClass::fp64}};
  t["sqrt"] = {decode_root<Sqrt32>, {OpClass::special, OpClass::fp64}};
  t["rsqrt"] = {decode_root<Rsqrt32>, {OpClass::special, OpClass::fp64}};
  t["ex2"] = {decode_approximate<Ex2, HEx2>, {OpClass::special}};
  t["lg2"] = {decode_approximate<Lg2, void>, {OpClass::special}};
  t["sin"] = {decode_approximate<Sin, void>, {OpClass::special}};
  t["cos"] = {decode_approximate<Cos, void>, {OpClass::special}};
  t["tanh"] = {decode_approximate<Tanh, HTanh>, {OpClass::special}};
}

}  // namespace torchext::sim
