// Picks the GEMM launcher for a GPU, or a simulated one, by its compute capability.
#include "../runtime/check.h"
#include "gemm.h"

namespace torchext {

void fp8_gemm_cuda(Device& device, const GemmProblem& p, std::initializer_list<Buffer> buffers) {
  if constexpr (kBuiltWithCuda) {
    const int capability = device.properties().compute_capability;
    if (capability == 90) return fp8_gemm_nt_sm90(device, p, buffers);
    fail("", p.op, ": there is no kernel for sm_", capability,
         "; torchext's GEMM kernels run on sm_90 (H100, H200, H800, GH200); move the tensors to "
         "the CPU or keep this layer in plain torch");
  }
}

}  // namespace torchext
