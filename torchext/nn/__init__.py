"""Layers that train in FP8."""

from .linear import Linear

__all__ = ["Linear"]
