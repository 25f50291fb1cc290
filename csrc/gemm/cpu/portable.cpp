// The portable level of the CPU GEMM: FP32 products on 128-bit vectors (SSE2, NEON). The loops are
// in loops.h. A tile of 6 x 8 fills 12 of 16 registers.
#include <algorithm>

#include "../../runtime/formats.h"
#include "fp32.h"

namespace torchext::cpu_gemm {

namespace {
struct Portable;
}

const Level portable = Loops<FP32<Portable, 4, 2, 6>>::level();

}  // namespace torchext::cpu_gemm
