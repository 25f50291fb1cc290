"""The soak finds planted faults, repeats a round exactly, and finds no fault in the kernels here.

Stand-ins for CUDA's streams and graphs show what is launched and what is compared.
"""

import random
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import torchext
from benchmarks.selection import Configuration, NoSelection, Product, Selection
from tests.hardware.soak import __main__ as command_line
from tests.hardware.soak import jobs, runner
from tests.hardware.soak.jobs import Job
from tests.hardware.soak.operands import Guarded, Lab, differing
from tests.hardware.soak.runner import Soak

SIM_SECONDS = 20.0


def soak(lab: Lab, seconds: float, draw=jobs.draw, seed: int = 7) -> Soak:
    found = Soak(lab, seed, draw)
    found.run(time.monotonic() + seconds, lambda soak, rounds: None)
    return found


@pytest.mark.slow
def test_no_fault_under_the_simulator():
    available, reason = torchext.is_available("sim")
    if not available:
        pytest.skip(reason)
    found = soak(command_line.without(command_line.laboratory("sim")), SIM_SECONDS)
    assert found.faults == []
    assert found.launches > 3


def test_no_fault_on_the_cpu_and_the_command_line_says_so(capsys):
    assert command_line.main(["--device", "cpu", "--minutes", "0.03", "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert "soak on cpu, seed 3: " in text and " 0 faults" in text


def test_the_watchdog_ends_what_hangs_and_nothing_after_it(monkeypatch):
    ended: list[int] = []
    monkeypatch.setattr(command_line.os, "_exit", ended.append)
    with command_line.Watchdog(0.05, "repeat"):
        pass
    time.sleep(0.3)
    assert ended == []
    with command_line.Watchdog(0.05, "repeat"):
        time.sleep(0.3)
    assert ended == [command_line.HUNG]


@pytest.mark.slow
def test_every_kind_of_job_is_drawn_and_right():
    lab = Lab("cpu", NoSelection())
    kinds = {}
    for i in range(300):
        job = jobs.draw(lab, random.Random(i))
        kind = job.name.split()[0]
        if kind not in kinds:
            kinds[kind] = job
            got = job.call()
            job.bound(got)
            if job.expect:
                assert differing(got, job.expect()) is None, job.name
    assert set(kinds) == set(torchext.ops.OPS)


def planted(change) -> Soak:
    def draw(lab: Lab, rng: random.Random) -> Job:
        job = jobs.quantizer(lab, rng)
        change(job)
        return job

    return soak(Lab("cpu", NoSelection()), 0.0, draw)


def flip(outputs: tuple) -> tuple:
    wrong = outputs[0].clone()
    wrong.view(torch.uint8)[-1, -1] ^= 1
    return (wrong, *outputs[1:])


def test_a_wrong_reference_is_found():
    def change(job: Job) -> None:
        right = job.expect
        assert right is not None
        job.expect = lambda: flip(right())

    found = planted(change)
    assert [fault.how for fault in found.faults] == ["alone", "again"]
    assert "output 0: 1 of " in found.faults[0].what


def test_a_result_that_changes_is_found_where_no_bits_are_promised():
    def change(job: Job) -> None:
        right, calls = job.call, []

        def call():
            calls.append(0)
            return flip(right()) if len(calls) > 1 else right()

        job.expect = None
        job.call = call

    (fault,) = planted(change).faults
    assert fault.how == "again" and "elements differ" in fault.what


def test_an_op_that_raises_and_one_out_of_bounds_are_faults():
    def raise_error(job: Job) -> None:
        def call():
            raise ZeroDivisionError("division by zero")

        job.call = call

    def too_far(job: Job) -> None:
        job.bound = lambda outputs: jobs.near(torch.ones(2, 2), torch.zeros(2, 2))

    (fault,) = planted(raise_error).faults
    assert fault.what == "ZeroDivisionError: division by zero"
    (fault,) = planted(too_far).faults
    assert "relative error" in fault.what


def test_a_store_between_the_rows_of_an_output_is_found():
    guarded = Guarded(Lab("cpu", NoSelection()), random.Random(0), (5, 7), torch.bfloat16)
    values = torch.randn(5, 7).bfloat16()
    out, memory = guarded.fresh()
    out.copy_(values)
    assert differing((memory,), (guarded.filled(values),)) is None
    memory[-3] ^= 1
    assert "elements differ" in str(differing((memory,), (guarded.filled(values),)))


def test_a_fault_is_printed_with_what_repeats_it(monkeypatch, capsys):
    def draw(lab: Lab, rng: random.Random) -> Job:
        job = jobs.draw(lab, rng)
        call = job.call
        if rng.random() < 0.5:
            job.call = lambda: flip(call())
        return job

    monkeypatch.setattr(runner.Soak, "__init__", _with_draw(draw))
    arguments = ["--device", "cpu", "--seed", "11"]
    assert command_line.main([*arguments, "--minutes", "1"]) == 1
    text = capsys.readouterr().out
    line = next(x for x in text.splitlines() if x.startswith("FAULT"))
    number = line.split()[2].rstrip(",")
    assert f"--device cpu --seed 11 --round {number}" in text
    assert command_line.main([*arguments, "--round", number]) == 1
    assert line in capsys.readouterr().out


def _with_draw(draw):
    original = Soak.__init__

    def init(self, lab, seed):
        original(self, lab, seed, draw)

    return init


@pytest.fixture
def selection(monkeypatch: pytest.MonkeyPatch) -> Selection:
    """A stand-in for torchext.gemm_selection with few configurations; logs what is forced."""
    log: list[tuple] = []

    @contextmanager
    def forced(name, *, split_k, cluster):
        log.append((name, split_k, cluster))
        yield

    candidates = [
        SimpleNamespace(name=name, split_k=split_k, cluster=cluster, cycles=1.0)
        for name, split_k, cluster in (
            ("swap_16x64", 4, 4), ("256x128", 1, 2), ("128x128", 1, 1), ("swap_32x64", 4, 4),
            ("swap_16x64", 1, 1),
        )
    ]  # fmt: skip
    module = SimpleNamespace(
        explain_gemm=lambda m, n, k, **options: SimpleNamespace(
            candidates=candidates, chosen=candidates[3]
        ),
        forced=forced,
        log=log,
    )
    monkeypatch.setattr(torchext, "gemm_selection", module)
    return Selection(132)


def test_a_configuration_is_compared_with_the_plainest_that_splits_k_alike(selection):
    product = Product(64, 128, 512, "1d2d")
    seen = {selection.draw(product, random.Random(i)) for i in range(200)}
    plain, split = Configuration("128x128"), Configuration("swap_16x64", 4, 4)
    assert seen == {
        (None, split),  # the library's own choice, which splits K in four
        (plain, plain),
        (Configuration("256x128", 1, 2), plain),
        (Configuration("swap_16x64"), plain),
        (split, split),
        (Configuration("swap_32x64", 4, 4), split),
    }


@pytest.mark.parametrize("maker", [jobs.dense, jobs.contiguous, jobs.masked, jobs.k_grouped])
def test_configurations_are_forced_in_the_call_and_in_its_expectation(selection, maker):
    log: Any = vars(torchext.gemm_selection)["log"]
    lab = Lab("cpu", selection)
    lab = type("Exact", (Lab,), {"exact": True})(lab.device, selection)
    for seed in range(9):
        log.clear()
        job = maker(lab, random.Random(seed))
        job.call()
        if not log:
            assert "[None against swap_16x64 split_k=4 cluster=4]" in job.name
        else:
            assert f"[{Configuration(*log[0])} against " in job.name
        called = len(log)
        job.expect()
        assert all(f" against {Configuration(*entry)}]" in job.name for entry in log[called:])


class Graph:
    """A stand-in for a CUDA graph, which replays by calling again into the same outputs."""

    active: "Graph | None" = None

    def __init__(self):
        self.calls: list = []

    def replay(self):
        for call, outputs in self.calls:
            for old, new in zip(outputs, call(), strict=True):
                old.copy_(new)


@pytest.fixture
def fake_cuda(monkeypatch):
    class Stream:
        def wait_stream(self, other):
            assert isinstance(other, Stream)

    @contextmanager
    def stream(which):
        yield

    @contextmanager
    def graph(which):
        Graph.active = which
        yield
        Graph.active = None

    for name, value in {
        "Stream": Stream, "stream": stream, "graph": graph, "CUDAGraph": Graph,
        "current_stream": Stream, "synchronize": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Lab, "torch_device", "cpu")
    monkeypatch.setattr(Lab, "largest", (60, 60, 150))
    monkeypatch.setattr(Lab, "exact", False)  # the kernels are the CPU's


def capturing(job: Job, after: int = 1 << 30) -> Job:
    """`job`, which takes part in fake graphs and gives a wrong result after `after` calls."""
    call, count = job.call, [0]

    def counted() -> tuple:
        count[0] += 1
        return flip(call()) if count[0] > after else call()

    def captured() -> tuple:
        outputs = counted()
        if Graph.active:
            Graph.active.calls.append((counted, outputs))
        return outputs

    job.call = captured
    return job


def test_rehearsal_of_streams_and_graphs(fake_cuda):
    found = Soak(Lab("cuda", NoSelection()), 5, lambda lab, rng: capturing(jobs.draw(lab, rng)))
    for number in range(3):
        found.round(number)
    assert found.faults == []
    assert found.launches > 3 * 2 * (1 + 1 + 2)  # alone, on streams, replayed


def test_a_replay_that_goes_wrong_is_found(fake_cuda):
    def draw(lab: Lab, rng: random.Random) -> Job:
        return capturing(jobs.quantizer(lab, rng), after=6)  # alone 1, streams up to 4, capture 1

    found = Soak(Lab("cuda", NoSelection()), 5, draw)
    found.round(0)
    assert found.faults and {fault.how for fault in found.faults} <= {
        "in a graph",
        "beside a graph",
    }
