// Kernels of fp8_gemm_nt.cuh for e4m3 operands, with 1x128 scales for a and 128x128 for b: fprop
// and dgrad.
#include "fp8_gemm_nt.cuh"

TORCHEXT_GEMM_KERNELS(1d2d, k1D2D, stored)
