// The inner loops of quantization on a CPU. Each instruction set implements
// them in a file of its own; kernels() picks one at run time. Callers pass parts
// of a matrix that fit in a cache. All of them return the bits that
// docs/numerics.md defines.
//
// The caller has set the default floating-point environment. Strides are in
// elements. `stream` asks for stores that bypass the cache: the destination and
// its stride are then multiples of 64 bytes, and the caller ends with fence().
#pragma once

#include "../runtime/cpu_level.h"
#include "../runtime/formats.h"
#include "../runtime/views.h"

namespace torchext::cpu {

constexpr int kTile = int(kScaleGroup);

// Rows of memory that will be read soon. A processor fetches ahead of what it
// reads within a row, but not from row to row. So kernels fetch a row of this
// while they compute a row, and not many at once: few misses can be under way
// at a time.
struct Ahead {
  const uint8_t* data = nullptr;
  int64_t pitch = 0;  // bytes
  int rows = 0;
  int bytes = 0;

  // Fetches row i, if there is one, into the L2 cache. Always inlined, because
  // GCC otherwise takes a function that only prefetches for one without effect.
  inline __attribute__((always_inline)) void fetch(int i) const {
    if (i >= rows) return;
    const uint8_t* row = data + i * pitch;
    for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
};

// Kernels for one dtype of x and one FP8 format.
struct QuantizeKernels {
  // Quantizes `groups` scale groups of `cols` <= 128 contiguous elements each.
  void (*groups)(const void* x, int64_t x_stride, int groups, int cols, uint32_t dropped_mantissa,
                 uint8_t* data, int64_t data_stride, float* scales, int64_t scale_stride,
                 const Ahead& ahead, bool stream);
  // The largest magnitude: bits of x's format without the sign.
  uint32_t (*amax)(const void* x, int64_t x_stride, int rows, int64_t cols);
  // The scale of elements with this largest magnitude.
  float (*scale)(uint32_t amax, uint32_t dropped_mantissa);
  // data = x / scale.
  void (*encode)(const void* x, int64_t x_stride, int rows, int64_t cols, float scale,
                 uint8_t* data, int64_t data_stride, const Ahead& ahead, bool stream);
};

// Quantizes a tile of `rows` <= 128 rows of 128 BF16 elements: along rows into `data`, and along
// columns into `data_t`. `scales` and `scales_t` have room for 128. False, and then without a result, if
// a scale is NaN or too small for the kernel.
using QuantizeBothKernel = bool (*)(const uint16_t* x, int64_t stride, int rows,
                                    uint32_t dropped_mantissa, uint8_t* data, int64_t data_stride,
                                    float* scales, bool stream, uint8_t* data_t,
                                    int64_t data_t_stride, float* scales_t, bool stream_t,
                                    const Ahead& ahead);

struct Kernels {
  QuantizeKernels quantize[3][2];  // [dtype_index][e5m2]
  // y = data * scales; each scale serves 128 columns.
  void (*dequantize[2][3])(const uint8_t* data, int64_t cols, const float* scales, void* y,
                           bool stream);  // [e5m2][dtype_index]
  // Quantizes `rows` <= 128 rows of 128 elements whose columns are scale groups: codes[r * 128 + c],
  // and a scale for each column. False, and then without a result, if a scale is NaN or too small for
  // the kernel: the caller then transposes x. [e5m2]
  bool (*columns[2])(const float* x, int64_t stride, int rows, uint32_t dropped_mantissa,
                     uint8_t* codes, float* scales, const Ahead& ahead);
  // nullptr if the instruction set has no such kernel. [e5m2]
  QuantizeBothKernel both[2];
  // to[c * 128 + r] = from[r, c] for at most 128 x 128 elements of 2 or 4
  // bytes.
  void (*transpose16)(const void* from, int64_t stride, int rows, int cols, void* to);
  void (*transpose32)(const void* from, int64_t stride, int rows, int cols, void* to);
  // to[c, r] = from[r * 128 + c] for at most 128 x 128 bytes. `from` has 128 x
  // 128 in any case.
  void (*transpose8)(const uint8_t* from, int rows, int cols, uint8_t* to, int64_t to_stride,
                     bool stream);
  // to[r, c] = from[r * 128 + c], likewise.
  void (*copy8)(const uint8_t* from, int rows, int cols, uint8_t* to, int64_t to_stride,
                bool stream);
  // Orders streaming stores before whatever the thread writes next.
  void (*fence)();
};

const Kernels& kernels();

inline uint32_t dropped_mantissa(const QuantizeOptions& options) {
  return options.pow2_scale ? 0x007fffff : 0;
}

inline int dtype_index(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? 0 : dtype == ScalarType::Half ? 1 : 2;
}

extern const Kernels portable_kernels;
#ifdef TORCHEXT_X86_LEVELS
extern const Kernels avx2_kernels, avx512_kernels, avx512_vbmi_kernels;
#endif
#ifdef TORCHEXT_ARM_LEVELS
extern const Kernels neon_kernels;
#endif

// ---- quotients of BF16 elements, tabulated ----
//
// For x = 1.m * 2^e in BF16, the FP8 significand of x / scale depends on m, the
// 7 fraction bits of x, and on the fraction of the scale. A scale is amax /
// fp8_max, where fp8_max = 7 * 2^n, or a power of two, which is 7 * 2^n /
// fp8_max. So its fraction is that of RN(a / 7), where a is a BF16 value: there
// are only 128 different fractions, and `key` is the fraction of a.
//
// significand[key][m] is the code of x / scale less (e' << mantissa bits),
// where e' is defined at exponents_below(). It
// lies in 0 to 2 * 2^(mantissa bits). For machines without look-ups in 128
// bytes: it grows with m, by at most one within 8 neighbors m, so
//     significand[key][m] = first[key][m / 8] + (m > limit[key][m / 8]).
struct Significands {
  alignas(64) uint8_t significand[128][128];
  alignas(64) uint8_t first[128][16];
  alignas(64) uint8_t limit[128][16];
};
const Significands& significands(bool e5m2);

// Codes are normal if e' >= 1, whatever the significands, where
//     e' = exponent of x - exponent of the scale + exponents_below(e5m2).
constexpr int exponents_below(bool e5m2) {
  return e5m2 ? 14 : 6;
}

inline uint32_t significand_key(float scale) {
  return (bits_of(scale * 7.0f) + 0x8000) >> 16 & 0x7f;
}

}  // namespace torchext::cpu
