"""DeepGEMM's FP8 interface for Hopper, on torchext's kernels: change one import.

    import torchext.compat.deep_gemm as deep_gemm

Names, the order and names of arguments, their defaults and the layouts of scales are those of
DeepGEMM 2.0 to 2.8 and of sgl-deep-gemm; docs/deep_gemm.md lists what is here and what differs.
Nothing is compiled at run time, and every function works under `torch.compile(fullgraph=True)`, on
CPU tensors and in the simulator.
"""

from . import utils
from ._runtime import (
    get_deterministic_algorithms,
    get_num_sms,
    set_ignore_compile_dims,
    set_num_sms,
    use_deterministic_algorithms,
)
from .gemm import fp8_gemm_nn, fp8_gemm_nt, fp8_gemm_tn, fp8_gemm_tt
from .utils import *  # noqa: F403
from .utils.layout import transform_sf_into_required_layout

__all__ = [
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "get_deterministic_algorithms",
    "get_num_sms",
    "set_ignore_compile_dims",
    "set_num_sms",
    "transform_sf_into_required_layout",
    "use_deterministic_algorithms",
    "utils",
    *utils.__all__,
]
