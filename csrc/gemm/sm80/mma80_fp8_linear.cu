// Instances for sm_80 and sm_89. The kernel's whole story is in ../mma/fp8_linear.cuh.
#include "../mma/fp8_linear.cuh"

TORCHEXT_LINEAR_KERNELS(mma80_fp8_linear)
