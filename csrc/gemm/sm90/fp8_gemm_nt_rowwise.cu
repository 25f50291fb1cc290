// The kernels of fp8_gemm_nt.cuh with one scale a row (or tensor) of a and of b, applied after all
// of K.
#include "fp8_gemm_nt.cuh"

// clang-format off: a table
TORCHEXT_GEMM_KERNELS(rowwise_e4m3_e4m3, TORCHEXT_SM90_PLAIN_TILES, sm90_fp8_gemm_nt_rowwise_e4m3_e4m3, kRowwise, e4m3, e4m3, kStored)
// clang-format on
