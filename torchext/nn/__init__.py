"""Layers that train in FP8."""

from .attention import Attention, KVCache
from .block import Block
from .linear import Linear
from .mlp import GEGLU, GELUMLP, ReLU2MLP, SwiGLU
from .rotary import rotary_embedding

__all__ = [
    "GEGLU",
    "GELUMLP",
    "Attention",
    "Block",
    "KVCache",
    "Linear",
    "ReLU2MLP",
    "SwiGLU",
    "rotary_embedding",
]
