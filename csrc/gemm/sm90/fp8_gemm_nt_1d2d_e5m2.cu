// The kernels of fp8_gemm_nt.cuh for e5m2 operands, with 1x128 scales for a, 128x128 for b.
#include "fp8_gemm_nt.cuh"

// clang-format off: a table
TORCHEXT_GEMM_KERNELS(1d2d_e4m3_e5m2, TORCHEXT_SM90_E5M2_TILES, sm90_fp8_gemm_nt_1d2d_e4m3_e5m2, k1D2D, e4m3, e5m2, kStored)
TORCHEXT_GEMM_KERNELS(1d2d_e5m2_e4m3, TORCHEXT_SM90_E5M2_TILES, sm90_fp8_gemm_nt_1d2d_e5m2_e4m3, k1D2D, e5m2, e4m3, kStored)
TORCHEXT_GEMM_KERNELS(1d2d_e5m2_e5m2, TORCHEXT_SM90_E5M2_TILES, sm90_fp8_gemm_nt_1d2d_e5m2_e5m2, k1D2D, e5m2, e5m2, kStored)
// clang-format on
