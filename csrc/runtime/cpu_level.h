// The set of vector instructions that CPU kernels use. It is chosen once, at the first call:
// the best that the processor has, or what the environment variable TORCHEXT_CPU names.
#pragma once

// GCC only: clang ignores `#pragma GCC target`, by which the kernels are compiled.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TORCHEXT_X86_LEVELS 1
#elif defined(__aarch64__) && defined(__GNUC__) && !defined(__clang__)
#define TORCHEXT_ARM_LEVELS 1
#endif

namespace torchext {

// On x86-64 each level includes those before it; aarch64 has `portable` and `neon`.
enum class CpuLevel {
  portable,     // what every machine of the architecture has: SSE2 or NEON
  avx2,         // AVX2, FMA, F16C, BMI2
  avx512,       // AVX-512 F, BW, DQ, VL
  avx512_bf16,  // and products of BF16: vdpbf16ps
  amx,          // and tiles of BF16: tdpbf16ps
  neon,         // products of BF16 on aarch64: bfdot
};

// Throws ValueError if TORCHEXT_CPU names no level, or one that this machine lacks. Without it,
// ATEN_CPU_CAPABILITY (default, avx2) asks for less, as it does of ATen.
CpuLevel cpu_level();

// Whether kernels of level avx512 and above may use AVX512_VBMI, which permutes bytes across a whole
// register: if the processor has it, unless TORCHEXT_CPU=avx512 asks for that level alone.
bool uses_avx512_vbmi();

}  // namespace torchext

// The name of cpu_level(), or of an error its message; for Python.
extern "C" __attribute__((visibility("default"))) const char* torchext_cpu_level();
