"""The ladder of docs/examples. Every step gives the tensor core's bits under every schedule,
without findings; faults planted in the lines that a step adds are found; the README has the counts
that the program prints."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from torchext import sim
from torchext.sim.compiler import CompileError, find_nvcc

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
_spec = importlib.util.spec_from_file_location("ladder", EXAMPLES / "run.py")
assert _spec is not None and _spec.loader is not None
ladder = sys.modules["ladder"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ladder)

SHAPES = [
    # M, N and K are ragged; six tiles of three K blocks, with an odd number of tiles along N.
    pytest.param((200, 264, 272), marks=pytest.mark.slow),
    (60, 128, 656),  # one tile; K blocks fill the ring more than once; the last K block is ragged
    (1, 4, 16),  # the smallest shape that every step accepts
]


@dataclass(frozen=True)
class Fault:
    """An edit of a step's kernel, and what every run with it must show."""

    name: str
    step: str
    old: str
    new: str
    kinds: tuple[str, ...]  # each run must have one of these; if empty, numbers must be wrong
    rare: bool = False  # only some schedules find it


MULTIPLY_THEN_RELEASE = """\
    multiply(shared->a[slot] + warpgroup * 64 * kTileK, shared->b[slot], k_block > 0, sum);
    __syncwarp();  // all lanes have waited for the product
    if (lane == 0) ptx::mbarrier_arrive(&shared->empty[slot]);
"""

FAULTS = [
    Fault("no fence between the copy and wgmma", "01",
          "    ptx::fence_proxy_async_shared();", "    ", ("missing proxy fence",)),
    Fault("tile copied over while wgmma may read it", "01",
          "    __syncthreads();  // both warpgroups have read the tiles", "    // the tiles",
          ("data race", "wgmma operand in flight")),
    Fault("chunks not swizzled", "01", "16 * (c ^ r % 8)", "16 * c", ()),
    Fault("product not waited for", "01", "  ptx::wgmma_wait_group<0>();\n", "",
          ("wgmma register in flight", "wgmma operand in flight")),
    Fault("bytes of B not expected", "02", "sizeof shared->a[slot] + sizeof shared->b[slot]",
          "sizeof shared->a[slot]", ("data race",)),
    Fault("no expect_tx", "02",
          "ptx::mbarrier_arrive_expect_tx(full, sizeof shared->a[slot] + sizeof shared->b[slot])",
          "ptx::mbarrier_arrive(full)", ("mbarrier misuse", "data race", "uninitialized memory")),
    Fault("phase that does not change", "02", "phase = k_block / kStages % 2", "phase = 0",
          ("data race", "deadlock")),
    Fault("barriers initialized without a fence", "02", "    ptx::fence_mbarrier_init();\n", "",
          ("missing mbarrier fence",)),
    Fault("slot filled before both warpgroups have read it", "02",
          "    __syncthreads();  // both warpgroups have read the slot\n", "",
          ("data race", "wgmma operand in flight")),
    Fault("empty slot not waited for", "03",
          "      ptx::mbarrier_wait(&shared->empty[slot], phase ^ 1);", "      ;",
          ("data race", "wgmma operand in flight", "deadlock")),
    Fault("phase of the empty slot inverted", "03", "phase ^ 1", "phase", ("deadlock",)),
    Fault("slot released before the product is there", "03", MULTIPLY_THEN_RELEASE,
          "".join(reversed(MULTIPLY_THEN_RELEASE.splitlines(keepends=True))),
          ("data race", "wgmma operand in flight")),
    Fault("empty slot that counts threads, where warps arrive", "03", "kConsumerWarps);\n    }",
          "32 * kConsumerWarps);\n    }", ("deadlock",)),
    Fault("block promoted while the tensor cores sum", "04", "  ptx::wgmma_wait_group<0>();\n", "",
          ("wgmma register in flight",)),
    Fault("block that goes on from the last one", "04", "b + 2 * i, i > 0)", "b + 2 * i, 1)",
          ("uninitialized register",)),
    Fault("scale of the next K block", "04", "a_scale + size_t(k_block) * m",
          "a_scale + size_t(k_block + 1) * m", ("out of bounds",)),
    Fault("no fence before the TMA store", "05", "    ptx::fence_proxy_async_shared();", "    ",
          ("missing proxy fence",)),
    Fault("boxes laid over a tile that TMA still reads", "05",
          "    if (leader) ptx::cp_async_bulk_wait_group_read<0>();\n", "",
          ("bulk store in flight",)),
    Fault("no barrier before the TMA store", "05",
          "async proxy\n    ptx::bar_sync(1 + warpgroup, 128);\n", "async proxy\n",
          ("data race", "missing proxy fence")),
    Fault("ring that starts anew with each tile", "05", "    float total[64] = {};",
          "    ring = RingPosition();\n    float total[64] = {};",
          ("deadlock", "data race", "uninitialized memory")),
    Fault("slot released to its own CTA alone", "06",
          "&shared->empty[0]), lane % kCluster)", "&shared->empty[0]), rank)",
          ("data race", "wgmma operand in flight")),
    Fault("copy into a CTA that may not be ready", "06",
          "  ptx::barrier_cluster_arrive_relaxed();  // both CTAs' barriers are initialized\n"
          "  ptx::barrier_cluster_wait();\n", "  __syncthreads();\n",
          ("mbarrier misuse", "missing mbarrier fence", "data race")),
    Fault("only half of A's bytes expected", "06", "sizeof shared->a[0] + sizeof",
          "sizeof shared->a[0] / 2 + sizeof",
          ("mbarrier misuse", "data race", "uninitialized memory", "deadlock")),
    Fault("CTA that exits before the other is done", "06",
          "  ptx::barrier_cluster_arrive_relaxed();  // the other CTA is done with this one's "
          "memory\n  ptx::barrier_cluster_wait();\n", "",
          ("exited CTA",), rare=True),
]  # fmt: skip
FAULTY_SHAPE = (130, 140, 656)  # four tiles, or two pairs, of six K blocks
NUM_SMS = 2  # one cluster, so that each CTA computes several tiles


@pytest.fixture
def nvcc():
    try:
        find_nvcc()
    except CompileError as error:
        pytest.skip(str(error))


def compile_fault(fault: Fault, folder: Path) -> sim.Module:
    step = ladder.STEPS[fault.step]
    text = step.source.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{step.source.name} must have this text once: {fault.old!r}")
    source = folder / f"{step.name}.cu"
    source.write_text(text.replace(fault.old, fault.new))
    return ladder.compile_step(step, source)


def bits(d) -> np.ndarray:
    return np.asarray(d).view(np.uint32)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("number", ladder.STEPS)
def test_every_schedule_gives_the_tensor_cores_bits(nvcc, number, shape):
    step, p = ladder.STEPS[number], ladder.problem(*shape)
    module, truth = ladder.compile_step(step), ladder.expected(step, p)
    exact, bound = ladder.exact_and_bound(step, p)
    assert (np.abs(truth - exact) <= bound).all()
    runs = [(*run, "converged") for run in ladder.RUNS] + [(0, "random", "strict")]
    for seed, completion, lane_order in runs:
        options = {"seed": seed, "completion": completion, "lane_order": lane_order}
        d, report = ladder.launch(step, module, p, num_sms=NUM_SMS, **options)
        assert not report.findings, str(report)
        assert not report.unwritten
        np.testing.assert_array_equal(bits(d), bits(truth))


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.step} {fault.name}")
def test_faults_are_found(nvcc, tmp_path, fault):
    step, p = ladder.STEPS[fault.step], ladder.problem(*FAULTY_SHAPE)
    module, truth = compile_fault(fault, tmp_path), ladder.expected(step, p)
    found = []
    for seed in range(12 if fault.rare else 3):
        for completion in ("late", "eager", "random"):
            options = {"seed": seed, "completion": completion, "num_sms": NUM_SMS}
            d, report = ladder.launch(step, module, p, num_threads=1, **options)
            if fault.kinds:
                found.append(any(finding.kind in fault.kinds for finding in report.errors))
            else:
                found.append(not np.array_equal(bits(d), bits(truth)))
    assert any(found) if fault.rare else all(found)


@pytest.mark.parametrize(
    "number, shape, message",
    [
        ("01", (128, 128, 72), "01_tensor_core: K must be a multiple of 16 above 0 (got 72)"),
        ("03", (128, 127, 64), "03_warp_specialization: N must be a multiple of 2 (got 127)"),
        ("06", (128, 126, 64), "06_multicast: N must be a multiple of 4 (got 126)"),
    ],
)
def test_the_contract_is_checked(number, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ladder.launch(ladder.STEPS[number], None, ladder.problem(*shape))


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the README's table under this heading: {first cell: other cells}."""
    text = (EXAMPLES / "README.md").read_text().partition(f"## {heading}\n")[2]
    rows = [line.strip("| ").split(" | ") for line in text.split("\n\n")[1].splitlines()]
    return {row[0]: row[1:] for row in rows if not row[0].startswith("-")}


@pytest.mark.slow
def test_the_counts_that_the_readme_shows(nvcc, capsys):
    """Counts of the source must be equal; those that depend on the compiler may differ by 10 %."""
    ladder.print_counts()
    printed = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    shown = table("Counts")
    assert list(shown) == [row[0] for row in printed if not row[0].startswith("-")]
    assert shown["step"] == printed[0][1:]
    for row in printed[2:]:
        for column, a, b in zip(printed[0][1:], shown[row[0]], row[1:], strict=True):
            rel = 0.1 if column in ("registers", "warp-instructions") else 0
            assert int(a.replace(",", "")) == pytest.approx(int(b.replace(",", "")), rel=rel), (
                column
            )


@pytest.mark.slow
def test_the_accuracy_that_the_readme_shows(nvcc, capsys):
    ladder.print_accuracy()
    assert capsys.readouterr().out in (EXAMPLES / "README.md").read_text()


def test_the_pages_name_every_step_and_its_lines():
    text = (EXAMPLES / "README.md").read_text()
    for number, step in ladder.STEPS.items():
        lines = len(step.source.read_text().splitlines())
        assert f"| [{number}]({step.name}.md) | " in text
        assert f"| [{step.name}.cu]({step.name}.cu) | {lines} | " in text
        page = (EXAMPLES / f"{step.name}.md").read_text()
        assert set(re.findall(r"\d+,\d{3}", page)) <= set(re.findall(r"\d+,\d{3}", text))
        assert f"`python docs/examples/run.py {number}`" in page and "](../../csrc/" in page


def test_the_command_line(nvcc, capsys):
    assert ladder.main(["05", "--shape", "130", "132", "144"]) == 0
    assert capsys.readouterr().out.startswith(
        "05_persistent, 130 x 132 x 144: 9 runs, 0 with findings, 9 with the tensor core's bits; "
    )
    assert ladder.main(["05", "--shape", "128", "126", "128"]) == 2
    assert "N must be a multiple of 4 (got 126)" in capsys.readouterr().err


def test_a_faulty_kernel_fails_the_command(nvcc, tmp_path, capsys, monkeypatch):
    (fault,) = [fault for fault in FAULTS if fault.name == "no fence before the TMA store"]
    module = compile_fault(fault, tmp_path)
    monkeypatch.setattr(ladder, "compile_step", lambda step: module)
    assert ladder.main(["05", "--shape", "8", "128", "128"]) == 1
    assert "missing proxy fence" in capsys.readouterr().out
