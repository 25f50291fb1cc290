"""Whether DDP or FSDP2 reduces a parameter's gradient at the end of backward.

Then a gradient that is computed later would be left out of the sum over ranks. Torch has no public
names for the questions below; the private ones that answer them are in this file only. They are
those of torch 2.10 to 2.13.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

_FSDP_STATE = "torch.distributed.fsdp._fully_shard._fsdp_state"


@dataclass
class _Replicated:
    """A weight under DDP.

    Attributes:
        ddp: the module whose forward used it last.
        reduced: whether that forward, or a backward since, made DDP reduce its gradient.
    """

    ddp: weakref.ref[DistributedDataParallel]
    reduced: bool


_replicated = WeakTensorKeyDictionary()  # Tensor -> _Replicated


def check_torch() -> None:
    """Raises RuntimeError if this torch lacks a private name, so that no answer can be wrong."""
    if dist.is_available() and dist.is_initialized():
        _private(DistributedDataParallel, "_active_ddp_module")
        for _ in _reducing_groups():
            pass


def is_recomputed() -> bool:
    """Whether this forward runs within a backward, as reentrant checkpointing recomputes.

    DDP's own forward has ended by then, so that nobody can ask it.
    """
    return torch._C._current_graph_task_id() != -1


def ddp_reduces(weight: Tensor) -> bool:
    """In forward: whether the DDP module that runs it reduces gradients after its backward."""
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None:
        return False
    _replicated[weight] = _Replicated(weakref.ref(ddp), ddp.require_backward_grad_sync)
    return bool(ddp.require_backward_grad_sync)


def backward_reduces(weight: Tensor) -> bool:
    """In backward: whether weight's gradient is reduced when it ends.

    weight: a parameter that forward has used; with FSDP2 the gathered one.
    """
    replicated = _replicated.get(weight) if _replicated else None
    if replicated is not None:
        # Torch's pipelines run all forwards in no_sync(), and prepare DDP before the last backward.
        ddp = replicated.ddp()
        replicated.reduced |= ddp is not None and ddp.require_backward_grad_sync
    return is_reduced(weight)


def is_reduced(weight: Tensor) -> bool:
    """Whether it is too late to add to weight's gradient, as a reduction has begun or may begin."""
    replicated = _replicated.get(weight) if _replicated else None
    return (replicated is not None and replicated.reduced) or any(
        getattr(parameter, "_unsharded_param", None) is weight
        for group in _reducing_groups()
        for parameter in _private(group, "fsdp_params")
    )


def _reducing_groups() -> Iterator[Any]:
    """FSDP2's groups of parameters whose gradients are reduced. A pipeline's last for a short time,
    which is why asking for a weight need not be fast."""
    if _FSDP_STATE not in sys.modules:
        return
    fsdp_state = _private(sys.modules[_FSDP_STATE], "FSDPState")
    states = sys.modules["torch.distributed._composable_state"]
    for reference in list(_private(states, "_module_state_mapping").values()):
        state = reference()
        if not isinstance(state, fsdp_state):
            continue
        groups = getattr(state, "_fsdp_param_groups", None)  # one group before torch 2.12
        for group in [_private(state, "_fsdp_param_group")] if groups is None else groups:
            if group is not None and _private(group, "reduce_grads"):
                yield group


def _private(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise RuntimeError(
            "torchext.delay_weight_gradients: torch must tell which gradients are reduced (got "
            f"{torch.__version__}, whose {owner!r} has no {name}); do not delay gradients with "
            "this release, and please report it"
        ) from None
