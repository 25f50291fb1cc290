"""Fake kernels and gradients of the grouped and the fused matrix products, as `registrations` has
them of the other ops. The M-grouped ones have a gradient with respect to `bias`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from . import library  # noqa: F401  (loads the ops that are registered on here)
from .autograd import register_fake_with_twin, register_gradient, register_out
from .layout import empty_data, empty_group_scale

_ops = torch.ops.torchext
_IMPL = torch.library.Library("torchext", "IMPL")

Dtype = torch.dtype | None


# ---- fake kernels ----


@register_fake_with_twin("m_grouped_fp8_gemm_nt_contiguous")
def _(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor | None = None,
    *,
    group_ids: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: Dtype = None,
    num_sms: int = 0,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype or torch.bfloat16)


@register_fake_with_twin("m_grouped_fp8_gemm_nt_masked")
def _(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    masked_m: Tensor,
    *,
    expected_m: int = 0,
    bias: Tensor | None = None,
    out_dtype: Dtype = None,
    num_sms: int = 0,
) -> Tensor:
    shape = (a.shape[0], a.shape[1], b.shape[1])
    return a.new_empty(shape, dtype=out_dtype or torch.bfloat16)


@register_fake("torchext::k_grouped_fp8_gemm_nt")
def _(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    *,
    out_dtype: Dtype = None,
    num_sms: int = 0,
) -> Tensor:
    shape = (offsets.shape[0], a.shape[0], b.shape[0])
    return a.new_empty(shape, dtype=out_dtype or torch.bfloat16)


def _writes_out(**arguments: Any) -> None:
    return None


for _name in (
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "k_grouped_fp8_gemm_nt",
):
    register_fake_with_twin(_name, "out")(_writes_out)


def _empty_quantized(a: Tensor, columns: int, dtype: Dtype) -> tuple[Tensor, Tensor]:
    leading = tuple(a.shape[:-1])
    data = empty_data(a, leading, columns, dtype or torch.float8_e4m3fn)
    return data, empty_group_scale(a, leading, columns)


@register_fake("torchext::fp8_gemm_nt_swiglu_quantize")
def _(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: Dtype = None,
    pow2_scale: bool = False,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:
    return _empty_quantized(a, b.shape[0] // 2, dtype)


@register_fake("torchext::fp8_gemm_nt_gelu_quantize")
def _(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    tanh_approximation: bool = False,
    bias: Tensor | None = None,
    dtype: Dtype = None,
    pow2_scale: bool = False,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:
    return _empty_quantized(a, b.shape[0], dtype)


@register_fake("torchext::fp8_gemm_nt_relu2_quantize")
def _(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: Dtype = None,
    pow2_scale: bool = False,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:
    return _empty_quantized(a, b.shape[0], dtype)


# ---- gradients ----

# Falling through the Autograd key leaves fresh outputs that require no gradient, and costs nothing.
for _name in (
    "k_grouped_fp8_gemm_nt",
    "fp8_gemm_nt_swiglu_quantize",
    "fp8_gemm_nt_gelu_quantize",
    "fp8_gemm_nt_relu2_quantize",
):
    _IMPL.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _sum_runs(grad: Tensor, starts: Tensor) -> Tensor:
    """Row g: the sum of grad's rows from starts[g] up to starts[g + 1], in FP32. Deterministic, and
    waits for nothing."""
    return torch.segment_reduce(grad.float(), "sum", offsets=starts, axis=0, unsafe=True)


def _sum_groups(
    grad: Tensor, bias_shape: torch.Size, offsets: Tensor | None, group_ids: Tensor | None
) -> Tensor:
    if offsets is not None:
        return _sum_runs(grad, torch.nn.functional.pad(offsets, (1, 0)))
    assert group_ids is not None  # the op has checked that it is one of the two
    ids, order = group_ids.sort(stable=True)
    numbers = torch.arange(bias_shape[0] + 1, dtype=ids.dtype, device=ids.device)
    return _sum_runs(grad[order], torch.searchsorted(ids, numbers))


def _sum_counted(grad: Tensor, bias_shape: torch.Size, masked_m: Tensor) -> Tensor:
    computed = torch.arange(grad.shape[1], device=grad.device) < masked_m[:, None]
    return grad.float().where(computed[:, :, None], 0).sum(1)


register_gradient(
    "m_grouped_fp8_gemm_nt_contiguous", "bias", _sum_groups, saved=("offsets", "group_ids")
)
register_gradient("m_grouped_fp8_gemm_nt_masked", "bias", _sum_counted, saved=("masked_m",))
write_contiguous = register_out("m_grouped_fp8_gemm_nt_contiguous")
write_masked = register_out("m_grouped_fp8_gemm_nt_masked")
write_k_grouped = register_out("k_grouped_fp8_gemm_nt")
