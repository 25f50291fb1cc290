"""Layers that train in FP8, and norms that quantize for them."""

from .attention import Attention, KVCache
from .block import Block
from .linear import Linear
from .mlp import GEGLU, GELUMLP, ReLU2MLP, SwiGLU
from .norm import LayerNorm, RMSNorm
from .rotary import rotary_embedding

__all__ = [
    "GEGLU",
    "GELUMLP",
    "Attention",
    "Block",
    "KVCache",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "ReLU2MLP",
    "SwiGLU",
    "rotary_embedding",
]
