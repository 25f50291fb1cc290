"""Layers that train in FP8."""

from .linear import Linear
from .mlp import GEGLU, GELUMLP, ReLU2MLP, SwiGLU

__all__ = ["GEGLU", "GELUMLP", "Linear", "ReLU2MLP", "SwiGLU"]
