// AVX2 and FMA: FP32 products on 256-bit vectors. The loops are in loops.h. A tile of 6 x 16 fills
// 12 of 16 registers.
#include <algorithm>
#include <cstring>
#include <utility>

#include "../../runtime/formats.h"
#include "kernel.h"

#ifdef TORCHEXT_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#include "fp32.h"

namespace torchext::cpu_gemm {

namespace {
struct Avx2;
}

const Level avx2 = Loops<FP32<Avx2, 8, 2, 6>>::level();

}  // namespace torchext::cpu_gemm
#pragma GCC pop_options
#endif
