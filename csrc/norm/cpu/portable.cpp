// The kernels of norms for every machine, and the choice of an instruction set.
#include <cstring>
#include <type_traits>

#include "../../runtime/formats.h"
#include "kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#elif defined(__clang__)
#pragma clang fp contract(off)
#endif
namespace torchext::norms {
namespace {
#include "loops.h"
}  // namespace

const Kernels portable_kernels = make_kernels();
}  // namespace torchext::norms
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

namespace torchext::norms {

const Kernels& kernels() {
#ifdef TORCHEXT_X86_LEVELS
  const CpuLevel level = cpu_level();
  if (level >= CpuLevel::avx512) return avx512_kernels;
  if (level == CpuLevel::avx2) return avx2_kernels;
#endif
  return portable_kernels;
}

}  // namespace torchext::norms
