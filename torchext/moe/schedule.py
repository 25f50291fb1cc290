"""`overlap_in_schedule`: OVERLAP_F_B of torch's pipelines, by `overlap_forward_backward`.

Torch has a public method to replace an action, but what an action does is a local function of
`_step_microbatches`. This file finds it there, so that sending, losses, FSDP and DDP stay torch's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .overlap import overlap_forward_backward

_NAME = "torchext.moe.overlap_in_schedule"


def overlap_in_schedule(schedule: Any) -> None:
    """Makes a pipeline schedule overlap the forward and the backward of its actions OVERLAP_F_B.

        schedule = ScheduleDualPipeV(stages, n_microbatches, loss_fn)
        overlap_in_schedule(schedule)
        schedule.step(x, target=target)

    Without it torch runs the two one after another. Losses and gradients have the same bits.

    Args:
        schedule: of torch.distributed.pipelining, with several stages on a rank, such as
            ScheduleDualPipeV. All ranks that share a Dispatcher do the same.

    Raises:
        TypeError: the schedule has no such actions.
        RuntimeError: this release of torch is not known: at once, or from schedule.step().
    """
    from torch.distributed.pipelining import schedules  # takes long to load

    action = getattr(schedules, "OVERLAP_F_B", None)
    if action is None:
        raise RuntimeError(
            f"{_NAME}: torch must have the action OVERLAP_F_B (got {torch.__version__}); install "
            "2.13, or call torchext.moe.overlap_forward_backward yourself"
        )
    if not hasattr(schedule, "register_custom_function"):
        raise TypeError(
            f"{_NAME}: schedule must have actions (got {type(schedule).__name__}); use one with "
            "several stages on a rank, for example ScheduleDualPipeV"
        )
    schedule.register_custom_function(action, _perform)


def _perform(action: Any, context: Any) -> None:
    """What torch calls for an action OVERLAP_F_B."""
    forward, backward = action.sub_actions
    perform = _perform_action()
    overlap_forward_backward(partial(perform, forward), partial(perform, backward))


def _perform_action() -> Callable[[Any], None]:
    """Torch's function that performs an action, from the frame that has called `_perform`."""
    frame = inspect.currentframe()
    while frame is not None:
        if "_perform_action" in frame.f_locals:
            return frame.f_locals["_perform_action"]  # type: ignore[no-any-return]
        frame = frame.f_back
    raise RuntimeError(
        f"{_NAME}: torch must perform actions by a function _perform_action (got "
        f"{torch.__version__}, which does not); omit the call, and please report it"
    )
