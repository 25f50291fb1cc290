"""Quantizers and dequantize, whose results are specified to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .entry import BITS, E5M2, Entry, Sample, random, sample


def special() -> Tensor:
    """Zeros, a NaN, an Inf, huge and subnormal FP32 numbers, each kind in its own scale groups."""
    x = random(140, 400, dtype=torch.float32)
    x[0] = 0
    x[1, 5] = torch.nan
    x[2, 133] = torch.inf
    x[3] *= 1e38
    x[4] *= 1e-40
    x[130:, :128] = 0
    return x


# Inputs for every quantizer.
MATRICES: dict[str, Callable[[], Sample]] = {
    "ragged": lambda: sample(random(200, 400)),
    "e5m2, powers of two": lambda: sample(
        random(67, 129, dtype=torch.float32), dtype=E5M2, pow2_scale=True
    ),
    "one row": lambda: sample(random(1, 300, dtype=torch.float16)),
    "one element": lambda: sample(random(1, 1)),
    "special numbers": lambda: sample(special()),
    "every other element": lambda: sample(random(120, 300)[::2, ::3]),
    "transposed": lambda: sample(random(129, 66, dtype=torch.float32).t()),
    "narrow": lambda: sample(random(5, 48)),
    "one column": lambda: sample(random(2, 1)),
    "stack": lambda: sample(random(2, 5, 200)),
    "stack of ragged blocks": lambda: sample(random(3, 130, 300)),
    "stack of whole blocks of rows": lambda: sample(random(2, 128, 70)),
    "stack of stacks": lambda: sample(random(2, 1, 5, 48)),
    "no rows": lambda: sample(random(0, 40)),
    "no columns": lambda: sample(random(7, 0)),
    "empty stack": lambda: sample(random(0, 3, 4)),
    "stack without rows": lambda: sample(random(2, 0, 40)),
    "stack without columns": lambda: sample(random(2, 7, 0)),
}
# More inputs for quantizers that accept one dimension.
ROWS = {"vector": lambda: sample(random(130)), "no elements": lambda: sample(random(0))}


def entry(
    name: str,
    bytes_per_element: float,
    more: Mapping[str, Callable[[], Sample]],
    bytes_per_column: int = 0,
) -> Entry:
    """bytes_per_element: bytes moved for each element of a BF16 input, scales included."""
    return Entry(
        name,
        samples={**MATRICES, **more},
        sized={"matrix": lambda rows, columns: sample(random(rows, columns))},
        shape=lambda x, **_: (math.prod(x.shape[:-1]), x.shape[-1]),
        bytes=lambda rows, columns: (bytes_per_element * rows + bytes_per_column) * columns,
        flops=lambda rows, columns: 0,
        bound=BITS,
    )


def dequantized(
    quantize: Callable[..., tuple[Tensor, Tensor]], *shape: int, to: torch.dtype, **options: Any
) -> Callable[[], Sample]:
    return lambda: sample(*quantize(random(*shape), **options), out_dtype=to)


def dequantized_sized(quantize: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Sample]:
    return lambda rows, columns: sample(*quantize(random(rows, columns)), out_dtype=torch.float32)


DEQUANTIZE = Entry(
    "dequantize",
    samples={
        "1x128": dequantized(reference.quantize_1x128, 136, 272, to=torch.bfloat16),
        "1x128, padded": dequantized(reference.quantize_1x128, 130, 300, to=torch.bfloat16),
        "128x128": dequantized(reference.quantize_128x128, 130, 300, to=torch.bfloat16),
        "rowwise": dequantized(reference.quantize_rowwise, 67, 129, to=torch.float32),
        "tensorwise": dequantized(reference.quantize_tensorwise, 67, 129, to=torch.float16),
        "e5m2": dequantized(reference.quantize_1x128, 5, 300, to=torch.float16, dtype=E5M2),
        "one row": dequantized(reference.quantize_1x128, 1, 129, to=torch.float32),
        "narrow": dequantized(reference.quantize_1x128, 5, 48, to=torch.bfloat16),
        "one column": dequantized(reference.quantize_1x128, 2, 1, to=torch.float16),
        "vector": dequantized(reference.quantize_1x128, 64, to=torch.bfloat16),
        "stack": dequantized(reference.quantize_1x128, 2, 5, 200, to=torch.float32),
        "stack of stacks": dequantized(reference.quantize_1x128, 2, 3, 1, 16, to=torch.float16),
        "no rows": dequantized(reference.quantize_1x128, 0, 40, to=torch.bfloat16),
        "no columns": dequantized(reference.quantize_1x128, 7, 0, to=torch.float32),
        "stack without rows": dequantized(reference.quantize_1x128, 2, 0, 24, to=torch.float32),
        "no elements": dequantized(reference.quantize_1x128, 0, to=torch.float16),
    },
    sized={
        "1x128": dequantized_sized(reference.quantize_1x128),
        "128x128": dequantized_sized(reference.quantize_128x128),
        "rowwise": dequantized_sized(reference.quantize_rowwise),
        "tensorwise": dequantized_sized(reference.quantize_tensorwise),
    },
    shape=lambda data, scale, **_: (math.prod(data.shape[:-1]), data.shape[-1]),
    bytes=lambda rows, columns: (3 + 4 / 128) * rows * columns,
    flops=lambda rows, columns: 0,
    bound=BITS,
)

ENTRIES = (
    entry("quantize_1x128", 3 + 4 / 128, ROWS),
    entry("quantize_1x128_t", 3 + 4 / 128, ROWS),
    entry("quantize_1x128_dual", 4 + 8 / 128, ROWS),
    entry("quantize_1x128_dual_bias_grad", 4 + 8 / 128, ROWS, bytes_per_column=4),
    entry("quantize_128x128", 3.0, {}),
    entry("quantize_128x128_dual", 4.0, {}),
    entry("quantize_rowwise", 3.0, ROWS),
    entry("quantize_tensorwise", 3.0, ROWS),
    DEQUANTIZE,
)
