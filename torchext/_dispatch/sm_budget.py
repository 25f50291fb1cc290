"""Divides the SMs of a GPU between communication and GEMMs, while a `torchext.sm_budget` is open.

A budget applies to all threads, because they share the GPU, and because autograd runs backward on
threads of its own, which see no context variable of the thread that opened the budget.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_lock = threading.Lock()
_open: list[list[int]] = []  # [communication] of each open budget, the last of which applies

# SMs of communication; 0 without a budget. torch.compile guards it.
communication = 0
# SMs of the simulated GPU on which ops with CPU tensors run; 0 if none is simulated.
simulated = 0


@functools.cache
def _count(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _sms(x: Tensor) -> int:
    """The SMs of the GPU of x; 0 for a CPU."""
    if x.is_cuda:
        return _count(x.device)
    return simulated if x.is_cpu else 0


def gemm_sms(x: Tensor) -> int:
    """`num_sms` of a GEMM on x's device whose caller names none; 0 for all.

    Raises ValueError if the budget leaves it no SM.
    """
    sms = _sms(x) if communication else 0
    if sms == 0:
        return 0
    if sms <= communication:
        raise ValueError(
            f"torchext.sm_budget: communication must be less than {sms}, the SMs of this GPU (got "
            f"{communication}); leave some for GEMMs"
        )
    return sms - communication


def communication_sms(x: Tensor) -> int:
    """`num_sms` of a communication op on x's device whose caller names none; 0 for all."""
    return min(_sms(x), communication) if communication else 0


@contextmanager
def sm_budget(*, communication: int = 20) -> Iterator[None]:
    """Within this context GEMMs leave `communication` SMs of a GPU to communication ops.

    Kernels that move tokens (moe_route, moe_permute, ...) take at most `communication` SMs, and
    GEMMs the others, so that both can run at the same time, each in one wave:

        with torchext.sm_budget(communication=20):
            loss(model(x)).backward()

    It costs time where nothing overlaps: measure before you use it. DeepSeek-V3 set 20 of 132 SMs
    aside. NCCL's kernels take SMs of their own choice; limit them by `max_ctas` of
    `ProcessGroupNCCL.Options.config`.

    It applies to all threads, and to backward if that runs within the context. Contexts nest; the
    last to open applies. A call that passes num_sms gets what it passes. Nothing changes on a CPU,
    in a compiled graph's backward, whose GEMMs take all SMs, or in a layer's op
    (torch.export, transforms, DTensor). Results have the same bits with and without a budget.

    Args:
        communication: SMs of communication ops, at least 1 and fewer than the GPU has.

    Raises:
        TypeError: communication is not an int.
        ValueError: it is less than 1; or, from a GEMM, not less than the SMs of its GPU.
    """
    if not isinstance(communication, int) or isinstance(communication, bool):
        raise TypeError(
            "torchext.sm_budget: communication must be an int (got "
            f"{type(communication).__name__}); pass a number of SMs, such as 20"
        )
    if communication < 1:
        raise ValueError(
            f"torchext.sm_budget: communication must be at least 1 (got {communication}); without "
            "a budget every kernel takes all SMs"
        )
    entry = [communication]  # a list, because equal budgets are different entries
    _change(entry)
    try:
        yield
    finally:
        _change(entry)


def _change(entry: list[int]) -> None:
    """Opens the budget, or closes it if it is open."""
    global communication  # noqa: PLW0603
    with _lock:
        kept = [other for other in _open if other is not entry]
        if len(kept) == len(_open):
            kept.append(entry)
        _open[:] = kept
        communication = kept[-1][0] if kept else 0
