"""The completion modes in which the runs of a kernel can differ."""

from __future__ import annotations

from collections.abc import Iterable

from torchext import _sim

MODES = ("eager", "late", "random")


def is_asynchronous(module: _sim.Module, kernel: str) -> bool:
    """Whether an instruction of the kernel completes later than it executes."""
    return any(instruction["completion"] != "at_once" for instruction in module.traits(kernel))


def modes_that_differ(asynchronous: Iterable[bool]) -> tuple[str, ...]:
    """All modes if one of the kernels is asynchronous, otherwise one: the mode says when
    asynchronous work completes, and nothing else depends on it."""
    return MODES if any(asynchronous) else MODES[:1]
