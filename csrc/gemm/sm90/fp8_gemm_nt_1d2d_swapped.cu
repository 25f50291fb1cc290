// The swapped kernels of fp8_gemm_nt.cuh with 1x128 scales for a, 128x128 for b.
#include "fp8_gemm_nt.cuh"

// clang-format off: a table
TORCHEXT_GEMM_KERNELS(1d2d_e4m3_e4m3_swapped, TORCHEXT_SM90_SWAPPED_TILES, sm90_fp8_gemm_nt_1d2d_e4m3_e4m3, k1D2D, e4m3, e4m3, kStored)
// clang-format on
