"""Quantization to FP8 and back, part of `torchext.ops`.

Outputs of quantizers never require a gradient, like those of a cast to integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._dispatch.autograd import Gradient, asks_gradient
from .._dispatch.batching import each, each_quantized, quantize_rows
from .._dispatch.declaration import declare
from .._dispatch.errors import python_error
from .._dispatch.layout import (
    GROUP,
    ceil_div,
    empty_block_scale,
    empty_contiguous,
    empty_data,
    empty_group_scale,
    fits_data,
    laid_out,
    leading_sizes,
)
from .._dispatch.scales import call_with_float32_scales, float32_in_graph
from .._dispatch.sharding_rules import quantizer
from .._dispatch.sharding_rules_gradients import dequantizer

Dtype = torch.dtype | None


def _quantize(
    op: Callable[..., Any], x: Tensor, dtype: torch.dtype | None, pow2_scale: bool
) -> Any:
    # Defaults are not passed: each keyword argument costs a quarter of a microsecond, or more.
    try:
        if dtype is None and pow2_scale is False:
            return op(x)
        return op(x, dtype=dtype, pow2_scale=pow2_scale)
    except RuntimeError as error:
        raise python_error(error) from None


def _fake_1x128(
    x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    leading, columns = leading_sizes(x), x.shape[-1]
    data = empty_data(x, leading, columns, dtype or torch.float8_e4m3fn)
    return data, empty_group_scale(x, leading, columns)


_quantize_1x128 = declare(
    "quantize_1x128",
    fake=_fake_1x128,
    flops=None,
    batching=quantize_rows(1),
    sharding=quantizer("quantize_1x128", "1x128"),
).op


def quantize_1x128(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantizes `x` to FP8 with one scale for every 128 consecutive elements of a row.

    For activations in fprop and gradients in dgrad (DeepSeek-V3, section 3.3.2).

    Args:
        x: [..., K], bfloat16, float16 or float32, of any strides that let its rows fold.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data: [..., K], FP8. Strides (P, 1) for a 2-D x, (S*P, P, 1) for [B, S, K], and so on,
            with P = round_up(K, 16).
        scale: [..., ceil(K / 128)], float32, M-major. Strides (1, round_up(M, 4)) for a 2-D x,
            (S, 1, round_up(M, 4)) for [B, S, K]. The last group of a row may be shorter than 128.

    Raises:
        ValueError: x is a scalar, or its rows do not fold.
        TypeError: x has another dtype, or `dtype` is not an FP8 dtype.
    """
    return _quantize(_quantize_1x128, x, dtype, pow2_scale)


def _fake_1x128_t(
    x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    rows, columns = math.prod(leading_sizes(x)), x.shape[-1]
    data_t = empty_data(x, (columns,), rows, dtype or torch.float8_e4m3fn)
    return data_t, empty_group_scale(x, (columns,), rows)


_quantize_1x128_t = declare(
    "quantize_1x128_t",
    fake=_fake_1x128_t,
    flops=None,
    batching=each_quantized,
    sharding=quantizer("quantize_1x128_t", "1x128_t"),
).op


def quantize_1x128_t(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantizes `x` transposed, with one scale for every 128 consecutive rows of a column.

    For wgrad, which sums over tokens. The result has the same bits as that of
    `quantize_1x128(x.flatten(0, -2).t())`, but x is not copied.

    Args:
        x: [..., K], bfloat16, float16 or float32, of any strides that let its rows fold into M.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data_t: [K, M], FP8, strides (round_up(M, 16), 1).
        scale_t: [K, ceil(M / 128)], float32, strides (1, round_up(K, 4)).

    Raises:
        ValueError: x is a scalar, or its rows do not fold.
        TypeError: x has another dtype, or `dtype` is not an FP8 dtype.
    """
    return _quantize(_quantize_1x128_t, x, dtype, pow2_scale)


def _fake_1x128_dual(
    x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake_1x128(x, dtype=dtype), *_fake_1x128_t(x, dtype=dtype)


_quantize_1x128_dual = declare(
    "quantize_1x128_dual",
    fake=_fake_1x128_dual,
    flops=None,
    batching=each_quantized,
    sharding=quantizer("quantize_1x128_dual", "1x128_dual"),
).op


def quantize_1x128_dual(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_1x128` and `quantize_1x128_t` from one read of `x`.

    A training step needs both for an activation or a gradient: `data` for fprop or dgrad, and
    `data_t` for wgrad.

    Args:
        x: [..., K], bfloat16, float16 or float32, of any strides that let its rows fold into M.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data, scale: as `quantize_1x128` returns them.
        data_t, scale_t: as `quantize_1x128_t` returns them.

    Raises:
        ValueError: x is a scalar, or its rows do not fold.
        TypeError: x has another dtype, or `dtype` is not an FP8 dtype.
    """
    return _quantize(_quantize_1x128_dual, x, dtype, pow2_scale)


def _fake_1x128_dual_bias_grad(
    x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False
) -> tuple[Tensor, ...]:
    return *_fake_1x128_dual(x, dtype=dtype), x.new_empty((x.shape[-1],), dtype=torch.float32)


_quantize_1x128_dual_bias_grad = declare(
    "quantize_1x128_dual_bias_grad",
    fake=_fake_1x128_dual_bias_grad,
    flops=None,
    batching=each_quantized,
    sharding=quantizer("quantize_1x128_dual_bias_grad", "1x128_dual", sums=True),
).op


def quantize_1x128_dual_bias_grad(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`quantize_1x128_dual` and the sums over the rows of `x`, from one read of `x`.

    For the backward of a linear layer with a bias: dgrad and wgrad read the quantized gradient, and
    the sums are the gradient of the bias.

    Args:
        x: [..., K], bfloat16, float16 or float32, of any strides that let its rows fold into M.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data, scale, data_t, scale_t: as `quantize_1x128_dual` returns them.
        bias_grad: [K], float32, the sums of x before it is quantized. Their order is fixed
            (docs/numerics.md), and is that of the bias gradients of activations. Without rows: 0.

    Raises:
        ValueError: x is a scalar, or its rows do not fold.
        TypeError: x has another dtype, or `dtype` is not an FP8 dtype.
    """
    return _quantize(_quantize_1x128_dual_bias_grad, x, dtype, pow2_scale)


def _fake_128x128(
    x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    data = empty_data(x, x.shape[:-1], x.shape[-1], dtype or torch.float8_e4m3fn)
    return data, empty_block_scale(x)


_quantize_128x128 = declare(
    "quantize_128x128",
    fake=_fake_128x128,
    flops=None,
    batching=quantize_rows(2),
    sharding=quantizer("quantize_128x128", "128x128"),
).op


def quantize_128x128(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantizes matrices to FP8 with one scale for every block of 128 rows and 128 columns.

    For weights; `weight` and `weight_scale_inv` of DeepSeek-V3 checkpoints have these blocks.
    Several matrices, such as the weights of experts, are quantized independently of each other.

    Args:
        x: [..., N, K], bfloat16, float16 or float32, of any strides.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data: [..., N, K], FP8. Strides (P, 1) for a 2-D x, (N*P, P, 1) for [B, N, K], and so on,
            with P = round_up(K, 16).
        scale: [..., ceil(N / 128), ceil(K / 128)], float32, contiguous. Blocks at the right and
            lower edges of a matrix may be smaller.

    Raises:
        ValueError: x has fewer than two dimensions.
        TypeError: x has another dtype, or `dtype` is not an FP8 dtype.
    """
    return _quantize(_quantize_128x128, x, dtype, pow2_scale)


def _fake_128x128_dual(
    x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    *leading, rows, columns = x.shape
    data_t = empty_data(x, (*leading, columns), rows, dtype or torch.float8_e4m3fn)
    return *_fake_128x128(x, dtype=dtype), data_t


_quantize_128x128_dual = declare(
    "quantize_128x128_dual",
    fake=_fake_128x128_dual,
    flops=None,
    batching=quantize_rows(2),
    sharding=quantizer("quantize_128x128_dual", "128x128_dual"),
).op


def quantize_128x128_dual(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_128x128` of `x` and of its transpose, `x.mT`, from one read of `x`.

    Blocks are square, so `data` and `data_t` hold the same FP8 values, and the scale of `data_t` is
    `scale.mT`. A weight's fprop reads `data`, its dgrad `data_t`.

    Args:
        x: [..., N, K], bfloat16, float16 or float32, of any strides.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data, scale: as `quantize_128x128` returns them.
        data_t: [..., K, N], FP8. Strides (P, 1) for a 2-D x, (K*P, P, 1) for [B, N, K], and so on,
            with P = round_up(N, 16).

    Raises:
        ValueError: x has fewer than two dimensions.
        TypeError: x has another dtype, or `dtype` is not an FP8 dtype.
    """
    return _quantize(_quantize_128x128_dual, x, dtype, pow2_scale)


def _fake_rowwise(
    x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    leading = leading_sizes(x)
    data = empty_data(x, leading, x.shape[-1], dtype or torch.float8_e4m3fn)
    return data, empty_contiguous(x, leading, 1, torch.float32)


_quantize_rowwise = declare(
    "quantize_rowwise",
    fake=_fake_rowwise,
    flops=None,
    batching=quantize_rows(1),
    sharding=quantizer("quantize_rowwise", "rowwise"),
).op


def quantize_rowwise(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantizes `x` to FP8 with one scale for each row.

    Args:
        x: [..., K], bfloat16, float16 or float32, of any strides that let its rows fold.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data: [..., K], FP8, with the strides of `quantize_1x128`'s data.
        scale: [..., 1], float32, contiguous.

    Raises:
        ValueError: x is a scalar, or its rows do not fold.
        TypeError: x has another dtype, or `dtype` is not an FP8 dtype.
    """
    return _quantize(_quantize_rowwise, x, dtype, pow2_scale)


def _fake_tensorwise(
    x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    data = empty_data(x, leading_sizes(x), x.shape[-1], dtype or torch.float8_e4m3fn)
    return data, x.new_empty((1, 1), dtype=torch.float32)


_quantize_tensorwise = declare(
    "quantize_tensorwise",
    fake=_fake_tensorwise,
    flops=None,
    batching=each_quantized,
    sharding=quantizer("quantize_tensorwise", "tensorwise"),
).op


def quantize_tensorwise(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantizes `x` to FP8 with one scale for the whole tensor.

    Args:
        x: [..., K], bfloat16, float16 or float32, of any strides that let its rows fold.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round the scale up to a power of two.

    Returns:
        data: [..., K], FP8, with the strides of `quantize_1x128`'s data.
        scale: [1, 1], float32.

    Raises:
        ValueError: x is a scalar, or its rows do not fold.
        TypeError: x has another dtype, or `dtype` is not an FP8 dtype.
    """
    return _quantize(_quantize_tensorwise, x, dtype, pow2_scale)


def restore_layout(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a quantized pair with the layout that the GEMMs require.

    For pairs that were cloned, made contiguous, moved between devices, sent, or saved and loaded,
    all of which may lose the layout. Works for every granularity and for transposed pairs. Values,
    shapes and dtypes do not change. A tensor that already has the layout is returned uncopied. A
    copied scale keeps its gradient.

    Args:
        data: [..., K], torch.float8_e4m3fn or torch.float8_e5m2, of any strides. M is the number of
            rows, with all leading dimensions folded.
        scale: float32, of any strides, with the shape of one of these granularities:
            1x128 groups: [..., ceil(K / 128)];
            128x128 blocks: [ceil(M / 128), ceil(K / 128)] or, for several matrices [..., N, K],
            [..., ceil(N / 128), ceil(K / 128)];
            row-wise: [..., 1];
            tensor-wise: [1, 1].

    Returns:
        data: a 16-byte aligned tensor whose rows are a multiple of 16 bytes apart.
        scale: for 1x128 groups M-major, with strides (1, round_up(M, 4)) if it is 2-D.

    Raises:
        ValueError: scale's shape fits data in none of these ways, or the devices differ.
        TypeError: data or scale has another dtype.
    """
    if data.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise TypeError(
            "restore_layout: data must be torch.float8_e4m3fn or torch.float8_e5m2 (got "
            f"{data.dtype}); view bytes of FP8 data as their dtype, data.view(torch.float8_e4m3fn)"
        )
    if scale.dtype != torch.float32:
        raise TypeError(
            f"restore_layout: scale must be torch.float32 (got {scale.dtype}); convert it with "
            ".float()"
        )
    if scale.device != data.device:
        raise ValueError(
            f"restore_layout: scale must be on the device of data, {data.device} (got "
            f"{scale.device}); move it there with .to(data.device)"
        )
    if not fits_data(data, scale):
        raise ValueError(
            f"restore_layout: scale must have a shape that a quantizer returns with data of shape "
            f"{list(data.shape)} (got {list(scale.shape)}); pass the scale that was made with "
            "data, or scale.mT with the data_t of a 128x128 quantizer"
        )
    return laid_out(data, scale)


def _fake_dequantize(data: Tensor, scale: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    return empty_contiguous(data, leading_sizes(data), data.shape[-1], out_dtype)


def _gradient_of_scale(grad: Tensor, scale_shape: torch.Size, data: Tensor) -> Tensor:
    """The FP32 sum of grad * data over the elements that share the scale, as y = data * scale."""
    columns, scale_columns = data.shape[-1], scale_shape[-1]
    rows, scale_rows = math.prod(data.shape[:-1]), math.prod(scale_shape[:-1])
    product = (grad.float() * data.float()).reshape(rows, columns)
    if scale_columns != columns:
        product = _sum_groups(product, scale_columns)
    if scale_rows != rows:
        product = _sum_groups(product.t(), scale_rows).t()
    return product.reshape(scale_shape)


def _sum_groups(matrix: Tensor, groups: int) -> Tensor:
    """Sums the columns of `matrix` in groups of 128 (the last may be shorter), or in one group."""
    rows, columns = matrix.shape
    if groups == 1:
        return matrix.sum(1, keepdim=True)
    padding = ceil_div(columns, GROUP) * GROUP - columns
    return torch.nn.functional.pad(matrix, (0, padding)).view(rows, groups, GROUP).sum(2)


_dequantize, _dequantize_alias, _ = declare(
    "dequantize",
    fake=_fake_dequantize,
    flops=None,
    batching=each,
    gradient=Gradient("scale", _gradient_of_scale, saved=("data",)),
    sharding=dequantizer("dequantize"),
)


def dequantize(data: Tensor, scale: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """`data * scale`, rounded to FP32 and then, to nearest even, to `out_dtype`.

    The shape of `scale` determines which elements share a scale. The op has a gradient with respect
    to `scale` (float32: the sum of grad * data over the elements that share the scale), and none
    with respect to `data`.

    Args:
        data: [..., K], torch.float8_e4m3fn or torch.float8_e5m2, whose rows fold into M rows.
        scale: float32, whose leading dimensions fold, with the shape that a quantizer returns:
            [..., ceil(K / 128)], [ceil(M / 128), ceil(K / 128)], [..., 1], [1, 1], or []. BF16 and
            torch.float8_e8m0fnu as for `fp8_gemm_nt`.
        out_dtype: torch.bfloat16, torch.float16 or torch.float32.

    Returns:
        [..., K], out_dtype, contiguous.

    Raises:
        ValueError: scale's shape fits data in none of these ways; the rows of data or of scale do
            not fold; the devices differ.
        TypeError: data, scale or out_dtype has another dtype.
    """
    if is_compiling():
        (scale,) = float32_in_graph((data, scale))
    try:
        if not asks_gradient(scale):
            return _dequantize_alias(data, scale, out_dtype)
        return _dequantize(data, scale, out_dtype=out_dtype)
    except RuntimeError as error:
        return call_with_float32_scales(
            error,
            dequantize,
            *(data, scale),
            pairs=((0, 1),),
            out_dtype=out_dtype,
        )
