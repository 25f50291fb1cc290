"""Rotary position embedding, as in Llama: each element turns with the one half a head away."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding(
    position_ids: Tensor,
    rotary_dim: int,
    theta: float = 10000.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each [..., length, rotary_dim].

    Elements i and i + rotary_dim / 2 of a head turn by position_ids * theta ** (-2 i / rotary_dim)
    radians, which is computed in FP32. Layers with equal arguments can share the result: pass it to
    torchext.nn.Attention as `position_embeddings`.

    Args:
        position_ids: [..., length], integers.
        rotary_dim: how many elements of each head turn; an even number.
        theta: base of the frequencies.
        dtype: of the results; FP32 if None.

    Raises:
        ValueError: rotary_dim is odd or not positive, or theta is not positive.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(
            f"torchext.nn.rotary_embedding: rotary_dim must be even and positive (got {rotary_dim})"
            "; pass the size of a head, or of its part that turns"
        )
    if not theta > 0:
        raise ValueError(
            f"torchext.nn.rotary_embedding: theta must be positive (got {theta}); models use 10000 "
            "or more"
        )
    exponents = torch.arange(0, rotary_dim, 2, device=position_ids.device, dtype=torch.float32)
    frequencies = (theta ** (exponents / rotary_dim)).reciprocal()
    angles = position_ids[..., None].float() * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype or torch.float32), angles.sin().to(dtype or torch.float32)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., head_dim] with its first elements turned, in x's dtype.

    The products are computed in the common dtype of x, cos and sin.

    Args:
        cos, sin: [..., rotary_dim], broadcast to x.
    """
    turning, rest = x.tensor_split([cos.shape[-1]], -1)
    first, second = turning.chunk(2, -1)
    turned = (turning * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
