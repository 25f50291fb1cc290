"""Activations fused with quantization, part of `torchext.ops`.

Outputs of quantizers never require a gradient, like those of a cast to integers. A layer calls an
op of `activation_gradient` in its backward. Numbers: docs/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._dispatch.batching import each_quantized, quantize_rows
from .._dispatch.declaration import declare
from .._dispatch.errors import python_error
from .._dispatch.layout import empty_data, empty_group_scale, leading_sizes
from .._dispatch.sharding_rules import quantizer

Dtype = torch.dtype | None
Pair = tuple[Tensor, Tensor]
Dual = tuple[Tensor, Tensor, Tensor, Tensor]


def call(op: Callable[..., Any], *tensors: Tensor, **options: Any) -> Any:
    # Defaults are not passed: each keyword argument costs a quarter of a microsecond, or more.
    given = {
        name: value for name, value in options.items() if value is not None and value is not False
    }
    try:
        return op(*tensors, **given)
    except RuntimeError as error:
        raise python_error(error) from None


# ---- fake kernels ----


def rows_of(x: Tensor, columns: int, dtype: Dtype) -> Pair:
    leading = leading_sizes(x)
    data = empty_data(x, leading, columns, dtype or torch.float8_e4m3fn)
    return data, empty_group_scale(x, leading, columns)


def transposed_of(x: Tensor, columns: int, dtype: Dtype) -> Pair:
    rows = math.prod(leading_sizes(x))
    data_t = empty_data(x, (columns,), rows, dtype or torch.float8_e4m3fn)
    return data_t, empty_group_scale(x, (columns,), rows)


def both_of(x: Tensor, columns: int, dtype: Dtype) -> Dual:
    return *rows_of(x, columns, dtype), *transposed_of(x, columns, dtype)


def _fake(outputs: Callable[..., Any], operands: int) -> Callable[..., Any]:
    """operands: columns of the input for each column of the result."""

    def fake(
        x: Tensor,
        *,
        tanh_approximation: bool = False,
        dtype: Dtype = None,
        pow2_scale: bool = False,
    ) -> Any:
        return outputs(x, x.shape[-1] // operands, dtype)

    return fake


def _declare(family: str, operands: int) -> tuple[Any, Any, Any]:
    """The ops NAME_quantize_1x128, _t and _dual."""
    name = f"{family}_quantize_1x128"
    return (
        declare(
            name,
            fake=_fake(rows_of, operands),
            flops=None,
            batching=quantize_rows(1),
            sharding=quantizer(name, "1x128", columns=operands == 1),
        ).op,
        *(
            declare(
                name + ending,
                fake=_fake(outputs, operands),
                flops=None,
                batching=each_quantized,
                sharding=quantizer(name + ending, f"1x128{ending}", columns=operands == 1),
            ).op
            for ending, outputs in (("_t", transposed_of), ("_dual", both_of))
        ),
    )


_silu_mul, _silu_mul_t, _silu_mul_dual = _declare("silu_mul", 2)
_gelu_mul, _gelu_mul_t, _gelu_mul_dual = _declare("gelu_mul", 2)
_gelu, _gelu_t, _gelu_dual = _declare("gelu", 1)
_relu2, _relu2_t, _relu2_dual = _declare("relu2", 1)


def silu_mul_quantize_1x128(
    gate_up: Tensor,
    *,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Pair:
    """SwiGLU and quantization in one kernel, with a scale for each 128 columns of a row.

    Returns `quantize_1x128(silu(gate) * up)`, computed in FP32 and not rounded before it is
    quantized. For fprop of the layer that follows.

    Args:
        gate_up: [..., 2 * I], bfloat16, float16 or float32: the I gates, then the I ups; of any
            strides that let its rows fold.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data: [..., I], FP8, with the strides of `quantize_1x128`'s data.
        scale: [..., ceil(I / 128)], float32, with the strides of `quantize_1x128`'s scale.

    Raises:
        ValueError: gate_up is a scalar, has an odd number of columns, or its rows do not fold.
        TypeError: gate_up has another dtype, or `dtype` is not an FP8 dtype.
    """
    return call(_silu_mul, gate_up, dtype=dtype, pow2_scale=pow2_scale)


def silu_mul_quantize_1x128_t(
    gate_up: Tensor,
    *,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Pair:
    """`silu_mul_quantize_1x128`, transposed, with a scale for each 128 rows of a column.

    Returns `quantize_1x128_t(silu(gate) * up)`: for wgrad of the layer that follows.

    Args, Raises: those of `silu_mul_quantize_1x128`.

    Returns:
        data_t: [I, M], FP8, where M is the number of rows; strides (round_up(M, 16), 1).
        scale_t: [I, ceil(M / 128)], float32, strides (1, round_up(I, 4)).
    """
    return call(_silu_mul_t, gate_up, dtype=dtype, pow2_scale=pow2_scale)


def silu_mul_quantize_1x128_dual(
    gate_up: Tensor,
    *,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Dual:
    """`silu_mul_quantize_1x128` and `silu_mul_quantize_1x128_t` from one read of `gate_up`.

    Args, Raises: those of `silu_mul_quantize_1x128`.

    Returns:
        data, scale: as `silu_mul_quantize_1x128` returns them.
        data_t, scale_t: as `silu_mul_quantize_1x128_t` returns them.
    """
    return call(_silu_mul_dual, gate_up, dtype=dtype, pow2_scale=pow2_scale)


def gelu_mul_quantize_1x128(
    gate_up: Tensor,
    *,
    tanh_approximation: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Pair:
    """GeGLU and quantization in one kernel, with a scale for each 128 columns of a row.

    Returns `quantize_1x128(gelu(gate) * up)`, computed in FP32 and not rounded before it is
    quantized. For fprop of the layer that follows.

    Args:
        gate_up: [..., 2 * I], bfloat16, float16 or float32: the I gates, then the I ups; of any
            strides that let its rows fold.
        tanh_approximation: if True, gelu is PyTorch's `approximate="tanh"` instead of
            x / 2 * (1 + erf(x / sqrt(2))).
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data: [..., I], FP8, with the strides of `quantize_1x128`'s data.
        scale: [..., ceil(I / 128)], float32, with the strides of `quantize_1x128`'s scale.

    Raises:
        ValueError: gate_up is a scalar, has an odd number of columns, or its rows do not fold.
        TypeError: gate_up has another dtype, or `dtype` is not an FP8 dtype.
    """
    return call(
        _gelu_mul,
        gate_up,
        tanh_approximation=tanh_approximation,
        dtype=dtype,
        pow2_scale=pow2_scale,
    )


def gelu_mul_quantize_1x128_t(
    gate_up: Tensor,
    *,
    tanh_approximation: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Pair:
    """`gelu_mul_quantize_1x128`, transposed, with a scale for each 128 rows of a column.

    Returns `quantize_1x128_t(gelu(gate) * up)`: for wgrad of the layer that follows.

    Args, Raises: those of `gelu_mul_quantize_1x128`.

    Returns:
        data_t: [I, M], FP8, where M is the number of rows; strides (round_up(M, 16), 1).
        scale_t: [I, ceil(M / 128)], float32, strides (1, round_up(I, 4)).
    """
    return call(
        _gelu_mul_t,
        gate_up,
        tanh_approximation=tanh_approximation,
        dtype=dtype,
        pow2_scale=pow2_scale,
    )


def gelu_mul_quantize_1x128_dual(
    gate_up: Tensor,
    *,
    tanh_approximation: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Dual:
    """`gelu_mul_quantize_1x128` and `gelu_mul_quantize_1x128_t` from one read of `gate_up`.

    Args, Raises: those of `gelu_mul_quantize_1x128`.

    Returns:
        data, scale: as `gelu_mul_quantize_1x128` returns them.
        data_t, scale_t: as `gelu_mul_quantize_1x128_t` returns them.
    """
    return call(
        _gelu_mul_dual,
        gate_up,
        tanh_approximation=tanh_approximation,
        dtype=dtype,
        pow2_scale=pow2_scale,
    )


def gelu_quantize_1x128(
    x: Tensor,
    *,
    tanh_approximation: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Pair:
    """GELU and quantization in one kernel, with a scale for each 128 columns of a row.

    Returns `quantize_1x128(gelu(x))`, computed in FP32 and not rounded before it is
    quantized. For fprop of the layer that follows.

    Args:
        x: [..., I], bfloat16, float16 or float32, of any strides that let its rows fold.
        tanh_approximation: if True, gelu is PyTorch's `approximate="tanh"` instead of
            x / 2 * (1 + erf(x / sqrt(2))).
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data: [..., I], FP8, with the strides of `quantize_1x128`'s data.
        scale: [..., ceil(I / 128)], float32, with the strides of `quantize_1x128`'s scale.

    Raises:
        ValueError: x is a scalar, or its rows do not fold.
        TypeError: x has another dtype, or `dtype` is not an FP8 dtype.
    """
    return call(_gelu, x, tanh_approximation=tanh_approximation, dtype=dtype, pow2_scale=pow2_scale)


def gelu_quantize_1x128_t(
    x: Tensor,
    *,
    tanh_approximation: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Pair:
    """`gelu_quantize_1x128`, transposed, with a scale for each 128 rows of a column.

    Returns `quantize_1x128_t(gelu(x))`: for wgrad of the layer that follows.

    Args, Raises: those of `gelu_quantize_1x128`.

    Returns:
        data_t: [I, M], FP8, where M is the number of rows; strides (round_up(M, 16), 1).
        scale_t: [I, ceil(M / 128)], float32, strides (1, round_up(I, 4)).
    """
    return call(
        _gelu_t, x, tanh_approximation=tanh_approximation, dtype=dtype, pow2_scale=pow2_scale
    )


def gelu_quantize_1x128_dual(
    x: Tensor,
    *,
    tanh_approximation: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Dual:
    """`gelu_quantize_1x128` and `gelu_quantize_1x128_t` from one read of `x`.

    Args, Raises: those of `gelu_quantize_1x128`.

    Returns:
        data, scale: as `gelu_quantize_1x128` returns them.
        data_t, scale_t: as `gelu_quantize_1x128_t` returns them.
    """
    return call(
        _gelu_dual, x, tanh_approximation=tanh_approximation, dtype=dtype, pow2_scale=pow2_scale
    )


def relu2_quantize_1x128(
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Pair:
    """Squared ReLU and quantization in one kernel, with a scale for each 128 columns of a row.

    Returns `quantize_1x128(max(x, 0)**2)`, computed in FP32 and not rounded before it is
    quantized. For fprop of the layer that follows.

    Args:
        x: [..., I], bfloat16, float16 or float32, of any strides that let its rows fold.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data: [..., I], FP8, with the strides of `quantize_1x128`'s data.
        scale: [..., ceil(I / 128)], float32, with the strides of `quantize_1x128`'s scale.

    Raises:
        ValueError: x is a scalar, or its rows do not fold.
        TypeError: x has another dtype, or `dtype` is not an FP8 dtype.
    """
    return call(_relu2, x, dtype=dtype, pow2_scale=pow2_scale)


def relu2_quantize_1x128_t(
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Pair:
    """`relu2_quantize_1x128`, transposed, with a scale for each 128 rows of a column.

    Returns `quantize_1x128_t(max(x, 0)**2)`: for wgrad of the layer that follows.

    Args, Raises: those of `relu2_quantize_1x128`.

    Returns:
        data_t: [I, M], FP8, where M is the number of rows; strides (round_up(M, 16), 1).
        scale_t: [I, ceil(M / 128)], float32, strides (1, round_up(I, 4)).
    """
    return call(_relu2_t, x, dtype=dtype, pow2_scale=pow2_scale)


def relu2_quantize_1x128_dual(
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Dual:
    """`relu2_quantize_1x128` and `relu2_quantize_1x128_t` from one read of `x`.

    Args, Raises: those of `relu2_quantize_1x128`.

    Returns:
        data, scale: as `relu2_quantize_1x128` returns them.
        data_t, scale_t: as `relu2_quantize_1x128_t` returns them.
    """
    return call(_relu2_dual, x, dtype=dtype, pow2_scale=pow2_scale)
