// How CPU kernels run: on torch's threads, compiled for the widest vectors that the machine has,
// and in the default floating-point environment.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cfenv>
#include <cstdint>

#include "cpu_level.h"

#ifdef TORCHEXT_X86_LEVELS
#include <xmmintrin.h>
#endif

namespace torchext {

#ifdef TORCHEXT_X86_LEVELS
#define TORCHEXT_AVX2 __attribute__((flatten, target("avx2,bmi2,fma")))
#define TORCHEXT_AVX512 \
  __attribute__((flatten, target("avx2,bmi2,fma,avx512f,avx512bw,avx512dq,avx512vl")))

// `flatten` inlines everything that Kernel::run calls, so that all of it is compiled for the
// target.
template <class Kernel, class... Arguments>
TORCHEXT_AVX2 void run_avx2(const Arguments&... arguments) {
  Kernel::run(arguments...);
}
template <class Kernel, class... Arguments>
TORCHEXT_AVX512 void run_avx512(const Arguments&... arguments) {
  Kernel::run(arguments...);
}
#endif

// Calls Kernel::run(arguments...), compiled for cpu_level().
template <class Kernel, class... Arguments>
void run_vectorized(const Arguments&... arguments) {
#ifdef TORCHEXT_X86_LEVELS
  const CpuLevel level = cpu_level();
  if (level >= CpuLevel::avx512) return run_avx512<Kernel>(arguments...);
  if (level == CpuLevel::avx2) return run_avx2<Kernel>(arguments...);
#endif
  Kernel::run(arguments...);
}

// While an object of this class exists, the thread rounds to nearest and keeps subnormals. The bits
// of a result must not depend on the thread's settings, such as torch.set_flush_denormal.
class DefaultFloatingPoint {
 public:
#ifdef TORCHEXT_X86_LEVELS
  DefaultFloatingPoint() : saved_(_mm_getcsr()) { _mm_setcsr(kDefault); }
  ~DefaultFloatingPoint() { _mm_setcsr(saved_); }
#else
  DefaultFloatingPoint() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&saved_); }
#endif
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;

 private:
#ifdef TORCHEXT_X86_LEVELS
  static constexpr unsigned kDefault = 0x1f80;  // all exceptions masked
  unsigned saved_;
#else
  std::fenv_t saved_;
#endif
};

}  // namespace torchext
