"""One micro-batch's forward beside another's backward, on two gloo ranks that are started once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchext
from support.ranks import Meshes, run_checks
from torchext.moe import (
    Dispatcher,
    MissingRanksError,
    overlap,
    overlap_forward_backward,
    overlap_in_schedule,
    transport,
)
from torchext.ops import experts_rows

pytestmark = pytest.mark.slow  # starts processes, each of which loads torch

WIDTH, EXPERTS, TOKENS = 128, 4, 24


class Block(nn.Module):
    def __init__(self, dispatcher: Dispatcher, dropout: float = 0.0) -> None:
        super().__init__()
        self.router, self.dropout = nn.Linear(WIDTH, EXPERTS), nn.Dropout(dropout)
        self.experts = torchext.nn.MoE(WIDTH, WIDTH, EXPERTS, dispatcher=dispatcher)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        return x + self.dropout(self.experts(self.dropout(x), ids, weights))


class Model(nn.Module):
    """Two layers of experts, of which checkpointing recomputes the second."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())
        self.first, self.second = (Block(dispatcher, dropout=0.1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(x), use_reentrant=False)  # type: ignore[no-any-return]


def batch(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
    return torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)


def one_after_another(forward: Callable[[], Any], backward: Callable[[], Any]) -> Any:
    return forward(), backward()


def results(run: Any, model: nn.Module) -> list[Any]:
    """Three micro-batches, the backward of each with the next one's forward."""
    torch.manual_seed(5)
    x = [batch(number) for number in range(3)]
    found = [model(x[0])]
    for number in (1, 2):
        y, returned = run(
            lambda number=number: model(x[number]),
            lambda number=number: found[number - 1].square().mean().backward() or number,
        )
        assert returned == number
        found.append(y)
    gradients = [t.grad for t in (*x[:2], *model.parameters())]
    return [*found, *gradients, torch.get_rng_state()]


def check_same_bits(meshes: Meshes) -> None:
    model = Model(Dispatcher(EXPERTS))
    expected = results(one_after_another, copy.deepcopy(model))
    for a, b in zip(results(overlap_forward_backward, model), expected, strict=True):
        assert a is not None and torch.equal(a, b)


def check_delayed_weight_gradients(meshes: Meshes) -> None:
    model = Model(Dispatcher(EXPERTS))
    expected = results(one_after_another, copy.deepcopy(model))
    with torchext.delay_weight_gradients() as queue:
        found = results(overlap_forward_backward, model)
        queue.run()
    for a, b in zip(found[:5], expected[:5], strict=True):
        assert torch.equal(a, b)
    for p, grad in zip(model.parameters(), expected[5:-1], strict=True):
        assert p.grad is not None and torch.equal(p.grad, grad)


class Log:
    """What happens, in order: (half, event), while it patches what is called."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self._main = threading.get_ident()

    def add(self, event: str) -> None:
        half = "forward" if threading.get_ident() == self._main else "backward"
        self.events.append((half, event))

    def around(self, function: Any, name: str) -> Any:
        def called(*args: Any, **options: Any) -> Any:
            self.add(f"{name} begins")
            result = function(*args, **options)
            self.add(f"{name} ends")
            return result

        return called

    def begins(self, function: Any) -> Any:
        def called(*args: Any) -> Any:
            self.add(f"{args[-1]} begins")
            return function(*args)

        return called

    def waits(self, function: Any) -> Any:
        def called(wait: Any) -> Any:
            function(wait)
            self.add(f"{wait._purpose} ends")

        return called


def check_bytes_travel_while_experts_multiply(meshes: Meshes) -> None:
    model = Block(Dispatcher(EXPERTS))
    before = model(batch(0)).square().mean()
    log = Log()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_rows, "forward", log.around(experts_rows.forward, "experts"))
        patch.setattr(experts_rows, "backward", log.around(experts_rows.backward, "experts"))
        patch.setattr(transport.Transport, "_start", log.begins(transport.Transport._start))
        patch.setattr(transport._Wait, "wait", log.waits(transport._Wait.wait))
        overlap_forward_backward(lambda: model(batch(1)), before.backward)
    dispatch, back = "the dispatch of tokens", "the return of rows"
    at = {event: log.events.index(event) for event in log.events}
    assert len(at) == len(log.events), log.events
    for half, purpose, other in (
        ("backward", dispatch, "forward"),
        ("forward", back, "backward"),
    ):
        # Bytes of one are under way before the experts of the other begin, and until they end.
        assert at[half, f"{purpose} begins"] < at[other, "experts begins"]
        assert at[other, "experts ends"] < at[half, f"{purpose} ends"]
    orders: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(orders, log.events)
    assert orders[0] == orders[1]


def backward_runs() -> bool:
    return any(thread.name == overlap._NAME for thread in threading.enumerate())


def check_errors_of_either_half(meshes: Meshes) -> None:
    model = Model(Dispatcher(EXPERTS))
    seen: list[RuntimeError] = []

    def fails(step: str) -> Any:
        raise KeyError(step)

    def forward() -> Tensor:
        y: Tensor = model(batch(1))
        return fails("after forward") if "forward" in failing else y

    def backward() -> None:
        try:
            loss.backward()
        except RuntimeError as error:
            seen.append(error)
            raise
        if "backward" in failing:
            fails("after backward")

    for failing in (["forward"], ["backward"], []):
        loss = model(batch(0)).square().mean()
        try:
            overlap_forward_backward(forward, backward)
            assert not failing
        except KeyError as error:
            assert error.args == (f"after {failing[0]}",)
    # Forward, which ends first, has ended backward at its next wait.
    assert [type(error) for error in seen] == [overlap.OtherHalfError]
    loss = model(batch(0)).square().mean()
    with pytest.raises(ZeroDivisionError):
        overlap_forward_backward(lambda: 1 // 0, loss.backward)
    with pytest.raises(ZeroDivisionError):
        overlap_forward_backward(lambda: model(batch(1)), lambda: 1 // 0)
    assert not overlap._running and not backward_runs()


def check_one_call_at_a_time(meshes: Meshes) -> None:
    def within() -> None:
        overlap_forward_backward(lambda: None, lambda: None)

    with pytest.raises(RuntimeError, match="must not run at the same time"):
        overlap_forward_backward(within, lambda: None)
    within()


def check_backward_sees_the_state_of_the_caller(meshes: Meshes) -> None:
    def state() -> Any:
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert overlap_forward_backward(state, state) == ((False, True),) * 2
    assert overlap_forward_backward(state, state) == ((True, False),) * 2


def check_a_schedule_of_torch(meshes: Meshes) -> None:
    from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV

    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    calls, found = [], []
    give = overlap._Turns.give

    def counted(turns: Any) -> None:
        calls.append(turns)
        give(turns)

    for overlapped in (False, True):
        model = Model(Dispatcher(EXPERTS))
        stages: list[Any] = [
            PipelineStage(block, stage, 2, torch.device("cpu"), group=alone)
            for stage, block in enumerate((model.first, model.second))
        ]
        schedule = ScheduleDualPipeV(stages, 2, lambda y, target: (y - target).square().mean())
        if overlapped:
            overlap_in_schedule(schedule)
        losses: list[Tensor] = []
        torch.manual_seed(1)
        x = torch.cat([batch(0), batch(1)]).detach()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(overlap._Turns, "give", counted)
            y = schedule.step(x, target=torch.zeros_like(x), losses=losses)
        assert bool(calls) == overlapped
        found.append([y, *losses, *(p.grad for p in model.parameters())])
    assert len({id(turns) for turns in calls}) == 1  # of one action
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def check_a_late_rank_is_an_error(meshes: Meshes) -> None:
    """The last check: the group of the dispatcher is of no use afterwards."""
    transport._SECONDS_TO_REPORT = 0.5
    model = Model(Dispatcher(EXPERTS, timeout=3))  # its group must connect, too
    loss = model(batch(0)).square().mean()
    dist.barrier()
    if dist.get_rank() == 0:
        with pytest.raises(MissingRanksError, match=r"missing: 1\)"):
            overlap_forward_backward(lambda: model(batch(1)), loss.backward)
        assert not backward_runs()
    dist.barrier()


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    names = [name for name in CHECKS if name != "check_a_late_rank_is_an_error"]
    folder: Path = tmp_path_factory.mktemp("overlap")
    return run_checks(__file__, [*names, "check_a_late_rank_is_an_error"], 2, folder)


@pytest.mark.parametrize("name", CHECKS)
def test_overlap(found: dict[str, str | None], name: str) -> None:
    assert found[name] is None, found[name]


def test_a_torch_that_performs_actions_otherwise_is_an_error() -> None:
    from torchext.moe import schedule

    with pytest.raises(RuntimeError, match="must perform actions by a function _perform_action"):
        schedule._perform_action()
    with pytest.raises(TypeError, match="schedule must have actions"):
        overlap_in_schedule(object())
