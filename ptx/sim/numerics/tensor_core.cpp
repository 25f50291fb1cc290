// The arithmetic of tensor_core.h: the model of each instruction, a readable version for one
// element, and a fast loop over tiles that compilers vectorize.
//
// The fast path is exact for these reasons: products of decoded values are exact (in
// f32 for FP8 and f16, in f64 for bf16 and tf32), scaling by a power of two is exact, conversion to
// int32 truncates toward zero, and integer or f64 sums of those do not round.
#include "tensor_core.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "csrc/runtime/architecture.h"

namespace torchext::sim {
namespace {

const char* name_of(NumberFormat format) {
  switch (format) {
    case NumberFormat::f32:
      return "f32";
    case NumberFormat::tf32:
      return "tf32";
    case NumberFormat::f16:
      return "f16";
    case NumberFormat::bf16:
      return "bf16";
    case NumberFormat::e4m3:
      return "e4m3";
    case NumberFormat::e5m2:
      return "e5m2";
  }
  return "?";
}

bool is_fp8(NumberFormat format) {
  return format == NumberFormat::e4m3 || format == NumberFormat::e5m2;
}

int min_exponent(NumberFormat format) {
  switch (format) {
    case NumberFormat::e4m3:
      return -6;
    case NumberFormat::e5m2:
    case NumberFormat::f16:
      return -14;
    default:
      return -126;
  }
}

void require_accumulator(const char* instruction, NumberFormat inputs, NumberFormat accumulator) {
  const bool known = inputs != NumberFormat::f32;
  const bool f16_ok = is_fp8(inputs) || inputs == NumberFormat::f16;
  if (known && (accumulator == NumberFormat::f32 || (accumulator == NumberFormat::f16 && f16_ok))) {
    return;
  }
  throw std::invalid_argument(std::string(instruction) +
                              ": inputs must be e4m3, e5m2, f16, bf16 or tf32 for an f32 "
                              "accumulator, and e4m3, e5m2 or f16 for an f16 one (got " +
                              name_of(inputs) + " for " + name_of(accumulator) + ")");
}

// floor(log2 |value|), at least `least`; value is finite and not zero.
int exponent_of(double value, int least) {
  return std::max(std::ilogb(value), least);
}

// Keeps `bits` fraction bits below the leading bit of a result of f32's exponent range.
double truncate_result(double value, int bits) {
  if (value == 0) return value;
  const int unit = exponent_of(value, -126) - bits;
  return std::ldexp(std::trunc(std::ldexp(value, -unit)), unit);
}

float round_result(MmaResult result, double value) {
  switch (result) {
    case MmaResult::f32:
      value = truncate_result(value, 23);
      break;
    case MmaResult::e8m13:
      value = truncate_result(value, 13);
      break;
    case MmaResult::f16:
      return f16_to_float(encode_f16(value)) + 0.0f;
  }
  return static_cast<float>(value) + 0.0f;  // +0.0f turns -0 into +0
}

float add_last(MmaResult result, float sum, float c) {
  if (result == MmaResult::f16) return f16_to_float(encode_f16(double{sum} + double{c}));
  const float total = sum + c;
  return std::isnan(total) ? float_from_bits(kCanonicalNanF32) : total;
}

struct Steps {
  std::vector<int> order;  // of k
  int length;
};

Steps steps_of(const MmaModel& model, int k) {
  Steps steps{std::vector<int>(k), model.block_k};
  std::iota(steps.order.begin(), steps.order.end(), 0);
  if (model.fp8_widened_to_f16) {
    std::stable_partition(steps.order.begin(), steps.order.end(), [](int i) { return i % 4 < 2; });
    steps.length = k / 2;
  }
  return steps;
}

float step_element(const MmaModel& model, const MmaOperand& a, int m, const MmaOperand& b, int n,
                   const int* ks, int count, float c) {
  double special = std::isfinite(c) ? 0.0 : double{c};
  int largest = c == 0 || !std::isfinite(c) ? model.zero_exponent
                                            : exponent_of(c, model.least_addend_exponent);
  for (int i = 0; i < count; ++i) {
    const std::size_t at_a = std::size_t(ks[i]) * a.count + m;
    const std::size_t at_b = std::size_t(ks[i]) * b.count + n;
    const double product = double{a.value[at_a]} * double{b.value[at_b]};
    if (!std::isfinite(product)) special += product;  // NaN, or opposite infinities, give NaN
    if (product != 0) largest = std::max<int>(largest, a.exponent[at_a] + b.exponent[at_b]);
  }
  if (std::isnan(special)) return float_from_bits(kCanonicalNanF32);
  if (special != 0) return static_cast<float>(special);

  const int scale = model.fraction_bits - largest;
  double sum = std::trunc(std::ldexp(double{c}, scale));
  for (int i = 0; i < count; ++i) {
    const double product = double{a.value[std::size_t(ks[i]) * a.count + m]} *
                           double{b.value[std::size_t(ks[i]) * b.count + n]};
    sum += std::trunc(std::ldexp(product, scale));
  }
  return round_result(model.result, std::ldexp(sum, -scale));
}

double power_of_two(int exponent) {
  const std::uint64_t bits = static_cast<std::uint64_t>(exponent + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr int kColumns = 64;  // outputs of one row that are computed together

// Products up to `kScaleGroup` at a time fit an int32 sum; Real holds a product exactly.
template <class Real, int kScaleGroup>
void sum_products(const MmaOperand& a, int m, const MmaOperand& b, int n0, int columns,
                  const int* ks, int count, const Real* scale, double* sum) {
  for (int first = 0; first < count; first += kScaleGroup) {
    std::int32_t partial[kColumns] = {};
    for (int i = first; i < std::min(first + kScaleGroup, count); ++i) {
      const Real x = a.value[std::size_t(ks[i]) * a.count + m];
      if (x == 0) continue;
      const float* y = &b.value[std::size_t(ks[i]) * b.count + n0];
      for (int n = 0; n < columns; ++n) partial[n] += std::int32_t(x * Real(y[n]) * scale[n]);
    }
    for (int n = 0; n < columns; ++n) sum[n] += partial[n];
  }
}

// One step for `columns` outputs of one row; false, with nothing done, if c holds NaN or infinity.
bool step_row(const MmaModel& model, const MmaOperand& a, int m, const MmaOperand& b, int n0,
              int columns, const int* ks, int count, bool wide, float* c) {
  std::int16_t largest[kColumns];
  bool finite = true;
  for (int n = 0; n < columns; ++n) {
    const std::uint32_t magnitude = bits_from_float(c[n]) & 0x7fffffff;
    const int field = static_cast<int>(magnitude >> 23);
    finite &= field != 255;
    largest[n] = static_cast<std::int16_t>(
        magnitude == 0 ? model.zero_exponent : std::max(field - 127, model.least_addend_exponent));
  }
  if (!finite) return false;
  for (int i = 0; i < count; ++i) {
    const std::int16_t x = a.exponent[std::size_t(ks[i]) * a.count + m];
    const std::int16_t* y = &b.exponent[std::size_t(ks[i]) * b.count + n0];
    for (int n = 0; n < columns; ++n) {
      largest[n] = std::max(largest[n], static_cast<std::int16_t>(x + y[n]));
    }
  }

  const int bits = model.fraction_bits;
  double sum[kColumns];
  double unit[kColumns];
  double scale[kColumns];
  for (int n = 0; n < columns; ++n) {
    unit[n] = power_of_two(largest[n] - bits);
    scale[n] = power_of_two(bits - largest[n]);
    sum[n] = std::int32_t(c[n] * scale[n]);
  }
  if (wide) {
    sum_products<double, 8>(a, m, b, n0, columns, ks, count, scale, sum);
  } else {
    // Non-zero products of FP8 and f16 have exponents of at least -28: below that there is nothing
    // to scale, and an unbounded scale would overflow f32.
    float narrow[kColumns];
    for (int n = 0; n < columns; ++n) {
      narrow[n] = float_from_bits(
          static_cast<std::uint32_t>(bits - std::max<int>(largest[n], -64) + 127) << 23);
    }
    if (bits > 13) {
      sum_products<float, 8>(a, m, b, n0, columns, ks, count, narrow, sum);
    } else {
      sum_products<float, 32>(a, m, b, n0, columns, ks, count, narrow, sum);
    }
  }

  if (model.result == MmaResult::f16) {
    for (int n = 0; n < columns; ++n) c[n] = round_result(model.result, sum[n] * unit[n]);
    return true;
  }
  const int kept = model.result == MmaResult::e8m13 ? 13 : 23;
  const std::uint64_t mask = ~((std::uint64_t{1} << (52 - kept)) - 1);
  for (int n = 0; n < columns; ++n) {
    double value = sum[n] * unit[n];
    std::uint64_t value_bits;
    std::memcpy(&value_bits, &value, sizeof value);
    value_bits &= mask;
    std::memcpy(&value, &value_bits, sizeof value);
    c[n] = static_cast<float>(value) + 0.0f;
  }
  for (int n = 0; n < columns; ++n) {  // subnormal results keep fewer bits
    const double value = sum[n] * unit[n];
    if (value != 0 && std::fabs(value) < power_of_two(-126)) {
      c[n] = round_result(model.result, value);
    }
  }
  return true;
}

}  // namespace

MmaModel wgmma_model(NumberFormat inputs, NumberFormat accumulator) {
  require_accumulator("wgmma.mma_async", inputs, accumulator);
  const bool f16 = accumulator == NumberFormat::f16;
  const MmaResult result = f16              ? MmaResult::f16
                           : is_fp8(inputs) ? MmaResult::e8m13
                                            : MmaResult::f32;
  return MmaModel{
      32 / size_in_bytes(inputs), is_fp8(inputs) ? 13 : 25, f16 ? -21 : -133, result, false,
      min_exponent(accumulator)};
}

MmaModel mma_sync_model(int target, NumberFormat inputs, NumberFormat accumulator) {
  require_accumulator("mma.sync", inputs, accumulator);
  const Architecture* gpu = find_architecture(target);
  const int rounding = gpu != nullptr ? gpu->mma_rounding : 0;
  const bool f16_alone = rounding != 0 && !gpu->bf16_mma;
  if (rounding == 0 || (f16_alone && inputs != NumberFormat::f16)) {
    std::string modeled;
    for (const Architecture& a : kArchitectures) {
      if (a.mma_rounding == 0) continue;
      modeled += "sm_" + std::to_string(a.capability) + (a.bf16_mma ? " " : " (f16) ");
    }
    throw std::invalid_argument("mma.sync: target must be one whose rounding is modeled, " +
                                modeled + "(got sm_" + std::to_string(target) + ")");
  }
  const bool ampere = rounding == 80;
  if (ampere && is_fp8(inputs)) {
    throw std::invalid_argument("mma.sync: target must be sm_89 or later for FP8 (got sm_" +
                                std::to_string(target) + ")");
  }
  const bool f16 = accumulator == NumberFormat::f16;
  const MmaResult result = f16 ? MmaResult::f16 : MmaResult::f32;
  if (rounding == 90) {
    const bool widened = is_fp8(inputs);
    return MmaModel{widened ? 16 : 32 / size_in_bytes(inputs),
                    25,
                    f16 ? -21 : -133,
                    result,
                    widened,
                    min_exponent(accumulator)};
  }
  const int zero_exponent = f16 ? -20 : -132;
  if (is_fp8(inputs)) {
    return MmaModel{16, 13, zero_exponent, f16 ? MmaResult::f16 : MmaResult::e8m13};
  }
  return MmaModel{16 / size_in_bytes(inputs), 24, zero_exponent, result};
}

void decode_operand(MmaOperand& operand, NumberFormat format, const void* data, int count, int k,
                    std::ptrdiff_t stride, std::ptrdiff_t k_stride, bool negate, bool widened) {
  operand.format = format;
  operand.count = count;
  operand.k = k;
  operand.value.resize(std::size_t(count) * k);
  operand.exponent.resize(std::size_t(count) * k);
  operand.has_nonfinite = false;
  const int least = min_exponent(widened ? NumberFormat::f16 : format);
  const auto* bytes = static_cast<const unsigned char*>(data);
  const auto decode_with = [&](auto to_float) {
    for (int i = 0; i < count; ++i) {
      for (int kk = 0; kk < k; ++kk) {
        const float value = to_float(bytes + i * stride + kk * k_stride);
        const std::uint32_t magnitude = bits_from_float(value) & 0x7fffffff;
        const int field = static_cast<int>(magnitude >> 23);
        const std::size_t at = std::size_t(kk) * count + i;
        operand.has_nonfinite |= field == 255;
        operand.value[at] = negate ? -value : value;
        operand.exponent[at] = magnitude == 0
                                   ? MmaOperand::kZeroExponent
                                   : static_cast<std::int16_t>(std::max(field - 127, least));
      }
    }
  };
  const auto load16 = [](const unsigned char* from) {
    std::uint16_t code;
    std::memcpy(&code, from, sizeof code);
    return code;
  };
  switch (format) {
    case NumberFormat::e4m3:
      return decode_with([](const unsigned char* from) { return e4m3_to_float(*from); });
    case NumberFormat::e5m2:
      return decode_with([](const unsigned char* from) { return e5m2_to_float(*from); });
    case NumberFormat::f16:
      return decode_with([&](const unsigned char* from) { return f16_to_float(load16(from)); });
    case NumberFormat::bf16:
      return decode_with([&](const unsigned char* from) { return bf16_to_float(load16(from)); });
    case NumberFormat::tf32:
      return decode_with([](const unsigned char* from) {
        std::uint32_t code;
        std::memcpy(&code, from, sizeof code);
        return float_from_bits(code & 0xffffe000);
      });
    case NumberFormat::f32:
      break;
  }
  throw std::invalid_argument("tensor cores do not multiply f32");
}

float multiply_accumulate_element(const MmaModel& model, const MmaOperand& a, int m,
                                  const MmaOperand& b, int n, float c) {
  const Steps steps = steps_of(model, a.k);
  float d = model.fp8_widened_to_f16 ? 0.0f : c;
  for (int first = 0; first < a.k; first += steps.length) {
    const int count = std::min(steps.length, a.k - first);
    d = step_element(model, a, m, b, n, steps.order.data() + first, count, d);
  }
  return model.fp8_widened_to_f16 ? add_last(model.result, d, c) : d;
}

void multiply_accumulate(const MmaModel& model, const MmaOperand& a, const MmaOperand& b,
                         float* accumulator, std::ptrdiff_t row_stride) {
  const Steps steps = steps_of(model, a.k);
  const bool finite = !a.has_nonfinite && !b.has_nonfinite;
  // Products of these exceed the exponent range of f32.
  const bool wide = a.format == NumberFormat::bf16 || a.format == NumberFormat::tf32;
  for (int n0 = 0; n0 < b.count; n0 += kColumns) {
    const int columns = std::min(kColumns, b.count - n0);
    for (int m = 0; m < a.count; ++m) {
      float* c = accumulator + m * row_stride + n0;
      float late[kColumns];
      if (model.fp8_widened_to_f16) {
        std::copy(c, c + columns, late);
        std::fill(c, c + columns, 0.0f);
      }
      for (int first = 0; first < a.k; first += steps.length) {
        const int* ks = steps.order.data() + first;
        const int count = std::min(steps.length, a.k - first);
        if (finite && step_row(model, a, m, b, n0, columns, ks, count, wide, c)) continue;
        for (int n = 0; n < columns; ++n) {
          c[n] = step_element(model, a, m, b, n0 + n, ks, count, c[n]);
        }
      }
      if (model.fp8_widened_to_f16) {
        for (int n = 0; n < columns; ++n) c[n] = add_last(model.result, c[n], late[n]);
      }
    }
  }
}

}  // namespace torchext::sim
