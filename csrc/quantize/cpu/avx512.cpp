// Kernels for AVX-512 (F, BW, DQ, VL), without byte permutes across lanes. The loops: loops.h.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>
#include <cfloat>
#include <cstring>
#include <type_traits>

#define TORCHEXT_VBMI 0

// GCC 12 warns of the undefined registers in its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
namespace torchext::cpu {
namespace {
#include "avx512_loops.h"
#include "loops.h"
}  // namespace

const Kernels avx512_kernels = make_kernels<Avx512>();
}  // namespace torchext::cpu
#pragma GCC pop_options
#endif
