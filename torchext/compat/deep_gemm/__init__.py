"""DeepGEMM's FP8 interface for Hopper, on torchext's kernels: change one import.

    import torchext.compat.deep_gemm as deep_gemm

Names, the order and names of arguments, their defaults and the layouts of scales are those of
DeepGEMM 2.0 to 2.8 and of sgl-deep-gemm; docs/deep_gemm.md lists what is here and what differs.
Nothing is compiled at run time. Products and casts work under `torch.compile(fullgraph=True)`, on
CPU tensors and in the simulator.
"""

from . import testing, utils
from ._runtime import (
    get_deterministic_algorithms,
    get_num_sms,
    set_ignore_compile_dims,
    set_num_sms,
    use_deterministic_algorithms,
)
from .gemm import (
    fp8_fp4_gemm_nn,
    fp8_fp4_gemm_nt,
    fp8_fp4_gemm_tn,
    fp8_fp4_gemm_tt,
    fp8_gemm_nn,
    fp8_gemm_nt,
    fp8_gemm_tn,
    fp8_gemm_tt,
)
from .grouped import (
    fp8_m_grouped_gemm_nt_masked,
    k_grouped_fp8_gemm_nt_contiguous,
    k_grouped_fp8_gemm_tn_contiguous,
    m_grouped_fp8_fp4_gemm_nn_contiguous,
    m_grouped_fp8_fp4_gemm_nt_contiguous,
    m_grouped_fp8_fp4_gemm_nt_masked,
    m_grouped_fp8_gemm_nn_contiguous,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from .utils import *  # noqa: F403
from .utils.fp4 import (
    fp8_fp4_mega_moe,
    get_symm_buffer_for_mega_moe,
    transform_weights_for_mega_moe,
)
from .utils.layout import transform_sf_into_required_layout
from .v1 import (
    gemm_fp8_fp8_bf16_nt,
    get_col_major_tma_aligned_tensor,
    k_grouped_wgrad_gemm_fp8_fp8_fp32_nt,
    m_grouped_gemm_fp8_fp8_bf16_nt_contiguous,
    m_grouped_gemm_fp8_fp8_bf16_nt_masked,
    wgrad_gemm_fp8_fp8_fp32_nt,
)
from .wide import (
    cublaslt_gemm_nn,
    cublaslt_gemm_nt,
    cublaslt_gemm_tn,
    cublaslt_gemm_tt,
    m_grouped_bf16_gemm_nn_contiguous,
    m_grouped_bf16_gemm_nt_contiguous,
)

__all__ = [
    "cublaslt_gemm_nn",
    "cublaslt_gemm_nt",
    "cublaslt_gemm_tn",
    "cublaslt_gemm_tt",
    "fp8_fp4_gemm_nn",
    "fp8_fp4_gemm_nt",
    "fp8_fp4_gemm_tn",
    "fp8_fp4_gemm_tt",
    "fp8_fp4_mega_moe",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "fp8_m_grouped_gemm_nt_masked",
    "gemm_fp8_fp8_bf16_nt",
    "get_col_major_tma_aligned_tensor",
    "get_deterministic_algorithms",
    "get_num_sms",
    "get_symm_buffer_for_mega_moe",
    "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous",
    "k_grouped_wgrad_gemm_fp8_fp8_fp32_nt",
    "m_grouped_bf16_gemm_nn_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_fp8_fp4_gemm_nn_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_masked",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous",
    "m_grouped_gemm_fp8_fp8_bf16_nt_masked",
    "set_ignore_compile_dims",
    "set_num_sms",
    "testing",
    "transform_sf_into_required_layout",
    "transform_weights_for_mega_moe",
    "use_deterministic_algorithms",
    "utils",
    "wgrad_gemm_fp8_fp8_fp32_nt",
]
__all__ += utils.__all__
