// The kernels of ../mma/fp8_gemm_nt.cuh for sm_89: one scale of b for a tile's columns.
#include "../mma/fp8_gemm_nt.cuh"

TORCHEXT_MMA_KERNELS(mma89_fp8_gemm_nt_1d2d, Sm89, k1D2D)
