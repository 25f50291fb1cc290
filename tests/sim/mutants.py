"""Faults planted in shipping kernels, and what the simulator makes of each.

A mutant is an edit of a kernel's source: the kernels themselves carry no test switches, and an edit
whose text is no longer there fails loudly. Each mutant is compiled to PTX and run through the op,
in every completion mode and under several seeds; in every run the checker must object, or the
numbers must be wrong. `python tests/sim/mutants.py` prints the table of ptx/sim/README.md.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

from torchext import ops, sim

ROOT = Path(__file__).parents[2]
RUNS = [(seed, mode) for seed in (0, 1, 2) for mode in ("eager", "late", "random")]

GEMM = "csrc/gemm/sm90/fp8_gemm_nt.cuh"
MMA = "csrc/gemm/mma/fp8_gemm_nt.cuh"
GROUPS = "csrc/quantize/cuda/groups.cu"
BLOCKS = "csrc/quantize/cuda/blocks.cu"

GEMM_SOURCE = """
#include "fp8_gemm_nt.cuh"
TORCHEXT_FP8_GEMM_NT(sm90_fp8_gemm_nt_1d2d_e4m3_e4m3_128x128x128, k1D2D, e4m3, e4m3)
"""
MMA_SOURCE = """
#include "../mma/fp8_gemm_nt.cuh"
TORCHEXT_MMA_KERNEL(mma89_fp8_gemm_nt_1d2d_e4m3_e4m3_128x128x128, Sm89, k1D2D, e4m3, e4m3, Large)
"""


@dataclass(frozen=True)
class Problem:
    """A call that a mutant must spoil: what to compile, and what to run on which SMs."""

    source: str  # text of a .cu file beside the kernel, or the path of the kernel's own
    run: Callable[[], tuple[torch.Tensor, ...]]
    num_sms: int = 2  # few, so that CTAs go round their rings and reuse their buffers
    capability: int = 90  # of the simulated GPU

    @property
    def arch(self) -> str:
        return "90a" if self.capability == 90 else str(self.capability)


def _gemm(m: int, n: int, k: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    def run() -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(m + n + k)
        rows = torch.randn(m, k, generator=generator) * torch.logspace(-2, 2, m)[:, None]
        weight = torch.randn(n, k, generator=generator)
        a, b = _plain(ops.quantize_1x128, rows), _plain(ops.quantize_128x128, weight)
        return (ops.fp8_gemm_nt(*a, *b),)

    return run


@contextmanager
def _without_simulator() -> Iterator[None]:
    sim.ops._install(None)
    try:
        yield
    finally:
        sim.ops._install(sim.ops._active[-1] if sim.ops._active else None)


def _plain(op: Callable, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with _without_simulator():
        return op(x)


def _dual() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return ops.quantize_1x128_dual(torch.randn(200, 272, generator=generator).bfloat16())


def _blocks() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(8)
    return ops.quantize_128x128_dual(torch.randn(200, 272, generator=generator).bfloat16())


PROBLEMS = {
    "by TMA": Problem(GEMM_SOURCE, _gemm(256, 256, 1024)),  # four tiles, eight K blocks
    "by threads": Problem(GEMM_SOURCE, _gemm(70, 101, 300)),  # rows of out are not 16-byte aligned
    "by cp.async": Problem(MMA_SOURCE, _gemm(256, 256, 1024), capability=89),
    "dual": Problem(GROUPS, _dual),
    "blocks": Problem(BLOCKS, _blocks),
}


@dataclass(frozen=True)
class Mutant:
    name: str
    problem: str
    file: str
    old: str
    new: str


WAIT_AND_RELEASE = """    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (float& value : block) ptx::wgmma_pin(value);
    __syncwarp();  // all lanes have read their scales
    if (at.lane == 0) ptx::mbarrier_arrive(&shared.empty[ring.slot]);
    promote<granularity>(total, block, scale, column_scale);"""
WAIT, RELEASE, PROMOTE = (
    WAIT_AND_RELEASE[: WAIT_AND_RELEASE.index("    __syncwarp")],
    WAIT_AND_RELEASE[
        WAIT_AND_RELEASE.index("    __syncwarp") : WAIT_AND_RELEASE.index("    promote")
    ],
    WAIT_AND_RELEASE[WAIT_AND_RELEASE.index("    promote") :] + "\n",
)

MUTANTS = [
    Mutant("slot released before wgmma has read it", "by TMA", GEMM,
           WAIT_AND_RELEASE, RELEASE + WAIT + PROMOTE),
    Mutant("no wgmma.fence", "by TMA", GEMM, "    ptx::wgmma_fence();\n", ""),
    Mutant("no wgmma.commit_group", "by TMA", GEMM, "    ptx::wgmma_commit_group();\n", ""),
    Mutant("no wgmma.wait_group", "by TMA", GEMM, "    ptx::wgmma_wait_group<0>();\n", ""),
    Mutant("wgmma.wait_group one group short", "by TMA", GEMM,
           "wgmma_wait_group<0>", "wgmma_wait_group<1>"),
    Mutant("accumulators read in flight", "by TMA", GEMM,
           WAIT_AND_RELEASE, PROMOTE + WAIT + RELEASE),
    Mutant("mbarriers initialised without a fence", "by TMA", GEMM,
           "    ptx::fence_mbarrier_init();\n", ""),
    Mutant("mbarriers used before the CTA has met", "by TMA", GEMM,
           "  __syncthreads();\n\n  if (warpgroup == 0)", "\n  if (warpgroup == 0)"),
    Mutant("no fence.proxy.async before the TMA store", "by TMA", GEMM,
           "    ptx::fence_proxy_async_shared();\n", ""),
    Mutant("only the storing thread fences", "by TMA", GEMM,
           "    ptx::fence_proxy_async_shared();\n",
           "    if (leader) ptx::fence_proxy_async_shared();\n"),
    Mutant("no barrier before the TMA store", "by TMA", GEMM,
           "    ptx::fence_proxy_async_shared();\n    ptx::bar_sync(barrier, 128);\n",
           "    ptx::fence_proxy_async_shared();\n"),
    Mutant("staging reused before the store has read it", "by TMA", GEMM,
           "    if (leader) ptx::cp_async_bulk_wait_group_read<0>();\n", ""),
    Mutant("exit without waiting for the last store", "by TMA", GEMM,
           "    if (at.warp == 0 && at.lane == 0) ptx::cp_async_bulk_wait_group<0>();\n", ""),
    Mutant("store never committed to a group", "by TMA", GEMM,
           "    ptx::cp_async_bulk_commit_group();\n", ""),
    Mutant("producer waits for the wrong phase", "by TMA", GEMM, "at.phase ^ 1", "at.phase"),
    Mutant("consumer waits for the wrong phase", "by TMA", GEMM,
           "&shared.full[ring.slot], ring.phase", "&shared.full[ring.slot], ring.phase ^ 1"),
    Mutant("phase not flipped when the ring wraps", "by TMA", GEMM, "      phase ^= 1;\n", ""),
    Mutant("expect_tx 16 bytes short", "by TMA", GEMM,
           "(full, S::kBytesPerStage)", "(full, S::kBytesPerStage - 16)"),
    Mutant("expect_tx 16 bytes long", "by TMA", GEMM,
           "(full, S::kBytesPerStage)", "(full, S::kBytesPerStage + 16)"),
    Mutant("one arrival too many expected", "by TMA", GEMM,
           "kConsumerWarpgroups * 4);", "kConsumerWarpgroups * 4 + 1);"),
    Mutant("one arrival too few expected", "by TMA", GEMM,
           "kConsumerWarpgroups * 4);", "kConsumerWarpgroups * 4 - 1);"),
    Mutant("one warpgroup forgets to release", "by TMA", GEMM,
           "if (at.lane == 0) ptx::mbarrier_arrive",
           "if (at.lane == 0 && at.warpgroup == 0) ptx::mbarrier_arrive"),
    Mutant("scales of all slots loaded into one", "by TMA", GEMM,
           "(shared.a_scale[at.slot], &p.a_scale", "(shared.a_scale[0], &p.a_scale"),
    Mutant("named barrier expects a warp too few", "by TMA", GEMM,
           "ptx::bar_sync(barrier, 128);\n    if (!leader)",
           "ptx::bar_sync(barrier, 96);\n    if (!leader)"),
    Mutant("wrong swizzle of the staged tile", "by TMA", GEMM,
           "(j % 8 + at.lane / 16) ^ (row % 8)", "(j % 8 + at.lane / 16) ^ (row % 4)"),
    Mutant("wrong stride in the wgmma descriptor", "by TMA", "ptx/isa/wgmma.h",
           "kStrideOffset = 1024 >> 4", "kStrideOffset = 512 >> 4"),
    Mutant("scale of the wrong row", "by TMA", GEMM,
           "scales + 8 * sizeof(float)", "scales + 4 * sizeof(float)"),
    Mutant("scale of the wrong K block of b", "by TMA", GEMM,
           "(k_block + 1) * p.b_scale_group", "k_block * p.b_scale_group"),
    Mutant("misaligned staging", "by TMA", GEMM,
           "staging + part * kColumnBytes,", "staging + part * kColumnBytes + 64,"),
    Mutant("row bound off by one", "by threads", GEMM, "if (r >= p.m) continue;",
           "if (r > p.m) continue;"),
    Mutant("column bound off by one", "by threads", GEMM,
           "if (c + 1 < p.n) out[1] = uint16_t(pair >> 16);",
           "if (c < p.n) out[1] = uint16_t(pair >> 16);"),
    Mutant("cp.async.wait_group one group short", "by cp.async", MMA,
           "cp_async_wait_group<C::kStages - 2>", "cp_async_wait_group<C::kStages - 1>"),
    Mutant("no cp.async.wait_group", "by cp.async", MMA,
           "    ptx::cp_async_wait_group<C::kStages - 2>();\n", ""),
    Mutant("first copies never committed", "by cp.async", MMA,
           "    ptx::cp_async_commit_group();\n", ""),
    Mutant("no barrier after the copies of a block", "by cp.async", MMA,
           "    __syncthreads();  // the block is there for all", "    // "),
    Mutant("slot refilled while it is read", "by cp.async", MMA,
           "slot == 0 ? C::kStages - 1 : slot - 1", "slot"),
    Mutant("tile loaded before the last one is stored", "by cp.async", MMA,
           "  __syncthreads();  // the last tile's slots have been read\n", ""),
    Mutant("product laid over operands that are still read", "by cp.async", MMA,
           "      __syncthreads();  // operands have been read: the product may take their place\n",
           ""),
    Mutant("swizzle of the copies and of ldmatrix differ", "by cp.async", MMA,
           "(threadIdx.x % 8) ^ (row % 8)", "(threadIdx.x % 8) ^ (row % 4)"),
    Mutant("no barrier between a tile's two passes", "dual", GROUPS,
           "  __syncthreads();\n", ""),
    Mutant("rows' bound off by one", "dual", GROUPS,
           "const int rows = interior ? kTile : valid_of(row, x.rows, kTile);",
           "const int rows = interior ? kTile : valid_of(row, x.rows + 1, kTile);"),
    Mutant("amax of half a group", "dual", GROUPS,
           "reduce_magnitudes<In>(largest[j], 8)", "reduce_magnitudes<In>(largest[j], 4)"),
]  # fmt: skip


def _compile(problem: Problem, edit: tuple[str, str, str] | None, folder: Path) -> Path:
    for part in ("csrc", "ptx"):
        shutil.copytree(ROOT / part, folder / part)
    if edit is not None:
        file, old, new = edit
        text = (folder / file).read_text()
        if text.count(old) < 1:
            raise ValueError(f"{file} no longer has the text of a mutant: {old!r}")
        (folder / file).write_text(text.replace(old, new, 1))
    if problem.source.endswith(".cu"):
        source = folder / problem.source
    else:
        source = folder / "csrc/gemm/sm90/mutant.cu"
        source.write_text(problem.source)
    options = [f"-I{folder}", *(f"-I{path}" for path in cpp_extension.include_paths())]
    options += ["-DTORCHEXT_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    sim.compile_cuda(source, arch=problem.arch, options=options, keep=folder / "kernel.ptx")
    return folder / "kernel.ptx"


@dataclass(frozen=True)
class Outcome:
    kinds: tuple[str, ...]  # of findings, over all runs, the most frequent first
    caught: int  # runs with a finding or with wrong numbers
    by_checker: int  # runs with a finding
    wrong: int | None  # runs with wrong numbers, of those that could be made without checks


def _bits(outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [t.contiguous().view(torch.uint8) for t in outputs]


def _run(problem: Problem, ptx: Path, seed: int, mode: str, checks: bool):
    """(outputs or None, kinds of findings)"""
    options = {"seed": seed, "completion": mode, "num_sms": problem.num_sms, "num_threads": 1}
    options["compute_capability"] = problem.capability
    with sim.simulate(ptx=[ptx], checks=checks, **options) as simulation:
        try:
            outputs = problem.run()
        except RuntimeError:
            if not simulation.reports or simulation.reports[-1].ok:
                raise  # the simulator broke: that is no way to catch a mutant
            return None, [finding.kind for finding in simulation.reports[-1].findings]
    return outputs, []


# Kinds after which a kernel may not be let run unchecked.
UNSAFE = {"out of bounds", "misaligned access", "deadlock", "read-only memory", "tensor map"}


def examine(mutant: Mutant | None, problem: Problem, truth: list[torch.Tensor] | None) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        edit = None if mutant is None else (mutant.file, mutant.old, mutant.new)
        ptx = _compile(problem, edit, Path(folder))
        kinds: dict[str, int] = {}
        by_checker = caught = wrong = 0
        for seed, mode in RUNS:
            outputs, found = _run(problem, ptx, seed, mode, checks=True)
            for kind in found:
                kinds[kind] = kinds.get(kind, 0) + 1
            by_checker += outputs is None
            caught += outputs is None or not _same(outputs, truth)
        safe = not any(kind in UNSAFE for kind in kinds)
        if safe:
            for seed, mode in RUNS:
                outputs, _ = _run(problem, ptx, seed, mode, checks=False)
                wrong += outputs is None or not _same(outputs, truth)
    order = tuple(sorted(kinds, key=lambda kind: (-kinds[kind], kind)))
    return Outcome(order, caught, by_checker, wrong if safe else None)


def _same(outputs: tuple[torch.Tensor, ...], truth: list[torch.Tensor] | None) -> bool:
    return truth is None or all(map(torch.equal, _bits(outputs), truth))


def truth_of(problem: Problem) -> list[torch.Tensor]:
    """What the shipping kernel gives."""
    with sim.simulate(num_sms=problem.num_sms, compute_capability=problem.capability):
        return _bits(problem.run())


def row(mutant: Mutant, outcome: Outcome) -> str:
    """A row of the table: | mutant | kernel | caught by | right numbers |"""
    kernel = Path(mutant.file).name if mutant.file.startswith("ptx") else Path(mutant.file).stem
    by = ", ".join(outcome.kinds) or "numbers"
    if outcome.wrong is None:
        right = "not run unchecked"
    else:
        right = f"{len(RUNS) - outcome.wrong} of {len(RUNS)}"
    return f"| {mutant.name} | {kernel} | {by} | {right} |"


if __name__ == "__main__":
    truths = {name: truth_of(problem) for name, problem in PROBLEMS.items()}
    for mutant in MUTANTS:
        problem = PROBLEMS[mutant.problem]
        print(row(mutant, examine(mutant, problem, truths[mutant.problem])), flush=True)
