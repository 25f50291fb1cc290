"""The tuner with stand-ins for cost model and GPU: what is timed, and the table that follows."""

import re
import time
from contextlib import nullcontext

import pytest
import torch

from benchmarks import tune
from benchmarks.cases import LAYERS
from benchmarks.selection import Configuration, NoSelection, Product, Selection
from benchmarks.tune import Entry

SMALL, LARGE, SPLIT = (
    Configuration("swap_16x64"),
    Configuration("256x128", 1, 2),
    Configuration("swap_16x64", 4, 4),
)
SLOW = Configuration("64x256")


class Model(NoSelection):
    """A cost model that prefers SMALL up to 64 rows, then LARGE, and finds SLOW hopeless."""

    def expected_cycles(self, product: Product) -> dict[Configuration, float]:
        small = 1.0 if product.m <= 64 else 1.5
        return {SMALL: small, LARGE: 2.5 - small, SPLIT: 1.8, SLOW: 9.0}


class Clock:
    """A timer that gives each configuration's seconds by m, and logs what was timed."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.log: list[tuple] = []

    def __call__(self, product, configurations, rounds):
        self.log.append((product.m, tuple(configurations), rounds))
        return {c: self.seconds(product.m, c) for c in configurations}


def product(m: int, n: int = 4096, k: int = 7168) -> Product:
    return Product(m, n, k, "1d2d", torch.float8_e4m3fn, torch.float8_e4m3fn, 0)


def test_the_models_choice_stands_within_two_percent():
    close = Clock(lambda m, c: 1.0 if c == LARGE else 1.019 if c == SMALL else 1.5)
    assert tune.verdict(product(8), Model(), close) is None
    better = Clock(lambda m, c: 1.0 if c == LARGE else 1.03 if c == SMALL else 1.5)
    assert tune.verdict(product(8), Model(), better) == LARGE
    (first, final) = better.log
    assert set(first[1]) == {SMALL, LARGE, SPLIT} and first[2] == tune.ROUNDS  # SLOW is not timed
    assert SMALL in final[1] and final[2] == tune.FINAL_ROUNDS


def test_neighbors_of_one_verdict_become_a_range():
    group = [
        (product(1), SPLIT), (product(8), SPLIT), (product(16), None), (product(64), SPLIT),
        (product(128), LARGE), (product(256), LARGE),
    ]  # fmt: skip
    entries = tune.merge(group)
    assert entries == [
        Entry("1d2d", 1, 8, 4096, 7168, SPLIT),
        Entry("1d2d", 17, 64, 4096, 7168, SPLIT),
        Entry("1d2d", 65, 256, 4096, 7168, LARGE),
    ]
    assert tune.merge([(product(7168), LARGE)])[0].m_low == 7168  # a wgrad has one m only


def test_the_table_is_read_back_as_written():
    entries = [
        Entry("rowwise", 1, 8, 4096, 7168, SPLIT),
        Entry("1d2d", 65, 256, 4096, 7168, LARGE),
        Entry("1d2d", 1, 8, 4096, 7168, SPLIT),
    ]
    text = tune.render(entries, ["Fake GPU; 2026-01-01"])
    lines = text.splitlines()
    assert [line for line in lines if not line.startswith("//")] == [
        'TUNED(k1D2D, 1, 8, 4096, 7168, "swap_16x64", 4, 4)',
        'TUNED(k1D2D, 65, 256, 4096, 7168, "256x128", 1, 2)',
        'TUNED(kRowwise, 1, 8, 4096, 7168, "swap_16x64", 4, 4)',
    ]
    assert "// Fake GPU; 2026-01-01" in lines
    assert tune.parse(text) == sorted(entries, key=lambda e: (*e.of, e.m_low))


def test_the_table_that_ships_follows_from_the_timings_that_it_names():
    text = tune.TABLE.read_text()
    (named,) = re.findall(r"By the timings in (\S+)\.$", text, re.M)
    entries = tune.recorded(tune.TABLE.parents[3] / named, Selection(132, tune.H200_MEMORY))
    assert tune.parse(text) == sorted(entries, key=lambda e: (*e.of, e.m_low))
    assert entries


def test_all_deepseek_shapes_are_tuned_over_m():
    groups = list(tune.products(["1d2d", "1d1d"]))
    deepseek = {(x.n, x.k) for x in LAYERS if x.model == "deepseek-v3"}
    rows = [group for group in groups if group[0].granularity == "1d2d"]
    assert {(group[0].n, group[0].k) for group in rows} == deepseek
    assert all([p.m for p in group] == sorted(tune.ROWS) for group in rows)
    wgrads = [group[0] for group in groups if group[0].granularity == "1d1d"]
    assert {(p.m, p.n) for p in wgrads} == deepseek
    assert {p.k for p in wgrads} == set(tune.TOKENS)


def test_what_is_not_measured_keeps_its_lines():
    old = [
        Entry("1d2d", 1, 8, 4096, 7168, LARGE),
        Entry("1d2d", 1, 8, 7168, 2048, LARGE),
    ]
    clock = Clock(lambda m, c: 1.0 if c == SPLIT else 2.0)
    said: list[str] = []
    groups = [[product(1), product(8)], [product(1, 7168, 2048)]]

    def run(deadline: float) -> list[Entry]:
        return tune.tune(groups, Model(), clock, old=old, deadline=deadline, say=said.append)

    assert run(time.monotonic() - 1) == old and "the time was up" in said[-1]
    new = Entry("1d2d", 1, 8, 4096, 7168, SPLIT)
    del groups[1]
    assert run(float("inf")) == [new, old[1]]


def test_a_wrong_configuration_is_named(monkeypatch: pytest.MonkeyPatch):
    selection = NoSelection()
    timer = tune.GpuTimer(selection)
    monkeypatch.setattr(selection, "forced", lambda configuration: nullcontext())

    class Problem:
        left_fp8 = right_fp8 = (torch.zeros(1), torch.zeros(1))

        def check_fp8(self, result: object) -> dict:
            raise ValueError("relative error 1")

    monkeypatch.setattr(timer, "problem", lambda product: Problem())
    monkeypatch.setattr("torchext.ops.fp8_gemm_nt", lambda *operands: None)
    with pytest.raises(tune.WrongConfigurationError, match="cluster=2: relative error"):
        timer(product(8), [LARGE], 3)


def test_without_a_hopper_gpu_it_says_so(capsys: pytest.CaptureFixture):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main([]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.tune: ")
