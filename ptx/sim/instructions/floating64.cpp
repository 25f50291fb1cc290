// f64 arithmetic in PTX's four rounding modes, and the approximate reciprocals that compilers
// refine.
#include <cmath>
#include <cstring>
#include <limits>

#include "../frontend/decode.h"
#include "../numerics/rounding_scope.h"
#include "floating.h"
#include "lanes.h"
#include "warp_matrix.h"

namespace torchext::sim {

namespace {

using D = double;

double canonical(double v) {
  return v != v ? std::numeric_limits<double>::quiet_NaN() : v;
}

struct Add {
  D operator()(D a, D b, D) const { return a + b; }
};
struct Sub {
  D operator()(D a, D b, D) const { return a - b; }
};
struct Mul {
  D operator()(D a, D b, D) const { return a * b; }
};
struct Div {
  D operator()(D a, D b, D) const { return a / b; }
};
struct Fma {
  D operator()(D a, D b, D c) const { return std::fma(a, b, c); }
};
struct Rcp {
  D operator()(D a, D, D) const { return 1.0 / a; }
};
struct Sqrt {
  D operator()(D a, D, D) const { return std::sqrt(a); }
};

struct RoundingMode {
  int cfenv;  // FE_TONEAREST, ...
};

template <class F>
Step rounded(Warp& w, const Instruction& i, U32 mask) {
  const RoundingScope scope(i.as<RoundingMode>().cfenv);
  const auto *a = w.at(i.s[0]), *b = w.at(i.s[1]), *c = w.at(i.s[2]);
  auto* d = w.at(i.d);
  each_lane(mask, [&](int l) {
    const D r = F()(Element<D>::load(a, l), Element<D>::load(b, l), Element<D>::load(c, l));
    Element<D>::store(d, l, canonical(r));
  });
  w.set_valid(i.d, mask, w.valid(i.s[0]) & w.valid(i.s[1]) & w.valid(i.s[2]));
  return Step::next;
}

template <bool is_max>
struct MinMax {
  D operator()(D a, D b) const {
    if (a != a || b != b) return canonical(a != a ? b : a);
    if (a == b) return (std::signbit(a) == is_max) ? b : a;  // -0 < +0
    return (a > b) == is_max ? a : b;
  }
};
struct Neg {
  D operator()(D a) const { return -a; }
};
struct Abs {
  D operator()(D a) const { return std::fabs(a); }
};
struct CopySign {
  D operator()(D a, D b) const { return std::copysign(b, a); }
};
struct Rsqrt {
  D operator()(D a) const { return canonical(1.0 / std::sqrt(a)); }
};

// .approx.ftz.f64 reads and writes only the upper 32 bits, with 20 bits of fraction. Subnormals
// count as zeros.
D upper_half(D v) {
  U64 bits;
  std::memcpy(&bits, &v, 8);
  bits &= 0xffffffff00000000ull;
  if ((bits & 0x7ff0000000000000ull) == 0) bits &= 0x8000000000000000ull;
  std::memcpy(&v, &bits, 8);
  return v;
}
struct GrossRcp {
  D operator()(D a) const { return upper_half(canonical(1.0 / upper_half(a))); }
};
struct GrossRsqrt {
  D operator()(D a) const { return upper_half(canonical(1.0 / std::sqrt(upper_half(a)))); }
};

void operands(Decoder& d, std::size_t sources, Execute execute) {
  d.finish(1 + sources);
  d.out.d = d.destination(0, 8);
  for (std::size_t k = 0; k < sources; ++k) d.out.s[k] = d.source(k + 1, Type::f64);
  for (std::size_t k = sources; k < 3; ++k) d.out.s[k] = d.constant(0, 8);
  d.out.execute = execute;
}

}  // namespace

void decode_f64_arithmetic(Decoder& d) {
  d.is(OpClass::fp64);
  const std::string& op = d.opcode();
  const std::string rounding = d.take_one_of({"rn", "rz", "rm", "rp"});
  d.keep(RoundingMode{rounding_mode(rounding)});
  if (op == "add") return operands(d, 2, rounded<Add>);
  if (op == "sub") return operands(d, 2, rounded<Sub>);
  if (op == "mul") return operands(d, 2, rounded<Mul>);
  if (op == "div") return operands(d, 2, rounded<Div>);
  if (op == "fma" || op == "mad") return operands(d, 3, rounded<Fma>);
  if (!rounding.empty()) d.fail_modifier(rounding);
  if (op == "min") return operands(d, 2, map2<D, D, D, MinMax<false>>);
  if (op == "max") return operands(d, 2, map2<D, D, D, MinMax<true>>);
  if (op == "neg") return operands(d, 1, map1<D, D, Neg>);
  if (op == "abs") return operands(d, 1, map1<D, D, Abs>);
  if (op == "copysign") return operands(d, 2, map2<D, D, D, CopySign>);
  d.fail_type(Type::f64);
}

void decode_f64_root(Decoder& d) {
  d.is(OpClass::fp64);
  const std::string& op = d.opcode();
  if (d.take("approx")) {
    const bool upper = d.take("ftz");
    if (op == "rcp" && upper) return operands(d, 1, map1<D, D, GrossRcp>);
    if (op == "rsqrt") return operands(d, 1, upper ? map1<D, D, GrossRsqrt> : map1<D, D, Rsqrt>);
    if (op == "rcp") d.need({"ftz"});
    d.fail_modifier("approx");
  }
  const std::string rounding = d.take_one_of({"rn", "rz", "rm", "rp"});
  if (op == "rsqrt") d.need({"approx"});
  if (rounding.empty()) d.need_one_of({"rn", "rz", "rm", "rp"});
  d.keep(RoundingMode{rounding_mode(rounding)});
  operands(d, 1, op == "rcp" ? rounded<Rcp> : rounded<Sqrt>);
}

}  // namespace torchext::sim
