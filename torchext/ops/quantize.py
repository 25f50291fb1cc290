"""Quantization to FP8 and back, part of `torchext.ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._dispatch import registrations  # noqa: F401  (loads the ops, their fake kernels and gradients)
from .._dispatch.autograd import asks_gradient
from .._dispatch.errors import python_error
from .._dispatch.layout import fits_data, laid_out

# Overloads, resolved once: a call costs one Python frame above the dispatcher.
_quantize_1x128 = torch.ops.torchext.quantize_1x128.default
_quantize_1x128_t = torch.ops.torchext.quantize_1x128_t.default
_quantize_1x128_dual = torch.ops.torchext.quantize_1x128_dual.default
_quantize_128x128 = torch.ops.torchext.quantize_128x128.default
_quantize_128x128_dual = torch.ops.torchext.quantize_128x128_dual.default
_quantize_rowwise = torch.ops.torchext.quantize_rowwise.default
_quantize_tensorwise = torch.ops.torchext.quantize_tensorwise.default
_dequantize = torch.ops.torchext.dequantize.default
_dequantize_twin = torch.ops.torchext._dequantize.default


def _quantize(
    op: Callable[..., Any], x: Tensor, dtype: torch.dtype | None, pow2_scale: bool
) -> Any:
    # A keyword argument costs a quarter of a microsecond, or more; so defaults are not passed.
    try:
        if dtype is None and pow2_scale is False:
            return op(x)
        return op(x, dtype=dtype, pow2_scale=pow2_scale)
    except RuntimeError as error:
        raise python_error(error) from None


def quantize_1x128(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantizes `x` to FP8 with one scale for every 128 consecutive elements of a row.

    The layout of activations and of gradients in fprop and dgrad (DeepSeek-V3, section 3.3.2).

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
        TypeError: x or dtype is of another dtype.
    """
    return _quantize(_quantize_1x128, x, dtype, pow2_scale)


def quantize_1x128_t(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantizes `x` transposed, with one scale for every 128 consecutive rows of a column.

    Equal, to the bit, to `quantize_1x128(x.flatten(0, -2).t())` without the copy: the operands of
    wgrad, whose K is the number of tokens.

    Args:
        x: [..., K], bfloat16, float16 or float32, of any strides that let its rows fold
            into M.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data_t: [K, M], FP8, strides (round_up(M, 16), 1).
        scale_t: [K, ceil(M / 128)], float32, strides (1, round_up(K, 4)).

    Raises:
        ValueError: x is a scalar, or its rows do not fold.
        TypeError: x or dtype is of another dtype.
    """
    return _quantize(_quantize_1x128_t, x, dtype, pow2_scale)


def quantize_1x128_dual(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_1x128` and `quantize_1x128_t` from one read of `x`.

    What a training step needs of an activation or a gradient: the rows now, for fprop or dgrad, and
    the transpose for wgrad.

    Args:
        x: [..., K], bfloat16, float16 or float32, of any strides that let its rows fold into M.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data, scale: as `quantize_1x128` returns them.
        data_t, scale_t: as `quantize_1x128_t` returns them.

    Raises:
        ValueError: x is a scalar, or its rows do not fold.
        TypeError: x or dtype is of another dtype.
    """
    return _quantize(_quantize_1x128_dual, x, dtype, pow2_scale)


def quantize_128x128(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantizes matrices to FP8 with one scale for every block of 128 rows and 128 columns.

    The layout of weights, and of `weight` and `weight_scale_inv` in DeepSeek-V3 checkpoints. Of
    several matrices, the weights of experts, say, each is quantized by itself.

    Args:
        x: [..., N, K], bfloat16, float16 or float32, of any strides.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data: [..., N, K], FP8, strides (round_up(K, 16), 1), leading dimensions folded into rows.
        scale: [..., ceil(N / 128), ceil(K / 128)], float32, contiguous. Blocks at the right and
            lower edges of a matrix may be smaller.

    Raises:
        ValueError: x has fewer than two dimensions.
        TypeError: x or dtype is of another dtype.
    """
    return _quantize(_quantize_128x128, x, dtype, pow2_scale)


def quantize_128x128_dual(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_128x128` of `x` and of its transpose, `x.mT`, from one read of `x`.

    Blocks are square, so both share their FP8 values and their scales: the transpose's scale is
    `scale.mT`. A weight needs `data` in fprop and `data_t` in dgrad.

    Args:
        x: [..., N, K], bfloat16, float16 or float32, of any strides.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data, scale: as `quantize_128x128` returns them.
        data_t: [..., K, N], FP8, strides (round_up(N, 16), 1), leading dimensions folded into rows.

    Raises:
        ValueError: x has fewer than two dimensions.
        TypeError: x or dtype is of another dtype.
    """
    return _quantize(_quantize_128x128_dual, x, dtype, pow2_scale)


def quantize_rowwise(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantizes `x` to FP8 with one scale a row.

    Args:
        x: [..., K], bfloat16, float16 or float32, of any strides that let its rows fold.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.

    Returns:
        data: [..., K], FP8, strides as `quantize_1x128`'s.
        scale: [..., 1], float32, contiguous.

    Raises:
        ValueError: x is a scalar, or its rows do not fold.
        TypeError: x or dtype is of another dtype.
    """
    return _quantize(_quantize_rowwise, x, dtype, pow2_scale)


def quantize_tensorwise(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantizes `x` to FP8 with one scale in all.

    Args:
        x: [..., K], bfloat16, float16 or float32, of any strides that let its rows fold.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round the scale up to a power of two.

    Returns:
        data: [..., K], FP8, strides as `quantize_1x128`'s.
        scale: [1, 1], float32.

    Raises:
        ValueError: x is a scalar, or its rows do not fold.
        TypeError: x or dtype is of another dtype.
    """
    return _quantize(_quantize_tensorwise, x, dtype, pow2_scale)


def restore_layout(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A quantized pair in the layout that the products ask for, whatever copied it before.

    For pairs that were cloned, made contiguous, moved between devices, sent, or saved and loaded.
    Works for every granularity and for transposes; values, shapes and dtypes stay as they are.
    Neither is copied where it has the layout already. The copy of a scale passes gradients on.

    Args:
        data: [..., K], torch.float8_e4m3fn or torch.float8_e5m2, of any strides; M rows.
        scale: float32, of any strides: [..., ceil(K / 128)] of 1x128 groups, [..., 1] of rows,
            [1, 1] of all, or of blocks [ceil(M / 128), ceil(K / 128)] or, of several matrices
            [..., N, K], [..., ceil(N / 128), ceil(K / 128)].

    Returns:
        data: rows a multiple of 16 bytes apart, 16-byte aligned.
        scale: of 1x128 groups, M-major: strides (1, round_up(M, 4)) for a 2-D one.

    Raises:
        ValueError: scale's shape fits data in none of these ways; different devices.
        TypeError: data or scale is of another dtype.
    """
    if data.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise TypeError(
            "restore_layout: data must be torch.float8_e4m3fn or torch.float8_e5m2 (got "
            f"{data.dtype}); if these are the bytes of FP8 data, pass data.view(its dtype)"
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
            f"restore_layout: scale must have a shape that a quantizer gives data of shape "
            f"{list(data.shape)} (got {list(scale.shape)}); pass the scale that was made with "
            "data, transposed if data is a transpose in 128x128 blocks"
        )
    return laid_out(data, scale)


def dequantize(data: Tensor, scale: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """`data * scale`, rounded to FP32 and then, to nearest even, to `out_dtype`.

    The shape of `scale` tells which elements share a scale. It has a gradient with respect to
    `scale` (float32; the sum of grad * data over each group) and none with respect to `data`.

    Args:
        data: [..., K], torch.float8_e4m3fn or torch.float8_e5m2; M rows.
        scale: float32, of any strides, as a quantizer made it: [..., ceil(K / 128)],
            [ceil(M / 128), ceil(K / 128)], [..., 1] or [1, 1].
        out_dtype: torch.bfloat16, torch.float16 or torch.float32.

    Returns:
        [..., K], out_dtype, contiguous.

    Raises:
        ValueError: scale's shape fits data in none of these ways; rows do not fold; different
            devices.
        TypeError: data, scale or out_dtype is of another dtype.
    """
    try:
        if not asks_gradient(scale):
            return _dequantize_twin(data, scale, out_dtype)
        return _dequantize(data, scale, out_dtype=out_dtype)
    except RuntimeError as error:
        raise python_error(error) from None
