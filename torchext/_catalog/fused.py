"""GEMMs whose epilogue applies an activation and quantizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .entry import E5M2, Bound, Entry, Sample, operands, random, sample
from .gemm import multiplications

# An activated value close to a rounding boundary may land one FP8 step away from the reference.
QUANTIZED = Bound(relative=0.02)


def samples(shrink: int, **more: Callable[[], Sample]) -> dict[str, Callable[[], Sample]]:
    """shrink: columns of the GEMM for each column of the result (2 for SwiGLU)."""

    def call(
        granularity: str, rows: int | tuple[int, ...], n: int, k: int, **options: Any
    ) -> Callable[[], Sample]:
        return lambda: sample(*operands(granularity, rows, shrink * n, k), **options)

    return {
        "1d2d": call("1d2d", 68, 144, 272),
        "several tiles": call("1d2d", 200, 272, 400),
        "1d1d": call("1d1d", 67, 130, 300),
        "rowwise with bias": call("rowwise", 40, 130, 272, bias=random(shrink * 130)),
        "e5m2, powers of two": call(
            "1d2d",
            67,
            130,
            129,
            bias=random(shrink * 130, dtype=torch.float32),
            dtype=E5M2,
            pow2_scale=True,
        ),
        "one row": call("1d2d", 1, 130, 129),
        "2 SMs": call("1d2d", 140, 144, 256, num_sms=2),
        "leading dimensions": call("1d2d", (3, 4), 40, 200),
        "leading dimensions, ragged": call("1d2d", (3, 4), 300, 200),
        "vector": call("1d2d", (), 40, 200),
        "m = 0": call("1d2d", 0, 40, 200),
        "m = 0 in a stack": call("1d2d", (2, 0), 300, 200),
        "n = 0": call("1d2d", 12, 0, 200),
        "n = 0, leading dimensions": call("1d2d", (3, 4), 0, 200),
        "k = 0": call("1d1d", 12, 40, 0),
        **more,
    }


def sized(shrink: int, **options: Any) -> Callable[..., Sample]:
    return lambda m, n, k: sample(*operands("1d2d", m, shrink * n, k), **options)


def entry(
    name: str,
    samples: dict[str, Callable[[], Sample]],
    shrink: int = 1,
    **more: Callable[..., Sample],
) -> Entry:
    return Entry(
        name,
        samples=samples,
        sized={"1d2d": sized(shrink), **more},
        shape=lambda a, a_scale, b, b_scale, **_: (
            math.prod(a.shape[:-1]),
            b.shape[0],
            a.shape[-1],
        ),
        bytes=lambda m, n, k: float((m + n) * k) + (1 + 4 / 128) * m * n / shrink,
        flops=multiplications,
        bound=QUANTIZED,
    )


def _tanh() -> Sample:
    return sample(*operands("1d2d", 67, 130, 300), tanh_approximation=True)


ENTRIES = (
    entry("fp8_gemm_nt_swiglu_quantize", samples(shrink=2), shrink=2),
    entry(
        "fp8_gemm_nt_gelu_quantize",
        samples(shrink=1, tanh=_tanh),
        tanh=sized(1, tanh_approximation=True),
    ),
    entry("fp8_gemm_nt_relu2_quantize", samples(shrink=1)),
)
