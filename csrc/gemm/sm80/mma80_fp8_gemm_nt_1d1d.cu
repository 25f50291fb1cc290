// The kernels of ../mma/fp8_gemm_nt.cuh for sm_80: a scale of b for every column.
#include "../mma/fp8_gemm_nt.cuh"

TORCHEXT_MMA_KERNELS(mma80_fp8_gemm_nt_1d1d, Sm80, k1D1D)
