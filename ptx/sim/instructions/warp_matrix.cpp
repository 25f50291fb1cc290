// Layouts and products of warp-wide matrices; mma.sync.
#include "warp_matrix.h"

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "../numerics/number_formats.h"
#include "../numerics/rounding_scope.h"
#include "lanes.h"

namespace torchext::sim {

void OperandLayout::position(int lane, int r, int* row, int* kk) const {
  const int along = k / (4 * per());  // registers along k
  r %= distinct();
  *row = lane / 4;
  int step;
  if (rows == 8 || (rows == 16 && is_b)) {
    step = r % along;
    *row += 8 * (r / along);
  } else {
    step = (r >> 1) % along;
    *row += 8 * (r & 1) + 16 * (r / (2 * along));
  }
  *kk = (lane % 4 + 4 * step) * per();
}

void AccumulatorLayout::position(int lane, int e, int* row, int* column) const {
  const int group = lane / 4, pair = 2 * (lane % 4) + (e & 1);
  if (m == 8 && n == 32) {  // computed as the transpose, 32 x 8
    *row = pair;
    *column = group + 8 * (e >> 1);
    return;
  }
  *row = group;
  *column = pair;
  if (m == 8) return;
  *row += 8 * ((e >> 1) & 1);
  if (m == 32) *row += 16 * (e >> 2);
  if (n == 16) *column += 8 * (e >> 2);
}

void need_whole_warp(Warp& w, std::uint32_t mask) {
  if (mask == ~0u || !w.grid().checks) return;
  w.finding(FindingKind::divergent_collective,
            "a warp-wide matrix instruction needs all 32 lanes of its warp; the block has no full "
            "warp here or some lanes have exited",
            mask);
}

int rounding_mode(const std::string& modifier) {
  return modifier == "rz"   ? FE_TOWARDZERO
         : modifier == "rm" ? FE_DOWNWARD
         : modifier == "rp" ? FE_UPWARD
                            : FE_TONEAREST;
}

MatrixShape take_shape(Decoder& d) {
  std::string text;
  MatrixShape shape;
  int used = 0;
  if (!d.take_prefix("m", &text) ||
      std::sscanf(text.c_str(), "m%dn%dk%d%n", &shape.m, &shape.n, &shape.k, &used) != 3 ||
      used != static_cast<int>(text.size()))
    d.fail("the modifiers must include a shape such as .m16n8k16");
  return shape;
}

namespace {

constexpr int kMostElements = 256;       // of C: m16n16, m32n8
constexpr int kMostBytes = 16 * 64 * 2;  // of A or B: m16n8k16 f64

// The shapes that exist. targets.cpp says which target has them.
struct Shapes {
  bool wmma;
  const char* type;
  MatrixShape shape;
};
const Shapes kShapes[] = {
    {false, "f16", {16, 8, 8}},   {false, "f16", {16, 8, 16}}, {false, "bf16", {16, 8, 8}},
    {false, "bf16", {16, 8, 16}}, {false, "tf32", {16, 8, 4}}, {false, "tf32", {16, 8, 8}},
    {false, "fp8", {16, 8, 16}},  {false, "fp8", {16, 8, 32}}, {false, "8", {8, 8, 16}},
    {false, "8", {16, 8, 16}},    {false, "8", {16, 8, 32}},   {false, "4", {8, 8, 32}},
    {false, "4", {16, 8, 32}},    {false, "4", {16, 8, 64}},   {false, "b1", {8, 8, 128}},
    {false, "b1", {16, 8, 128}},  {false, "b1", {16, 8, 256}}, {false, "f64", {8, 8, 4}},
    {false, "f64", {16, 8, 4}},   {false, "f64", {16, 8, 8}},  {false, "f64", {16, 8, 16}},
    {true, "f16", {16, 16, 16}},  {true, "f16", {32, 8, 16}},  {true, "f16", {8, 32, 16}},
    {true, "bf16", {16, 16, 16}}, {true, "bf16", {32, 8, 16}}, {true, "bf16", {8, 32, 16}},
    {true, "8", {16, 16, 16}},    {true, "8", {32, 8, 16}},    {true, "8", {8, 32, 16}},
    {true, "tf32", {16, 16, 8}},  {true, "f64", {8, 8, 4}},    {true, "4", {8, 8, 32}},
    {true, "b1", {8, 8, 128}},
};

std::string family_of(const std::string& type) {
  if (type == "s8" || type == "u8") return "8";
  if (type == "s4" || type == "u4") return "4";
  if (type == "e4m3" || type == "e5m2") return "fp8";
  return type;
}

NumberFormat format_of(const std::string& type) {
  return type == "e4m3"   ? NumberFormat::e4m3
         : type == "e5m2" ? NumberFormat::e5m2
         : type == "f16"  ? NumberFormat::f16
         : type == "bf16" ? NumberFormat::bf16
                          : NumberFormat::tf32;
}

bool operator==(const MatrixShape& x, const MatrixShape& y) {
  return x.m == y.m && x.n == y.n && x.k == y.k;
}

void check_shape(Decoder& d, bool wmma, const std::string& type, const MatrixShape& shape) {
  bool known = false;
  for (const Shapes& s : kShapes) {
    if (s.wmma != wmma || family_of(type) != s.type) continue;
    known = true;
    if (s.shape == shape) return;
  }
  d.fail(known
             ? "the shape must be one that exists for ." + type
             : "the type of A and B must be one that " + d.opcode() + " takes (got ." + type + ")");
}

// ---- Arithmetic ---------------------------------------------------------------------------------

std::vector<std::uint16_t> places_of(const OperandLayout& layout) {
  std::vector<std::uint16_t> at;
  for (int r = 0; r < layout.distinct(); ++r) {
    for (int lane = 0; lane < 32; ++lane) {
      int row, k;
      layout.position(lane, r, &row, &k);
      at.push_back(static_cast<std::uint16_t>((row * layout.k + k) * layout.bits / 8));
    }
  }
  return at;
}

std::vector<std::uint16_t> places_of(const AccumulatorLayout& layout) {
  std::vector<std::uint16_t> at;
  for (int e = 0; e < layout.elements(); ++e) {
    for (int lane = 0; lane < 32; ++lane) {
      int row, column;
      layout.position(lane, e, &row, &column);
      at.push_back(static_cast<std::uint16_t>(row * layout.n + column));
    }
  }
  return at;
}

template <class Register>
void gather(Warp& w, const std::vector<std::uint16_t>& at, const Slot* slot, std::uint8_t* image) {
  for (std::size_t first = 0; first < at.size(); first += 32, ++slot) {
    const auto* values = w.at<Register>(*slot);
    for (std::size_t lane = 0; lane < 32; ++lane)
      std::memcpy(image + at[first + lane], values + lane, sizeof(Register));
  }
}

int element(const std::uint8_t* row, int k, int bits, bool is_signed) {
  if (bits == 8) return is_signed ? static_cast<std::int8_t>(row[k]) : static_cast<int>(row[k]);
  const int nibble = (row[k / 2] >> (4 * (k % 2))) & 15;
  return is_signed && nibble > 7 ? nibble - 16 : nibble;
}

void multiply(const WarpProduct& p, const std::uint8_t* a, const std::uint8_t* b, float* c) {
  thread_local MmaOperand left, right;
  const int bytes = p.a.bits / 8;
  const bool widened = p.model.fp8_widened_to_f16;
  decode_operand(left, p.a_format, a, p.c.m, p.a.k, p.a.k * bytes, bytes, false, widened);
  decode_operand(right, p.b_format, b, p.c.n, p.b.k, p.b.k * bytes, bytes, false, widened);
  multiply_accumulate(p.model, left, right, c, p.c.n);
}

void multiply(const WarpProduct& p, const std::uint8_t* a, const std::uint8_t* b, std::int32_t* c) {
  const int pitch = p.a.k * p.a.bits / 8;
  for (int m = 0; m < p.c.m; ++m) {
    for (int n = 0; n < p.c.n; ++n) {
      const std::uint8_t *x = a + m * pitch, *y = b + n * pitch;
      std::int64_t sum = c[m * p.c.n + n];
      if (p.kind == WarpProduct::single_bits) {
        for (int i = 0; i < pitch; ++i)
          sum += __builtin_popcount(p.conjunction ? x[i] & y[i] : x[i] ^ y[i]);
      } else {
        for (int k = 0; k < p.a.k; ++k)
          sum += element(x, k, p.a.bits, p.a_signed) * element(y, k, p.b.bits, p.b_signed);
      }
      if (p.saturate) sum = std::clamp<std::int64_t>(sum, INT32_MIN, INT32_MAX);
      c[m * p.c.n + n] = static_cast<std::int32_t>(static_cast<U32>(sum));
    }
  }
}

// A chain of fused multiply-adds along k, each rounded.
void multiply(const WarpProduct& p, const std::uint8_t* a, const std::uint8_t* b, double* c) {
  const RoundingScope scope(p.rounding);
  for (int m = 0; m < p.c.m; ++m) {
    for (int n = 0; n < p.c.n; ++n) {
      double& sum = c[m * p.c.n + n];
      for (int k = 0; k < p.a.k; ++k) {
        double x, y;
        std::memcpy(&x, a + 8 * (m * p.a.k + k), 8);
        std::memcpy(&y, b + 8 * (n * p.a.k + k), 8);
        sum = std::fma(x, y, sum);
      }
    }
  }
}

template <class T>
Step multiply_matrices(Warp& w, const Instruction& i, U32 mask) {
  using Register = std::conditional_t<sizeof(T) == 8, U64, U32>;
  const auto& p = i.as<WarpProduct>();
  const Slot* d = i.list.data();
  const Slot *a = d + p.registers_d(), *b = a + p.a.registers, *c = b + p.b.registers;
  for (auto r = static_cast<std::size_t>(p.registers_d()); r < i.list.size(); ++r)
    w.need(i.list[r], mask, "by a matrix product");
  need_whole_warp(w, mask);
  w.order_if_converged(mask);
  alignas(8) std::uint8_t a_image[kMostBytes], b_image[kMostBytes];
  gather<Register>(w, p.a_at, a, a_image);
  gather<Register>(w, p.b_at, b, b_image);

  T values[kMostElements];
  const auto elements = static_cast<std::size_t>(p.c.elements());
  for (std::size_t e = 0; e < elements; ++e) {
    const std::uint16_t* at = p.c_at.data() + 32 * e;
    const auto* source = w.at<Register>(c[p.half_c ? e / 2 : e]);
    for (int lane = 0; lane < 32; ++lane) {
      if (p.half_c) {
        const auto half = static_cast<U16>(source[lane] >> (16 * (e & 1)));
        values[at[lane]] = static_cast<T>(f16_to_float(half));
      } else {
        std::memcpy(&values[at[lane]], source + lane, sizeof(T));
      }
    }
  }
  multiply(p, a_image, b_image, values);
  for (std::size_t e = 0; e < elements; ++e) {
    const std::uint16_t* at = p.c_at.data() + 32 * e;
    auto* target = w.at<Register>(d[p.half_d ? e / 2 : e]);
    for (int lane = 0; lane < 32; ++lane) {
      if (p.half_d) {
        const Register half = encode_f16(static_cast<double>(values[at[lane]]));
        target[lane] = e & 1 ? target[lane] | half << 16 : half;
      } else {
        std::memcpy(target + lane, &values[at[lane]], sizeof(T));
      }
    }
  }
  for (int r = 0; r < p.registers_d(); ++r) w.set_valid(d[r], mask, mask);
  return Step::next;
}

}  // namespace

// ---- Decoding -----------------------------------------------------------------------------------

int element_bits(const std::string& type) {
  if (type == "b1") return 1;
  if (type == "s4" || type == "u4") return 4;
  return 8 * size_of(type_named(type));
}

void require_wmma_shape(Decoder& d, bool accumulator, const std::string& type,
                        const MatrixShape& shape) {
  if (!accumulator) return check_shape(d, true, type, shape);
  const char* operands[] = {"f16", "bf16", "tf32", "s8", "s4", "b1", "f64"};
  for (const char* operand : operands) {
    const std::string name = operand;
    const bool fits = type == "f16"   ? name == "f16"
                      : type == "f32" ? name == "f16" || name == "bf16" || name == "tf32"
                      : type == "s32" ? name == "s8" || name == "s4" || name == "b1"
                                      : type == "f64" && name == "f64";
    if (!fits) continue;
    for (const Shapes& s : kShapes) {
      if (s.wmma && s.shape == shape && s.type == family_of(name)) return;
    }
  }
  d.fail("the shape must be one that exists for ." + type);
}

WarpProduct take_product(Decoder& d, bool wmma) {
  WarpProduct p;
  const MatrixShape shape = take_shape(d);
  p.saturate = d.take("satfinite");
  const std::string rounding = d.take_one_of({"rn", "rz", "rm", "rp"});
  const std::string operation = d.take_one_of({"xor", "and"});
  const bool counts = d.take("popc");
  // D, A, B, C. wmma omits the types of A and B if they are f16.
  std::vector<std::string> types;
  std::string type;
  while (!(type = d.take_first_of({"f16", "bf16", "tf32", "f32", "f64", "e4m3", "e5m2", "s8", "u8",
                                   "s4", "u4", "b1", "s32"}))
              .empty())
    types.push_back(type);
  if (wmma && types.size() == 2) types = {types[0], "f16", "f16", types[1]};
  if (types.size() != 4)
    d.fail("the types must be those of D, A, B and C (got " + std::to_string(types.size()) +
           " types)");
  const std::string &result = types[0], &a = types[1], &b = types[2], &c = types[3];
  if (family_of(a) != family_of(b))
    d.fail("the types of A and B must be of one kind (got ." + a + " and ." + b + ")");
  check_shape(d, wmma, a, shape);
  const auto fail_accumulators = [&](const char* expected) {
    d.fail(std::string("the types of D and C must be ") + expected + " (got ." + result + " and ." +
           c + ")");
  };

  const int bits = element_bits(a);
  p.a = {shape.m, shape.k, bits, false, 0};
  p.b = {shape.n, shape.k, bits, true, 0};
  p.c = {shape.m, shape.n};
  p.a.registers = p.a.distinct();
  p.b.registers = p.b.distinct();
  if (wmma && a == "f16") p.a.registers = p.b.registers = 8;

  if (a == "f64") {
    p.kind = WarpProduct::doubles;
    if (result != "f64" || c != "f64") fail_accumulators(".f64");
    p.rounding = rounding_mode(rounding);
  } else if (a == "b1") {
    p.kind = WarpProduct::single_bits;
  } else if (family_of(a) == "8" || family_of(a) == "4") {
    p.kind = WarpProduct::integers;
  } else {
    p.a_format = format_of(a);
    p.b_format = format_of(b);
    p.half_d = result == "f16";
    p.half_c = c == "f16";
    if ((!p.half_d && result != "f32") || (!p.half_c && c != "f32"))
      fail_accumulators(".f16 or .f32");
    if (p.half_c != p.half_d && !(wmma && a == "f16"))
      fail_accumulators("equal, unless wmma multiplies .f16");
    // If C or D is f32, the sum is f32: C is widened first, D is rounded last.
    const bool half = p.half_c && p.half_d;
    try {
      p.model =
          mma_sync_model(d.target(), p.a_format, half ? NumberFormat::f16 : NumberFormat::f32);
    } catch (const std::invalid_argument& e) {
      d.fail(e.what());
    }
  }
  const bool integral = p.kind == WarpProduct::integers || p.kind == WarpProduct::single_bits;
  if (integral && (result != "s32" || c != "s32")) fail_accumulators(".s32");
  if (p.saturate && p.kind != WarpProduct::integers) d.fail_modifier("satfinite");
  if (!rounding.empty() && p.kind != WarpProduct::doubles) d.fail_modifier(rounding);
  if (counts != (p.kind == WarpProduct::single_bits) || operation.empty() == counts)
    d.fail(
        "the modifiers must include .xor.popc or .and.popc for A and B of .b1, and for no others");
  p.a_signed = a == "s8" || a == "s4";
  p.b_signed = b == "s8" || b == "s4";
  p.conjunction = operation == "and";
  return p;
}

void decode_product(Decoder& d, WarpProduct p) {
  d.finish(4);
  const auto add = [&](std::size_t n, int count, Type type) {
    const auto& each = d.vector_or_one(d.arg(n), static_cast<std::size_t>(count));
    for (const Arg& x : each)
      d.out.list.push_back(n == 0 ? d.destination(x, size_of(type)) : d.source(x, type));
    const auto is_constant = [](const Arg& x) {
      return x.kind == Arg::integer || x.kind == Arg::real;
    };
    if (n == 3 && p.half_c && std::all_of(each.begin(), each.end(), is_constant))
      d.fail("a C of .f16 must have a register, as ptxas demands");
  };
  const bool wide = p.kind == WarpProduct::doubles;
  const Type accumulator = wide                                 ? Type::f64
                           : p.kind == WarpProduct::tensor_core ? Type::f32
                                                                : Type::s32;
  add(0, p.registers_d(), p.half_d ? Type::b32 : accumulator);
  add(1, p.a.registers, wide ? Type::f64 : Type::b32);
  add(2, p.b.registers, wide ? Type::f64 : Type::b32);
  add(3, p.registers_c(), p.half_c ? Type::b32 : accumulator);
  d.out.aligned = true;
  d.out.execute = wide                                 ? multiply_matrices<double>
                  : p.kind == WarpProduct::tensor_core ? multiply_matrices<float>
                                                       : multiply_matrices<std::int32_t>;
  p.a_at = places_of(p.a);
  p.b_at = places_of(p.b);
  p.c_at = places_of(p.c);
  d.keep(std::move(p));
}

namespace {

void decode_mma(Decoder& d) {
  if (d.take("sp") || d.take("sp::ordered_metadata")) d.fail("sparse mma is not supported");
  d.need({"sync", "aligned"});
  d.need({"row", "col"});
  if (d.take("block_scale")) d.fail("block scales (sm_120a) are not supported");
  d.take("kind::f8f6f4");
  decode_product(d, take_product(d, false));
}

}  // namespace

void add_mma(OpcodeTable& t) {
  t["mma"] = {decode_mma, {OpClass::mma}};
}

}  // namespace torchext::sim
