// Kernels for AVX-512 (F, BW, DQ, VL), without byte permutes across lanes. The loops: loops.h.
#include <algorithm>
#include <cfloat>
#include <cstring>
#include <type_traits>

#include "../runtime/intrinsics.h"
#include "kernels.h"

#ifdef TORCHEXT_X86_LEVELS

#define TORCHEXT_VBMI 0

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
namespace torchext::cpu {
namespace {
#include "avx512_operations.h"
#include "loops.h"
}  // namespace

const Kernels avx512_kernels = make_kernels<Avx512>();
}  // namespace torchext::cpu
#pragma GCC pop_options
#endif
