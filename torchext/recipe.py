"""`Recipe`: how a layer that trains in FP8 quantizes the operands of its three GEMMs.

A linear layer y = x @ w.T runs three GEMMs: fprop (y from x and w), dgrad (dx from dy and w) and
wgrad (dw from dy and x). A recipe gives the granularity of the scales, and the FP8 format of x, w
and dy.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch

Granularity = Literal["blockwise", "rowwise", "tensorwise"]

# Ops take the index in this tuple: csrc/linear/linear.h.
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
_FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a layer trains in FP8. Immutable and hashable; one recipe serves any number of layers.

    Args:
        granularity: how many elements share a scale.
            "blockwise": 1x128 groups of inputs and gradients, along the dimension that the GEMM
            sums over, and 128x128 blocks of weights. Sums are promoted to FP32 every 128 elements
            of K (DeepSeek-V3, arXiv:2412.19437, section 3.3).
            "rowwise": one scale for each row of each operand, that is, for all elements along the
            dimension that the GEMM sums over.
            "tensorwise": one scale for the whole tensor.
        input_dtype, weight_dtype, grad_dtype: the formats of x, w and dy: torch.float8_e4m3fn (4
            exponent bits, 3 mantissa bits, largest value 448) or torch.float8_e5m2 (5 and 2 bits,
            57344).
        pow2_scale: round every scale up to a power of two, which UE8M0 can store.

    Raises:
        ValueError: granularity is none of these.
        TypeError: a dtype is neither of the two, or pow2_scale is not a bool.
    """

    granularity: Granularity = "blockwise"
    input_dtype: torch.dtype = torch.float8_e4m3fn
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    grad_dtype: torch.dtype = torch.float8_e4m3fn
    pow2_scale: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"Recipe: granularity must be one of {', '.join(GRANULARITIES)} (got "
                f"{self.granularity!r}); Recipe.deepseek_v3() is a good first choice"
            )
        for name in ("input_dtype", "weight_dtype", "grad_dtype"):
            dtype = getattr(self, name)
            if dtype not in _FP8_DTYPES:
                raise TypeError(
                    f"Recipe: {name} must be torch.float8_e4m3fn or torch.float8_e5m2 (got "
                    f"{dtype!r}); FP32, FP16 and BF16 are not FP8 formats: to set the dtype of a "
                    "layer's output, convert its input or use torch.autocast"
                )
        if not isinstance(self.pow2_scale, bool):
            raise TypeError(
                f"Recipe: pow2_scale must be True or False (got {self.pow2_scale!r}); pass "
                "bool(pow2_scale)"
            )

    @classmethod
    def deepseek_v3(cls, *, pow2_scale: bool = False) -> Recipe:
        """1x128 groups, 128x128 blocks of weights and e4m3: the default, and the most accurate."""
        return cls("blockwise", pow2_scale=pow2_scale)

    @classmethod
    def rowwise(cls, *, pow2_scale: bool = False) -> Recipe:
        """One scale for each row of each operand, and e4m3 for all of them."""
        return cls("rowwise", pow2_scale=pow2_scale)

    @classmethod
    def tensorwise(cls, *, pow2_scale: bool = False) -> Recipe:
        """One scale for each tensor, computed from its current values; e4m3 for x and w, and e5m2
        for gradients, whose range is larger."""
        return cls("tensorwise", grad_dtype=torch.float8_e5m2, pow2_scale=pow2_scale)

    def __str__(self) -> str:
        """The granularity, and each operand in e5m2 and power-of-two scales if there are any."""
        words: list[str] = [self.granularity]
        for role in ("input", "weight", "grad"):
            if getattr(self, f"{role}_dtype") is torch.float8_e5m2:
                words.append(f"{role} e5m2")
        if self.pow2_scale:
            words.append("pow2 scales")
        return " + ".join(words)
