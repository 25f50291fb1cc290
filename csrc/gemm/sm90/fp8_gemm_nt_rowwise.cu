// Kernels of fp8_gemm_nt.cuh for e4m3 operands, with one scale for each row of a and of b, or for
// the whole tensor, applied after all of K.
#include "fp8_gemm_nt.cuh"

TORCHEXT_GEMM_KERNELS(rowwise, kRowwise, stored)
