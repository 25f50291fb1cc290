// An emulation of AMX's tile instructions, as Intel's manual (volume 2, TDPBF16PS) defines them, for
// machines without AMX: csrc/gemm/cpu/amx.cpp includes it if TORCHEXT_EMULATED_AMX names this file.
// As the instructions do, it stops at a tile that was not configured and keeps what lies beyond a
// tile's rows out of memory.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64, "as ldtilecfg reads it");

struct Tile {
  uint8_t bytes[16][64];
};

inline thread_local Configuration configuration;  // palette 0: not configured
inline thread_local Tile tiles[8];

inline void check(int tile) {
  if (configuration.palette == 1 && configuration.rows[tile] > 0 && configuration.rows[tile] <= 16)
    return;
  std::fprintf(stderr, "emulated AMX: tile %d is not configured\n", tile);
  std::abort();
}

inline float float_of_bf16(uint32_t bits) {
  bits <<= 16;
  if ((bits & 0x7f800000) == 0) bits &= 0x80000000;  // subnormals count as zero
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void load_configuration(const void* from) {
  std::memcpy(&configuration, from, sizeof configuration);
  std::memset(tiles, 0, sizeof tiles);
}

inline void zero(int tile) {
  check(tile);
  std::memset(&tiles[tile], 0, sizeof tiles[tile]);
}

inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int row = 0; row < configuration.rows[tile]; ++row)
    std::memcpy(tiles[tile].bytes[row], static_cast<const char*>(from) + row * stride,
                configuration.row_bytes[tile]);
}

inline void store(int tile, void* to, int64_t stride) {
  check(tile);
  for (int row = 0; row < configuration.rows[tile]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile].bytes[row],
                configuration.row_bytes[tile]);
}

// The even and the odd products of pairs have sums of their own, which are added at the end.
inline void multiply(int sum, int a, int b) {
  check(sum);
  check(a);
  check(b);
  const int pairs = configuration.row_bytes[a] / 4, columns = configuration.row_bytes[sum] / 4;
  if (configuration.rows[sum] != configuration.rows[a] || configuration.rows[b] != pairs) {
    std::fprintf(stderr, "emulated AMX: tiles %d, %d, %d do not fit together\n", sum, a, b);
    std::abort();
  }
  for (int m = 0; m < configuration.rows[sum]; ++m) {
    for (int n = 0; n < columns; ++n) {
      float partial[2] = {};
      for (int k = 0; k < pairs; ++k) {
        uint32_t x, y;
        std::memcpy(&x, tiles[a].bytes[m] + 4 * k, 4);
        std::memcpy(&y, tiles[b].bytes[k] + 4 * n, 4);
        partial[0] += float_of_bf16(x & 0xffff) * float_of_bf16(y & 0xffff);
        partial[1] += float_of_bf16(x >> 16) * float_of_bf16(y >> 16);
      }
      float total;
      std::memcpy(&total, tiles[sum].bytes[m] + 4 * n, 4);
      total += partial[0] + partial[1];
      std::memcpy(tiles[sum].bytes[m] + 4 * n, &total, 4);
    }
  }
}

}  // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_release
#define _tile_loadconfig(from) emulated_amx::load_configuration(from)
#define _tile_zero(tile) emulated_amx::zero(tile)
#define _tile_loadd(tile, from, stride) emulated_amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated_amx::store(tile, to, stride)
#define _tile_dpbf16ps(sum, a, b) emulated_amx::multiply(sum, a, b)
#define _tile_release() (emulated_amx::configuration = {})
