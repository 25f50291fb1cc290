"""Rounding, bit fields and saturation in Python's exact numbers."""

from __future__ import annotations

import sys
from fractions import Fraction
from math import inf, nextafter

LARGEST = sys.float_info.max


def rounded(value: Fraction, mode: str, zero: float = 0.0) -> float:
    """A rational as f64 by PTX's mode; `zero`: what an exact zero is."""
    if value == 0:
        return zero
    try:
        near = value.numerator / value.denominator  # correctly rounded, as Python promises
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
    """The field of `bits` bits that begins at bit `at`."""
    part = value >> at & (1 << bits) - 1
    return part - (1 << bits) if signed and part >> (bits - 1) else part


def saturate(value: int, signed: bool, bits: int) -> int:
    """The nearest integer that a field of `bits` bits holds."""
    low = -(1 << (bits - 1)) if signed else 0
    return min(max(value, low), low + (1 << bits) - 1)
