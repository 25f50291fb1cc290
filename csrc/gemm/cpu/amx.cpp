// AMX-BF16: products of tiles of BF16 with FP32 sums (tdpbf16ps). Packed b is that of avx512_bf16.h;
// packed a has its rows one after the other. All loops over a tile are here:
//
//   for each tile of at most 32 rows x a panel of 32 columns, for each segment of 128 of K:
//     four steps of 32 of K: 2 x 2 tiles += 2 tiles of a x 2 tiles of b    registers tmm0 to tmm7
//     store the 2 x 2 tiles; total += sum * scale_a * scale_b              AVX-512
//
// No machine of ours has AMX. The tests run this file on an emulation of its instructions
// (tests/cross/emulated_amx.h).
#include <algorithm>
#include <cstring>
#include <utility>

#include "../../runtime/intrinsics.h"
#include "bf16_table.h"
#include "kernel.h"

#ifdef TORCHEXT_X86_LEVELS
#pragma GCC push_options
#ifdef TORCHEXT_EMULATED_AMX
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")
#include TORCHEXT_EMULATED_AMX
#else
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")
#pragma GCC target("amx-tile,amx-bf16")
#endif
#include "avx512_bf16.h"
#include "decode_vbmi.h"

namespace torchext::cpu_gemm {
namespace {

// Every processor with AMX has AVX512_VBMI. Amx makes the type unique to this file.
struct Amx : BF16<DecodeByBytes> {};
using Shared = Loops<Amx>;

constexpr int kTileRows = 32, kHalf = 16, kPanel = Amx::kPanel, kSteps = Shared::kSteps;
constexpr int kRowBytes = kSteps * int(sizeof(uint32_t));   // of packed a
constexpr int kStepBytes = kPanel * int(sizeof(uint32_t));  // of packed b
constexpr int kTileSteps = 16;                              // steps of K in a tile register

// The operand of ldtilecfg: bytes and rows of each tile register.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// tmm0 to tmm3: sums of (upper, lower rows) x (left, right columns); tmm4, tmm5: a; tmm6, tmm7: b.
void configure(int upper, int lower) {
  TileConfiguration configuration;
  const int rows[8] = {upper, upper, lower, lower, upper, lower, kHalf, kHalf};
  for (int i = 0; i < 8; ++i) {
    configuration.row_bytes[i] = 64;
    configuration.rows[i] = uint8_t(rows[i]);
  }
  _tile_loadconfig(&configuration);
}

void pack(const Operand& a, const Rows& rows, const Depth& k, const PackedRows& out) {
  const int64_t segments = k.segments(), height = rows.count;
  uint32_t* data = static_cast<uint32_t*>(out.data);
  for (int64_t s = 0; s < segments; ++s) {
    for (int64_t i = 0; i < height; ++i, data += kSteps) {
      std::memset(data, 0, kRowBytes);
      Amx::pack_row(a, rows[i], k.first(s), k.count(s), data);
    }
    Shared::load_scales(a, rows, k.group(s), out.scales + s * height);
  }
}

// The sums of one segment, to sums[32][32]. `steps` is a multiple of kTileSteps.
void multiply_segment(const uint32_t* a, const uint16_t* b, int height, int steps, float* sums) {
  const bool lower = height > kHalf;
  _tile_zero(0);
  _tile_zero(1);
  if (lower) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int j = 0; j < steps; j += kTileSteps) {
    const uint16_t* columns = b + j * kPanel * Amx::kPair;
    _tile_loadd(4, a + j, kRowBytes);
    _tile_loadd(6, columns, kStepBytes);
    _tile_loadd(7, columns + kHalf * Amx::kPair, kStepBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (lower) {
      _tile_loadd(5, a + kHalf * kSteps + j, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int kSumBytes = kPanel * int(sizeof(float));
  _tile_stored(0, sums, kSumBytes);
  _tile_stored(1, sums + kHalf, kSumBytes);
  if (lower) {
    _tile_stored(2, sums + kHalf * kPanel, kSumBytes);
    _tile_stored(3, sums + kHalf * kPanel + kHalf, kSumBytes);
  }
}

void promote(const float* sums, int height, const float* a_scales, const float* b_scales,
             bool first, float* total, int64_t total_stride) {
  for (int i = 0; i < height; ++i) {
    for (int column = 0; column < kPanel; column += kHalf) {
      float* to = total + i * total_stride + column;
      const __m512 before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
      _mm512_storeu_ps(to, Amx::add_scaled(before, _mm512_loadu_ps(sums + i * kPanel + column),
                                           a_scales[i], _mm512_loadu_ps(b_scales + column)));
    }
  }
}

void multiply_chunk(const Product& p, const Shared::Panels& panels, int64_t count, int64_t begin,
                    int64_t end) {
  alignas(64) float sums[kTileRows * kPanel];
  const int64_t segments = p.k.segments();
  const Division tiles(p.rows, kTileRows);
  int configured = 0;
  for (int64_t t = 0; t < tiles.parts; ++t) {
    const int64_t row = tiles.begin(t);
    const int height = int(tiles.begin(t + 1) - row);
    if (height != configured) configure(std::min(height, kHalf), std::max(height - kHalf, 1));
    configured = height;
    for (int64_t panel = 0; panel < count; ++panel) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t at = row * segments + height * s;
        const int steps = int(round_up(p.k.count(s), 2 * kTileSteps)) / 2;
        multiply_segment(static_cast<const uint32_t*>(p.a.data) + at * kSteps,
                         Shared::data_of(panels, panel, s - begin), height, steps, sums);
        promote(sums, height, p.a.scales + at, Shared::scales_of(panels, panel, s - begin), s == 0,
                p.total + row * p.total_stride + panel * kPanel, p.total_stride);
      }
    }
  }
  _tile_release();
}

void multiply(const Product& p);

constexpr Level kLevel = {kPanel,      kTileRows,        sizeof(Amx::Element),
                          Amx::kChunk, Shared::kFewRows, kTileRows,
                          pack,        multiply};

void multiply(const Product& p) {
  Shared::for_each_chunk(kLevel, p, multiply_chunk);
}

}  // namespace

const Level amx = kLevel;

}  // namespace torchext::cpu_gemm
#pragma GCC pop_options
#endif
