"""Rounding, bit fields and saturation in Python's exact numbers."""

from __future__ import annotations

import sys
from fractions import Fraction
from math import inf, nextafter

LARGEST = sys.float_info.max


def rounded(value: Fraction, mode: str, zero: float = 0.0) -> float:
    """A rational rounded to f64 by a PTX rounding mode; `zero` is the result for an exact zero."""
    if value == 0:
        return zero
    try:
        near = value.numerator / value.denominator  # Python rounds this division correctly
    except OverflowError:
        near = inf if value > 0 else -inf
    if near in (inf, -inf):
        toward_zero = mode in ("rz", "rm" if value > 0 else "rp")
        return (LARGEST if value > 0 else -LARGEST) if toward_zero else near
    if near == 0:
        near = 0.0 if value > 0 else -0.0
    if mode == "rn" or Fraction(near) == value:
        return near
    below = near if Fraction(near) < value else nextafter(near, -inf)
    above = near if Fraction(near) > value else nextafter(near, inf)
    return below if mode == "rm" or (mode == "rz" and value > 0) else above


def extract(value: int, at: int, bits: int, signed: bool) -> int:
    """The value of the field of `bits` bits that begins at bit `at` of `value`."""
    part = value >> at & (1 << bits) - 1
    return part - (1 << bits) if signed and part >> (bits - 1) else part


def saturate(value: int, signed: bool, bits: int) -> int:
    """The integer nearest to `value` that a field of `bits` bits can hold."""
    low = -(1 << (bits - 1)) if signed else 0
    return min(max(value, low), low + (1 << bits) - 1)
