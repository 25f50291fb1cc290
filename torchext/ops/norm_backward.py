"""Gradients of norms, also quantized; part of `torchext.ops`.

They are the backward of the ops of `torchext.ops.norm`, whose outputs require no gradient: a
layer's own autograd function calls them. Every sum has a fixed order (docs/numerics.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dispatch.batching import each, each_quantized
from .._dispatch.declaration import declare
from .._dispatch.errors import python_error
from .._dispatch.layout import empty_contiguous, empty_data, empty_group_scale, leading_sizes
from .._dispatch.sharding_rules_gradients import norm_gradient

Dtype = torch.dtype | None


def _column_values(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[-1],), dtype=torch.float32)


def _quantized_both(x: Tensor, dtype: Dtype) -> tuple[Tensor, ...]:
    leading, columns, fp8 = leading_sizes(x), x.shape[-1], dtype or torch.float8_e4m3fn
    rows = math.prod(leading)
    return (
        empty_data(x, leading, columns, fp8),
        empty_group_scale(x, leading, columns),
        empty_data(x, (columns,), rows, fp8),
        empty_group_scale(x, (columns,), rows),
    )


def _fake_rms(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    return empty_contiguous(x, leading_sizes(x), x.shape[-1], x.dtype), _column_values(x)


_rms_norm_backward = declare(
    "rms_norm_backward",
    fake=_fake_rms,
    flops=None,
    batching=each,
    sharding=norm_gradient("rms_norm_backward", 1),
).op


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of RMSNorm's input and weight.

    With x_hat = x * rstd and g = grad * w in FP32, dx = rstd * (g - x_hat * mean(g * x_hat)), the
    mean over each row, plus `residual_grad`; it is rounded once. dweight is the sum over rows of
    grad * x_hat.

    Args:
        grad: gradient of the normed values: like x, of the same shape and dtype.
        x: [..., K], bfloat16, float16 or float32: what was normed, the forward's `new_residual` if
            there was a residual. Strides of x, grad and residual_grad must let their rows fold.
        weight: [K], bfloat16, float16 or float32.
        rstd: [...], float32, from the forward op.
        residual_grad: like x: the gradient of `new_residual`, which is added to dx.
        unit_offset: as in the forward op.

    Returns:
        dx: [..., K], of x's dtype, contiguous.
        dweight: [K], float32. Deterministic: its order depends on the number of rows alone.

    Raises:
        ValueError: x is a scalar; rows do not fold; an argument has another shape or is on another
            device.
        TypeError: x or weight has another dtype, grad's or residual_grad's is not that of x, or
            rstd's is not float32.
    """
    try:
        return _rms_norm_backward(
            grad, x, weight, rstd, residual_grad=residual_grad, unit_offset=unit_offset
        )
    except RuntimeError as error:
        raise python_error(error) from None


def _fake_rms_quantize(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    unit_offset: bool = False,
    dtype: Dtype = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, ...]:
    return *_fake_rms(grad, x, weight, rstd), *_quantized_both(x, dtype)


_rms_norm_backward_quantize_1x128_dual = declare(
    "rms_norm_backward_quantize_1x128_dual",
    fake=_fake_rms_quantize,
    flops=None,
    batching=each_quantized,
    sharding=norm_gradient("rms_norm_backward_quantize_1x128_dual", 1),
).op


def rms_norm_backward_quantize_1x128_dual(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`rms_norm_backward`, and dx quantized both ways while it is in a cache.

    Args:
        grad, x, weight, rstd, residual_grad, unit_offset: as for `rms_norm_backward`.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        dx, dweight: as `rms_norm_backward` returns them.
        data, scale, data_t, scale_t: `quantize_1x128_dual` of dx.

    Raises:
        ValueError, TypeError: as `rms_norm_backward`; `dtype` is not an FP8 dtype.
    """
    try:
        return _rms_norm_backward_quantize_1x128_dual(
            grad,
            x,
            weight,
            rstd,
            residual_grad=residual_grad,
            unit_offset=unit_offset,
            dtype=dtype,
            pow2_scale=pow2_scale,
        )
    except RuntimeError as error:
        raise python_error(error) from None


def _fake_layer(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_rms(grad, x, weight, rstd), _column_values(x)


_layer_norm_backward = declare(
    "layer_norm_backward",
    fake=_fake_layer,
    flops=None,
    batching=each,
    sharding=norm_gradient("layer_norm_backward", 2),
).op


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of LayerNorm's input, weight and bias.

    With x_hat = (x - mean) * rstd and g = grad * w in FP32,
    dx = rstd * ((g - mean(g)) - x_hat * mean(g * x_hat)), the means over each row, plus
    `residual_grad`; it is rounded once. dweight and dbias are the sums over rows of grad * x_hat
    and of grad.

    Args:
        grad, x, weight, rstd, residual_grad, unit_offset: as for `rms_norm_backward`.
        mean: [...], float32, from the forward op.

    Returns:
        dx, dweight: as `rms_norm_backward` returns them.
        dbias: [K], float32, deterministic as dweight.

    Raises:
        ValueError, TypeError: as `rms_norm_backward`; mean as rstd.
    """
    try:
        return _layer_norm_backward(
            grad, x, weight, mean, rstd, residual_grad=residual_grad, unit_offset=unit_offset
        )
    except RuntimeError as error:
        raise python_error(error) from None


def _fake_layer_quantize(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    unit_offset: bool = False,
    dtype: Dtype = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, ...]:
    return *_fake_layer(grad, x, weight, mean, rstd), *_quantized_both(x, dtype)


_layer_norm_backward_quantize_1x128_dual = declare(
    "layer_norm_backward_quantize_1x128_dual",
    fake=_fake_layer_quantize,
    flops=None,
    batching=each_quantized,
    sharding=norm_gradient("layer_norm_backward_quantize_1x128_dual", 2),
).op


def layer_norm_backward_quantize_1x128_dual(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`layer_norm_backward`, and dx quantized both ways while it is in a cache.

    Args:
        grad, x, weight, mean, rstd, residual_grad, unit_offset: as for `layer_norm_backward`.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        dx, dweight, dbias: as `layer_norm_backward` returns them.
        data, scale, data_t, scale_t: `quantize_1x128_dual` of dx.

    Raises:
        ValueError, TypeError: as `layer_norm_backward`; `dtype` is not an FP8 dtype.
    """
    try:
        return _layer_norm_backward_quantize_1x128_dual(
            grad,
            x,
            weight,
            mean,
            rstd,
            residual_grad=residual_grad,
            unit_offset=unit_offset,
            dtype=dtype,
            pow2_scale=pow2_scale,
        )
    except RuntimeError as error:
        raise python_error(error) from None
