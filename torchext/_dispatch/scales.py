"""Scales as checkpoints hold them: products convert BF16 and UE8M0 scales to FP32 and call again.

The compiled ops take FP32 scales only. The conversion runs after an op has refused its arguments,
so it costs nothing to a call with FP32 scales. In a graph, ops refuse arguments only when the graph
runs, so there the conversion is traced, before the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import python_error
from .layout import GROUP, ceil_div, m_major

# Each of their values is an FP32 value, too. torch 2.10 and later have UE8M0.
_CONVERTED = (torch.bfloat16, torch.float8_e8m0fnu)


def float32_scale(scale: Tensor) -> Tensor:
    """`scale` in FP32: itself, or a copy of BF16 or UE8M0 scales. Other dtypes are left alone."""
    return scale.float() if scale.dtype in _CONVERTED else scale


def call_with_float32_scales(
    error: RuntimeError,
    function: Callable[..., Any],
    *arguments: Any,
    pairs: tuple[tuple[int, int], ...],
    **options: Any,
) -> Any:
    """What `function` returns for FP32 copies of its scales, if it raised `error` for others.

    Args:
        error: what the op raised for these arguments.
        function: the op's typed function.
        arguments, options: what it was called with.
        pairs: the positions of (data, its scale) among the arguments.

    Raises what `error` means if no scale is in BF16 or UE8M0.
    """
    given = list(arguments)
    for data, scale in pairs:
        tensor = arguments[scale]
        if isinstance(tensor, Tensor) and tensor.dtype in _CONVERTED:
            given[scale] = _laid_out(arguments[data], tensor.float())
    if all(new is old for new, old in zip(given, arguments, strict=True)):
        raise python_error(error) from None
    return function(*given, **options)


def float32_in_graph(*pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The scale of each pair (data, scale) in FP32, for code that Dynamo traces."""
    return [
        _m_major_in_graph(scale.float())
        if scale.dtype in _CONVERTED and _is_grouped(data, scale)
        else float32_scale(scale)
        for data, scale in pairs
    ]


def _m_major_in_graph(scale: Tensor) -> Tensor:
    """`m_major`, always a copy. If it wrote into a new tensor, a graph would lose its strides."""
    rows = scale.reshape(-1, scale.shape[-1])
    padded = F.pad(rows.t(), (0, -rows.shape[0] % 4))
    return padded[:, : rows.shape[0]].t().view(scale.shape)


def _laid_out(data: Tensor, scale: Tensor) -> Tensor:
    """A converted scale as products read it: that of 1x128 groups M-major."""
    return m_major(scale) if _is_grouped(data, scale) else scale


def _is_grouped(data: Tensor, scale: Tensor) -> bool:
    return scale.shape == (*data.shape[:-1], ceil_div(data.shape[-1], GROUP))
