"""What is quantized how when a layer trains in FP8: a `Recipe`, the same for all three GEMMs.

A linear layer y = x @ w.T multiplies three times: fprop (y from x, w), dgrad (dx from dy, w) and
wgrad (dw from dy, x). A recipe says how coarse the scales of x, w and dy are and which FP8 format
each takes.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch

Granularity = Literal["blockwise", "rowwise", "tensorwise"]

# An op takes the index here: csrc/linear/linear.h.
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
_FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a layer trains in FP8. Immutable and hashable; one recipe serves any number of layers.

    Args:
        granularity: how many values share one scale.
            "blockwise": 1x128 groups of inputs and gradients, along the dimension that the GEMM
            sums over, and 128x128 blocks of weights. Products are promoted to FP32 every 128
            elements of K (DeepSeek-V3, arXiv:2412.19437, section 3.3).
            "rowwise": one scale for each row of each operand, again along the summed dimension.
            "tensorwise": one scale for the whole tensor.
        input_dtype, weight_dtype, grad_dtype: torch.float8_e4m3fn (4 exponent bits, 3 of mantissa,
            largest value 448) or torch.float8_e5m2 (5 and 2, 57344) for x, w and dy.
        pow2_scale: round every scale up to a power of two, as UE8M0 stores it.

    Raises:
        ValueError: another granularity.
        TypeError: a dtype that is not one of the two, or a pow2_scale that is not a bool.
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
                    f"{dtype!r}); it is the format that operands are quantized to (a layer's "
                    "output has its input's dtype, or autocast's)"
                )
        if not isinstance(self.pow2_scale, bool):
            raise TypeError(
                f"Recipe: pow2_scale must be True or False (got {self.pow2_scale!r}); pass "
                "bool(pow2_scale)"
            )

    @classmethod
    def deepseek_v3(cls, *, pow2_scale: bool = False) -> Recipe:
        """1x128 groups and 128x128 blocks, e4m3 throughout: the default, and the most accurate."""
        return cls("blockwise", pow2_scale=pow2_scale)

    @classmethod
    def rowwise(cls, *, pow2_scale: bool = False) -> Recipe:
        """One scale a row, e4m3 throughout."""
        return cls("rowwise", pow2_scale=pow2_scale)

    @classmethod
    def tensorwise(cls, *, pow2_scale: bool = False) -> Recipe:
        """One scale a tensor, computed anew from each one; gradients, which span more, in e5m2."""
        return cls("tensorwise", grad_dtype=torch.float8_e5m2, pow2_scale=pow2_scale)

    def __str__(self) -> str:
        """The granularity, and what departs from e4m3 and exact scales."""
        words: list[str] = [self.granularity]
        for role in ("input", "weight", "grad"):
            if getattr(self, f"{role}_dtype") is torch.float8_e5m2:
                words.append(f"{role} e5m2")
        if self.pow2_scale:
            words.append("pow2 scales")
        return " + ".join(words)
