"""Ranges of torchext.nn.Linear in a profile: `torchext.nn.Linear.forward (blockwise)`.

Ops show up in a profile by themselves. Where no profiler runs, a layer reads one flag,
`torch.autograd.profiler._is_profiler_enabled`, and does not call this. While torch.compile traces,
it does not read the flag, on which the graph would be guarded.
"""

from __future__ import annotations

from typing import Any

# torch.profiler.record_function calls two ops, which would be in graphs that are traced meanwhile.
from torch._C._profiler import _RecordFunctionFast

from ..recipe import Recipe


def open_range(direction: str, recipe: Recipe) -> Any:
    """Opens the range of a "forward" or "backward"; its __exit__ closes it."""
    opened = _RecordFunctionFast(f"torchext.nn.Linear.{direction} ({recipe.granularity})")
    opened.__enter__()
    return opened
