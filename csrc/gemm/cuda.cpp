// Picks the GEMM launcher for a GPU, or a simulated one, by its path (runtime/device.h).
#include "gemm.h"

namespace torchext {

void fp8_gemm_cuda(Device& device, const GemmProblem& p, std::initializer_list<Buffer> buffers) {
  if constexpr (kBuiltWithCuda) {
    const Path path = path_of(device.properties(), p.op);
    if (path == Path::sm90) return fp8_gemm_nt_sm90(device, p, buffers);
    fp8_gemm_nt_mma(device, path, p, buffers);
  }
}

}  // namespace torchext
