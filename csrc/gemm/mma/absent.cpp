// Stands in for kernels that TORCHEXT_ARCHS left out of the build. Each definition is weak: the
// linker takes that of the .cu file if there is one. A kernel that is absent has no function.
#include "kernels.h"

namespace torchext::mma {

#define TORCHEXT_ABSENT __attribute__((weak))

TORCHEXT_ABSENT GemmKernel mma89_fp8_gemm_nt_1d2d(TileSize, bool, bool) {
  return {};
}
TORCHEXT_ABSENT GemmKernel mma89_fp8_gemm_nt_1d1d(TileSize, bool, bool) {
  return {};
}
TORCHEXT_ABSENT GemmKernel mma89_fp8_gemm_nt_rowwise(TileSize, bool, bool) {
  return {};
}
TORCHEXT_ABSENT GemmKernel mma80_fp8_gemm_nt_1d2d(TileSize, bool, bool) {
  return {};
}
TORCHEXT_ABSENT GemmKernel mma80_fp8_gemm_nt_1d1d(TileSize, bool, bool) {
  return {};
}
TORCHEXT_ABSENT GemmKernel mma80_fp8_gemm_nt_rowwise(TileSize, bool, bool) {
  return {};
}
TORCHEXT_ABSENT GemmKernel mma80_fp8_linear(TileSize, ScalarType, bool) {
  return {};
}
TORCHEXT_ABSENT GemmKernel sm90_fp8_linear(TileSize, ScalarType, bool) {
  return {};
}
TORCHEXT_ABSENT GemmKernel plain_fp8_gemm_nt() {
  return {};
}

#undef TORCHEXT_ABSENT

}  // namespace torchext::mma
