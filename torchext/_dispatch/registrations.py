"""What torch must know of the compiled ops beyond their kernels: fake kernels and gradients.

Fake kernels state shape, dtype and strides and leave the checks to the real kernels. Gradients:
quantizers have none (their outputs never require one, like those of a cast to integers);
`dequantize` has one with respect to `scale`; `fp8_gemm_nt` with respect to `bias`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.library import register_fake

from . import batching, flops, library  # noqa: F401  (loads the ops that are registered on here)
from .autograd import register_fake_with_twin, register_gradient, register_out
from .layout import (
    GROUP,
    ceil_div,
    empty_block_scale,
    empty_contiguous,
    empty_data,
    empty_group_scale,
    round_up,
)

_ops = torch.ops.torchext
_IMPL = torch.library.Library("torchext", "IMPL")

Dtype = torch.dtype | None


# ---- fake kernels ----


def _leading(x: Tensor) -> tuple[int, ...]:
    if x.dim() == 0:
        raise ValueError("torchext: a tensor must have shape [..., K] (got 0 dimensions)")
    return tuple(x.shape[:-1])


@register_fake("torchext::quantize_1x128")
def _(x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False) -> tuple[Tensor, Tensor]:
    leading, columns = _leading(x), x.shape[-1]
    data = empty_data(x, leading, columns, dtype or torch.float8_e4m3fn)
    return data, empty_group_scale(x, leading, columns)


@register_fake("torchext::quantize_1x128_t")
def _(x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False) -> tuple[Tensor, Tensor]:
    rows, columns = math.prod(_leading(x)), x.shape[-1]
    data_t = empty_data(x, (columns,), rows, dtype or torch.float8_e4m3fn)
    return data_t, empty_group_scale(x, (columns,), rows)


@register_fake("torchext::quantize_1x128_dual")
def _(
    x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_ops.quantize_1x128(x, dtype=dtype), *_ops.quantize_1x128_t(x, dtype=dtype)


@register_fake("torchext::quantize_128x128")
def _(x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False) -> tuple[Tensor, Tensor]:
    data = empty_data(x, x.shape[:-1], x.shape[-1], dtype or torch.float8_e4m3fn)
    return data, empty_block_scale(x)


@register_fake("torchext::quantize_128x128_dual")
def _(x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    *leading, rows, columns = x.shape
    data_t = empty_data(x, (*leading, columns), rows, dtype or torch.float8_e4m3fn)
    return *_ops.quantize_128x128(x, dtype=dtype), data_t


@register_fake("torchext::quantize_rowwise")
def _(x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False) -> tuple[Tensor, Tensor]:
    leading = _leading(x)
    data = empty_data(x, leading, x.shape[-1], dtype or torch.float8_e4m3fn)
    return data, empty_contiguous(x, leading, 1, torch.float32)


@register_fake("torchext::quantize_tensorwise")
def _(x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False) -> tuple[Tensor, Tensor]:
    data = empty_data(x, _leading(x), x.shape[-1], dtype or torch.float8_e4m3fn)
    return data, x.new_empty((1, 1), dtype=torch.float32)


@register_fake_with_twin("dequantize")
def _(data: Tensor, scale: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    return empty_contiguous(data, _leading(data), data.shape[-1], out_dtype)


@register_fake_with_twin("fp8_gemm_nt")
def _(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: Dtype = None,
    num_sms: int = 0,
) -> Tensor:
    return a.new_empty((*_leading(a), b.shape[0]), dtype=out_dtype or torch.bfloat16)


@register_fake_with_twin("fp8_gemm_nt", "out")
def _(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    out: Tensor,
    accumulate: bool = False,
    bias: Tensor | None = None,
    num_sms: int = 0,
) -> None:
    return None


@register_fake("torchext::_quantize_kept")
def _(
    x: Tensor, granularity: int, *, dtype: Dtype = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = math.prod(_leading(x)), x.shape[-1]
    quantizers = (_ops.quantize_1x128, _ops.quantize_rowwise, _ops.quantize_tensorwise)
    data, scale = quantizers[granularity](x, dtype=dtype)
    kept_scale = ((ceil_div(rows, GROUP), round_up(columns, 4)), (1, columns), (1, 1))[granularity]
    kept = data.new_empty((columns, round_up(rows, 16)))
    return data, scale, kept, scale.new_empty(kept_scale)


@register_fake("torchext::_quantize_128x128_kept")
def _(x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    data, scale = _ops.quantize_128x128(x, dtype=dtype)
    return data, scale, data.new_empty((x.shape[1], round_up(x.shape[0], 16)))


@register_fake("torchext::_fp8_gemm_nt_kept")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: Dtype = None) -> Tensor:
    return a.new_empty((*_leading(a), b.shape[0]), dtype=out_dtype or torch.bfloat16)


# ---- gradients ----

# Falling through the Autograd key leaves fresh outputs that require no gradient, and costs nothing.
for _name in (
    "quantize_1x128",
    "quantize_1x128_t",
    "quantize_1x128_dual",
    "quantize_128x128",
    "quantize_128x128_dual",
    "quantize_rowwise",
    "quantize_tensorwise",
    "_quantize_kept",
    "_quantize_128x128_kept",
    "_fp8_gemm_nt_kept",
):
    _IMPL.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _gradient_of_scale(grad: Tensor, scale_shape: torch.Size, data: Tensor) -> Tensor:
    """y = data * scale, so a scale's gradient is the sum of grad * data over its group, in FP32."""
    columns, scale_columns = data.shape[-1], scale_shape[-1]
    rows, scale_rows = math.prod(data.shape[:-1]), math.prod(scale_shape[:-1])
    product = (grad.float() * data.float()).reshape(rows, columns)
    if scale_columns != columns:
        product = _sum_groups(product, scale_columns)
    if scale_rows != rows:
        product = _sum_groups(product.t(), scale_rows).t()
    return product.reshape(scale_shape)


def _sum_groups(matrix: Tensor, groups: int) -> Tensor:
    """Sums the columns of `matrix` in groups of 128, the last one ragged, or all in one group."""
    rows, columns = matrix.shape
    if groups == 1:
        return matrix.sum(1, keepdim=True)
    padding = ceil_div(columns, GROUP) * GROUP - columns
    return torch.nn.functional.pad(matrix, (0, padding)).view(rows, groups, GROUP).sum(2)


register_gradient("dequantize", "scale", _gradient_of_scale, saved=("data",))


def _gradient_of_bias(grad: Tensor, bias_shape: torch.Size) -> Tensor:
    rows = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
    return rows.sum(0, dtype=torch.float32)


register_gradient("fp8_gemm_nt", "bias", _gradient_of_bias)
write_fp8_gemm_nt = register_out("fp8_gemm_nt")
