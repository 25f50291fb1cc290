// The kernels of norms for AVX2 and BMI2.
#include <cstring>
#include <type_traits>

#include "../../runtime/formats.h"
#include "kernels.h"

#ifdef TORCHEXT_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("avx2,bmi2")
#pragma GCC optimize("fp-contract=off")
namespace torchext::norms {
namespace {
#include "loops.h"
}  // namespace

const Kernels avx2_kernels = make_kernels();
}  // namespace torchext::norms
#pragma GCC pop_options
#endif
