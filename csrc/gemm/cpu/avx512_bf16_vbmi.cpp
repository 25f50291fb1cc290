// AVX512-BF16 with AVX512_VBMI (Zen 4 and later, Sapphire Rapids and later): see avx512_bf16.h. FP8
// becomes BF16 by tables of 128 bytes, one for low and one for high bytes.
#include <algorithm>
#include <cstring>
#include <utility>

#include "../../runtime/intrinsics.h"
#include "bf16_table.h"
#include "kernel.h"

#ifdef TORCHEXT_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")
#include "avx512_bf16.h"
#include "decode_vbmi.h"
#include "few_rows_avx512.h"

namespace torchext::cpu_gemm {

const Level avx512_bf16_vbmi = FewRows<BF16<DecodeByBytes>>::level();

}  // namespace torchext::cpu_gemm
#pragma GCC pop_options
#endif
