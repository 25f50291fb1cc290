// The kernels of fp8_gemm_nt.cuh with one scale a row (or tensor) of a and of b, applied after all
// of K.
#include "fp8_gemm_nt.cuh"

TORCHEXT_FP8_GEMM_NT(sm90_fp8_gemm_nt_rowwise_e4m3_e4m3_128x128x128, kRowwise, e4m3, e4m3)
TORCHEXT_FP8_GEMM_NT(sm90_fp8_gemm_nt_rowwise_e4m3_e5m2_128x128x128, kRowwise, e4m3, e5m2)
TORCHEXT_FP8_GEMM_NT(sm90_fp8_gemm_nt_rowwise_e5m2_e4m3_128x128x128, kRowwise, e5m2, e4m3)
TORCHEXT_FP8_GEMM_NT(sm90_fp8_gemm_nt_rowwise_e5m2_e5m2_128x128x128, kRowwise, e5m2, e5m2)

torchext::sm90::GemmKernel torchext::sm90::fp8_gemm_nt_rowwise(bool a_e5m2, bool b_e5m2) {
  static const GemmKernel kernels[2][2] = {
      {TORCHEXT_FP8_GEMM_NT_ENTRY(sm90_fp8_gemm_nt_rowwise_e4m3_e4m3_128x128x128, kRowwise),
       TORCHEXT_FP8_GEMM_NT_ENTRY(sm90_fp8_gemm_nt_rowwise_e4m3_e5m2_128x128x128, kRowwise)},
      {TORCHEXT_FP8_GEMM_NT_ENTRY(sm90_fp8_gemm_nt_rowwise_e5m2_e4m3_128x128x128, kRowwise),
       TORCHEXT_FP8_GEMM_NT_ENTRY(sm90_fp8_gemm_nt_rowwise_e5m2_e5m2_128x128x128, kRowwise)}};
  return kernels[a_e5m2][b_e5m2];
}
