// Instances for sm_80 with a scale of b for every column of a tile. This folder only names the GPU
// that nvcc compiles for: the kernel's whole story is in ../mma/fp8_gemm_nt.cuh, and how sm_80
// multiplies in its Sm80.
#include "../mma/fp8_gemm_nt.cuh"

TORCHEXT_MMA_KERNELS(mma80_fp8_gemm_nt_1d1d, Sm80, k1D1D)
