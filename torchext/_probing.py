"""Calls modules to find out what they compute: MLPs, norms and experts are recognized so."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger("torchext")


def results_of(module: Any, calls: Sequence[tuple[Tensor, ...]], kind: str) -> list[Tensor] | None:
    """Calls the forward of the module's class, without hooks, once for each tuple of arguments.

    Args:
        module: a copy that the calls may change.
        calls, kind: as for `results_of_function`.
    """
    forward = functools.partial(type(module).forward, module)
    return results_of_function(forward, calls, f"{type(module).__name__}: no {kind}")


def results_of_function(
    function: Callable[..., Any], calls: Sequence[tuple[Tensor, ...]], failure: str
) -> list[Tensor] | None:
    """Calls the function once for each tuple of arguments. Each run draws the same random numbers.

    Args:
        function: what to call.
        calls: arguments; the first are of the shape that the results must have.
        failure: what to log before an error.

    Returns:
        The results, or None if the function does not take such arguments or returns anything else
        than one tensor of the shape of the first.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            ys = [function(*arguments) for arguments in calls]
    except Exception as error:  # of any class: the module may need other inputs
        _log.debug("%s: %r", failure, error)
        return None
    fits = all(
        isinstance(y, Tensor) and y.shape == x.shape for y, (x, *_) in zip(ys, calls, strict=True)
    )
    return ys if fits else None
