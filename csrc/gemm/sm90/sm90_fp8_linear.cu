// Instances for sm_90, which multiply by mma.sync, not wgmma. The kernel's whole story is in
// ../mma/fp8_linear.cuh.
#include "../mma/fp8_linear.cuh"

TORCHEXT_LINEAR_KERNELS(sm90_fp8_linear)
