"""How far two results lie apart, and how many bytes tensors hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

Nested: TypeAlias = "Tensor | Iterable[Nested] | None"


def calc_diff(x: Tensor, y: Tensor) -> Tensor | float:
    """1 - 2 <x, y> / (<x, x> + <y, y>), in float64: 0 for equal tensors, 2 for x = -y.

    0.0 if both are zero throughout.
    """
    x, y = x.double(), y.double()
    squares = (x * x + y * y).sum()
    if squares == 0:
        return 0.0
    return 1 - 2 * (x * y).sum() / squares


def count_bytes(*tensors: Nested) -> int:
    """Bytes of the elements of tensors, in tuples and lists of any depth; None counts as 0."""
    total = 0
    for item in tensors:
        if isinstance(item, Tensor):
            total += item.numel() * item.element_size()
        elif item is not None:
            total += count_bytes(*item)
    return total


def assert_bitwise_equal(x: Tensor, y: Tensor, label: str = "") -> None:
    """Raises AssertionError, with the first place, unless shapes, dtypes and all bits agree."""
    name = f" ({label})" if label else ""
    assert x.shape == y.shape, f"shapes differ{name}: {list(x.shape)} and {list(y.shape)}"
    assert x.dtype == y.dtype, f"dtypes differ{name}: {x.dtype} and {y.dtype}"
    size = x.element_size()
    bits_x, bits_y = (t.contiguous().view(-1).view(torch.uint8).view(-1, size) for t in (x, y))
    differs = (bits_x != bits_y).any(dim=1)
    if not differs.any():
        return
    first = int(differs.nonzero()[0])
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), x.shape))
    raise AssertionError(
        f"bits differ{name}: in {int(differs.sum())} of {x.numel()} elements; first at {place}: "
        f"{x.flatten()[first].item()} and {y.flatten()[first].item()}"
    )
