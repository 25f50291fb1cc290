// Kernels for any machine: loops that the compiler vectorizes for what every
// machine of the architecture has, with a division for each element. The other
// instruction sets call them for what is rare. csrc/device/numbers.cuh and
// formats.cuh have the same arithmetic for GPUs.
//
//   groups, encode   largest magnitude, scale, quotients
//   dequantize       products
//   transpose        16-byte squares (transpose.h)
#include <algorithm>
#include <cfloat>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "transpose.h"

namespace torchext::cpu {
namespace {

constexpr uint8_t kNaN8 = 0x7f;  // in both formats

// A format's magnitudes as signed integers. These are ordered like the values, with Inf and NaN
// last. They are signed because more machines have a vector maximum of signed than of unsigned
// integers.
template <class In>
using Magnitude = std::make_signed_t<typename In::Bits>;

template <class In>
Magnitude<In> magnitude(typename In::Bits bits) {
  return Magnitude<In>(bits & (typename In::Bits(-1) >> 1));
}

// The scale of a group whose largest magnitude is `largest`. To round it up to a power of two is to
// round its bits up to a multiple of the lowest bit that is not in `dropped_mantissa`.
template <class In, class Out>
float scale_of(Magnitude<In> largest, uint32_t dropped_mantissa) {
  const float amax = In::to_float(typename In::Bits(largest));
  const float scale = std::max(amax / Out::kMax, FLT_MIN);
  uint32_t bits = (bits_of(scale) + dropped_mantissa) & ~dropped_mantissa;
  bits = select(largest == 0, bits_of(1.0f), bits);
  bits = select(bits_of(amax) >= kInfinityBits, kNaNBits, bits);
  return float_of(bits);
}

// Calls body(n); for whole scale groups, body is compiled with n as a constant.
template <class Body>
auto with_count(int n, const Body& body) {
  return n == kScaleGroup ? body(std::integral_constant<int, int(kScaleGroup)>()) : body(n);
}

template <class In>
Magnitude<In> largest_magnitude(const typename In::Bits* x, int n) {
  return with_count(n, [x](auto count) {
    Magnitude<In> largest = 0;
    for (int i = 0; i < count; ++i) largest = std::max(largest, magnitude<In>(x[i]));
    return largest;
  });
}

// data = x / scale in FP8. Nothing needs to saturate: since no |x| exceeds amax, no quotient
// exceeds the largest FP8 value by half a place or more.
template <class In, class Out>
void encode_run(const typename In::Bits* __restrict x, int n, float scale,
                uint8_t* __restrict data) {
  if (scale != scale) {
    std::memset(data, kNaN8, n);
    return;
  }
  with_count(n, [=](auto count) {
    for (int i = 0; i < count; ++i) data[i] = Out::encode_finite(In::to_float(x[i]) / scale);
  });
}

// One group of a row: at most 128 elements, which share a scale. Returns the scale.
template <class In, class Out>
float quantize_group(const typename In::Bits* x, int n, uint32_t dropped_mantissa, uint8_t* data) {
  const float scale = scale_of<In, Out>(largest_magnitude<In>(x, n), dropped_mantissa);
  encode_run<In, Out>(x, n, scale, data);
  return scale;
}

template <class In, class Out>
struct Quantize {
  using Bits = typename In::Bits;

  static void groups(const void* x, int64_t x_stride, int groups, int cols,
                     uint32_t dropped_mantissa, uint8_t* data, int64_t data_stride, float* scales,
                     int64_t scale_stride, const Ahead&, bool) {
    for (int i = 0; i < groups; ++i)
      scales[i * scale_stride] =
          quantize_group<In, Out>(static_cast<const Bits*>(x) + i * x_stride, cols,
                                  dropped_mantissa, data + i * data_stride);
  }

  static uint32_t amax(const void* x, int64_t x_stride, int rows, int64_t cols) {
    Magnitude<In> largest = 0;
    for_each_part(rows, cols, [&](int row, int64_t col, int n) {
      const Bits* from = static_cast<const Bits*>(x) + row * x_stride + col;
      largest = std::max(largest, largest_magnitude<In>(from, n));
    });
    return uint32_t(largest);
  }

  static float scale(uint32_t amax, uint32_t dropped_mantissa) {
    return scale_of<In, Out>(Magnitude<In>(amax), dropped_mantissa);
  }

  static void encode(const void* x, int64_t x_stride, int rows, int64_t cols, float scale,
                     uint8_t* data, int64_t data_stride, const Ahead&, bool) {
    for_each_part(rows, cols, [&](int row, int64_t col, int n) {
      encode_run<In, Out>(static_cast<const Bits*>(x) + row * x_stride + col, n, scale,
                          data + row * data_stride + col);
    });
  }

  // Calls body(row, col, n) for runs of at most 128 elements.
  template <class Body>
  static void for_each_part(int rows, int64_t cols, const Body& body) {
    for (int row = 0; row < rows; ++row)
      for (int64_t col = 0; col < cols; col += kTile)
        body(row, col, int(std::min<int64_t>(kTile, cols - col)));
  }

  static constexpr QuantizeKernels kernels() { return {groups, amax, scale, encode}; }
};

template <class In, class Out>
void dequantize(const uint8_t* data, int64_t cols, const float* scales, void* y, bool) {
  auto* to = static_cast<typename Out::Bits*>(y);
  for (int64_t col = 0; col < cols; col += kTile, ++scales) {
    const uint8_t* __restrict from = data + col;
    typename Out::Bits* __restrict out = to + col;
    const float scale = *scales;
    with_count(int(std::min<int64_t>(kTile, cols - col)), [=](auto count) {
      for (int j = 0; j < count; ++j) out[j] = Out::from_float(In::to_float(from[j]) * scale);
    });
  }
}

template <class Bits>
void transpose_tile(const void* from, int64_t stride, int rows, int cols, void* to) {
  transpose(static_cast<const Bits*>(from), stride, static_cast<Bits*>(to), kTile, rows, cols);
}

// Writes a few rows of `to` at a time, through a buffer, because rows of `to`
// that are a power of two apart compete for the same few lines of cache.
void transpose_codes(const uint8_t* from, int rows, int cols, uint8_t* to, int64_t to_stride,
                     bool) {
  constexpr int kStrip = 16;
  alignas(64) uint8_t strip[kStrip][kTile];
  for (int col = 0; col < cols; col += kStrip) {
    const int count = std::min(kStrip, cols - col);
    transpose(from + col, kTile, strip[0], kTile, kTile, kStrip);
    for (int i = 0; i < count; ++i) std::memcpy(to + (col + i) * to_stride, strip[i], size_t(rows));
  }
}

void copy_codes(const uint8_t* from, int rows, int cols, uint8_t* to, int64_t to_stride, bool) {
  for (int row = 0; row < rows; ++row)
    std::memcpy(to + row * to_stride, from + row * kTile, size_t(cols));
}

bool no_columns(const float*, int64_t, int, uint32_t, uint8_t*, float*, const Ahead&) {
  return false;
}

void fence() {}

}  // namespace

const Kernels portable_kernels = {
    {{Quantize<BFloat16, E4M3>::kernels(), Quantize<BFloat16, E5M2>::kernels()},
     {Quantize<Half, E4M3>::kernels(), Quantize<Half, E5M2>::kernels()},
     {Quantize<Float, E4M3>::kernels(), Quantize<Float, E5M2>::kernels()}},
    {{dequantize<E4M3, BFloat16>, dequantize<E4M3, Half>, dequantize<E4M3, Float>},
     {dequantize<E5M2, BFloat16>, dequantize<E5M2, Half>, dequantize<E5M2, Float>}},
    {no_columns, no_columns},
    {nullptr, nullptr},
    transpose_tile<uint16_t>,
    transpose_tile<uint32_t>,
    transpose_codes,
    copy_codes,
    fence,
};

}  // namespace torchext::cpu
