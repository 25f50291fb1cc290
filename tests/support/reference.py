"""The quantizers in numpy, by a method that no kernel uses: a search in the list of all FP8 values.
Ties are found among the exact midpoints between these values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

GROUP = 128
SMALLEST_NORMAL = np.float32(2.0**-126)
NAN_SCALE = np.uint32(0x7FC00000).view(np.float32)
NAN_CODE = 0x7F


@dataclass(frozen=True)
class Format:
    """An FP8 format: the values of its codes 0 to the largest finite one, in order."""

    values: np.ndarray
    midpoints: np.ndarray

    @staticmethod
    def of(mantissa_bits: int, bias: int, largest_code: int) -> Format:
        values = []
        for code in range(largest_code + 1):
            exponent, fraction = divmod(code, 1 << mantissa_bits)
            significand = fraction if exponent == 0 else fraction + (1 << mantissa_bits)
            values.append(significand * 2.0 ** (max(exponent, 1) - bias - mantissa_bits))
        array = np.array(values)
        return Format(array, (array[:-1] + array[1:]) / 2)

    @property
    def largest(self) -> np.float32:
        return np.float32(self.values[-1])

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Codes of x (no NaN): rounds to nearest, ties to even codes; saturates; keeps the sign."""
        magnitude = np.abs(x.astype(np.float64))
        code = np.searchsorted(self.midpoints, magnitude, side="left")  # midpoints below magnitude
        tie = np.isin(magnitude, self.midpoints)
        code = np.where(tie & (code % 2 == 1), code + 1, code)
        return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Values of codes, in FP32. Codes beyond the largest are Inf in E5M2, else NaN."""
        infinity = len(self.values) if self is E5M2 else -1
        magnitude = codes & 0x7F
        finite = self.values[np.minimum(magnitude, len(self.values) - 1)]
        values = np.where(magnitude < len(self.values), finite, np.nan)
        values = np.where(magnitude == infinity, np.inf, values)
        return np.copysign(values, np.where(codes & 0x80, -1.0, 1.0)).astype(np.float32)


E4M3 = Format.of(mantissa_bits=3, bias=7, largest_code=0x7E)
E5M2 = Format.of(mantissa_bits=2, bias=15, largest_code=0x7B)
FORMATS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}


def scale_of(group: np.ndarray, largest: np.float32, pow2: bool) -> np.float32:
    if not np.isfinite(group).all():
        return NAN_SCALE
    amax = np.abs(group).max()
    if amax == 0:
        return np.float32(1)
    scale = max(np.float32(amax / largest), SMALLEST_NORMAL)
    if pow2:
        mantissa, exponent = np.frexp(scale)  # scale == mantissa * 2**exponent, mantissa in [.5, 1)
        scale = np.ldexp(np.float32(1), exponent - 1 if mantissa == 0.5 else exponent)
    return np.float32(scale)


def quantize(
    x: np.ndarray, rows: int | None, columns: int | None, fp8: Format, pow2: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of an FP32 matrix with one scale per rows x columns elements (None: all)."""
    rows, columns = rows or max(x.shape[0], 1), columns or max(x.shape[1], 1)
    codes = np.empty(x.shape, np.uint8)
    scales = np.empty((-(-x.shape[0] // rows), -(-x.shape[1] // columns)), np.float32)
    for i, j in np.ndindex(scales.shape):
        part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scale = scales[i, j] = scale_of(x[part], fp8.largest, pow2)
        if np.isnan(scale):
            codes[part] = NAN_CODE
        else:
            codes[part] = fp8.encode(x[part] / scale)
    return codes, scales


def expected(name: str, x: np.ndarray, fp8: Format, pow2: bool) -> list[np.ndarray]:
    """The codes and scales that the op `name` must return for the matrix x."""
    if name == "quantize_1x128":
        return [*quantize(x, 1, GROUP, fp8, pow2)]
    if name == "quantize_1x128_t":
        return [*quantize(x.T, 1, GROUP, fp8, pow2)]
    if name == "quantize_1x128_dual":
        return [*quantize(x, 1, GROUP, fp8, pow2), *quantize(x.T, 1, GROUP, fp8, pow2)]
    if name == "quantize_128x128":
        return [*quantize(x, GROUP, GROUP, fp8, pow2)]
    if name == "quantize_128x128_dual":
        codes, scales = quantize(x, GROUP, GROUP, fp8, pow2)
        return [codes, scales, codes.T]
    if name == "quantize_rowwise":
        codes, scales = quantize(x, 1, None, fp8, pow2)
        return [codes, scales if x.shape[1] else np.ones((x.shape[0], 1), np.float32)]
    assert name == "quantize_tensorwise"
    codes, scales = quantize(x, None, None, fp8, pow2)
    return [codes, scales if x.size else np.ones((1, 1), np.float32)]
