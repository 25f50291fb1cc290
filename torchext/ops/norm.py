"""Norms fused with quantization; part of `torchext.ops`.

The normed values y are computed in FP32 and quantized without being rounded in between, so that x
is read once and y is never written. With `return_normed`, y is rounded to x's dtype, written, and
quantized as rounded. Every sum has a fixed order (docs/numerics.md): CPU and CUDA give the same
bits. Outputs require no gradient, like those of a quantizer; `torchext.ops.norm_backward` has the
gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dispatch.batching import each_quantized
from .._dispatch.declaration import declare
from .._dispatch.errors import python_error
from .._dispatch.layout import (
    empty_contiguous,
    empty_data,
    empty_group_scale,
    folded_strides,
    leading_sizes,
)
from .._dispatch.sharding_rules import norm

Dtype = torch.dtype | None


def empty_row_values(x: Tensor) -> Tensor:
    """Uninitialized FP32 values, one for each row of x [..., K]: [...], contiguous."""
    leading = leading_sizes(x)
    return x.new_empty_strided(leading, folded_strides(leading, 1, 1)[:-1], dtype=torch.float32)


def empty_optional(x: Tensor, exists: bool) -> Tensor:
    """An uninitialized tensor of x's shape and dtype, contiguous; an empty one if not `exists`."""
    if not exists:
        return x.new_empty((0,))
    return empty_contiguous(x, leading_sizes(x), x.shape[-1], x.dtype)


def _fake_rms(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    dtype: Dtype = None,
    pow2_scale: bool = False,
    return_normed: bool = False,
) -> tuple[Tensor, ...]:
    leading, columns = leading_sizes(x), x.shape[-1]
    data = empty_data(x, leading, columns, dtype or torch.float8_e4m3fn)
    scale = empty_group_scale(x, leading, columns)
    optional = (empty_optional(x, exists) for exists in (residual is not None, return_normed))
    return data, scale, empty_row_values(x), *optional


_rms_norm_quantize_1x128 = declare(
    "rms_norm_quantize_1x128",
    fake=_fake_rms,
    flops=None,
    batching=each_quantized,
    sharding=norm("rms_norm_quantize_1x128", 1),
).op


def rms_norm_quantize_1x128(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    return_normed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm and quantization with one scale for every 128 consecutive elements of a row.

    Returns `quantize_1x128(y)` of y = h * rstd * w in FP32, where h is x + residual, rounded to x's
    dtype, or x without a residual; rstd = 1 / sqrt(mean(h**2) + eps) over each row; and w is the
    weight or, with `unit_offset`, 1 + weight.

    Args:
        x: [..., K], bfloat16, float16 or float32, of any strides that let its rows fold.
        weight: [K], bfloat16, float16 or float32.
        eps: added to the mean of squares, rounded to FP32; at least 0.
        residual: like x: the same shape and dtype, and strides that let its rows fold.
        unit_offset: multiply by 1 + weight, as Gemma does.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.
        return_normed: also return `normed`. Then y is rounded to x's dtype before it is quantized.

    Returns:
        data: [..., K], FP8, with the strides of `quantize_1x128`'s data.
        scale: [..., ceil(K / 128)], float32, M-major, with the strides of `quantize_1x128`'s scale.
        rstd: [...], float32, contiguous. NaN if K is 0.
        new_residual: h, [..., K], of x's dtype, contiguous. Without a residual: empty, [0].
        normed: y, [..., K], rounded to x's dtype, contiguous; `data` and `scale` are then the bits
            of `quantize_1x128(normed)`. Without `return_normed`: empty, [0].

    Raises:
        ValueError: x is a scalar; the rows of x or of residual do not fold; weight or residual has
            another shape or is on another device; eps is negative or not finite.
        TypeError: x or weight has another dtype, residual's is not that of x, or `dtype` is not an
            FP8 dtype.
    """
    try:
        return _rms_norm_quantize_1x128(
            x,
            weight,
            eps,
            residual=residual,
            unit_offset=unit_offset,
            dtype=dtype,
            pow2_scale=pow2_scale,
            return_normed=return_normed,
        )
    except RuntimeError as error:
        raise python_error(error) from None


def _fake_rms_dual(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    dtype: Dtype = None,
    pow2_scale: bool = False,
    return_normed: bool = False,
) -> tuple[Tensor, ...]:
    data, scale, *rest = _fake_rms(
        x, weight, eps, residual=residual, dtype=dtype, return_normed=return_normed
    )
    rows, columns = math.prod(leading_sizes(x)), x.shape[-1]
    data_t = empty_data(x, (columns,), rows, dtype or torch.float8_e4m3fn)
    return data, scale, data_t, empty_group_scale(x, (columns,), rows), *rest


_rms_norm_quantize_1x128_dual = declare(
    "rms_norm_quantize_1x128_dual",
    fake=_fake_rms_dual,
    flops=None,
    batching=each_quantized,
    sharding=norm("rms_norm_quantize_1x128_dual", 1),
).op


def rms_norm_quantize_1x128_dual(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    return_normed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`rms_norm_quantize_1x128`, and the transpose of its normed values quantized too.

    A training step needs both: `data` for fprop, and `data_t` for wgrad. A GPU reads h twice, the
    second time mostly from L2.

    Args:
        x, weight, eps, residual, unit_offset, dtype, pow2_scale, return_normed: as for
            `rms_norm_quantize_1x128`.

    Returns:
        data, scale: as `rms_norm_quantize_1x128` returns them.
        data_t, scale_t: `quantize_1x128_t` of the same normed values, [K, M] and
            [K, ceil(M / 128)].
        rstd, new_residual, normed: as `rms_norm_quantize_1x128` returns them.

    Raises:
        ValueError, TypeError: as `rms_norm_quantize_1x128`.
    """
    try:
        return _rms_norm_quantize_1x128_dual(
            x,
            weight,
            eps,
            residual=residual,
            unit_offset=unit_offset,
            dtype=dtype,
            pow2_scale=pow2_scale,
            return_normed=return_normed,
        )
    except RuntimeError as error:
        raise python_error(error) from None


def _fake_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    dtype: Dtype = None,
    pow2_scale: bool = False,
    return_normed: bool = False,
) -> tuple[Tensor, ...]:
    data, scale, *rest = _fake_rms(
        x, weight, eps, residual=residual, dtype=dtype, return_normed=return_normed
    )
    return data, scale, empty_row_values(x), *rest


_layer_norm_quantize_1x128 = declare(
    "layer_norm_quantize_1x128",
    fake=_fake_layer,
    flops=None,
    batching=each_quantized,
    sharding=norm("layer_norm_quantize_1x128", 2),
).op


def layer_norm_quantize_1x128(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    return_normed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm and quantization with one scale for every 128 consecutive elements of a row.

    Returns `quantize_1x128(y)` of y = (h - mean) * rstd * w + bias in FP32, where h is
    x + residual, rounded to x's dtype, or x without a residual; mean is that of each row, and
    rstd = 1 / sqrt(mean((h - mean)**2) + eps); and w is the weight or, with `unit_offset`,
    1 + weight.

    Args:
        x, weight, eps, residual, unit_offset, dtype, pow2_scale, return_normed: as for
            `rms_norm_quantize_1x128`.
        bias: [K], bfloat16, float16 or float32, or None.

    Returns:
        data, scale, rstd, new_residual, normed: as `rms_norm_quantize_1x128` returns them.
        mean: [...], float32, contiguous. NaN if K is 0.

    Raises:
        ValueError, TypeError: as `rms_norm_quantize_1x128`; bias as weight.
    """
    try:
        return _layer_norm_quantize_1x128(
            x,
            weight,
            bias,
            eps,
            residual=residual,
            unit_offset=unit_offset,
            dtype=dtype,
            pow2_scale=pow2_scale,
            return_normed=return_normed,
        )
    except RuntimeError as error:
        raise python_error(error) from None


def _fake_layer_dual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    dtype: Dtype = None,
    pow2_scale: bool = False,
    return_normed: bool = False,
) -> tuple[Tensor, ...]:
    data, scale, data_t, scale_t, *rest = _fake_rms_dual(
        x, weight, eps, residual=residual, dtype=dtype, return_normed=return_normed
    )
    return data, scale, data_t, scale_t, empty_row_values(x), *rest


_layer_norm_quantize_1x128_dual = declare(
    "layer_norm_quantize_1x128_dual",
    fake=_fake_layer_dual,
    flops=None,
    batching=each_quantized,
    sharding=norm("layer_norm_quantize_1x128_dual", 2),
).op


def layer_norm_quantize_1x128_dual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    return_normed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`layer_norm_quantize_1x128`, and the transpose of its normed values quantized too.

    Args:
        x, weight, bias, eps, residual, unit_offset, dtype, pow2_scale, return_normed: as for
            `layer_norm_quantize_1x128`.

    Returns:
        data, scale: as `layer_norm_quantize_1x128` returns them.
        data_t, scale_t: `quantize_1x128_t` of the same normed values, [K, M] and
            [K, ceil(M / 128)].
        mean, rstd, new_residual, normed: as `layer_norm_quantize_1x128` returns them.

    Raises:
        ValueError, TypeError: as `layer_norm_quantize_1x128`.
    """
    try:
        return _layer_norm_quantize_1x128_dual(
            x,
            weight,
            bias,
            eps,
            residual=residual,
            unit_offset=unit_offset,
            dtype=dtype,
            pow2_scale=pow2_scale,
            return_normed=return_normed,
        )
    except RuntimeError as error:
        raise python_error(error) from None
