// Kernels of fp8_gemm_nt.cuh for pairs of formats with e5m2, with 1x128 scales for a and 128x128
// for b: fprop and dgrad.
#include "fp8_gemm_nt.cuh"

TORCHEXT_GEMM_KERNELS(1d2d, k1D2D, e5m2)
