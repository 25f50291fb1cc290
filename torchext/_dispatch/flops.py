"""Flop formulas for torch.utils.flop_counter: two for each multiplication, as for torch.mm.

Grouped products count the rows of no group, too: only the device knows which these are.
"""

from __future__ import annotations

import math
from typing import Any


def product_flops(a_shape: Any, a_scale_shape: Any, b_shape: Any, *_: Any, **options: Any) -> int:
    """a [..., K] times b [..., N, K], transposed: each row of a meets one matrix of b."""
    return 2 * math.prod(a_shape) * b_shape[-2]
