"""Flop formulas for torch.utils.flop_counter: two flops for each multiplication, as for torch.mm.

For grouped GEMMs they count rows of no group, too: only the device knows which rows these are.
"""

from __future__ import annotations

import math
from typing import Any


def product_flops(a_shape: Any, a_scale_shape: Any, b_shape: Any, *_: Any, **options: Any) -> int:
    """Flops of a [..., K] times b [..., N, K] transposed, one matrix of b for each row of a."""
    return 2 * math.prod(a_shape) * b_shape[-2]


def linear_flops(x_shape: Any, weight_shape: Any, *_: Any, **options: Any) -> int:
    """Flops of an x [..., K] times a weight [N, K] transposed."""
    return 2 * math.prod(x_shape) * weight_shape[0]
