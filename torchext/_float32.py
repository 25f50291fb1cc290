"""Activations in FP32 to the bit, in plain PyTorch: what csrc/runtime/activation_math.h computes.

All functions take and return float32 tensors. They are slow, and for references; a layer calls
column_sums where it quantizes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_hex = float.fromhex


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c with one rounding.

    The product is exact in float64. The sum is rounded to float64 "to odd" (if it is inexact, its
    last bit is one), so that rounding it again, to FP32, gives the result of a single rounding.
    """
    product = a.double() * b
    addend = c.double() if isinstance(c, Tensor) else product.new_full((), c)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    inexact = (error != 0) & error.isfinite() & (bits & 1 == 0)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + step, bits).view(torch.float64).float()


def _polynomial(x: Tensor, *coefficients: str) -> Tensor:
    """Horner's scheme; the coefficient of the highest power comes first."""
    result = torch.full_like(x, _hex(coefficients[0]))
    for coefficient in coefficients[1:]:
        result = fma(result, x, _hex(coefficient))
    return result


def _exponential(x: Tensor) -> tuple[Tensor, Tensor]:
    """e**x as a significand and a power of two, which is 0 or Inf at the ends of the range."""
    shift = _hex("0x1.8p23") + 127
    x = x.clamp(-88.0, 89.0)  # keeps NaN
    shifted = fma(x, _hex("0x1.715476p0"), shift)
    n = shifted - shift
    r = fma(n, _hex("0x1.05c61p-29"), fma(n, _hex("-0x1.62e43p-1"), x))
    coefficients = "0x1.6a24dcp-10", "0x1.123a5cp-7", "0x1.5558f2p-5", "0x1.55549p-3"
    significand = _polynomial(r, *coefficients, "0x1.fffffcp-2", "0x1p0", "0x1p0")
    return significand, ((shifted.view(torch.int32) & 0xFF) << 23).view(torch.float32)


def _reciprocal(x: Tensor) -> Tensor:
    return torch.ones_like(x) / x


def _sigmoid(x: Tensor) -> Tensor:
    significand, power = _exponential(-x)
    return _reciprocal(fma(significand, power, 1.0))


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mass of the standard normal distribution below x, and e**(-x**2 / 2)."""
    significand, power = _exponential(-0.5 * x * x)
    density = significand * power
    t = _reciprocal(fma(x.abs(), _hex("0x1.21a186p-2"), 1.0))
    first = "0x1.4b92a6p-6", "-0x1.178adcp-4", "0x1.3742ccp-5", "0x1.8e4008p-5", "0x1.2c1af4p-5"
    q = _polynomial(t, *first, "0x1.91d05ap-4", "0x1.9bf90ep-4", "0x1.cff7dep-4", "0x1.ce1612p-4")
    q = q * t
    return torch.where(x < 0, q * density, fma(-q, density, 1.0)), density


class Curve(NamedTuple):
    """An activation of one operand."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _silu_slope(x: Tensor) -> Tensor:
    s = _sigmoid(x)
    return s * fma(x, 1.0 - s, 1.0)


def _gelu_slope(x: Tensor) -> Tensor:
    mass, density = _normal(x)
    return fma(x, _hex("0x1.988454p-2") * density, mass)


_A, _B, _THREE_B = _hex("0x1.988454p0"), _hex("0x1.2444f2p-4"), _hex("0x1.b6676cp-3")


def _gelu_tanh_value(x: Tensor) -> Tensor:
    return x * _sigmoid(x * fma(x * x, _B, _A))


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    x = x.clamp(-64.0, 64.0)
    square = x * x
    s = _sigmoid(x * fma(square, _B, _A))
    return s * fma(x * fma(square, _THREE_B, _A), 1.0 - s, 1.0)


def _positive(x: Tensor) -> Tensor:
    return torch.where(x < 0, 0.0, x)  # keeps NaN


SILU = Curve(lambda x: x * _sigmoid(x), _silu_slope)
GELU = Curve(lambda x: x * _normal(x)[0], _gelu_slope)
GELU_TANH = Curve(_gelu_tanh_value, _gelu_tanh_slope)
RELU2 = Curve(lambda x: _positive(x) * _positive(x), lambda x: 2.0 * _positive(x))


def column_sums(x: Tensor) -> Tensor:
    """The sums over the rows of a matrix, in the order of the kernels (docs/numerics.md)."""
    rows, columns = x.shape
    tiles = max(-(-rows // 128), 1)
    padded = torch.nn.functional.pad(x, (0, 0, 0, tiles * 128 - rows))
    runs = padded.view(tiles, 8, 16, columns)
    sums = runs[:, :, 0]
    for row in range(1, 16):
        sums = sums + runs[:, :, row]
    while sums.shape[1] > 1:
        sums = sums[:, 0::2] + sums[:, 1::2]
    total = sums[0, 0]
    for tile in range(1, tiles):
        total = total + sums[tile, 0]
    return total


_SEGMENT = 512  # elements of a row whose sum is a tree of neighbors


def pairwise_sums(x: Tensor) -> Tensor:
    """The sum over each row of x [M, K] in FP32, in the order of norms (docs/numerics.md)."""
    rows, columns = x.shape
    segments = -(-columns // _SEGMENT)
    sums = torch.nn.functional.pad(x, (0, segments * _SEGMENT - columns))
    sums = sums.reshape(rows, segments, _SEGMENT)
    while sums.shape[-1] > 1:
        sums = sums[..., ::2] + sums[..., 1::2]
    total = x.new_zeros(rows)
    for segment in range(segments):
        total = total + sums[:, segment, 0]
    return total
