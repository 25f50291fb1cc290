// Chooses the level of a product.
#include "kernel.h"

namespace torchext::cpu_gemm {

const Level& level_for(Format a, Format b) {
  const auto narrow = [](Format f) { return f != Format::fp16 && f != Format::fp32; };
  [[maybe_unused]] const bool bf16 = narrow(a) && narrow(b);
  switch (cpu_level()) {
#ifdef TORCHEXT_X86_LEVELS
    case CpuLevel::amx:
      return bf16 ? amx : avx512;
    case CpuLevel::avx512_bf16:
      if (bf16) return uses_avx512_vbmi() ? avx512_bf16_vbmi : avx512_bf16;
      return avx512;
    case CpuLevel::avx512:
      return avx512;
    case CpuLevel::avx2:
      return avx2;
#endif
#ifdef TORCHEXT_ARM_LEVELS
    case CpuLevel::neon:
      return bf16 ? neon : portable;
#endif
    default:
      return portable;
  }
}

}  // namespace torchext::cpu_gemm
