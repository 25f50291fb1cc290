"""The shapes and strides of quantised tensors: one definition for fake kernels and references.

A tensor [..., K] is treated as a matrix whose M rows are all its leading dimensions, folded. FP8
data keep a 16-byte pitch between rows (all that TMA asks); scales of 1x128 groups lie M-major, with
the columns a multiple of four FP32 values apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GROUP = 128


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def round_up(a: int, b: int) -> int:
    return ceil_div(a, b) * b


def folded_strides(leading: Sequence[int], row: int, column: int) -> list[int]:
    """Strides of [*leading, columns] whose rows, folded, are `row` elements apart."""
    strides = [column]
    for size in reversed(leading):
        strides.insert(0, row)
        row = row * size
    return strides


def empty_data(x: Tensor, leading: Sequence[int], columns: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised FP8 data [*leading, columns], rows round_up(columns, 16) bytes apart."""
    strides = folded_strides(leading, round_up(columns, 16), 1)
    return x.new_empty_strided((*leading, columns), strides, dtype=dtype)


def empty_group_scale(x: Tensor, leading: Sequence[int], columns: int) -> Tensor:
    """Uninitialised scales [*leading, ceil(columns / 128)] of 1x128 groups, M-major."""
    rows = math.prod(leading)
    strides = folded_strides(leading, 1, round_up(rows, 4))
    shape = (*leading, ceil_div(columns, GROUP))
    return x.new_empty_strided(shape, strides, dtype=torch.float32)


def empty_block_scale(x: Tensor) -> Tensor:
    """Uninitialised scales [..., ceil(rows / 128), ceil(columns / 128)] of x's blocks,
    contiguous."""
    *leading, rows, columns = x.shape
    blocks = (*leading, ceil_div(rows, GROUP))
    return empty_contiguous(x, blocks, ceil_div(columns, GROUP), torch.float32)


def empty_contiguous(x: Tensor, leading: Sequence[int], columns: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [*leading, columns]. Unlike torch.empty, a stride is 0 where a size is."""
    strides = folded_strides(leading, columns, 1)
    return x.new_empty_strided((*leading, columns), strides, dtype=dtype)
