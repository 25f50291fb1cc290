// Number formats for the checks of CPU kernels: decoded and rounded with ldexp and nearbyint, element
// by element, independently of csrc.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>

namespace cross {

struct NumberFormat {
  int bytes, mantissa, bias;
  bool infinity;  // whether the largest exponent is that of Inf and NaN; E4M3 has one NaN only
};

constexpr NumberFormat kE4M3{1, 3, 7, false}, kE5M2{1, 2, 15, true}, kBF16{2, 7, 127, true},
    kFP16{2, 10, 15, true}, kFP32{4, 23, 127, true};

inline uint32_t code_at(const NumberFormat& f, const void* data, int64_t i) {
  uint32_t code = 0;  // little-endian, as all machines that torch runs on
  std::memcpy(&code, static_cast<const uint8_t*>(data) + i * f.bytes, size_t(f.bytes));
  return code;
}

inline double decode(const NumberFormat& f, uint32_t code) {
  const uint32_t sign = 1u << (8 * f.bytes - 1), magnitude = code & (sign - 1);
  const int exponent = int(magnitude >> f.mantissa);
  const double fraction = magnitude & ((1u << f.mantissa) - 1);
  const int last = int((sign - 1) >> f.mantissa);
  double value;
  if (f.infinity && exponent == last)
    value = fraction == 0 ? std::numeric_limits<double>::infinity() : std::nan("");
  else if (!f.infinity && magnitude == sign - 1)
    value = std::nan("");
  else if (exponent == 0)
    value = std::ldexp(fraction, 1 - f.bias - f.mantissa);
  else
    value = std::ldexp(fraction + std::ldexp(1.0, f.mantissa), exponent - f.bias - f.mantissa);
  return code & sign ? -value : value;
}

// `value` rounded to the format, to nearest even. Beyond its largest number: Inf.
inline double rounded(const NumberFormat& f, double value) {
  if (!std::isfinite(value) || value == 0) return value;
  int exponent;
  std::frexp(value, &exponent);
  const int least = 1 - f.bias - f.mantissa, place = std::max(exponent - 1 - f.mantissa, least);
  const double result = std::ldexp(std::nearbyint(std::ldexp(value, -place)), place);
  const double beyond = std::ldexp(1.0, int((1u << (8 * f.bytes - 1 - f.mantissa)) - 1) - f.bias);
  return f.infinity && std::abs(result) >= beyond
             ? std::copysign(std::numeric_limits<double>::infinity(), value)
             : result;
}

// Equal, zeros with their signs; NaN equals NaN.
inline bool same(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b && std::signbit(a) == std::signbit(b);
}

inline int& failures() {
  static int count = 0;
  return count;
}

// Counts a failure, and prints the first twenty.
template <class... Arguments>
void fail(const char* format, Arguments... arguments) {
  if (++failures() > 20) return;
  std::printf("FAILED: ");
  std::printf(format, arguments...);
  std::printf("\n");
}

using Random = std::mt19937;

}  // namespace cross
