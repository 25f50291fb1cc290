"""Weight gradients that are computed after backward, by `torchext.delay_weight_gradients`.

The backward of a layer computes dx, which earlier layers wait for, and dw, which nobody waits for.
`weight_gradient` puts dw off if a queue is open: then backward returns none for the weight, and
`WeightGradientQueue.run` computes it and hands it to autograd, which accumulates it as in backward.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import gradient_sync

_lock = threading.Lock()
_thread = threading.local()  # `at_once`: whether the thread computes gradients in backward
# The open queues, of which the last takes gradients. They serve all threads, because autograd runs
# backward on threads of its own.
_open: list[WeightGradientQueue] = []


class WeightGradientQueue:
    """The weight gradients that are still to be computed, in the order of backward.

    len() is their number.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def run(self, count: int | None = None) -> None:
        """Computes gradients, the oldest first, and adds them to `.grad` as backward does.

        On CUDA, call it on the stream of backward, or on one that waits for it.

        Args:
            count: how many; all by default.

        Raises:
            RuntimeError: a weight's memory was freed, as FSDP2 does when it reshards; or DDP or
                FSDP2 has begun to reduce its gradient.
            ValueError: count is negative.
        """
        if count is not None and count < 0:
            raise ValueError(
                "torchext.delay_weight_gradients: count must not be negative (got "
                f"{count}); omit it to compute all gradients"
            )
        left = len(self._waiting) if count is None else min(count, len(self._waiting))
        for _ in range(left):
            weight, compute = self._waiting.popleft()
            if weight.numel() > 0 and weight.untyped_storage().size() == 0:
                self._waiting.clear()
                raise RuntimeError(
                    "torchext.delay_weight_gradients: weights must keep their memory until "
                    "queue.run() (got one that FSDP2 resharded); delay only where gradients are "
                    "not synchronized: set_requires_gradient_sync(False) and "
                    "set_reshard_after_backward(False)"
                )
            if gradient_sync.is_reduced(weight):
                self._waiting.clear()
                raise RuntimeError(
                    "torchext.delay_weight_gradients: queue.run() must come before gradients are "
                    "reduced (got one whose weight DDP or FSDP2 synchronizes now); call it before "
                    "the micro-batch that ends no_sync() or calls set_requires_gradient_sync(True)"
                )
            with torch.no_grad():
                gradient = compute()
            torch.autograd.backward((weight,), (gradient,))

    def _put(self, weight: Tensor, compute: Callable[[], Tensor]) -> None:
        self._waiting.append((weight, compute))


def weight_gradient(weight: Tensor | None, compute: Callable[[], Tensor]) -> Tensor | None:
    """compute(), or None if an open queue computes it later.

    Args:
        weight: the parameter that the gradient is for; None if backward must compute it, because
            the weight is computed itself.
        compute: returns the gradient.
    """
    queue = _open[-1] if _open else None
    if queue is None or weight is None or getattr(_thread, "at_once", False):
        return compute()
    if gradient_sync.backward_reduces(weight):
        return compute()
    queue._put(weight, compute)
    return None


@contextmanager
def at_once() -> Iterator[None]:
    """Within this context no gradient of the thread is delayed, because it is differentiated."""
    _thread.at_once = True
    try:
        yield
    finally:
        _thread.at_once = False


def leaf(weight: Tensor) -> Tensor | None:
    """In forward: the weight if a gradient can be accumulated into it after backward, else None.

    Hooks would be called twice, at first without a gradient. FSDP2 frees a weight that it gathered
    in FP8, and reduces its gradient, at the end of backward. So does DDP, unless within no_sync().
    """
    if (
        type(weight) is torch.nn.Parameter
        and weight.requires_grad
        and weight.is_leaf
        and not weight._backward_hooks
        and not getattr(weight, "_post_accumulate_grad_hooks", None)
        and not gradient_sync.is_recomputed()
        and not gradient_sync.ddp_reduces(weight)
    ):
        return weight
    return None


@contextmanager
def delay_weight_gradients() -> Iterator[WeightGradientQueue]:
    """Within this context, backward leaves weight gradients of FP8 layers to `queue.run()`.

        with torchext.delay_weight_gradients() as queue:
            loss.backward()  # gradients of inputs, biases and other layers
            send_gradients_of_inputs()
            queue.run()      # gradients of the weights

    A pipeline can send the gradient of its input before it computes the rest, and a mixture of
    experts has GEMMs left for the time that tokens travel. Gradients have the same bits, and add up
    over micro-batches as usual. Until `run`, a layer keeps FP8 copies of its input and of its
    output's gradient.

    It applies to torchext.nn.Linear and the fused MLPs and experts, whichever thread runs backward.
    Backward computes the gradients of weights that are computed themselves (parametrizations,
    transposed layers), that have hooks, or that were gathered in FP8; of DTensors; of layers in a
    compiled graph, and of those that reentrant checkpointing recomputes.

    DDP and FSDP2 reduce gradients when backward ends, so then backward computes them all. Delayed
    are those of micro-batches that are not reduced: whose forward and backward are within DDP's
    no_sync(), or for FSDP2 after set_requires_gradient_sync(False) and
    set_reshard_after_backward(False). Call `queue.run()` before the micro-batch that is reduced,
    and before your own code, or the step() of a pipeline, scales gradients.

    Raises:
        RuntimeError: at the end, gradients are left in the queue; torch.compile traces the context;
            or this release of torch does not tell whether DDP and FSDP2 reduce.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "torchext.delay_weight_gradients: must not be opened in a compiled function (a graph "
            "computes all gradients in backward); open it around the call of backward"
        )
    gradient_sync.check_torch()
    queue = WeightGradientQueue()
    with _lock:
        _open.append(queue)
    try:
        yield queue
    finally:
        with _lock:
            _open.remove(queue)
    if len(queue):
        raise RuntimeError(
            f"torchext.delay_weight_gradients: queue.run() must compute all gradients (got "
            f"{len(queue)} left at the end of the context); call it before the context ends"
        )
