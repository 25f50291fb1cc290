"""Rows for experts, whose results are specified to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..ops.moe_messages import MessageLayout
from .entry import BITS, E5M2, Entry, Sample, random, sample
from .quantize import special

Make = Callable[[], Sample]
EXPERTS, CHOICES = 6, 3  # in samples: each token makes 3 choices of 6 experts. Sized calls: 8 of 64


def ids_of(tokens: int, choices: int, experts: int) -> Tensor:
    """Ids from -1 (no expert) on, some experts far more often than others."""
    values = random(tokens, choices, dtype=torch.float32).square() * experts / 2
    return values.long().clamp(max=experts) - 1


def slots_of(tokens: int, choices: int) -> Tensor:
    """A permutation of the rows."""
    order = random(tokens, choices, dtype=torch.float32).flatten().argsort()
    return order.int().view(tokens, choices)


def weights_of(tokens: int, choices: int) -> Tensor:
    return random(tokens, choices, dtype=torch.float32).abs()


def entry(
    name: str,
    samples: dict[str, Make],
    sized: dict[str, Callable[..., Sample]],
    shape: Callable[..., tuple[int, ...]],
    traffic: Callable[..., float],
) -> Entry:
    return Entry(
        name,
        samples=samples,
        sized=sized,
        shape=shape,
        bytes=traffic,
        flops=lambda *_: 0,
        bound=BITS,
    )


# ---- route ----


def route(tokens: int, choices: int, experts: int, dtype: torch.dtype = torch.int64) -> Make:
    return lambda: sample(ids_of(tokens, choices, experts).to(dtype), experts)


ROUTE = {
    "a few experts": route(67, CHOICES, EXPERTS),
    "int32": route(130, 2, 5, torch.int32),
    "one expert": route(40, 1, 1),
    "many experts": route(33, 8, 1024),
    "several CTAs": route(1200, 4, 37),
    "all choose one": lambda: sample(torch.full((70, 2), 3), 5),
    "strides": lambda: sample(ids_of(80, 9, 7)[::2, ::3], 7),
    "one choice": route(1, 1, 4),
    "no tokens": route(0, 2, 4),
    "no choices": route(5, 0, 4),
}

# ---- permute ----


def permute(
    tokens: int,
    columns: int,
    choices: int = CHOICES,
    *,
    x_dtype: torch.dtype = torch.bfloat16,
    weighted: bool = False,
    **options: Any,
) -> Make:
    def make() -> Sample:
        weights = (weights_of(tokens, choices),) if weighted else ()
        x = random(tokens, columns, dtype=x_dtype)
        return sample(x, slots_of(tokens, choices), *weights, **options)

    return make


def permutations(*weights: bool, **options: Any) -> dict[str, Make]:
    """weights: (True,) for calls with weights, () for an op without."""

    def with_weights(*tensors: Tensor) -> Sample:
        return sample(*tensors, *(weights_of(*tensors[1].shape) for _ in weights))

    weighted: dict[str, Any] = {"weighted": True} if weights else {}

    def strided() -> Sample:
        return with_weights(random(60, 600)[::2, ::3], slots_of(CHOICES, 30).t())

    return {
        "ragged": permute(37, 400, **weighted),
        "whole groups": permute(16, 1024, 2, **options),
        "fp16": permute(20, 1040, x_dtype=torch.float16, **weighted),
        "fp32": permute(11, 129, x_dtype=torch.float32, **weighted, **options),
        "one choice each": permute(9, 256, 1),
        "special numbers": lambda: with_weights(special(), slots_of(140, 2)),
        "strides": strided,
        "unaligned rows": lambda: with_weights(random(30, 273)[:, 1:], slots_of(30, CHOICES)),
        "one element": permute(1, 1, 1, **weighted),
        "no tokens": permute(0, 40, **weighted),
        "no columns": permute(7, 0, **weighted),
        "no choices": permute(7, 40, 0, **weighted),
    }


def shape_of_permute(x: Tensor, slots: Tensor, *_: Any, **__: Any) -> tuple[int, ...]:
    return *x.shape, slots.shape[1]


# ---- combine ----


def combine(
    tokens: int,
    columns: int,
    choices: int = CHOICES,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weighted: bool = True,
    residual: bool = False,
    **options: Any,
) -> Make:
    def make() -> Sample:
        y, slots = random(tokens * choices, columns, dtype=dtype), slots_of(tokens, choices)
        weights = (weights_of(tokens, choices),) if weighted else ()
        more = {"residual": random(tokens, columns, dtype=dtype)} if residual else {}
        return sample(y, slots, *weights, **more, **options)

    return make


def without_rows() -> Sample:
    """Choices without a row, and rows of no choice."""
    slots = slots_of(30, CHOICES)
    slots[::3, 1] = -1
    return sample(random(90, 200), slots, weights_of(30, CHOICES))


COMBINE = {
    "residual": combine(37, 400, residual=True),
    "no weights": combine(20, 300, weighted=False),
    "many choices": combine(6, 512, 11),
    "fp16": combine(20, 1040, dtype=torch.float16, residual=True),
    "fp32": combine(11, 129, dtype=torch.float32),
    "to fp32": combine(11, 129, out_dtype=torch.float32, residual=True),
    "fp32 to fp16": combine(11, 300, dtype=torch.float32, out_dtype=torch.float16),
    "choices without rows": without_rows,
    "special numbers": lambda: sample(special(), slots_of(70, 2), weights_of(70, 2)),
    "strides": lambda: sample(
        random(120, 600)[::2, ::3],
        slots_of(20, 3),
        weights_of(20, 6)[:, ::2],
        residual=random(200, 20).t(),
    ),
    "unaligned rows": lambda: sample(random(90, 273)[:, 1:], slots_of(30, 3)),
    "one element": combine(1, 1, 1),
    "no tokens": combine(0, 40),
    "no columns": combine(7, 0, residual=True),
    "no choices": combine(7, 40, 0, residual=True),
}


def shape_of_combine(
    y: Tensor, slots: Tensor, *_: Any, residual: Tensor | None = None, **__: Any
) -> tuple[int, ...]:
    return slots.shape[0], y.shape[1], slots.shape[1], int(residual is not None)


# ---- messages ----
RANKS = 2  # in samples; each token has a row for each


def pack(
    tokens: int,
    columns: int,
    choices: int = CHOICES,
    ranks: int = RANKS,
    *,
    x_dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Make:
    def make() -> Sample:
        header = (ids_of(tokens, choices, EXPERTS), weights_of(tokens, choices)) if choices else ()
        x = random(tokens, columns, dtype=x_dtype)
        return sample(x, slots_of(tokens, ranks), *header, **options)

    return make


def pack_strided() -> Sample:
    x, slots = random(60, 600)[::2, ::3], slots_of(RANKS, 30).t()
    return sample(x, slots, ids_of(60, 8, EXPERTS)[::2, ::2], weights_of(4, 30).t())


PACK = {
    "ragged": pack(37, 400),
    "whole groups": pack(16, 1024, 8, dtype=E5M2, pow2_scale=True),
    "no header": pack(21, 260, 0),
    "fp16": pack(20, 1040, x_dtype=torch.float16),
    "fp32": pack(11, 129, x_dtype=torch.float32, dtype=E5M2, pow2_scale=True),
    "one rank": pack(9, 256, 1, 1),
    "many choices": pack(5, 128, 40),
    "special numbers": lambda: sample(
        special(), slots_of(140, 2), ids_of(140, 2, EXPERTS).int(), weights_of(140, 2)
    ),
    "strides": pack_strided,
    "unaligned rows": lambda: sample(random(30, 273)[:, 1:], slots_of(30, CHOICES)),
    "ids that are no int32": lambda: sample(
        random(3, 128), slots_of(3, 2), torch.tensor([[2**40], [-5], [2**31 - 1]]), weights_of(3, 1)
    ),
    "one token": pack(1, 2, 1, 1),
    "no tokens": pack(0, 40),
    "no columns": pack(7, 0),
}


def unpack(
    messages: int,
    columns: int,
    choices: int = CHOICES,
    *,
    header: bool = True,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Make:
    """A message whose choices include some without a row."""

    def make() -> Sample:
        ids, weights = ids_of(messages, choices, EXPERTS), weights_of(messages, choices)
        order = torch.arange(messages, dtype=torch.int32)[:, None]
        parts = (ids, weights) if header else ()
        message = reference.moe_pack_1x128(random(messages, columns), order, *parts, dtype=dtype)
        slots, offsets = reference.moe_route(ids, EXPERTS)
        slots = torch.where((ids >= 0) & (ids < EXPERTS), slots, -1)
        more: dict[str, Any] = {} if header else {"header": False}
        if dtype is not None:
            more["dtype"] = dtype
        return sample(message, slots, offsets, columns, **more, **options)

    return make


def unpack_strided() -> Sample:
    """Every other row of a message, and slots and offsets of other tensors' columns."""
    given = unpack(24, 300)()
    message, slots, offsets, _ = given.args
    twice = torch.stack((message, message.flip(0)), 1).flatten(0, 1)[::2]
    return sample(twice, slots.t().contiguous().t(), torch.stack((offsets, offsets), 1)[:, 0], 300)


UNPACK = {
    "ragged": unpack(37, 400),
    "whole groups": unpack(16, 1024, 8, dtype=E5M2),
    "no header": unpack(21, 260, header=False),
    "more rows": unpack(9, 129, 2, rows=30),
    "one choice": unpack(12, 256, 1),
    "strides": unpack_strided,
    "one element": unpack(1, 1, 1),
    "no tokens": unpack(0, 40),
    "no columns": unpack(7, 0),
}


def shape_of_pack(
    x: Tensor, slots: Tensor, ids: Tensor | None = None, *_: Any, **__: Any
) -> tuple[int, ...]:
    return *x.shape, slots.shape[1], 0 if ids is None else ids.shape[1]


def shape_of_unpack(
    message: Tensor, slots: Tensor, offsets: Tensor, columns: int, rows: int | None = None, **_: Any
) -> tuple[int, ...]:
    return slots.shape[0], columns, slots.shape[1], slots.numel() if rows is None else rows


ENTRIES = (
    entry(
        "moe_pack_1x128",
        PACK,
        {
            "header": lambda rows, columns: pack(rows, columns, 8)(),
            "no header": lambda rows, columns: pack(rows, columns, 0)(),
        },
        shape_of_pack,
        lambda tokens, columns, ranks=RANKS, choices=8: (
            tokens * (2 * columns + 4 * ranks + 12 * choices)
            + tokens * ranks * MessageLayout.of(columns, choices).pitch
        ),
    ),
    entry(
        "moe_unpack_1x128",
        UNPACK,
        {
            "header": lambda rows, columns: unpack(rows, columns, 8)(),
            "no header": lambda rows, columns: unpack(rows, columns, 8, header=False)(),
        },
        shape_of_unpack,
        lambda messages, columns, choices=8, rows=0: (
            messages * (MessageLayout.of(columns, choices).pitch + 4 * choices)
            + (rows or messages * choices) * ((1 + 4 / 128) * columns + 4)
        ),
    ),
    entry(
        "moe_route",
        ROUTE,
        {"choices": lambda rows, columns: route(rows, 8, 64)()},
        lambda ids, experts, **_: (ids.shape[0], 0, ids.shape[1], experts),
        lambda tokens, columns, choices=8, experts=64: 12 * tokens * choices + 4 * experts,
    ),
    entry(
        "moe_permute_quantize_1x128",
        permutations(dtype=E5M2, pow2_scale=True),
        {"tokens": lambda rows, columns: permute(rows, columns, 8)()},
        shape_of_permute,
        lambda tokens, columns, choices=8: (
            tokens * (2 * columns + choices * (4 + (1 + 4 / 128) * columns))
        ),
    ),
    entry(
        "moe_permute",
        permutations(True),
        {
            "weights": lambda rows, columns: permute(rows, columns, 8, weighted=True)(),
            "no weights": lambda rows, columns: permute(rows, columns, 8)(),
        },
        shape_of_permute,
        lambda tokens, columns, choices=8: tokens * (2 * columns + choices * (8 + 2 * columns)),
    ),
    entry(
        "moe_combine",
        COMBINE,
        {
            "residual": lambda rows, columns: combine(rows, columns, 8, residual=True)(),
            "no weights": lambda rows, columns: combine(rows, columns, 8, weighted=False)(),
        },
        shape_of_combine,
        lambda tokens, columns, choices=8, residual=1: (
            tokens * (2 * columns * (1 + residual) + choices * (8 + 2 * columns))
        ),
    ),
)
