// Implements cpu_level.h.
#include "cpu_level.h"

#include <cstdlib>
#include <string>

#include "check.h"

#if defined(TORCHEXT_X86_LEVELS)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(TORCHEXT_ARM_LEVELS)
#include <sys/auxv.h>
#endif

namespace torchext {
namespace {

struct Named {
  const char* name;
  CpuLevel level;
};
constexpr Named kLevels[] = {
    {"portable", CpuLevel::portable},       {"avx2", CpuLevel::avx2}, {"avx512", CpuLevel::avx512},
    {"avx512_bf16", CpuLevel::avx512_bf16}, {"amx", CpuLevel::amx},   {"neon", CpuLevel::neon}};

#if defined(TORCHEXT_X86_LEVELS)
// Linux gives a process the tile registers only if it asks for them.
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // leaf 7, edx
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has(CpuLevel level) {
  switch (level) {
    case CpuLevel::portable:
      return true;
    case CpuLevel::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    case CpuLevel::avx512:
      return has(CpuLevel::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case CpuLevel::avx512_bf16:
      return has(CpuLevel::avx512) && __builtin_cpu_supports("avx512bf16");
    case CpuLevel::amx:
      return has(CpuLevel::avx512_bf16) && has_amx();
    case CpuLevel::neon:
      return false;
  }
  return false;
}
#elif defined(TORCHEXT_ARM_LEVELS)
bool has(CpuLevel level) {
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16
  return level == CpuLevel::portable ||
         (level == CpuLevel::neon && (getauxval(AT_HWCAP2) & kBf16) != 0);
}
#else
bool has(CpuLevel level) {
  return level == CpuLevel::portable;
}
#endif

CpuLevel best(CpuLevel most) {
  CpuLevel found = CpuLevel::portable;
  for (const Named& named : kLevels)
    if (named.level <= most && has(named.level)) found = named.level;
  return found;
}

std::string wanted_level() {
  const char* wanted = std::getenv("TORCHEXT_CPU");
  return wanted == nullptr ? "" : wanted;
}

CpuLevel choose() {
  const std::string wanted = wanted_level();
  if (!wanted.empty()) {
    std::string here;
    for (const Named& named : kLevels) {
      if (!has(named.level)) continue;
      if (named.name == wanted) return named.level;
      here += (here.empty() ? "" : ", ") + std::string(named.name);
    }
    fail("ValueError", "torchext: TORCHEXT_CPU must name a level of this machine: ", here, " (got ",
         wanted, "); unset it to use the best");
  }
  const char* aten = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string capability = aten == nullptr ? "" : aten;
  if (capability == "default") return CpuLevel::portable;
  if (capability == "avx2") return best(CpuLevel::avx2);
  return best(CpuLevel::neon);
}

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel level = choose();
  return level;
}

bool uses_avx512_vbmi() {
#ifdef TORCHEXT_X86_LEVELS
  static const bool uses = __builtin_cpu_supports("avx512vbmi") && wanted_level() != "avx512";
  return uses;
#else
  return false;
#endif
}

}  // namespace torchext

const char* torchext_cpu_level() {
  using namespace torchext;
  static const std::string text = [] {
    try {
      for (const Named& named : kLevels)
        if (named.level == cpu_level()) return std::string(named.name);
      return std::string();
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
  }();
  return text.c_str();
}
