// Checks on the host what csrc/device/numbers.cuh claims: scales against a true division,
// and quotients, rounded to FP8, against the FP8 of the correctly rounded FP32 quotient. Prints
// every kind of mismatch once and returns how many kinds there were.
#include "../../csrc/device/numbers.cuh"

#include <cstdio>
#include <cstdlib>
#include <random>

using namespace torchext::quantizers;

namespace {

struct Format {
  const char* name;
  float max;
  int mantissa_bits, min_exponent;
};
constexpr Format kFormats[] = {{"e4m3", 448.0f, 3, -6}, {"e5m2", 57344.0f, 2, -14}};

int mismatches = 0;

void expect(bool holds, const char* what, float a, float b, long& count) {
  if (!holds && count++ == 0) {
    ++mismatches;
    std::printf("mismatch: %s (%a, %a)\n", what, a, b);
  }
}

// Rounds to nearest even and saturates; keeps the sign of zero.
double to_fp8(float x, const Format& f) {
  if (x == 0 || std::isnan(x)) return x;
  const int exponent = std::max(std::ilogb(x), f.min_exponent);
  const double quantum = std::ldexp(1.0, exponent - f.mantissa_bits);
  return std::copysign(std::min(std::nearbyint(std::fabs(x) / quantum) * quantum, double(f.max)),
                       double(x));
}

bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

void check_scale(uint32_t amax_bits, const Format& f, long& count) {
  const float amax = float_of(amax_bits);
  const float scale = scale_of(amax_bits, f.max, 0).scale;
  const float pow2 = scale_of(amax_bits, f.max, kMantissa).scale;
  if (amax_bits >= 0x7f800000)
    return expect(bits_of(scale) == 0x7fc00000 && bits_of(pow2) == 0x7fc00000, "poison", amax,
                  scale, count);
  const float expected = amax == 0 ? 1.0f : std::max(amax / f.max, 0x1p-126f);
  expect(bits_of(scale) == bits_of(expected), "scale", amax, scale, count);
  int exponent;
  const bool exact = std::frexp(expected, &exponent) == 0.5f;
  expect(pow2 == std::ldexp(1.0f, exact ? exponent - 1 : exponent), "power of two", amax, pow2,
         count);
}

// Checks x / scale, for a scale that scale_of can give.
void check_quotient(float x, float scale, const Format& f, long& count) {
  GroupScale s;
  s.scale = scale;
  set_divisor(s);
  expect(same(to_fp8(divide(x * s.lift, s), f), to_fp8(x / scale, f)), f.name, x, scale, count);
}

void check_scales(const Format& f) {
  long count = 0;
  for (const uint32_t exponent : {0u, 1u, 8u, 9u, 10u, 16u, 127u, 254u, 255u})
    for (uint32_t mantissa = 0; mantissa <= kMantissa; ++mantissa)
      check_scale(exponent << 23 | mantissa, f, count);
  for (uint32_t bits = 0; bits < 0x80000000; bits += 4099) check_scale(bits, f, count);
}

// Checks all mantissas for which divide() could differ from the true quotient q after rounding to
// FP8. For this, q must be within 2^-22 ulp of the end of an FP32 rounding interval around a value
// half-way between FP8 neighbors; elsewhere the error of divide(), 3 * 2^-24 ulp before the last
// rounding, is too small to matter. Let the mantissas a and b be integers of 24 bits,
// q = a * 2^s / b with s = 23 or 24, and H = M * 2^19 +- 1/2 the end, where M / 16 is the half-way
// value (5 significant bits). The condition is then |2^(s+1) a - 2 H b| <= 8. Since 2 H is odd,
// each remainder determines one b modulo 2^(s+1), so that all such pairs can be listed.
void check_critical_quotients(const Format& f) {
  long count = 0, pairs = 0;
  for (uint64_t m = 16; m <= 32; ++m)
    for (const int side : {-1, 1})
      for (const int shift : {24, 25}) {
        if ((m == 16 && side < 0) || (m == 32 && side > 0)) continue;  // in the next binade
        const uint64_t end = (m << 20) + side, modulus = 1ull << shift;
        uint64_t inverse = 1;
        for (int i = 0; i < 6; ++i) inverse *= 2 - end * inverse;
        for (int64_t remainder = -64; remainder <= 64; ++remainder) {
          const uint64_t b = (uint64_t(-remainder) * inverse) & (modulus - 1);
          const uint64_t a = (b * end + remainder) >> shift;
          if (a >> 23 != 1 || b >> 23 != 1) continue;
          ++pairs;
          for (int exponent = -126; exponent < 105; ++exponent)
            for (int ratio = f.min_exponent - f.mantissa_bits - 2; ratio < 17; ++ratio) {
              const float scale = std::ldexp(float(b), exponent - 23);
              const float x = std::ldexp(float(a), exponent - 23 + ratio);
              if (std::isfinite(x)) check_quotient(x, scale, f, count);
            }
        }
      }
  if (pairs < 1000) {
    ++mismatches;
    std::printf("mismatch: only %ld critical pairs\n", pairs);
  }
}

void check_random_quotients(const Format& f) {
  long count = 0;
  std::mt19937_64 random(f.mantissa_bits);
  for (int i = 0; i < 400000; ++i) {
    const uint32_t amax_bits = 1 + random() % 0x7f7fffff;
    const float scale = scale_of(amax_bits, f.max, random() % 4 ? 0 : kMantissa).scale;
    const float amax = float_of(amax_bits);
    check_quotient(amax, scale, f, count);
    check_quotient(-0.0f, scale, f, count);
    check_quotient(0.0f, scale, f, count);
    for (int j = 0; j < 4; ++j) {  // any value, and values nearly half-way between FP8 neighbors
      const float x = float_of(random() % (amax_bits + 1));
      check_quotient(-x, scale, f, count);
      const double wanted = std::ldexp(int(16 + random() % 16), int(random() % 40) - 24);
      const float close = float(wanted * scale);
      for (int step = -2; step <= 2; ++step) {
        const float near = float_of(bits_of(close) + step);
        if (near >= 0 && near <= amax) check_quotient(near, scale, f, count);
      }
    }
  }
}

}  // namespace

int main() {
  for (const Format& f : kFormats) {
    check_scales(f);
    check_critical_quotients(f);
    check_random_quotients(f);
  }
  return mismatches;
}
