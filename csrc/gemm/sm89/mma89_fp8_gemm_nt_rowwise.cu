// Instances for sm_89 with scales that are applied once, after all of K. This folder only names the
// GPU that nvcc compiles for: the kernel's whole story is in ../mma/fp8_gemm_nt.cuh, and how sm_89
// multiplies in its Sm89.
#include "../mma/fp8_gemm_nt.cuh"

TORCHEXT_MMA_KERNELS(mma89_fp8_gemm_nt_rowwise, Sm89, kRowwise)
