"""What torch.utils.flop_counter counts of the ops: two for each multiplication of a product, as of
torch.mm; quantizers multiply nothing.

Grouped products count rows that belong to no group, too: which do, only the device knows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import library  # noqa: F401  (loads the ops)

_ops = torch.ops.torchext


def _flops(a_shape: Any, b_shape: Any) -> int:
    """Of a [..., K] times b [..., N, K], transposed: each row of a meets one matrix of b."""
    return 2 * math.prod(a_shape) * b_shape[-2]


@register_flop_formula(
    [
        _ops.fp8_gemm_nt,
        _ops._fp8_gemm_nt,
        _ops._fp8_gemm_nt_kept,
        _ops.m_grouped_fp8_gemm_nt_contiguous,
        _ops._m_grouped_fp8_gemm_nt_contiguous,
        _ops.m_grouped_fp8_gemm_nt_masked,
        _ops._m_grouped_fp8_gemm_nt_masked,
        _ops.k_grouped_fp8_gemm_nt,
        _ops._k_grouped_fp8_gemm_nt,
        _ops.fp8_gemm_nt_swiglu_quantize,
        _ops.fp8_gemm_nt_gelu_quantize,
        _ops.fp8_gemm_nt_relu2_quantize,
    ]
)
def _(a_shape: Any, a_scale_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(a_shape, b_shape)


@register_flop_formula(_ops._linear)
def _(input_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(input_shape, weight_shape)


@register_flop_formula(_ops._linear_dgrad)
def _(dy_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(dy_shape) * weight_shape[1]


@register_flop_formula(_ops._linear_wgrad)
def _(dy_shape: Any, input_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(dy_shape) * input_shape[-1]
