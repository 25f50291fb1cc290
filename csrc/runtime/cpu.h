// How CPU kernels run: on torch's threads, compiled for the widest vectors that the machine has,
// and in the default floating-point environment.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cfenv>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace torchext {

#if defined(__x86_64__) && defined(__GNUC__)
#define TORCHEXT_X86_LEVELS 1
#define TORCHEXT_AVX2 __attribute__((flatten, target("avx2,bmi2")))
#define TORCHEXT_AVX512 \
  __attribute__((flatten, target("avx2,bmi2,avx512f,avx512bw,avx512dq,avx512vl")))
#endif

// Sets of vector instructions that a kernel is compiled for. `baseline` is what every machine of
// the architecture has.
enum class VectorIsa { baseline, avx2, avx512 };

// The machine's set, or a smaller one if ATEN_CPU_CAPABILITY (default, avx2) asks ATen for less.
inline VectorIsa vector_isa() {
  static const VectorIsa isa = [] {
#ifdef TORCHEXT_X86_LEVELS
    const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
    const bool at_most_avx2 = wanted && std::strcmp(wanted, "avx2") == 0;
    const bool at_most_baseline = wanted && std::strcmp(wanted, "default") == 0;
    if (at_most_baseline || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi2"))
      return VectorIsa::baseline;
    if (!at_most_avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return VectorIsa::avx512;
    return VectorIsa::avx2;
#else
    return VectorIsa::baseline;
#endif
  }();
  return isa;
}

#ifdef TORCHEXT_X86_LEVELS
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

// Calls Kernel::run(arguments...), compiled for vector_isa().
template <class Kernel, class... Arguments>
void run_vectorized(const Arguments&... arguments) {
#ifdef TORCHEXT_X86_LEVELS
  if (vector_isa() == VectorIsa::avx512) return run_avx512<Kernel>(arguments...);
  if (vector_isa() == VectorIsa::avx2) return run_avx2<Kernel>(arguments...);
#endif
  Kernel::run(arguments...);
}

// While an object of this class exists, the thread rounds to nearest and keeps subnormals. The bits
// of a result must not depend on the thread's settings, such as torch.set_flush_denormal.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&saved_); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;

 private:
  std::fenv_t saved_;
};

// Calls Kernel::run(arguments..., begin, end) on torch's threads, for parts of [0, count) that have
// at least `grain` elements each.
template <class Kernel, class... Arguments>
void run_parallel(int64_t count, int64_t grain, const Arguments&... arguments) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const DefaultFloatingPoint environment;
    run_vectorized<Kernel>(arguments..., begin, end);
  });
}

}  // namespace torchext
