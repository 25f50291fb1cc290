// Implements kernels.h: the choice of an instruction set, and the tables of significands.
#include "kernels.h"

#include "../runtime/cpu.h"

namespace torchext::cpu {
namespace {

template <class Out>
Significands make_significands() {
  constexpr bool kE5m2 = std::is_same_v<Out, E5M2>;
  constexpr int kMantissa = kE5m2 ? 2 : 3;
  const DefaultFloatingPoint environment;
  Significands tables;
  uint16_t x[kTile];
  for (int m = 0; m < kTile; ++m) x[m] = uint16_t(0x3f80 + m);
  for (int key = 0; key < 128; ++key) {
    const float scale = BFloat16::to_float(uint16_t(0x3f80 + key)) / 7.0f;
    // The scale lies in [1/7, 2/7): its exponent is -3 or -2.
    const int below = key < 0x60 ? 3 : 2;
    uint8_t* codes = tables.significand[key];
    portable_kernels.quantize[0][kE5m2].encode(x, 0, 1, kTile, scale, codes, 0, Ahead(), false);
    for (int m = 0; m < kTile; ++m)
      codes[m] = uint8_t(codes[m] - ((below + exponents_below(kE5m2)) << kMantissa));
    for (int block = 0; block < 16; ++block) {
      const uint8_t* eight = codes + 8 * block;
      int equal = 1;
      while (equal < 8 && eight[equal] == eight[0]) ++equal;
      tables.first[key][block] = eight[0];
      tables.limit[key][block] = uint8_t(equal == 8 ? 127 : 8 * block + equal - 1);
    }
  }
  return tables;
}

}  // namespace

const Significands& significands(bool e5m2) {
  static const Significands e4m3_tables = make_significands<E4M3>();
  static const Significands e5m2_tables = make_significands<E5M2>();
  return e5m2 ? e5m2_tables : e4m3_tables;
}

const Kernels& kernels() {
  [[maybe_unused]] const CpuLevel level = cpu_level();
#ifdef TORCHEXT_X86_LEVELS
  if (level >= CpuLevel::avx512) return uses_avx512_vbmi() ? avx512_vbmi_kernels : avx512_kernels;
  if (level == CpuLevel::avx2) return avx2_kernels;
  return portable_kernels;
#elif defined(TORCHEXT_ARM_LEVELS)
  return neon_kernels;
#else
  return portable_kernels;
#endif
}

}  // namespace torchext::cpu
