// Kernels of fp8_gemm_nt.cuh for pairs of formats with e5m2, with 1x128 scales for a and for b:
// wgrad.
#include "fp8_gemm_nt.cuh"

TORCHEXT_GEMM_KERNELS(1d1d, k1D1D, e5m2)
