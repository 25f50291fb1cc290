"""The grouped GEMMs: over groups of rows, each with its own matrix, and over groups of columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .entry import GRANULARITIES, Entry, Sample, index, operands, random, sample
from .gemm import PRODUCT


def rows_traffic(rows: int, n: int, k: int, groups: int, *, out: int = 2) -> float:
    """rows: the number of rows that belong to a group. out: as in gemm.traffic."""
    return float(rows * k + groups * n * k + out * rows * n)


def rows_multiplications(rows: int, n: int, k: int, groups: int) -> float:
    return 2.0 * rows * n * k


def columns_traffic(m: int, n: int, k: int, groups: int, *, out: int = 2) -> float:
    """k: the columns of all groups together."""
    return float((m + n) * k + out * groups * m * n)


def columns_multiplications(m: int, n: int, k: int, groups: int) -> float:
    return 2.0 * m * n * k


def contiguous(
    granularity: str, rows: int, n: int, k: int, *, groups: int, **options: Any
) -> Callable[[], Sample]:
    """Options that are lists become index tensors."""
    tensors = {
        name: index(*value) if isinstance(value, list) else value for name, value in options.items()
    }
    return lambda: sample(*operands(granularity, rows, n, k, groups=groups), **tensors)


def masked(
    granularity: str, room: int, n: int, k: int, counts: list[int], **options: Any
) -> Callable[[], Sample]:
    groups = len(counts)
    return lambda: sample(
        *operands(granularity, (groups, room), n, k, groups=groups), index(*counts), **options
    )


def along_k(
    m: int, n: int, k: int, ends: list[int], out: torch.dtype | None = None, **options: Any
) -> Callable[[], Sample]:
    def make() -> Sample:
        place = {} if out is None else {"out": random(len(ends), m, n, dtype=out)}
        return sample(*operands("1d1d", m, n, k), index(*ends), **place, **options)

    return make


def _contiguous_shape(a: Tensor, a_scale: Tensor, b: Tensor, *_: Any, **__: Any) -> tuple[int, ...]:
    return a.shape[0], b.shape[1], a.shape[1], b.shape[0]


def _masked_shape(a: Tensor, a_scale: Tensor, b: Tensor, *_: Any, **__: Any) -> tuple[int, ...]:
    return a.shape[0] * a.shape[1], b.shape[1], a.shape[2], b.shape[0]


# Calls of any size with three groups, of which by_offsets and by_columns leave the second empty.


def by_offsets(granularity: str) -> Callable[..., Sample]:
    return lambda m, n, k: sample(
        *operands(granularity, m, n, k, groups=3), index(m // 3, m // 3, m)
    )


def by_group_ids(granularity: str) -> Callable[..., Sample]:
    return lambda m, n, k: sample(
        *operands(granularity, m, n, k, groups=3),
        group_ids=index(*(7 * row % 3 for row in range(m))),
    )


def by_counts(granularity: str) -> Callable[..., Sample]:
    return lambda m, n, k: sample(*operands(granularity, (3, m), n, k, groups=3), index(m, m, m))


def by_columns(m: int, n: int, k: int) -> Sample:
    return sample(*operands("1d1d", m, n, k), index(k // 3, k // 3, k))


IDS = [*[2] * 60, *[-1] * 5, *[0] * 90, *[3] * 33, *[2] * 3]

ENTRIES = (
    Entry(
        "m_grouped_fp8_gemm_nt_contiguous",
        samples={
            "offsets": contiguous("1d2d", 132, 144, 272, groups=4, offsets=[20, 20, 101, 132]),
            "rows of no group": contiguous(
                "1d2d", 333, 272, 400, groups=4, offsets=[70, 70, 201, 330]
            ),
            "group ids": contiguous("1d2d", len(IDS), 144, 272, groups=4, group_ids=IDS),
            "1d1d, 2 SMs": contiguous("1d1d", 67, 130, 300, groups=2, offsets=[5, 67], num_sms=2),
            "rowwise with bias": lambda: sample(
                *operands("rowwise", 67, 130, 300, groups=2),
                index(60, 67),
                bias=random(2, 130),
                out_dtype=torch.float32,
            ),
            "accumulate": lambda: sample(
                *operands("1d2d", 40, 136, 129, groups=3),
                index(0, 17, 38),
                out=random(40, 136, dtype=torch.float32),
                accumulate=True,
            ),
            "group ids with bias": lambda: sample(
                *operands("1d2d", 20, 40, 208, groups=3),
                group_ids=index(*[2] * 9, *[0] * 11),
                bias=random(3, 40, dtype=torch.float32),
            ),
            "no rows": contiguous("1d2d", 0, 40, 200, groups=3, offsets=[0, 0, 0]),
            "n = 0": contiguous("1d2d", 12, 0, 200, groups=2, offsets=[4, 12]),
            "k = 0": contiguous("1d2d", 12, 40, 0, groups=2, offsets=[4, 12]),
            "group ids, no rows": contiguous("1d2d", 0, 40, 200, groups=3, group_ids=[]),
            "group ids, n = 0": contiguous("1d2d", 4, 0, 200, groups=2, group_ids=[1, 0, 1, 1]),
            "group ids, k = 0": contiguous("1d2d", 4, 40, 0, groups=2, group_ids=[1, 0, 1, 1]),
        },
        sized={
            **{f"offsets, {granularity}": by_offsets(granularity) for granularity in GRANULARITIES},
            **{f"ids, {granularity}": by_group_ids(granularity) for granularity in GRANULARITIES},
        },
        shape=_contiguous_shape,
        bytes=rows_traffic,
        flops=rows_multiplications,
        bound=PRODUCT,
    ),
    Entry(
        "m_grouped_fp8_gemm_nt_masked",
        samples={
            "1d2d": masked("1d2d", 52, 144, 272, [52, 52], expected_m=60),
            "rows of no group": masked("1d2d", 150, 272, 400, [17, 0, 150], expected_m=60),
            "1d1d, 2 SMs": masked("1d1d", 35, 130, 300, [35, 3], num_sms=2),
            "rowwise with bias": lambda: sample(
                *operands("rowwise", (2, 35), 130, 300, groups=2),
                index(35, 1),
                bias=random(2, 130),
                out_dtype=torch.float16,
            ),
            "accumulate": lambda: sample(
                *operands("1d2d", (2, 40), 136, 129, groups=2),
                index(40, 9),
                out=random(2, 40, 136, dtype=torch.float32),
                accumulate=True,
            ),
            "no rows": masked("1d2d", 0, 40, 200, [0, 0]),
            "n = 0": masked("1d2d", 12, 0, 200, [12, 5]),
            "k = 0": masked("1d2d", 12, 40, 0, [12, 5]),
        },
        sized={granularity: by_counts(granularity) for granularity in GRANULARITIES},
        shape=_masked_shape,
        bytes=rows_traffic,
        flops=rows_multiplications,
        bound=PRODUCT,
    ),
    Entry(
        "k_grouped_fp8_gemm_nt",
        samples={
            "ragged": along_k(68, 72, 400, [130, 130, 400]),
            "columns of no group": along_k(67, 130, 400, [130, 130, 390]),
            "2 SMs, fp16": along_k(67, 130, 300, [5, 300], num_sms=2, out_dtype=torch.float16),
            "out": along_k(20, 40, 300, [100, 300], out=torch.bfloat16),
            "accumulate": along_k(136, 264, 384, [0, 129, 384], out=torch.float32, accumulate=True),
            "m = 0": along_k(0, 40, 200, [60, 200]),
            "n = 0": along_k(12, 0, 200, [60, 200]),
            "k = 0": along_k(12, 40, 0, [0, 0]),
        },
        sized={"offsets": by_columns},
        shape=lambda a, a_scale, b, b_scale, offsets, **_: (
            a.shape[0],
            b.shape[0],
            a.shape[1],
            len(offsets),
        ),
        bytes=columns_traffic,
        flops=columns_multiplications,
        bound=PRODUCT,
    ),
)
