// The kernels of fp8_gemm_nt.cuh with 1x128 scales for a, 128x128 for b: fprop and dgrad.
#include "fp8_gemm_nt.cuh"

TORCHEXT_FP8_GEMM_NT(sm90_fp8_gemm_nt_1d2d_e4m3_e4m3_128x128x128, k1D2D, e4m3, e4m3)
TORCHEXT_FP8_GEMM_NT(sm90_fp8_gemm_nt_1d2d_e4m3_e5m2_128x128x128, k1D2D, e4m3, e5m2)
TORCHEXT_FP8_GEMM_NT(sm90_fp8_gemm_nt_1d2d_e5m2_e4m3_128x128x128, k1D2D, e5m2, e4m3)
TORCHEXT_FP8_GEMM_NT(sm90_fp8_gemm_nt_1d2d_e5m2_e5m2_128x128x128, k1D2D, e5m2, e5m2)

torchext::sm90::GemmKernel torchext::sm90::fp8_gemm_nt_1d2d(bool a_e5m2, bool b_e5m2) {
  static const GemmKernel kernels[2][2] = {
      {TORCHEXT_FP8_GEMM_NT_ENTRY(sm90_fp8_gemm_nt_1d2d_e4m3_e4m3_128x128x128, k1D2D),
       TORCHEXT_FP8_GEMM_NT_ENTRY(sm90_fp8_gemm_nt_1d2d_e4m3_e5m2_128x128x128, k1D2D)},
      {TORCHEXT_FP8_GEMM_NT_ENTRY(sm90_fp8_gemm_nt_1d2d_e5m2_e4m3_128x128x128, k1D2D),
       TORCHEXT_FP8_GEMM_NT_ENTRY(sm90_fp8_gemm_nt_1d2d_e5m2_e5m2_128x128x128, k1D2D)}};
  return kernels[a_e5m2][b_e5m2];
}
