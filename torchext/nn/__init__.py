"""Layers that train in FP8, norms that quantize for them, and FP8Linear for inference."""

from .attention import Attention, KVCache
from .block import Block
from .fp8_linear import FP8Linear
from .linear import Linear
from .mlp import GEGLU, GELUMLP, ReLU2MLP, SwiGLU
from .moe import MoE
from .norm import LayerNorm, RMSNorm
from .rotary import rotary_embedding

__all__ = [
    "GEGLU",
    "GELUMLP",
    "Attention",
    "Block",
    "FP8Linear",
    "KVCache",
    "LayerNorm",
    "Linear",
    "MoE",
    "RMSNorm",
    "ReLU2MLP",
    "SwiGLU",
    "rotary_embedding",
]
