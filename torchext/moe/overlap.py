"""`overlap_forward_backward`: tokens of one micro-batch travel while the other's experts multiply.

Forward and backward run on a thread each and take turns. Whoever waits for bytes gives the turn
away, and gets it back when the other waits or has ended. With > for the start of a dispatch and <
for that of a combine, whose bytes travel until the same half computes again:

    forward     attention >         experts <         attention >         ...
    backward                 loss >          experts <           attention >

One computes at a time, beside the bytes of both. The order depends on what both do and never on
time: all ranks start the same exchanges in the same order, so that one process group is enough.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F")
B = TypeVar("B")

_NAME = "torchext.moe.overlap_forward_backward"
_FORWARD, _BACKWARD = 0, 1
_lock = threading.Lock()
# The call that runs, if any. It is one for all threads, because on GPUs autograd runs backward on
# threads of its own.
_running: list[_Turns] = []


class OtherHalfError(RuntimeError):
    """Ends a half of `overlap_forward_backward` whose other half has raised."""


class _Turns:
    """Who may run.

    Attributes:
        given: how often each half has given its turn away.
        error: what the half that failed first has raised.
    """

    def __init__(self) -> None:
        self.given = [0, 0]
        self.error: BaseException | None = None
        self._ended = [False, False]
        self._go = threading.Semaphore(0), threading.Semaphore(0)
        self._forward_thread = threading.get_ident()

    def half(self) -> int:
        """That of this thread. Other threads than forward's are autograd's."""
        return _FORWARD if threading.get_ident() == self._forward_thread else _BACKWARD

    def give(self) -> None:
        """Returns when the other half has given its turn away, or has ended."""
        half = self.half()
        self.given[half] += 1
        if self.error is None and not self._ended[1 - half]:
            random = _random_states()  # checkpointing sets it while it recomputes
            self._go[1 - half].release()
            self._go[half].acquire()
            _set_random_states(random)
        if self.error is not None:
            raise OtherHalfError(f"{_NAME}: ends because the other half has failed")

    def begin_backward(self) -> bool:
        """Whether to run, once it is backward's turn."""
        self._go[_BACKWARD].acquire()
        return self.error is None

    def end(self, half: int, error: BaseException | None) -> None:
        self._ended[half] = True
        if self.error is None:
            self.error = error
        self._go[1 - half].release()


def turns_given() -> int:
    """How often this half has given its turn away."""
    return _running[0].given[_running[0].half()] if _running else 0


def before_waiting(since: int) -> None:
    """Lets the other half run, before this one waits for an exchange.

    since: turns_given() when the exchange began. If it has changed, bytes have had their time.
    """
    if _running and turns_given() == since:
        _running[0].give()


@torch._disable_dynamo
def overlap_forward_backward(forward: Callable[[], F], backward: Callable[[], B]) -> tuple[F, B]:
    """Runs the forward of one micro-batch beside the backward of another.

        y, _ = overlap_forward_backward(lambda: model(x), lambda: loss_before.backward())

    Each runs until it waits for a dispatch or a combine (`Dispatcher`, `Work.wait`,
    `torchext.nn.MoE`); then the other runs. So one computes while bytes of the other travel. Only
    one runs at a time, in an order that is the same on all ranks if they call the same functions.
    Other communication, such as all-reduces, keeps its turn while it waits.

    Outputs and gradients have the bits of `forward()` and then `backward()`. Random numbers, too,
    except for those that backward draws itself (checkpointing's are forward's).

    Args:
        forward: runs on the caller's thread. It must not compute gradients: on GPUs they need the
            thread of autograd on which backward waits for its turn.
        backward: runs on another one, with the caller's autocast, gradient mode, context variables,
            and current stream. It must not need what forward computes. Other states of a thread,
            such as modes of torch.utils._python_dispatch, it does not see.

    Returns:
        What forward and backward return.

    Raises:
        RuntimeError: another call is running in this process.
        Exception: what forward or backward raises. The other half ends with an exception at its
            next wait. Other ranks see a rank that is missing, as always.
    """
    turns = _Turns()
    with _lock:
        if _running:
            raise RuntimeError(
                f"{_NAME}: calls must not run at the same time (got one within another, or on "
                "another thread); call it once for each pair of micro-batches"
            )
        _running.append(turns)
    results: dict[int, Any] = {}
    random: dict[int, Any] = {}

    def run(half: int, function: Callable[[], Any]) -> None:
        error = None
        try:
            results[half] = function()
        except BaseException as raised:  # of both threads; raised below
            error = raised
        random[half] = _random_states()  # the other half runs from here on
        turns.end(half, error)

    def run_backward() -> None:
        if turns.begin_backward():
            run(_BACKWARD, backward)

    thread = threading.Thread(target=_in_this_state(run_backward), name=_NAME)
    try:
        thread.start()
        run(_FORWARD, forward)
        thread.join()
        _set_random_states(random[_FORWARD])
    finally:
        _running.clear()
    if turns.error is not None:
        raise turns.error
    return results[_FORWARD], results[_BACKWARD]


def _in_this_state(function: Callable[[], None]) -> Callable[[], None]:
    """The function, to be called on another thread as if on this one."""
    context = contextvars.copy_context()
    graph = torch.is_grad_enabled()
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    stream = torch.cuda.current_stream() if on_gpu else None
    autocast = [
        (device, torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]

    def call() -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(graph))
            stack.enter_context(torch.cuda.stream(stream))
            for device, dtype in autocast:
                stack.enter_context(torch.autocast(device, dtype))
            function()

    return lambda: context.run(call)


def _random_states() -> tuple[Tensor, Tensor | None]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None


def _set_random_states(states: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])
