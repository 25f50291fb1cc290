// NEON with BF16: products of BF16 pairs with FP32 sums (bfdot). The loops are in loops.h. A tile of
// 6 x 16 fills 24 of 32 registers. FP8 becomes BF16 by tables of 128 bytes, one for low and one for
// high bytes; a step is a pair of K, and a quad of K becomes the pairs (0, 2) and (1, 3), because
// these are the even and the odd bytes of its codes.
#include <algorithm>
#include <cstring>
#include <utility>

#include "bf16_table.h"
#include "kernel.h"

#ifdef TORCHEXT_ARM_LEVELS
#include <arm_neon.h>

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+bf16")
#include "loops.h"

namespace torchext::cpu_gemm {
namespace {

// FP8 codes to BF16: `even` gets those of bytes 0, 2, ..., `odd` the others.
template <class Number>
struct Decode {
  uint8x16x4_t low[2], high[2];

  Decode() {
    for (int i = 0; i < 2; ++i) {
      low[i] = vld1q_u8_x4(kBF16Table<Number>.low + 64 * i);
      high[i] = vld1q_u8_x4(kBF16Table<Number>.high + 64 * i);
    }
  }

  static uint8x16_t look_up(const uint8x16x4_t* table, uint8x16_t index) {
    // An index beyond a table gives 0, or keeps what the first lookup found.
    return vqtbx4q_u8(vqtbl4q_u8(table[0], index), table[1], vsubq_u8(index, vdupq_n_u8(64)));
  }

  void operator()(uint8x16_t codes, uint32x4_t& even, uint32x4_t& odd) const {
    const uint8x16_t magnitudes = vandq_u8(codes, vdupq_n_u8(0x7f));
    const uint8x16_t low_bytes = look_up(low, magnitudes);
    const uint8x16_t high_bytes = vbslq_u8(vdupq_n_u8(0x80), codes, look_up(high, magnitudes));
    even = vreinterpretq_u32_u8(vtrn1q_u8(low_bytes, high_bytes));
    odd = vreinterpretq_u32_u8(vtrn2q_u8(low_bytes, high_bytes));
  }
};

uint8x16_t load_codes(const uint8_t* from, int count) {
  if (count >= 16) return vld1q_u8(from);
  uint8_t codes[16] = {};
  if (count > 0) std::memcpy(codes, from, count);
  return vld1q_u8(codes);
}

// The steps of a segment of `count` elements; a quad of K becomes the pairs (0, 2) and (1, 3).
void pack_bf16(const uint16_t* x, int count, uint32_t* steps) {
  uint16_t row[Depth::kSegment] = {};
  std::memcpy(row, x, count * sizeof *x);
  for (int k = 0; k < count; k += 4) {
    steps[k / 2] = row[k] | uint32_t(row[k + 2]) << 16;
    steps[k / 2 + 1] = row[k + 1] | uint32_t(row[k + 3]) << 16;
  }
}

struct Neon {
  static constexpr int kLanes = 4, kVectors = 4, kTileRows = 6, kPair = 2, kChunk = 8;
  static constexpr int kPanel = kLanes * kVectors;
  using Element = uint16_t;
  using Step = uint32_t;
  using Vector = float32x4_t;
  using Operands = bfloat16x8_t;

  static bfloat16x8_t load(const uint16_t* x) { return vreinterpretq_bf16_u16(vld1q_u16(x)); }
  static bfloat16x8_t broadcast(const uint32_t* x) {
    return vreinterpretq_bf16_u32(vld1q_dup_u32(x));
  }
  static float32x4_t dot(float32x4_t sum, bfloat16x8_t a, bfloat16x8_t b) {
    return vbfdotq_f32(sum, b, a);
  }
  static float32x4_t load_floats(const float* x) { return vld1q_f32(x); }
  static void store_floats(float* x, float32x4_t v) { vst1q_f32(x, v); }
  static float32x4_t add_scaled(float32x4_t total, float32x4_t sum, float a_scale,
                                float32x4_t b_scale) {
    return vfmaq_f32(total, sum, vmulq_n_f32(b_scale, a_scale));
  }

  static bool pack_tile(const Operand&, const Rows&, int64_t, int, uint32_t*) { return false; }

  template <class Number>
  static void pack_row_of(const uint8_t* codes, int count, uint32_t* steps) {
    const Decode<Number> decode;
    for (int k = 0; k < count; k += 16) {
      uint32x4x2_t pairs;
      decode(load_codes(codes + k, count - k), pairs.val[0], pairs.val[1]);
      vst2q_u32(steps + k / 2, pairs);  // even and odd in turn
    }
  }

  static float pack_row(const Operand& a, int64_t row, int64_t column, int count, uint32_t* steps) {
    const int64_t first = row * a.stride + column;
    if (a.format == Format::bf16)
      pack_bf16(static_cast<const uint16_t*>(a.data) + first, count, steps);
    else
      (a.format == Format::e5m2
           ? pack_row_of<E5M2>
           : pack_row_of<E4M3>)(static_cast<const uint8_t*>(a.data) + first, count, steps);
    return 1;
  }

  template <class Number>
  static void pack_panel_of(const uint8_t* from, int64_t stride, int rows, int depth,
                            uint16_t* out) {
    const Decode<Number> decode;
    for (int k = 0; k < depth; k += 16) {
      for (int v = 0; v < kVectors; ++v) {
        uint32x4_t x[4];
        for (int i = 0; i < 4; ++i) {
          const int row = v * kLanes + i;
          x[i] = vreinterpretq_u32_u8(row < rows ? load_codes(from + row * stride + k, depth - k)
                                                 : vdupq_n_u8(0));
        }
        // A transpose of 4 x 4: lane i of quads[q] has quad q of row i.
        const uint64x2_t y[4] = {vreinterpretq_u64_u32(vtrn1q_u32(x[0], x[1])),
                                 vreinterpretq_u64_u32(vtrn2q_u32(x[0], x[1])),
                                 vreinterpretq_u64_u32(vtrn1q_u32(x[2], x[3])),
                                 vreinterpretq_u64_u32(vtrn2q_u32(x[2], x[3]))};
        const uint64x2_t quads[4] = {vtrn1q_u64(y[0], y[2]), vtrn1q_u64(y[1], y[3]),
                                     vtrn2q_u64(y[0], y[2]), vtrn2q_u64(y[1], y[3])};
        for (int q = 0; q < 4; ++q) {
          uint32x4_t even, odd;
          decode(vreinterpretq_u8_u64(quads[q]), even, odd);
          uint16_t* to = out + (k + 4 * q) * kPanel + v * kLanes * kPair;
          vst1q_u16(to, vreinterpretq_u16_u32(even));
          vst1q_u16(to + kPair * kPanel, vreinterpretq_u16_u32(odd));
        }
      }
    }
  }

  static void pack_panel(const Operand& b, int64_t row, int rows, int64_t column, int depth,
                         uint16_t* out) {
    const auto* from = static_cast<const uint8_t*>(b.data) + row * b.stride + column;
    (b.format == Format::e5m2 ? pack_panel_of<E5M2> : pack_panel_of<E4M3>)(from, b.stride, rows,
                                                                           depth, out);
  }
};

}  // namespace

const Level neon = Loops<Neon>::level();

}  // namespace torchext::cpu_gemm
#pragma GCC pop_options
#endif
