"""Ranks of a node that send messages into each other's windows, run as several simulated GPUs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from torchext import sim
from torchext.sim.compiler import CompileError, find_nvcc

ROOT = Path(__file__).parents[2]
MOST_RANKS, WARPS, STAGES = 8, 4, 2
PITCH, CAPACITY, CTAS = 48, 12, 2
RUNS = [(mode, seed) for mode in ("eager", "late", "random") for seed in range(3)]


@pytest.fixture(scope="module")
def ptx(tmp_path_factory) -> str:
    try:
        find_nvcc()
    except CompileError:
        pytest.skip("there is no nvcc to compile with")
    path = tmp_path_factory.mktemp("symmetric") / "symmetric_dispatch.ptx"
    source = Path(__file__).with_name("symmetric_dispatch.cu")
    sim.compile_cuda(source, options=["-I", str(ROOT)], keep=path)
    return path.read_text()


class Ranks:
    """The messages of each epoch: which rank sends which to whom, and those that should arrive."""

    def __init__(self, tokens: tuple[int, ...], epochs: int) -> None:
        generator = np.random.default_rng(3)
        self.tokens, self.epochs, ranks = tokens, epochs, len(tokens)
        self.messages = [
            generator.integers(0, 256, (epochs, n, PITCH), dtype=np.uint8) for n in tokens
        ]
        goes = [generator.random((n, ranks)) < 0.6 for n in tokens]
        self.rows = [np.where(g, np.cumsum(g, 0) - 1, -1).astype(np.int32) for g in goes]
        self.send_counts = [g.sum(0).astype(np.int32) for g in goes]
        self.want = [
            [np.concatenate([self.messages[s][e][goes[s][:, d]] for s in range(ranks)])
             for e in range(epochs)]
            for d in range(ranks)
        ]  # fmt: skip

    def run(self, module: sim.Module, alive: int | None = None, timeout: int = 1 << 40, **options):
        """Launches the ranks below `alive`. Returns the report, and what came to each rank."""
        ranks = len(self.tokens)
        shapes = {
            "slots": ((2, ranks, CAPACITY, PITCH), np.uint8, "write"),
            "counts": ((2, ranks), np.uint32, "write"),
            "arrived": ((ranks,), np.uint32, "read_write"),
            "freed": ((ranks,), np.uint32, "read_write"),
        }
        windows = [
            sim.struct(*[
                sim.window(np.zeros(shape, dtype), d, access, f"{name} of rank {d}")
                for name, (shape, dtype, access) in shapes.items()
            ])
            for d in range(ranks)
        ]  # fmt: skip
        windows += [sim.struct(*[np.uint64(0)] * len(shapes))] * (MOST_RANKS - ranks)
        outs = [np.zeros((self.epochs, ranks * CAPACITY, PITCH), np.uint8) for _ in range(ranks)]
        counts = [np.zeros((self.epochs, ranks), np.int32) for _ in range(ranks)]
        missing = [np.zeros(1, np.uint32) for _ in range(ranks)]
        launches = []
        for r in range(ranks if alive is None else alive):
            arguments = sim.struct(
                *windows, *np.array([r, ranks, CAPACITY, PITCH], np.int32), np.uint32(0),
                sim.read_only(self.messages[r]), sim.read_only(self.rows[r]),
                sim.read_only(self.send_counts[r]), np.int64(self.tokens[r]), sim.output(outs[r]),
                sim.output(counts[r]), missing[r], np.uint64(timeout),
            )  # fmt: skip
            launches.append(sim.Launch(
                module, "epochs", grid=CTAS, block=32 * WARPS, smem=WARPS * STAGES * PITCH,
                args=[arguments, self.epochs], device=r,
            ))  # fmt: skip
        report = sim.launch_group(launches, max_instructions=20_000_000, **options)
        return report, outs, counts, [int(m[0]) for m in missing]

    def check(self, outs, counts) -> None:
        for d, want in enumerate(self.want):
            for e in range(self.epochs):
                assert counts[d][e].tolist() == [int(c[d]) for c in self.send_counts]
                np.testing.assert_array_equal(outs[d][e][: len(want[e])], want[e])


@pytest.mark.parametrize("tokens", [(9, 12), (7, 0, 10, 3)])
def test_every_message_arrives_in_the_order_of_sources(ptx, tokens):
    """Four epochs, so that both halves of the windows are used twice; a rank may have no tokens."""
    module, ranks = sim.Module(ptx), Ranks(tokens, epochs=4)
    for completion, seed in RUNS:
        report, outs, counts, missing = ranks.run(module, completion=completion, seed=seed)
        assert not report.findings, f"{completion}, seed {seed}: {report}"
        assert missing == [0] * len(tokens)
        ranks.check(outs, counts)


def test_a_rank_that_does_not_come_is_named(ptx):
    """The others end by themselves, with no store left under way."""
    report, _, _, missing = Ranks((5, 5, 5), epochs=1).run(
        sim.Module(ptx), alive=2, timeout=200_000
    )  # fmt: skip
    assert report.ok, str(report)
    assert missing == [1 << 2, 1 << 2, 0]


FAULTS = {
    "released at .gpu": ("red.release.sys", "red.release.gpu", "data race"),
    "not acquired": ("ld.acquire.sys", "ld.relaxed.sys", "data race"),
    "stores of which only the source is awaited": (
        "cp.async.bulk.wait_group 0;", "cp.async.bulk.wait_group.read 0;", "data race"),
    "loads that may be stale": ("\tld.v4.u32", "\tld.global.nc.v4.u32", "non-coherent load"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_in_every_run(ptx, fault):
    old, new, kind = FAULTS[fault]
    assert old in ptx
    module, ranks = sim.Module(ptx.replace(old, new)), Ranks((9, 12), epochs=3)
    for completion, seed in RUNS:
        report, *_ = ranks.run(module, completion=completion, seed=seed)
        assert kind in {f.kind for f in report.errors}, f"{completion}, seed {seed}: {report}"
