"""Ranges of torchext.nn.Linear in a profile: `torchext.nn.Linear.forward (blockwise)`.

A profiler records ops by itself. If no profiler runs, a layer only reads the flag
`torch.autograd.profiler._is_profiler_enabled` and does not call this module. While torch.compile
traces, the layer does not read the flag, because the graph would be guarded on it.
"""

from __future__ import annotations

from typing import Any

# torch.profiler.record_function calls two ops, which a concurrent trace would record in its graph.
from torch._C._profiler import _RecordFunctionFast

from ..recipe import Recipe


def open_range(direction: str, recipe: Recipe) -> Any:
    """Opens the range of the direction "forward" or "backward"; its __exit__ closes it."""
    opened = _RecordFunctionFast(f"torchext.nn.Linear.{direction} ({recipe.granularity})")
    opened.__enter__()
    return opened
