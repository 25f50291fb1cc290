"""Looks into the FP8 layers of a model while it trains."""

from .numerics import numerics
from .numerics_report import GemmNumerics, NonFinite, NumericsReport, OperandNumerics

__all__ = ["GemmNumerics", "NonFinite", "NumericsReport", "OperandNumerics", "numerics"]
