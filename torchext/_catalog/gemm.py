"""The dense GEMM."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .entry import E5M2, GRANULARITIES, Bound, Entry, Sample, operands, random, sample

# FP8 tensor cores keep about 14 bits while they sum 128 products, and rounding to BF16 adds a
# relative error of up to 2^-9. tests/gemm checks the tighter bounds of docs/numerics.md.
PRODUCT = Bound(relative=5e-3, worst=5e-2)


def traffic(m: int, n: int, k: int, *, operand: int = 1, out: int = 2) -> float:
    """Bytes read and written.

    operand: bytes per element of a and b.
    out: bytes per element of the output; twice its size if it is also read (`accumulate`).
    """
    return float(operand * (m + n) * k + out * m * n)


def multiplications(m: int, n: int, k: int) -> float:
    return 2.0 * m * n * k


# Shapes of `a` without its K, and K. At K = 208 the tensors keep their strides when cloned.
ROWS: dict[str, tuple[int | tuple[int, ...], int]] = {
    "12 rows": (12, 200),
    "leading dimensions": ((3, 4), 200),
    "8 rows in two dimensions": ((2, 4), 208),
    "vector": ((), 200),
    "m = 0": (0, 200),
    "m = 0 in a stack": ((2, 0), 200),
}


def small(granularity: str) -> dict[str, Callable[[], Sample]]:
    """A sample for each of ROWS."""

    def call(rows: int | tuple[int, ...], k: int) -> Callable[[], Sample]:
        return lambda: sample(*operands(granularity, rows, 40, k))

    return {f"{granularity}, {label}": call(rows, k) for label, (rows, k) in ROWS.items()}


def sized(granularity: str) -> Callable[..., Sample]:
    return lambda m, n, k: sample(*operands(granularity, m, n, k), bias=random(n))


ENTRIES = (
    Entry(
        "fp8_gemm_nt",
        samples={
            "1d2d": lambda: sample(*operands("1d2d", 200, 272, 400)),
            "1d1d": lambda: sample(*operands("1d1d", 200, 272, 400)),
            "rowwise": lambda: sample(*operands("rowwise", 200, 272, 400), bias=random(272)),
            "tensorwise": lambda: sample(*operands("tensorwise", 200, 272, 400)),
            "long K": lambda: sample(*operands("1d2d", 200, 272, 1040)),
            "one row": lambda: sample(*operands("1d2d", 1, 130, 129), bias=random(130)),
            "2 SMs": lambda: sample(*operands("1d2d", 300, 400, 256), num_sms=2),
            "fp16": lambda: sample(*operands("1d2d", 128, 128, 512), out_dtype=torch.float16),
            "e5m2": lambda: sample(
                *operands("1d2d", 67, 130, 300, dtype=E5M2, pow2_scale=True),
                bias=random(130, dtype=torch.float32),
                out_dtype=torch.float32,
            ),
            "out": lambda: sample(*operands("1d2d", 20, 40, 300), out=random(20, 60)[:, :40]),
            "accumulate": lambda: sample(
                *operands("1d1d", 136, 264, 384),
                out=random(136, 264, dtype=torch.float32),
                accumulate=True,
            ),
            **small("1d2d"),
            **small("1d1d"),
            **small("rowwise"),
            **small("tensorwise"),
            "n = 0": lambda: sample(*operands("1d2d", 12, 0, 200)),
            "k = 0": lambda: sample(*operands("1d1d", 12, 40, 0)),
        },
        sized={granularity: sized(granularity) for granularity in GRANULARITIES},
        shape=lambda a, a_scale, b, b_scale, **_: (
            math.prod(a.shape[:-1]),
            b.shape[0],
            a.shape[-1],
        ),
        bytes=traffic,
        flops=multiplications,
        bound=PRODUCT,
    ),
)
