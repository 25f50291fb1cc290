"""Fake kernels and gradients of the grouped and the fused matrix products, as `_registrations` has
them of the other ops. The M-grouped ones have a gradient with respect to `bias`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from . import _library  # noqa: F401  (loads the ops that are registered on here)
from ._layout import empty_data, empty_group_scale

_ops = torch.ops.torchext
_IMPL = torch.library.Library("torchext", "IMPL")

Dtype = torch.dtype | None


# ---- fake kernels ----


@register_fake("torchext::m_grouped_fp8_gemm_nt_contiguous")
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


@register_fake("torchext::m_grouped_fp8_gemm_nt_masked")
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


def _writes_out(*args: Any, **kwargs: Any) -> None:
    return None


for _name in (
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "k_grouped_fp8_gemm_nt",
):
    register_fake(f"torchext::{_name}.out", _writes_out)


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
    "m_grouped_fp8_gemm_nt_contiguous.out",  # these refuse gradients below, where they also bump
    "m_grouped_fp8_gemm_nt_masked.out",  # the version of `out`
    "k_grouped_fp8_gemm_nt.out",
):
    _IMPL.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _sum_runs(grad: Tensor, starts: Tensor) -> Tensor:
    """Row g: the sum of grad's rows from starts[g] up to starts[g + 1], in FP32. Deterministic, and
    waits for nothing."""
    return torch.segment_reduce(grad.float(), "sum", offsets=starts, axis=0, unsafe=True)


def _sum_groups(
    grad: Tensor, groups: int, offsets: Tensor | None, group_ids: Tensor | None
) -> Tensor:
    if offsets is not None:
        return _sum_runs(grad, torch.nn.functional.pad(offsets, (1, 0)))
    assert group_ids is not None  # the op has checked that it is one of the two
    ids, order = group_ids.sort(stable=True)
    numbers = torch.arange(groups + 1, dtype=ids.dtype, device=ids.device)
    return _sum_runs(grad[order], torch.searchsorted(ids, numbers))


def _sum_counted(grad: Tensor, groups: int, masked_m: Tensor) -> Tensor:
    computed = torch.arange(grad.shape[1], device=grad.device) < masked_m[:, None]
    return grad.float().where(computed[:, :, None], 0).sum(1)


class _GroupedWithBias(torch.autograd.Function):
    """An M-grouped op seen from its bias: register_autograd takes no keyword-only tensors.

    gradient(grad, groups, *index) is bias's, in FP32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        bias: Tensor,
        run: Callable[[Tensor], Tensor],
        gradient: Callable[..., Tensor],
        *index: Tensor | None,
    ) -> Tensor:
        ctx.gradient, ctx.groups, ctx.bias_dtype = gradient, bias.shape[0], bias.dtype
        ctx.save_for_backward(*index)
        return run(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index = ctx.saved_tensors
        gradient = ctx.gradient(grads[0], ctx.groups, *index)
        return gradient.to(ctx.bias_dtype), None, None, *(None for _ in index)


def _with_bias(
    op: Callable[..., Tensor],
    gradient: Callable[..., Tensor],
    index: tuple[Tensor | None, ...],
    bias: Tensor | None,
    *args: Any,
    **options: Any,
) -> Tensor:
    def run(bias: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, bias=bias, **options)

    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return _GroupedWithBias.apply(bias, run, gradient, *index)
    return run(bias)


def _contiguous_autograd(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor | None = None,
    *,
    group_ids: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    return _with_bias(
        _ops.m_grouped_fp8_gemm_nt_contiguous.default,
        _sum_groups,
        (offsets, group_ids),
        bias,
        *(a, a_scale, b, b_scale, offsets),
        group_ids=group_ids,
        **options,
    )


def _masked_autograd(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    masked_m: Tensor,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    return _with_bias(
        _ops.m_grouped_fp8_gemm_nt_masked.default,
        _sum_counted,
        (masked_m,),
        bias,
        *(a, a_scale, b, b_scale, masked_m),
        **options,
    )


_IMPL.impl("m_grouped_fp8_gemm_nt_contiguous", _contiguous_autograd, "Autograd")
_IMPL.impl("m_grouped_fp8_gemm_nt_masked", _masked_autograd, "Autograd")


def _write_out(name: str) -> Callable[..., None]:
    """Refuses gradients, as every out= function of torch does, and tells autograd of the write."""
    op = getattr(_ops, name).out

    def write_out(
        keyset: torch._C.DispatchKeySet,
        *args: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        **options: Any,
    ) -> None:
        if torch.is_grad_enabled():
            for argument, tensor in (("out", out), ("bias", bias)):
                if tensor is not None and tensor.requires_grad:
                    raise RuntimeError(
                        f"{name}: {argument} must not require a gradient when out= is given (got "
                        "requires_grad=True); detach it, call under torch.no_grad(), or leave out= "
                        "away"
                    )
        torch.autograd.graph.increment_version(out)
        if bias is not None:
            options["bias"] = bias
        op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, out=out, **options)

    return write_out


for _name in (
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "k_grouped_fp8_gemm_nt",
):
    _IMPL.impl(f"{_name}.out", _write_out(_name), "ADInplaceOrView", with_keyset=True)
