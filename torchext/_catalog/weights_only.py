"""The weights-only product."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .entry import E5M2, GRANULARITIES, Bound, Entry, Sample, random, sample


def traffic(m: int, n: int, k: int) -> float:
    """Bytes read and written, for a 16-bit x."""
    return float(2 * m * k + n * k + 2 * m * n)


def weight(granularity: str, n: int, k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """An FP8 weight [n, k] with the scales of b in a GEMM of this granularity."""
    return GRANULARITIES[granularity][1](random(n, k), **options)


def sized(granularity: str) -> Callable[..., Sample]:
    return lambda m, n, k: sample(random(m, k), *weight(granularity, n, k))


ENTRIES = (
    Entry(
        "fp8_linear",
        samples={
            "blocks": lambda: sample(random(200, 400), *weight("1d2d", 272, 400), random(272)),
            "1x128": lambda: sample(random(67, 400), *weight("1d1d", 272, 400)),
            "rowwise": lambda: sample(random(67, 400), *weight("rowwise", 272, 400), random(272)),
            "tensorwise": lambda: sample(random(67, 400), *weight("tensorwise", 272, 400)),
            "fp16": lambda: sample(
                random(20, 1040, dtype=torch.float16),
                *weight("1d2d", 136, 1040),
                random(136, dtype=torch.float32),
            ),
            "fp32": lambda: sample(
                random(33, 300, dtype=torch.float32), *weight("1d2d", 130, 300, dtype=E5M2)
            ),
            "one row": lambda: sample(random(1, 129), *weight("1d2d", 130, 129)),
            "2 SMs": lambda: sample(random(300, 256), *weight("1d2d", 400, 256), num_sms=2),
            "e5m2": lambda: sample(
                random(67, 300), *weight("1d1d", 130, 300, dtype=E5M2, pow2_scale=True)
            ),
            "strides": lambda: sample(random(200, 67).t(), *weight("1d2d", 40, 200)),
            "leading dimensions": lambda: sample(random(3, 4, 200), *weight("1d2d", 40, 200)),
            "vector": lambda: sample(random(200), *weight("1d2d", 40, 200)),
            "m = 0": lambda: sample(random(0, 200), *weight("1d2d", 40, 200)),
            "n = 0": lambda: sample(random(12, 200), *weight("1d2d", 0, 200)),
            "k = 0": lambda: sample(random(12, 0), *weight("1d1d", 40, 0), random(40)),
        },
        sized={granularity: sized(granularity) for granularity in GRANULARITIES},
        shape=lambda x, weight, *_, **__: (
            math.prod(x.shape[:-1]),
            weight.shape[0],
            x.shape[-1],
        ),
        bytes=traffic,
        flops=lambda m, n, k: 2.0 * m * n * k,
        # Rounding to BF16 makes a relative error of up to 2^-9; tests/gemm has the tighter bounds.
        bound=Bound(relative=3e-3, worst=1e-2),
    ),
)
