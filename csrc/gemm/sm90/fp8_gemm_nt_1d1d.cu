// The kernels of fp8_gemm_nt.cuh with 1x128 scales for a and b: wgrad.
#include "fp8_gemm_nt.cuh"

TORCHEXT_FP8_GEMM_NT(sm90_fp8_gemm_nt_1d1d_e4m3_e4m3_128x128x128, k1D1D, e4m3, e4m3)
TORCHEXT_FP8_GEMM_NT(sm90_fp8_gemm_nt_1d1d_e4m3_e5m2_128x128x128, k1D1D, e4m3, e5m2)
TORCHEXT_FP8_GEMM_NT(sm90_fp8_gemm_nt_1d1d_e5m2_e4m3_128x128x128, k1D1D, e5m2, e4m3)
TORCHEXT_FP8_GEMM_NT(sm90_fp8_gemm_nt_1d1d_e5m2_e5m2_128x128x128, k1D1D, e5m2, e5m2)

torchext::sm90::GemmKernel torchext::sm90::fp8_gemm_nt_1d1d(bool a_e5m2, bool b_e5m2) {
  static const GemmKernel kernels[2][2] = {
      {TORCHEXT_FP8_GEMM_NT_ENTRY(sm90_fp8_gemm_nt_1d1d_e4m3_e4m3_128x128x128, k1D1D),
       TORCHEXT_FP8_GEMM_NT_ENTRY(sm90_fp8_gemm_nt_1d1d_e4m3_e5m2_128x128x128, k1D1D)},
      {TORCHEXT_FP8_GEMM_NT_ENTRY(sm90_fp8_gemm_nt_1d1d_e5m2_e4m3_128x128x128, k1D1D),
       TORCHEXT_FP8_GEMM_NT_ENTRY(sm90_fp8_gemm_nt_1d1d_e5m2_e5m2_128x128x128, k1D1D)}};
  return kernels[a_e5m2][b_e5m2];
}
