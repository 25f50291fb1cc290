// The kernels of ../mma/fp8_gemm_nt.cuh for sm_89: scales applied once, after all of K.
#include "../mma/fp8_gemm_nt.cuh"

TORCHEXT_MMA_KERNELS(mma89_fp8_gemm_nt_rowwise, Sm89, kRowwise)
