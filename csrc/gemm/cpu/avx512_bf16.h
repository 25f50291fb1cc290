// Instructions for Loops that multiply pairs of BF16 (vdpbf16ps), on 512-bit vectors. A tile of 14 x
// 32 fills 28 of 32 registers. A step is a pair of K. Decode turns FP8 codes into BF16. Include it
// after a pragma that selects AVX512-BF16.
#pragma once

#include "loops.h"
#include "transpose_avx512.h"

namespace torchext::cpu_gemm {

template <class Decode>
struct BF16 {
  using FromFP8 = Decode;
  static constexpr int kLanes = 16, kVectors = 2, kTileRows = 14, kPair = 2, kChunk = 16;
  static constexpr int kPanel = kLanes * kVectors;
  using Element = uint16_t;
  using Step = uint32_t;
  using Vector = __m512;
  using Operands = __m512i;

  static __m512i load(const uint16_t* x) { return _mm512_loadu_si512(x); }
  static __m512i broadcast(const uint32_t* x) { return _mm512_set1_epi32(int(*x)); }
  static __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)a);
  }
  static __m512 load_floats(const float* x) { return _mm512_loadu_ps(x); }
  static void store_floats(float* x, __m512 v) { _mm512_storeu_ps(x, v); }
  static __m512 add_scaled(__m512 total, __m512 sum, float a_scale, __m512 b_scale) {
    return _mm512_fmadd_ps(sum, _mm512_mul_ps(_mm512_set1_ps(a_scale), b_scale), total);
  }

  static void pack_codes(const Decode& decode, const uint8_t* codes, int count, uint32_t* steps) {
    for (int k = 0; k < Depth::kSegment; k += 64) {
      const int left = std::max(count - k, 0);
      const __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
      __m512i first, second;
      decode(_mm512_maskz_loadu_epi8(mask, codes + k), first, second);
      alignas(64) uint32_t pairs[2][16];
      _mm512_store_si512(pairs[0], first);
      _mm512_store_si512(pairs[1], second);
      for (int i = 0; i < 32; ++i) steps[k / 2 + i] = pairs[i / 4 % 2][i / 8 * 4 + i % 4];
    }
  }

  // Packs all rows of a tile at once, if they are FP8 and lie one stride apart.
  static bool pack_tile(const Operand& a, const Rows& rows, int64_t column, int count,
                        uint32_t* steps) {
    if (a.format == Format::bf16 || rows.list != nullptr) return false;
    const Decode decode(table_of(a.format));
    const auto* from = static_cast<const uint8_t*>(a.data) + rows.first * a.stride + column;
    const int height = int(rows.count);
    const __mmask16 mask = __mmask16((1u << height) - 1);
    for (int k = 0; k < count; k += 64)
      for_each_quad<true>(from + k, a.stride, height, count - k,
                          [&](int q, __m512i codes) __attribute__((always_inline)) {
                            __m512i first, second;
                            decode(codes, first, second);
                            uint32_t* to = steps + (k / 2 + 2 * q) * height;
                            _mm512_mask_storeu_epi32(to, mask, first);
                            _mm512_mask_storeu_epi32(to + height, mask, second);
                          });
    return true;
  }

  static float pack_row(const Operand& a, int64_t row, int64_t column, int count, uint32_t* steps) {
    const int64_t first = row * a.stride + column;
    if (a.format == Format::bf16) {
      auto* to = reinterpret_cast<uint16_t*>(steps);
      std::memcpy(to, static_cast<const uint16_t*>(a.data) + first, count * sizeof *to);
      std::memset(to + count, 0, -count % 4u * sizeof *to);
    } else {
      pack_codes(Decode(table_of(a.format)), static_cast<const uint8_t*>(a.data) + first, count,
                 steps);
    }
    return 1;
  }

  static void pack_panel(const Operand& b, int64_t row, int rows, int64_t column, int depth,
                         uint16_t* out) {
    const Decode decode(table_of(b.format));
    const auto* from = static_cast<const uint8_t*>(b.data) + row * b.stride + column;
    for (int k = 0; k < depth; k += 64) {
      for (int v = 0; v < kVectors; ++v) {
        uint16_t* to = out + (k * kVectors + 2 * v) * kLanes;
        for_each_quad<true>(from + v * kLanes * b.stride + k, b.stride, rows - v * kLanes,
                            depth - k, [&](int q, __m512i codes) __attribute__((always_inline)) {
                              __m512i first, second;
                              decode(codes, first, second);
                              _mm512_storeu_si512(to + 4 * q * kPanel, first);
                              _mm512_storeu_si512(to + (4 * q + 2) * kPanel, second);
                            });
      }
    }
  }
};

}  // namespace torchext::cpu_gemm
