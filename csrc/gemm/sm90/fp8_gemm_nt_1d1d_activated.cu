// Kernels of fp8_gemm_nt.cuh that activate and quantize the product, with 1x128 scales for a and
// for b: wgrad.
#include "fp8_gemm_nt.cuh"

TORCHEXT_GEMM_KERNELS(1d1d, k1D1D, activated)
