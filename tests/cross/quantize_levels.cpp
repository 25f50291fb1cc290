// Checks every table of quantization kernels that this machine can run (csrc/cpu/kernels.h):
// all results have the bits that docs/numerics.md defines, computed here element by element.
#include <algorithm>
#include <cfloat>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/runtime/cpu_level.h"
#include "numbers.h"

namespace torchext::cpu {}  // namespace torchext::cpu

namespace cross {
namespace {

using torchext::cpu::Kernels;
using torchext::cpu::QuantizeKernels;

constexpr NumberFormat kWide[] = {kBF16, kFP16, kFP32};  // by dtype_index

// Numbers of all exponents, or near 1; some groups with zeros, subnormals, Inf or NaN.
std::vector<uint8_t> numbers(const NumberFormat& f, int count, int kind, Random& random) {
  std::vector<uint8_t> data(size_t(count * f.bytes));
  const uint32_t sign = 1u << (8 * f.bytes - 1);
  const uint32_t one = uint32_t(f.bias) << f.mantissa, fraction = (1u << f.mantissa) - 1;
  const uint32_t infinity = (sign - 1) & ~fraction;
  for (int i = 0; i < count; ++i) {
    uint32_t code = 0;
    if (kind == 0)  // near 1
      code = one + (random() % 6 << f.mantissa) + (random() & fraction);
    else if (kind == 1)  // any finite number
      code = uint32_t(random() % infinity);
    else if (kind == 2)  // subnormal
      code = random() & fraction;
    else if (kind == 3)  // zeros, and small numbers beside one large
      code = i == count / 2 ? one + (7u << f.mantissa)
             : random() % 2 ? 0
                            : one - (9u << f.mantissa);
    else if (i == count / 3)  // Inf, NaN
      code = kind == 4 ? infinity : infinity + 1;
    else
      code = one + (random() & fraction);
    if (kind != 6 && random() % 2) code |= sign;
    if (kind == 6) code = random() % 2 ? 0 : sign;
    std::memcpy(&data[size_t(i * f.bytes)], &code, size_t(f.bytes));
  }
  return data;
}
constexpr int kKinds = 7;

float expected_scale(float amax, bool e5m2, bool pow2) {
  if (!std::isfinite(amax)) return std::nanf("");
  if (amax == 0) return 1.0f;
  const float scale = std::max(amax / (e5m2 ? 57344.0f : 448.0f), FLT_MIN);
  if (!pow2) return scale;
  int exponent;
  const float fraction = std::frexp(scale, &exponent);
  return std::ldexp(1.0f, fraction == 0.5f ? exponent - 1 : exponent);
}

struct Checker {
  const char* name;
  const Kernels& kernels;
  Random random{11};
  int64_t elements = 0;

  void code(const char* what, const NumberFormat& out, float x, float scale, uint8_t got) {
    ++elements;
    const double expected = std::isnan(scale) ? std::nan("") : rounded(out, double(x / scale));
    if (!same(decode(out, got), expected) || (std::isnan(scale) && got != 0x7f))
      fail("%s: %s: %.9g / %.9g is %.9g (code %02x), not %.9g", name, what, double(x),
           double(scale), decode(out, got), got, expected);
  }

  void quantize(int dtype, bool e5m2, bool pow2, int kind, int cols, bool stream) {
    const NumberFormat &f = kWide[dtype], &out = e5m2 ? kE5M2 : kE4M3;
    const QuantizeKernels& k = kernels.quantize[dtype][e5m2];
    const uint32_t dropped = pow2 ? 0x007fffff : 0;
    const int groups = 21, stride = 192;  // elements; of the data: bytes, a multiple of 64
    // Nothing lies behind the last group, so that a sanitizer sees reads beyond it.
    const std::vector<uint8_t> x = numbers(f, (groups - 1) * stride + cols, kind, random);
    alignas(64) static uint8_t data[groups * stride];
    std::memset(data, 0xee, sizeof data);
    constexpr int kScaleStride = 3;
    float scales[groups * kScaleStride];
    k.groups(x.data(), stride, groups, cols, dropped, data, stride, scales, kScaleStride,
             torchext::cpu::Ahead(), stream);
    if (stream) kernels.fence();
    for (int g = 0; g < groups; ++g) {
      float amax = 0;
      for (int i = 0; i < cols; ++i) {
        const float v = std::abs(float(decode(f, code_at(f, x.data(), g * stride + i))));
        amax = v > amax || std::isnan(v) ? v : amax;
        if (std::isnan(amax)) break;
      }
      const float scale = expected_scale(amax, e5m2, pow2);
      const float got = scales[g * kScaleStride];
      if (!same(got, scale))
        fail("%s: scale of amax %.9g is %.9g, not %.9g", name, double(amax), double(got),
             double(scale));
      for (int i = 0; i < cols; ++i) {
        const float v = float(decode(f, code_at(f, x.data(), g * stride + i)));
        code("groups", out, v, scale, data[g * stride + i]);
      }
    }
    const std::vector<uint8_t> part(x.end() - (6 * stride + cols) * f.bytes, x.end());
    block(f, out, k, part, e5m2, pow2, cols, stride, stream);
  }

  // One scale for a block of rows: amax, scale, encode.
  void block(const NumberFormat& f, const NumberFormat& out, const QuantizeKernels& k,
             const std::vector<uint8_t>& x, bool e5m2, bool pow2, int cols, int stride,
             bool stream) {
    const int rows = 7;
    uint32_t largest = 0;
    const uint32_t mask = uint32_t((uint64_t(1) << (8 * f.bytes - 1)) - 1);
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < cols; ++i)
        largest = std::max(largest, code_at(f, x.data(), r * stride + i) & mask);
    const uint32_t amax = k.amax(x.data(), stride, rows, cols);
    if (amax != largest) fail("%s: amax is %x, not %x", name, amax, largest);
    const float value = float(decode(f, largest)), expected = expected_scale(value, e5m2, pow2);
    const float scale = k.scale(largest, pow2 ? 0x007fffff : 0);
    if (!same(scale, expected))
      fail("%s: scale of %.9g is %.9g", name, double(value), double(scale));
    alignas(64) static uint8_t data[7 * 192];
    k.encode(x.data(), stride, rows, cols, expected, data, stride, torchext::cpu::Ahead(), stream);
    if (stream) kernels.fence();
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < cols; ++i) {
        const float v = float(decode(f, code_at(f, x.data(), r * stride + i)));
        code("encode", out, v, expected, data[r * stride + i]);
      }
  }

  // A tile of BF16 along rows and along columns at once.
  void both(bool e5m2, bool pow2, int kind, int rows, bool stream) {
    const auto kernel = kernels.both[e5m2];
    if (kernel == nullptr) return;
    const NumberFormat& out = e5m2 ? kE5M2 : kE4M3;
    constexpr int n = 128, kStride = 136, kPitch = 192;
    const std::vector<uint8_t> bytes = numbers(kBF16, (rows - 1) * kStride + n, kind, random);
    const auto at = [&](int row, int col) {
      return float(decode(kBF16, code_at(kBF16, bytes.data(), row * kStride + col)));
    };
    // The largest magnitudes of rows, then of columns.
    std::vector<float> largest(2 * n), scales(2 * n), got_scales(2 * n);
    bool tabulated = true;
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < n; ++c)
        for (float* to : {&largest[size_t(r)], &largest[size_t(n + c)]})
          *to = std::isnan(at(r, c)) || std::abs(at(r, c)) > *to ? std::abs(at(r, c)) : *to;
    for (size_t i = 0; i < 2 * n; ++i) {
      scales[i] = expected_scale(largest[i], e5m2, pow2);
      tabulated &= scales[i] >= 0x1p-100f;
    }
    std::vector<uint16_t> x(bytes.size() / 2);
    std::memcpy(x.data(), bytes.data(), bytes.size());
    alignas(64) static uint8_t data[n * kPitch], data_t[n * kPitch];
    std::memset(data_t, 0xee, sizeof data_t);
    const bool done =
        kernel(x.data(), kStride, rows, pow2 ? 0x007fffff : 0, data, kPitch, got_scales.data(),
               stream, data_t, kPitch, &got_scales[n], stream, torchext::cpu::Ahead());
    if (stream) kernels.fence();
    if (done != tabulated) fail("%s: both: %d, though all have tables: %d", name, done, tabulated);
    if (!done) return;
    for (int i = 0; i < 2 * n; ++i)
      if ((i >= n || i < rows) && !same(got_scales[size_t(i)], scales[size_t(i)]))
        fail("%s: both: scale %d of %d rows", name, i, rows);
    for (int c = 0; c < n; ++c) {
      for (int r = 0; r < rows; ++r) {
        code("both", out, at(r, c), scales[size_t(r)], data[r * kPitch + c]);
        code("both, columns", out, at(r, c), scales[size_t(n + c)], data_t[c * kPitch + r]);
      }
      for (int r = rows; r < kPitch; ++r)
        if (data_t[c * kPitch + r] != 0xee) fail("%s: both: writes behind %d rows", name, rows);
    }
  }

  // All codes, with scales of many exponents.
  void dequantize(bool e5m2, int dtype, int cols, bool stream) {
    const NumberFormat &in = e5m2 ? kE5M2 : kE4M3, &out = kWide[dtype];
    std::vector<uint8_t> data;
    for (int i = 0; i < cols; ++i) data.push_back(uint8_t(random()));
    std::vector<float> scales;
    for (int i = 0; i < cols; i += 128)
      scales.push_back(std::ldexp(1.0f + float(random() % 4096) / 4096, int(random() % 60) - 40));
    if (cols > 300) scales[1] = std::nanf("");
    alignas(64) static uint8_t y[4 * 1024];
    kernels.dequantize[e5m2][dtype](data.data(), cols, scales.data(), y, stream);
    if (stream) kernels.fence();
    for (int i = 0; i < cols; ++i) {
      ++elements;
      const float product = float(decode(in, data[size_t(i)])) * scales[size_t(i / 128)];
      const double expected = rounded(out, double(product)), got = decode(out, code_at(out, y, i));
      if (!same(got, expected))
        fail("%s: dequantize: code %02x times %.9g is %.9g, not %.9g", name, data[size_t(i)],
             double(scales[size_t(i / 128)]), got, expected);
    }
  }

  template <class Bits>
  void transpose_wide(void (*transpose)(const void*, int64_t, int, int, void*), int rows,
                      int cols) {
    const int stride = 150;
    std::vector<Bits> from(size_t(128 * stride));
    for (Bits& x : from) x = Bits(random());
    alignas(64) static Bits to[128 * 128];
    transpose(from.data(), stride, rows, cols, to);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c, ++elements)
        if (to[c * 128 + r] != from[size_t(r * stride + c)])
          fail("%s: transpose of %d x %d, (%d, %d)", name, rows, cols, r, c);
  }

  void move_codes(int rows, int cols, bool stream) {
    alignas(64) static uint8_t from[128 * 128], to[128 * 192];
    for (uint8_t& x : from) x = uint8_t(random());
    for (bool transposed : {false, true}) {
      std::memset(to, 0, sizeof to);
      (transposed ? kernels.transpose8 : kernels.copy8)(from, rows, cols, to, 192, stream);
      if (stream) kernels.fence();
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < cols; ++c, ++elements)
          if (to[transposed ? c * 192 + r : r * 192 + c] != from[r * 128 + c])
            fail("%s: codes of %d x %d, (%d, %d)", name, rows, cols, r, c);
    }
  }

  void run() {
    for (int cols : {1, 7, 31, 64, 100, 127, 128})
      for (bool stream : {false, true}) {
        for (int dtype = 0; dtype < 3; ++dtype)
          for (bool e5m2 : {false, true})
            for (bool pow2 : {false, true})
              for (int kind = 0; kind < kKinds; ++kind)
                quantize(dtype, e5m2, pow2, kind, cols, stream);
        for (int rows : {1, 17, 64, 128}) {
          if (!stream) {
            transpose_wide<uint16_t>(kernels.transpose16, rows, cols);
            transpose_wide<uint32_t>(kernels.transpose32, rows, cols);
          }
          move_codes(rows, cols, stream);
        }
      }
    for (int rows : {1, 17, 64, 128})
      for (bool stream : {false, true})
        for (bool e5m2 : {false, true})
          for (bool pow2 : {false, true})
            for (int kind = 0; kind < kKinds; ++kind) both(e5m2, pow2, kind, rows, stream);
    for (int cols : {1, 63, 128, 200, 512, 1000})
      for (bool stream : {false, true})
        for (int dtype = 0; dtype < 3; ++dtype)
          for (bool e5m2 : {false, true}) dequantize(e5m2, dtype, cols, stream);
  }
};

}  // namespace

void check_quantize_levels() {
  using namespace torchext::cpu;
  struct Named {
    const char* name;
    const Kernels* kernels;
    bool here;
  };
  const Named tables[] = {
      {"portable", &portable_kernels, true},
#ifdef TORCHEXT_X86_LEVELS
      {"avx2", &avx2_kernels, torchext::cpu_level() >= torchext::CpuLevel::avx2},
      {"avx512", &avx512_kernels, torchext::cpu_level() >= torchext::CpuLevel::avx512},
      {"avx512_vbmi", &avx512_vbmi_kernels,
       torchext::cpu_level() >= torchext::CpuLevel::avx512 && torchext::uses_avx512_vbmi()},
#endif
#ifdef TORCHEXT_ARM_LEVELS
      {"neon", &neon_kernels, true},
#endif
  };
  for (const Named& named : tables) {
    if (!named.here) {
      std::printf("quantize %s: skipped: this machine lacks it\n", named.name);
      continue;
    }
    Checker checker{named.name, *named.kernels};
    checker.run();
    std::printf("quantize %s: %lld elements\n", named.name, (long long)checker.elements);
  }
}

}  // namespace cross
