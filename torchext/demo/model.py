"""A small byte-level transformer in plain PyTorch, without anything specific to FP8: RMSNorm,
grouped-query attention with rotary embedding, and SwiGLU, as in Llama."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_BYTES = 256


class Attention(nn.Module):
    """Causal self-attention. Several query heads share a head of keys and values."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.head_size = width // num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [batch, length, width]
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotated(q), _rotated(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def _rotated(x: Tensor) -> Tensor:
    """Rotary embedding of x [..., length, head size]."""
    half = x.shape[-1] // 2
    frequencies = 10000 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then an MLP, each with a norm before it and a residual connection."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, num_heads, num_kv_heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class ByteTransformer(nn.Module):
    """Predicts the next byte: tokens [batch, length] to logits [batch, length, 256]."""

    def __init__(
        self,
        width: int = 256,
        num_blocks: int = 3,
        num_heads: int = 8,
        num_kv_heads: int = 4,
        hidden: int = 640,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(NUM_BYTES, width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, num_kv_heads, hidden) for _ in range(num_blocks)
        )
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, NUM_BYTES, bias=False)
        self.apply(_initialize)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def _initialize(module: nn.Module) -> None:
    """Weights from N(0, 0.02**2), as in GPT-2."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
