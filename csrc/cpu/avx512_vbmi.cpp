// Kernels for AVX-512 with VBMI: any byte of 128 by one permute. The loops: loops.h.
#include <algorithm>
#include <cfloat>
#include <cstring>
#include <type_traits>

#include "../runtime/intrinsics.h"
#include "kernels.h"

#ifdef TORCHEXT_X86_LEVELS

#define TORCHEXT_VBMI 1

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")
namespace torchext::cpu {
namespace {
#include "avx512_operations.h"
#include "loops.h"
}  // namespace

const Kernels avx512_vbmi_kernels = make_kernels<Avx512>();
}  // namespace torchext::cpu
#pragma GCC pop_options
#endif
