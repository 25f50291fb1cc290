"""Norms fused with quantizers, whose results are specified to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .entry import BITS, E5M2, Entry, Sample, random, sample
from .quantize import special

EPS = 1e-6
Make = Callable[[], Sample]


def call(x: Tensor, weight: Tensor, bias: bool | None, **options: Any) -> Sample:
    """bias: whether a LayerNorm has one; None for RMSNorm."""
    if bias is None:
        return sample(x, weight, EPS, **options)
    shift = random(1, len(weight), dtype=torch.float32)[0] if bias else None
    return sample(x, weight, shift, EPS, **options)


def norm(
    bias: bool | None,
    *shape: int,
    dtype: torch.dtype = torch.bfloat16,
    residual: bool = False,
    **options: Any,
) -> Make:
    """N(0, 1) data with a BF16 weight, and with a residual if asked."""

    def make() -> Sample:
        x = random(*shape, dtype=dtype)
        more = {"residual": random(1, *shape, dtype=dtype)[0]} if residual else {}
        return call(x, random(shape[-1]), bias, **more, **options)

    return make


def of(bias: bool | None, x: Callable[[], Tensor], **options: Any) -> Make:
    """x with a weight in FP32."""

    def make() -> Sample:
        data = x()
        return call(data, random(data.shape[-1], dtype=torch.float32), bias, **options)

    return make


def samples(bias: bool | None) -> dict[str, Make]:
    def strided() -> Sample:
        x, residual = random(120, 600)[::2, ::3], random(200, 60).t()
        return call(x, random(400)[::2], bias, residual=residual)

    def unaligned() -> Sample:
        """Rows of x start at odd elements."""
        x, residual = random(130, 273)[:, 1:], random(130, 272)
        return call(x, random(273)[1:], bias, residual=residual)

    return {
        "residual": norm(bias, 200, 400, residual=True),
        "no residual": norm(bias, 67, 300),
        "whole tiles": norm(bias, 128, 256, residual=True),
        "unit offset, e5m2, powers of two": of(
            bias,
            lambda: random(67, 129, dtype=torch.float32),
            unit_offset=True,
            dtype=E5M2,
            pow2_scale=True,
        ),
        "normed": norm(bias, 150, 300, residual=True, unit_offset=True, return_normed=True),
        "fp16": norm(bias, 20, 1040, dtype=torch.float16, residual=True),
        "several warps of a row": norm(bias, 3, 3000, residual=True),
        "a whole CTA of a row": norm(bias, 2, 8000),
        "more than a CTA holds": norm(bias, 2, 9000, residual=True),
        "one row": norm(bias, 1, 300, dtype=torch.float16),
        "one element": norm(bias, 1, 1),
        "special numbers": of(bias, special),
        "strides": strided,
        "unaligned rows": unaligned,
        "one column": norm(bias, 2, 1, residual=True),
        "stack": norm(bias, 2, 5, 200, residual=True),
        "vector": norm(bias, 130, residual=True),
        "no rows": norm(bias, 0, 40),
        "no columns": norm(bias, 7, 0, residual=True),
        "stack without rows": norm(bias, 2, 0, 40, residual=True),
        "no elements": norm(bias, 0),
    }


def shape_of(
    x: Tensor, *rest: Any, residual: Tensor | None = None, return_normed: bool = False, **_: Any
) -> tuple[int, ...]:
    """Rows, columns, and whether there are a residual, a bias and normed values."""
    bias = len(rest) == 3 and rest[1] is not None
    there = residual is not None, bias, return_normed
    return math.prod(x.shape[:-1]), x.shape[-1], *map(int, there)


def entry(name: str, outputs: float, bias: bool | None = None) -> Entry:
    """outputs: bytes of FP8 data and scales that are written for each element of x."""

    def traffic(
        rows: int, columns: int, residual: int = 1, shift: int = int(bool(bias)), normed: int = 0
    ) -> float:
        of_rows = 4 * rows if bias is None else 8 * rows
        elements = (2 + 4 * residual + 2 * normed + outputs) * rows * columns
        return elements + of_rows + (2 + 4 * shift) * columns

    more = {} if bias is None else {"no bias": norm(False, 67, 300, residual=True)}
    return Entry(
        name,
        samples={**samples(bias), **more},
        sized={
            "residual": lambda rows, columns: norm(bias, rows, columns, residual=True)(),
            "no residual": lambda rows, columns: norm(bias, rows, columns)(),
        },
        shape=shape_of,
        bytes=traffic,
        flops=lambda *_: 0,
        bound=BITS,
    )


# ---- gradients ----


def gradient(
    x: Callable[[], Tensor],
    centers: bool,
    *,
    weight: torch.dtype = torch.bfloat16,
    residual: bool = False,
    **options: Any,
) -> Make:
    """A call on `x()`; the gradient and rstd have numbers of their own. centers: LayerNorm."""

    def make() -> Sample:
        data = x()
        like = [random(n, *data.shape, dtype=data.dtype)[0] for n in (1, 2)]
        rows = [random(n, *data.shape[:-1], dtype=torch.float32)[0] for n in (1, 2)]
        factors = random(data.shape[-1], dtype=weight)
        values = (rows[1], rows[0].abs()) if centers else (rows[0].abs(),)
        more = {"residual_grad": like[1]} if residual else {}
        return sample(like[0], data, factors, *values, **more, **options)

    return make


def gradient_samples(centers: bool, **options: Any) -> dict[str, Make]:
    def of(*shape: int, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Make:
        return gradient(lambda: random(*shape, dtype=dtype), centers, **more)

    return {
        "residual": of(200, 400, residual=True),
        "no residual": of(67, 300),
        "whole tiles": of(128, 256, residual=True),
        "unit offset": gradient(
            lambda: random(67, 129, dtype=torch.float32),
            centers,
            weight=torch.float32,
            unit_offset=True,
            **options,
        ),
        "fp16": of(20, 1040, dtype=torch.float16, residual=True),
        "several warps of a row": of(3, 3000, residual=True),
        "more than a CTA holds": of(2, 9000, residual=True),
        "one row": of(1, 300, dtype=torch.float16),
        "one element": of(1, 1),
        "special numbers": gradient(special, centers, weight=torch.float32, residual=True),
        "strides": gradient(lambda: random(120, 600)[::2, ::3], centers, residual=True),
        "unaligned rows": gradient(lambda: random(130, 273)[:, 1:], centers, residual=True),
        "one column": of(2, 1, residual=True),
        "stack": of(2, 5, 200, residual=True),
        "vector": of(130, residual=True),
        "no rows": of(0, 40),
        "no columns": of(7, 0, residual=True),
        "stack without rows": of(2, 0, 40, residual=True),
        "no elements": of(0),
    }


def gradient_entry(name: str, outputs: float, centers: bool, **options: Any) -> Entry:
    """outputs: bytes of FP8 data and scales that are written for each element of x."""

    def shape(
        grad: Tensor, x: Tensor, *_: Any, residual_grad: Tensor | None = None, **__: Any
    ) -> tuple[int, ...]:
        return math.prod(x.shape[:-1]), x.shape[-1], int(residual_grad is not None)

    def traffic(rows: int, columns: int, residual: int = 1) -> float:
        elements = (6 + 2 * residual + outputs) * rows * columns
        return elements + (1 + centers) * 4 * rows + (2 + 4 * (1 + centers)) * columns

    def sized(residual: bool) -> Callable[..., Sample]:
        return lambda rows, columns: gradient(
            lambda: random(rows, columns), centers, residual=residual
        )()

    return Entry(
        name,
        samples=gradient_samples(centers, **options),
        sized={"residual": sized(True), "no residual": sized(False)},
        shape=shape,
        bytes=traffic,
        flops=lambda *_: 0,
        bound=BITS,
    )


FP8_OPTIONS = {"dtype": E5M2, "pow2_scale": True}
ENTRIES = (
    entry("rms_norm_quantize_1x128", 1 + 4 / 128),
    entry("rms_norm_quantize_1x128_dual", 2 + 8 / 128),
    entry("layer_norm_quantize_1x128", 1 + 4 / 128, bias=True),
    entry("layer_norm_quantize_1x128_dual", 2 + 8 / 128, bias=True),
    gradient_entry("rms_norm_backward", 0, centers=False),
    gradient_entry(
        "rms_norm_backward_quantize_1x128_dual", 2 + 8 / 128, centers=False, **FP8_OPTIONS
    ),
    gradient_entry("layer_norm_backward", 0, centers=True),
    gradient_entry(
        "layer_norm_backward_quantize_1x128_dual", 2 + 8 / 128, centers=True, **FP8_OPTIONS
    ),
)
