// Video instructions: vadd, vsub, vabsdiff, vmin, vmax, vshl, vshr, vmad, vset on parts of 32-bit
// registers, and their forms of two and four lanes (vadd2, vavrg4, ...).
#include <algorithm>

#include "../frontend/decode.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

using Wide = __int128;  // holds every intermediate result; vshl makes up to 64 bits

enum class VideoOp : std::uint8_t {
  add,
  sub,
  absolute_difference,
  average,
  min,
  max,
  shl,
  shr,
  mad,
  set
};
enum class Compare : std::uint8_t { eq, ne, lt, le, gt, ge };
enum class Second : std::uint8_t { none, add, min, max };  // the second operation, with c

struct Field {  // part of a register
  int at = 0, bits = 32;
};

struct Video {
  VideoOp op{};
  Compare compare{};
  Second second = Second::none;
  bool a_signed = false, b_signed = false, d_signed = false, saturate = false;
  // One lane.
  Field a, b, d;
  bool merge = false;  // writes a part of d; the rest comes from c
  bool wrap = false;   // vshl, vshr: the amount modulo 32, not at most 32
  bool negate_product = false, negate_c = false, plus_one = false;
  int scale = 0;
  // Two or four lanes.
  int lanes = 1;
  int a_lane[4] = {}, b_lane[4] = {};  // 0 .. lanes - 1 in a, from there on in b
  U32 write = 0;                       // lanes that get the result; the others come from c
};

Wide extract(U32 value, Field f, bool is_signed) {
  const int unused = 64 - f.bits;
  const U64 high = U64{value} >> f.at << unused;
  return is_signed ? Wide{static_cast<std::int64_t>(high) >> unused} : Wide{high >> unused};
}

Wide saturated(Wide value, bool is_signed, int bits) {
  const Wide least = is_signed ? -(Wide{1} << (bits - 1)) : 0;
  const Wide most = is_signed ? (Wide{1} << (bits - 1)) - 1 : (Wide{1} << bits) - 1;
  return std::clamp(value, least, most);
}

U32 insert(U32 value, Field f, U32 into) {
  const auto mask = static_cast<U32>(((U64{1} << f.bits) - 1) << f.at);
  return (value << f.at & mask) | (into & ~mask);
}

bool compares(Compare how, Wide a, Wide b) {
  switch (how) {
    case Compare::eq:
      return a == b;
    case Compare::ne:
      return a != b;
    case Compare::lt:
      return a < b;
    case Compare::le:
      return a <= b;
    case Compare::gt:
      return a > b;
    case Compare::ge:
      return a >= b;
  }
  return false;
}

Wide compute(const Video& v, Wide a, Wide b) {
  switch (v.op) {
    case VideoOp::add:
      return a + b;
    case VideoOp::sub:
      return a - b;
    case VideoOp::absolute_difference:
      return a > b ? a - b : b - a;
    case VideoOp::average:  // a half rounds away from zero
      return a + b >= 0 ? (a + b + 1) >> 1 : (a + b) >> 1;
    case VideoOp::min:
      return std::min(a, b);
    case VideoOp::max:
      return std::max(a, b);
    case VideoOp::shl:
      return a * (Wide{1} << (v.wrap ? b & 31 : std::min<Wide>(b, 32)));
    case VideoOp::shr:
      return a >> (v.wrap ? b & 31 : std::min<Wide>(b, 32));
    case VideoOp::set:
      return compares(v.compare, a, b);
    case VideoOp::mad:
      break;
  }
  return 0;
}

U32 scalar(const Video& v, U32 a, U32 b, U32 c) {
  Wide r = compute(v, extract(a, v.a, v.a_signed), extract(b, v.b, v.b_signed));
  if (v.saturate) r = saturated(r, v.d_signed, v.merge ? v.d.bits : 32);
  const Wide third = extract(c, {}, v.d_signed);
  switch (v.second) {
    case Second::add:
      r += third;
      break;
    case Second::min:
      r = std::min(r, third);
      break;
    case Second::max:
      r = std::max(r, third);
      break;
    case Second::none:
      break;
  }
  return v.merge ? insert(static_cast<U32>(r), v.d, c) : static_cast<U32>(r);
}

U32 multiply_add(const Video& v, U32 a, U32 b, U32 c) {
  Wide r = extract(a, v.a, v.a_signed) * extract(b, v.b, v.b_signed);
  const bool is_signed = v.a_signed || v.b_signed || v.negate_product || v.negate_c;
  Wide third = extract(c, {}, is_signed);
  if (v.negate_product) r = -r;
  if (v.negate_c) third = -third;
  r += third + (v.plus_one ? 1 : 0);
  r >>= v.scale;
  if (v.saturate) {
    const Wide least = is_signed ? Wide{INT32_MIN} : Wide{0};
    const Wide most = is_signed ? Wide{INT32_MAX} : Wide{UINT32_MAX};
    r = std::clamp(r, least, most);
  }
  return static_cast<U32>(r);
}

U32 lanewise(const Video& v, U32 a, U32 b, U32 c) {
  const int bits = 32 / v.lanes;
  const auto lane = [&](int n, bool is_signed) {
    return extract(n < v.lanes ? a : b, {n % v.lanes * bits, bits}, is_signed);
  };
  U32 merged = c, sum = c;
  for (int n = 0; n < v.lanes; ++n) {
    if (!(v.write >> n & 1)) continue;
    Wide r = compute(v, lane(v.a_lane[n], v.a_signed), lane(v.b_lane[n], v.b_signed));
    if (v.saturate) r = saturated(r, v.d_signed, bits);
    sum += static_cast<U32>(r);
    merged = insert(static_cast<U32>(r), {n * bits, bits}, merged);
  }
  return v.second == Second::add ? sum : merged;
}

template <U32 (*compute)(const Video&, U32, U32, U32)>
struct Apply {
  U32 operator()(const Video& v, U32 a, U32 b, U32 c) const { return compute(v, a, b, c); }
};

template <U32 (*compute)(const Video&, U32, U32, U32)>
Execute video() {
  return map3_form<U32, U32, U32, U32, Apply<compute>>;
}

// ---- Decoding -----------------------------------------------------------------------------------

Field field_named(Decoder& d, const std::string& selector) {
  if (selector.empty()) return {};
  const int n = selector.size() == 2 ? selector[1] - '0' : -1;
  if (selector[0] == 'b' && n >= 0 && n < 4) return {8 * n, 8};
  if (selector[0] == 'h' && n >= 0 && n < 2) return {16 * n, 16};
  d.fail("a part of a source must be .b0 to .b3, .h0 or .h1 (got ." + selector + ")");
}

// ".h10", ".b7654": the lanes, highest first. Default: `first` and the following.
void select_lanes(Decoder& d, const std::string& selector, int lanes, int first, int* out) {
  for (int n = 0; n < lanes; ++n) out[n] = first + n;
  if (selector.empty()) return;
  const bool fits = selector.size() == static_cast<std::size_t>(lanes) + 1 &&
                    selector[0] == (lanes == 2 ? 'h' : 'b');
  for (int n = 0; n < lanes; ++n) {
    const int lane = fits ? selector[static_cast<std::size_t>(lanes - n)] - '0' : -1;
    if (lane < 0 || lane >= 2 * lanes) {
      d.fail("the lanes of a source must be " +
             std::string(lanes == 2 ? ".h00 to .h33" : ".b0000 to .b7777") + " (got ." + selector +
             ")");
    }
    out[n] = lane;
  }
}

// ".h1", ".b20": the lanes written, highest first.
U32 write_mask(Decoder& d, const std::string& selector, int lanes) {
  if (selector.empty()) return (1u << lanes) - 1;
  U32 mask = 0;
  int above = lanes;
  bool fits = selector[0] == (lanes == 2 ? 'h' : 'b') && selector.size() > 1;
  for (std::size_t k = 1; k < selector.size() && fits; ++k) {
    const int lane = selector[k] - '0';
    fits = lane >= 0 && lane < above;
    above = lane;
    if (fits) mask |= 1u << lane;
  }
  if (!fits) {
    d.fail("the lanes of the destination must be named from high to low, such as " +
           std::string(lanes == 2 ? ".h10" : ".b20") + " (got ." + selector + ")");
  }
  return mask;
}

Slot part_source(Decoder& d, std::size_t n, Type type, std::string* selector, bool* negate) {
  Arg a = d.arg(n);
  *selector = a.kind == Arg::reg ? a.text : "";
  if (a.kind == Arg::reg) a.text.clear();
  if (negate != nullptr) *negate = a.minus;
  if (negate != nullptr) a.minus = false;
  return d.source(a, type);
}

bool take_signedness(Decoder& d) {
  const Type type = d.take_type();
  if (type != Type::u32 && type != Type::s32) d.fail_type(type);
  return is_signed(type);
}

VideoOp operation_named(const std::string& name) {
  return name == "vadd"       ? VideoOp::add
         : name == "vsub"     ? VideoOp::sub
         : name == "vabsdiff" ? VideoOp::absolute_difference
         : name == "vavrg"    ? VideoOp::average
         : name == "vmin"     ? VideoOp::min
         : name == "vmax"     ? VideoOp::max
         : name == "vshl"     ? VideoOp::shl
         : name == "vshr"     ? VideoOp::shr
         : name == "vmad"     ? VideoOp::mad
                              : VideoOp::set;
}

void decode_video(Decoder& d) {
  Video v;
  std::string name = d.opcode();
  if (name.back() == '2' || name.back() == '4') {
    v.lanes = name.back() - '0';
    name.pop_back();
  }
  v.op = operation_named(name);
  const bool shift = v.op == VideoOp::shl || v.op == VideoOp::shr;
  const bool mad = v.op == VideoOp::mad;
  if (v.op == VideoOp::set) {
    const std::string how = d.need_one_of({"eq", "ne", "lt", "le", "gt", "ge"});
    v.compare = how == "eq"   ? Compare::eq
                : how == "ne" ? Compare::ne
                : how == "lt" ? Compare::lt
                : how == "le" ? Compare::le
                : how == "gt" ? Compare::gt
                              : Compare::ge;
  } else {
    v.d_signed = take_signedness(d);
    v.saturate = d.take("sat");
  }
  v.a_signed = take_signedness(d);
  v.b_signed = take_signedness(d);
  if (shift) {
    if (v.b_signed) d.fail("the type of the amount must be .u32 (got .s32)");
    v.wrap = d.need_one_of({"clamp", "wrap"}) == "wrap";
  }
  if (mad) {
    v.plus_one = d.take("po");
    v.scale = d.take("shr7") ? 7 : d.take("shr15") ? 15 : 0;
  } else {
    const std::string second =
        v.lanes > 1 ? d.take_one_of({"add"}) : d.take_one_of({"add", "min", "max"});
    v.second = second == "add"   ? Second::add
               : second == "min" ? Second::min
               : second == "max" ? Second::max
                                 : Second::none;
  }

  Arg to = d.arg(0);
  const std::string part = to.kind == Arg::reg ? to.text : "";
  if (to.kind == Arg::reg) to.text.clear();
  d.out.d = d.destination(to, 4);
  std::string a_part, b_part, c_part;
  bool negate_a = false, negate_b = false;
  d.out.s[0] =
      part_source(d, 1, v.a_signed ? Type::s32 : Type::u32, &a_part, mad ? &negate_a : nullptr);
  d.out.s[1] =
      part_source(d, 2, v.b_signed ? Type::s32 : Type::u32, &b_part, mad ? &negate_b : nullptr);
  if (v.lanes > 1) {
    v.write = write_mask(d, part, v.lanes);
    select_lanes(d, a_part, v.lanes, 0, v.a_lane);
    select_lanes(d, b_part, v.lanes, v.lanes, v.b_lane);
  } else {
    v.merge = !part.empty();
    v.a = field_named(d, a_part);
    v.b = field_named(d, b_part);
    v.d = field_named(d, part);
    if (v.merge && (mad || v.second != Second::none)) d.fail_operand(d.arg(0), "a whole register");
  }
  const bool third = mad || v.lanes > 1 || v.merge || v.second != Second::none;
  d.finish(third ? 4 : 3);
  d.out.s[2] =
      third ? part_source(d, 3, Type::b32, &c_part, mad ? &v.negate_c : nullptr) : d.constant(0, 4);
  if (!c_part.empty()) d.fail_operand(d.arg(3), "a whole register");
  v.negate_product = negate_a != negate_b;
  if (v.plus_one && (negate_a || negate_b || v.negate_c))
    d.fail("no operand must be negated with .po");
  d.out.execute = v.lanes > 1 ? video<lanewise>() : mad ? video<multiply_add>() : video<scalar>();
  d.keep(v);
}

}  // namespace

void add_video(OpcodeTable& t) {
  t["vadd"] = t["vsub"] = t["vabsdiff"] = t["vmin"] = t["vmax"] = {decode_video, {OpClass::alu}};
  t["vshl"] = t["vshr"] = t["vmad"] = t["vset"] = {decode_video, {OpClass::alu}};
  t["vadd2"] = t["vsub2"] = t["vavrg2"] = t["vabsdiff2"] = {decode_video, {OpClass::alu}};
  t["vmin2"] = t["vmax2"] = t["vset2"] = {decode_video, {OpClass::alu}};
  t["vadd4"] = t["vsub4"] = t["vavrg4"] = t["vabsdiff4"] = {decode_video, {OpClass::alu}};
  t["vmin4"] = t["vmax4"] = t["vset4"] = {decode_video, {OpClass::alu}};
}

}  // namespace torchext::sim
