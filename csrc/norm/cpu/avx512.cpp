// The kernels of norms for AVX-512 (F, BW, DQ, VL).
#include <cstring>
#include <type_traits>

#include "../../runtime/formats.h"
#include "kernels.h"

#ifdef TORCHEXT_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("avx2,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#pragma GCC optimize("fp-contract=off")
namespace torchext::norms {
namespace {
#include "loops.h"
}  // namespace

const Kernels avx512_kernels = make_kernels();
}  // namespace torchext::norms
#pragma GCC pop_options
#endif
