// The kernels of fp8_gemm_nt.cuh that activate and quantize, with one scale a row (or tensor) of a
// and of b.
#include "fp8_gemm_nt.cuh"

// clang-format off: a table
TORCHEXT_GEMM_KERNELS(rowwise_e4m3_e4m3_gated, TORCHEXT_SM90_GATED_TILES, sm90_fp8_gemm_nt_swiglu_quantize_rowwise_e4m3_e4m3, kRowwise, e4m3, e4m3, kGated)
TORCHEXT_GEMM_KERNELS(rowwise_e4m3_e4m3_activated, TORCHEXT_SM90_ACTIVATED_TILES, sm90_fp8_gemm_nt_activate_quantize_rowwise_e4m3_e4m3, kRowwise, e4m3, e4m3, kActivated)
TORCHEXT_GEMM_KERNELS(rowwise_e4m3_e5m2_gated, TORCHEXT_SM90_GATED_TILES, sm90_fp8_gemm_nt_swiglu_quantize_rowwise_e4m3_e5m2, kRowwise, e4m3, e5m2, kGated)
TORCHEXT_GEMM_KERNELS(rowwise_e4m3_e5m2_activated, TORCHEXT_SM90_ACTIVATED_TILES, sm90_fp8_gemm_nt_activate_quantize_rowwise_e4m3_e5m2, kRowwise, e4m3, e5m2, kActivated)
TORCHEXT_GEMM_KERNELS(rowwise_e5m2_e4m3_gated, TORCHEXT_SM90_GATED_TILES, sm90_fp8_gemm_nt_swiglu_quantize_rowwise_e5m2_e4m3, kRowwise, e5m2, e4m3, kGated)
TORCHEXT_GEMM_KERNELS(rowwise_e5m2_e4m3_activated, TORCHEXT_SM90_ACTIVATED_TILES, sm90_fp8_gemm_nt_activate_quantize_rowwise_e5m2_e4m3, kRowwise, e5m2, e4m3, kActivated)
TORCHEXT_GEMM_KERNELS(rowwise_e5m2_e5m2_gated, TORCHEXT_SM90_GATED_TILES, sm90_fp8_gemm_nt_swiglu_quantize_rowwise_e5m2_e5m2, kRowwise, e5m2, e5m2, kGated)
TORCHEXT_GEMM_KERNELS(rowwise_e5m2_e5m2_activated, TORCHEXT_SM90_ACTIVATED_TILES, sm90_fp8_gemm_nt_activate_quantize_rowwise_e5m2_e5m2, kRowwise, e5m2, e5m2, kActivated)
// clang-format on
