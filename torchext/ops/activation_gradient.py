"""Gradients of activations, quantized on the way out, part of `torchext.ops`.

The backward of a layer passes the gradient of the activation and the operands that forward saved,
and gets what both GEMMs of the layer before read. Numbers: docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from .._dispatch.batching import each_quantized
from .._dispatch.declaration import declare
from .._dispatch.sharding_rules_gradients import activation_gradient
from .activation import Dtype, both_of, call, transposed_of

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
GradientsAndActivation = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]


def _fake(operands: int) -> Callable[..., Any]:
    """operands: columns of the input for each column of the activation."""

    def fake(
        grad: Tensor,
        x: Tensor,
        *,
        tanh_approximation: bool = False,
        bias_grad: bool = False,
        activation_dtype: Dtype = None,
        dtype: Dtype = None,
        pow2_scale: bool = False,
        **scale_of_x: Tensor | None,
    ) -> tuple[Tensor, ...]:
        columns = x.shape[-1]
        sums = x.new_empty((columns if bias_grad else 0,), dtype=torch.float32)
        if activation_dtype is None:
            activation_t = transposed_of(x.new_empty((0, 0)), 0, dtype)
        else:
            activation_t = transposed_of(x, columns // operands, activation_dtype)
        return *both_of(x, columns, dtype), sums, *activation_t

    return fake


def _declare(family: str, operands: int) -> Any:
    name = f"{family}_backward_quantize_1x128_dual"
    operand = "gate_up" if operands == 2 else "x"
    return declare(
        name,
        fake=_fake(operands),
        flops=None,
        batching=each_quantized,
        sharding=activation_gradient(name, operand, columns=operands == 1),
    ).op


_silu_mul, _gelu_mul = _declare("silu_mul", 2), _declare("gelu_mul", 2)
_gelu, _relu2 = _declare("gelu", 1), _declare("relu2", 1)


def _gradients(
    op: Callable[..., Any], grad: Tensor, x: Tensor, activation_dtype: Dtype, **options: Any
) -> Any:
    results = call(op, grad, x, activation_dtype=activation_dtype, **options)
    *gradients, sums, activation_t, activation_scale_t = results
    bias_grad = sums if options["bias_grad"] else None
    if activation_dtype is None:
        return *gradients, bias_grad
    return *gradients, bias_grad, activation_t, activation_scale_t


@overload
def silu_mul_backward_quantize_1x128_dual(
    grad: Tensor,
    gate_up: Tensor,
    *,
    gate_up_scale: Tensor | None = None,
    bias_grad: bool = False,
    activation_dtype: None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Gradients: ...


@overload
def silu_mul_backward_quantize_1x128_dual(
    grad: Tensor,
    gate_up: Tensor,
    *,
    gate_up_scale: Tensor | None = None,
    bias_grad: bool = False,
    activation_dtype: torch.dtype,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> GradientsAndActivation: ...


def silu_mul_backward_quantize_1x128_dual(
    grad: Tensor,
    gate_up: Tensor,
    *,
    gate_up_scale: Tensor | None = None,
    bias_grad: bool = False,
    activation_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Gradients | GradientsAndActivation:
    """The gradient of silu(gate) * up with respect to gate_up, quantized both ways.

    All outputs come from one read of `grad` and `gate_up`. The gradient is computed in FP32 and not
    rounded before it is quantized or summed.

    Args:
        grad: [..., I], bfloat16, float16 or float32: the gradient of the activation; of any strides
            that let its rows fold.
        gate_up: [..., 2 * I], the I gates, then the I ups, in grad's dtype or in FP8; of any
            strides that let its rows fold.
        gate_up_scale: [..., ceil(2 * I / 128)], float32, the 1x128 scales of an FP8 gate_up.
        bias_grad: also return the sums of the gradient over all rows.
        activation_dtype: if an FP8 dtype, also return what `silu_mul_quantize_1x128_t` returns for
            gate_up and this dtype: the operand of wgrad of the layer that follows.
        dtype: of the gradient: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data, scale, data_t, scale_t: the gradient [..., 2 * I], as of `quantize_1x128_dual`.
        bias_grad: [2 * I], float32, or None. The order of the sums is fixed (docs/numerics.md).
        activation_t, activation_scale_t: only if activation_dtype is given.

    Raises:
        ValueError: a tensor is a scalar or its rows do not fold; gate_up has an odd number of
            columns; grad or gate_up_scale has another shape or device; gate_up_scale is missing, or
            given although gate_up is not FP8.
        TypeError: a tensor has another dtype, or `dtype` or `activation_dtype` is not an FP8 dtype.
    """
    return _gradients(
        _silu_mul,
        grad,
        gate_up,
        activation_dtype,
        gate_up_scale=gate_up_scale,
        bias_grad=bias_grad,
        dtype=dtype,
        pow2_scale=pow2_scale,
    )


@overload
def gelu_mul_backward_quantize_1x128_dual(
    grad: Tensor,
    gate_up: Tensor,
    *,
    gate_up_scale: Tensor | None = None,
    tanh_approximation: bool = False,
    bias_grad: bool = False,
    activation_dtype: None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Gradients: ...


@overload
def gelu_mul_backward_quantize_1x128_dual(
    grad: Tensor,
    gate_up: Tensor,
    *,
    gate_up_scale: Tensor | None = None,
    tanh_approximation: bool = False,
    bias_grad: bool = False,
    activation_dtype: torch.dtype,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> GradientsAndActivation: ...


def gelu_mul_backward_quantize_1x128_dual(
    grad: Tensor,
    gate_up: Tensor,
    *,
    gate_up_scale: Tensor | None = None,
    tanh_approximation: bool = False,
    bias_grad: bool = False,
    activation_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Gradients | GradientsAndActivation:
    """The gradient of gelu(gate) * up with respect to gate_up, quantized both ways.

    Other arguments, Returns and Raises: those of `silu_mul_backward_quantize_1x128_dual`.

    Args:
        tanh_approximation: if True, gelu is PyTorch's `approximate="tanh"` instead of
            x / 2 * (1 + erf(x / sqrt(2))).
    """
    return _gradients(
        _gelu_mul,
        grad,
        gate_up,
        activation_dtype,
        gate_up_scale=gate_up_scale,
        tanh_approximation=tanh_approximation,
        bias_grad=bias_grad,
        dtype=dtype,
        pow2_scale=pow2_scale,
    )


@overload
def gelu_backward_quantize_1x128_dual(
    grad: Tensor,
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    tanh_approximation: bool = False,
    bias_grad: bool = False,
    activation_dtype: None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Gradients: ...


@overload
def gelu_backward_quantize_1x128_dual(
    grad: Tensor,
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    tanh_approximation: bool = False,
    bias_grad: bool = False,
    activation_dtype: torch.dtype,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> GradientsAndActivation: ...


def gelu_backward_quantize_1x128_dual(
    grad: Tensor,
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    tanh_approximation: bool = False,
    bias_grad: bool = False,
    activation_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Gradients | GradientsAndActivation:
    """The gradient of gelu(x) with respect to x, quantized both ways.

    Other arguments, Returns and Raises: those of `silu_mul_backward_quantize_1x128_dual`, for
    x [..., I] in place of gate_up.

    Args:
        tanh_approximation: if True, gelu is PyTorch's `approximate="tanh"` instead of
            x / 2 * (1 + erf(x / sqrt(2))).
    """
    return _gradients(
        _gelu,
        grad,
        x,
        activation_dtype,
        x_scale=x_scale,
        tanh_approximation=tanh_approximation,
        bias_grad=bias_grad,
        dtype=dtype,
        pow2_scale=pow2_scale,
    )


@overload
def relu2_backward_quantize_1x128_dual(
    grad: Tensor,
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    bias_grad: bool = False,
    activation_dtype: None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Gradients: ...


@overload
def relu2_backward_quantize_1x128_dual(
    grad: Tensor,
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    bias_grad: bool = False,
    activation_dtype: torch.dtype,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> GradientsAndActivation: ...


def relu2_backward_quantize_1x128_dual(
    grad: Tensor,
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    bias_grad: bool = False,
    activation_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Gradients | GradientsAndActivation:
    """The gradient of max(x, 0)**2 with respect to x, quantized both ways.

    Other arguments, Returns and Raises: those of `silu_mul_backward_quantize_1x128_dual`, for
    x [..., I] in place of gate_up.
    """
    return _gradients(
        _relu2,
        grad,
        x,
        activation_dtype,
        x_scale=x_scale,
        bias_grad=bias_grad,
        dtype=dtype,
        pow2_scale=pow2_scale,
    )
