"""Runs the steps of the ladder (README.md in this folder) under the simulator, on a CPU.

python docs/examples/run.py 03                        # nine schedules, checked against float64
python docs/examples/run.py 03 --shape 200 136 272    # with your own M, N and K
python docs/examples/run.py all
python docs/examples/run.py counts                    # the table of README.md
python docs/examples/run.py accuracy                  # what 04 buys: positive data, K = 4096

Needs nvcc (torchext.sim.compiler says where it looks) but no GPU. The exit status is 1 after a
finding, after bits that differ from the tensor core's, and after an error beyond the bound; it is 2
if nothing could be run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchext import sim

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TILE = 128  # rows and columns of D that a CTA computes, and elements of K in a K block
RUNS = [(seed, completion) for completion in ("late", "eager", "random") for seed in range(3)]
KIB = 1024
SHAPE = (512, 512, 1024)  # M, N, K of the counts: 16 tiles of 8 K blocks
NUM_SMS = 4  # few SMs of the simulated GPU, so that a persistent CTA has several tiles


@dataclass(frozen=True)
class Step:
    """How a kernel is launched.

    Attributes:
        name: the name of its file, without .cu.
        threads, shared_bytes: threads and bytes of shared memory of a CTA.
        n_multiple: N must be a multiple of this.
        by_tma: A and B are passed as tensor maps.
        scaled: the kernel takes scales, and promotes every 128 elements of K.
        persistent: each CTA computes several tiles, and stores them by TMA.
        cluster: the number of CTAs that share rows of A.
    """

    name: str
    threads: int
    shared_bytes: int
    n_multiple: int = 2
    by_tma: bool = True
    scaled: bool = False
    persistent: bool = False
    cluster: int = 1

    @property
    def source(self) -> Path:
        return HERE / f"{self.name}.cu"


RING = 4 * 2 * 16 * KIB + KIB  # bytes of four slots of A and B, and of their mbarriers
STEPS = {
    "01": Step("01_tensor_core", 256, 2 * 16 * KIB, by_tma=False),
    "02": Step("02_tma", 256, RING),
    "03": Step("03_warp_specialization", 288, RING),
    "04": Step("04_promotion", 288, RING, scaled=True),
    "05": Step("05_persistent", 288, RING + 64 * KIB, 4, scaled=True, persistent=True),
    "06": Step("06_multicast", 288, RING + 64 * KIB, 4, scaled=True, persistent=True, cluster=2),
}


@dataclass(frozen=True)
class Problem:
    """The operands of a GEMM: a [M, K] and b [N, K] in e4m3; a_scale [ceil(K / 128), M] and
    b_scale [ceil(N / 128), ceil(K / 128)] in FP32."""

    a: torch.Tensor
    b: torch.Tensor
    a_scale: torch.Tensor
    b_scale: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.a.shape[0], self.b.shape[0], self.a.shape[1]


def tiles_of(size: int) -> int:
    return -(-size // TILE)


def problem(m: int, n: int, k: int, *, positive: bool = False, seed: int = 0) -> Problem:
    """N(0, 1) data with scales between 2^-4 and 2^4, or the magnitudes of such data, unscaled."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, k, generator=generator) for rows in (m, n))
    blocks = tiles_of(k)
    shapes = (blocks, m), (tiles_of(n), blocks)
    if positive:
        scales = [torch.ones(shape) for shape in shapes]
        a, b = a.abs(), b.abs()
    else:
        scales = [torch.exp2(8 * torch.rand(shape, generator=generator) - 4) for shape in shapes]
    e4m3 = torch.float8_e4m3fn
    return Problem(a.to(e4m3), b.to(e4m3), scales[0], scales[1])


@cache
def compile_step(step: Step, source: Path | None = None) -> sim.Module:
    """The loaded module of the step's kernel, compiled from its own file or from `source`."""
    return sim.compile_cuda(source or step.source, options=[f"-I{ROOT}"])


def launch(
    step: Step, module: sim.Module, p: Problem, *, num_sms: int = NUM_SMS, **options: Any
) -> tuple[torch.Tensor, sim.Report]:
    """(D [M, N] in FP32, report) of one launch; `options` are those of Module.launch.

    Raises ValueError unless K is a positive multiple of 16 and N a multiple of step.n_multiple.
    """
    m, n, k = p.shape
    if k == 0 or k % 16:
        raise ValueError(f"{step.name}: K must be a multiple of 16 above 0 (got {k}); pad A and B")
    if n % step.n_multiple:
        raise ValueError(
            f"{step.name}: N must be a multiple of {step.n_multiple} (got {n}); pad B and D"
        )
    d = torch.zeros(m, n)
    a, b, out = sim.read_only(p.a, "a"), sim.read_only(p.b, "b"), sim.output(d, "d")
    args: list[Any] = [a, b]
    if step.by_tma:
        args = [
            sim.tensor_map(a, box=(TILE // step.cluster, TILE), swizzle=128),
            sim.tensor_map(b, box=(TILE, TILE), swizzle=128),
        ]
    scales = [sim.read_only(p.a_scale, "a_scale"), sim.read_only(p.b_scale, "b_scale")]
    if step.persistent:
        args += [sim.tensor_map(out, box=(64, 32), swizzle=128), *scales]
    else:
        args += [*(scales if step.scaled else []), out]
    grid = (tiles_of(n), tiles_of(m))
    if step.persistent:
        units = min(tiles_of(m) * -(-tiles_of(n) // step.cluster), num_sms // step.cluster)
        grid = (units * step.cluster, 1)
    report = module.launch(
        "gemm", grid=grid, block=step.threads, smem=step.shared_bytes, num_sms=num_sms,
        args=[*args, np.int32(m), np.int32(n), np.int32(k)], **options,
    )  # fmt: skip
    return d, report


# ---- what the numbers must be ----


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of FP32 arrays, rounded once. The float64 sum is rounded to odd, then to FP32."""
    product, z = x.astype(np.float64) * y, z.astype(np.float64)  # the product is exact
    total = product + z
    back = total - product
    error = (product - (total - back)) + (z - back)  # total + error is the exact sum (Knuth)
    even = (total.view(np.uint64) & 1) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & even, np.nextafter(total, toward), total).astype(np.float32)


def expected(step: Step, p: Problem) -> np.ndarray:
    """D with the bits that Hopper's tensor cores give."""
    if not step.scaled:
        return sim.tensor_core_matmul(p.a, p.b)
    m, n, k = p.shape
    total = np.zeros((m, n), np.float32)
    for block, first in enumerate(range(0, k, TILE)):
        part = sim.tensor_core_matmul(p.a[:, first : first + TILE], p.b[:, first : first + TILE])
        columns = p.b_scale[:, block].repeat_interleave(TILE)[:n]
        scale = (p.a_scale[block][:, None] * columns).numpy()
        total = _fma(scale, part, total)
    return total


def exact_and_bound(step: Step, p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """D in float64, and the bound of docs/numerics.md on |error|: E_sum + E_tensor.

    Between promotions (if any) the tensor cores make S = K / 32 steps. Each step makes 34 errors of
    at most 2^-13 L, where L is the largest product or partial sum, including earlier errors.
    """
    m, n, k = p.shape
    a, b = p.a.double().numpy(), p.b.double().numpy()
    span = TILE if step.scaled else k
    d, sizes, bound = (np.zeros((m, n)) for _ in range(3))
    for first in range(0, k, span):
        scale = np.ones((m, n))
        if step.scaled:
            block = first // TILE
            columns = p.b_scale[:, block].repeat_interleave(TILE)[:n]
            scale = (p.a_scale[block].double()[:, None] * columns.double()).numpy()
        part, largest = np.zeros((m, n)), np.full((m, n), 2.0**-12)  # of subnormals
        end = min(first + span, k)
        for at in range(first, end, 32):
            x, y = a[:, at : min(at + 32, end)], b[:, at : min(at + 32, end)]
            part = part + x @ y.T
            products = np.abs(x)[:, None, :].max(axis=2) * np.abs(y)[None].max(axis=2)
            largest = np.maximum(largest, np.maximum(products, np.abs(part)))
        errors = -(-(end - first) // 32) * 34 * 2.0**-13
        if errors >= 1:
            raise ValueError(f"{step.name}: K must be below 7680 for a bound (got {k})")
        d += scale * part
        sizes += scale * (np.abs(a[:, first:end]) @ np.abs(b[:, first:end]).T)
        bound += scale * largest * errors / (1 - errors)
    return d, bound + (k + 4) * 2.0**-24 * sizes


# ---- what each step costs ----


def registers(step: Step) -> int:
    """Registers of each thread, as ptxas reports them for sm_90a."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(sim.compiler.find_nvcc()), "-std=c++17", "-cubin", "-arch=sm_90a", "-Xptxas=-v",
            f"-I{ROOT}", "-o", f"{folder}/gemm.cubin", str(step.source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.findall(r"Used (\d+) registers", done.stderr)[0])


def operand_bytes(step: Step, report: sim.Report) -> int:
    """Bytes of A and B that the launch read from global memory (or L2)."""
    plain, shared = 16 * KIB, 16 * KIB // step.cluster  # bytes of a box, and of a multicast box
    total = 0
    for opcode, count in report.instructions.items():
        if opcode.startswith("cp.async.bulk.tensor.2d.shared::cluster"):
            total += count * (shared if ".multicast" in opcode else plain)
        elif opcode.startswith("ld.global.v4"):
            total += count * 32 * 16
    return total


def executed(report: sim.Report, *prefixes: str) -> int:
    """Warp-instructions whose opcode starts with one of these."""
    return sum(n for opcode, n in report.instructions.items() if opcode.startswith(prefixes))


def counts(step: Step, report: sim.Report) -> dict[str, int]:
    """{heading of a column in README.md's table: its number for this launch}."""
    return {
        "warp-instructions": report.warp_instructions,
        "KiB of A and B": operand_bytes(step, report) // KIB,
        "`bar.sync`": executed(report, "bar.sync"),
        "`mbarrier.init`": executed(report, "mbarrier.init"),
        "`ld.global`": executed(report, "ld.global"),
        "`st.global`": executed(report, "st.global"),
        "TMA stores": executed(report, "cp.async.bulk.tensor.2d.global"),
    }


# ---- the command line ----


def check(step: Step, p: Problem) -> bool:
    """Runs nine schedules, prints the results, and returns whether all are right."""
    m, n, k = p.shape
    module, truth = compile_step(step), expected(step, p)
    exact, bound = exact_and_bound(step, p)
    right, faulty, worst = 0, 0, 0.0
    for seed, completion in RUNS:
        d, report = launch(step, module, p, seed=seed, completion=completion)
        right += np.array_equal(d.numpy().view(np.uint32), truth.view(np.uint32))
        worst = max(worst, float(np.max(np.abs(d.numpy() - exact) / bound)))
        if report.findings and not faulty:
            print(report, end="\n\n")
        faulty += bool(report.findings)
    print(
        f"{step.name}, {m} x {n} x {k}: {len(RUNS)} runs, {faulty} with findings, {right} with the "
        f"tensor core's bits; error against float64 at most {worst:.3f} of its bound"
    )
    return right == len(RUNS) and not faulty and worst <= 1


def print_counts() -> None:
    """Prints a table with each step's counts, from one launch with seed 0 and late completion."""
    p = problem(*SHAPE)
    for number, step in STEPS.items():
        _, report = launch(step, compile_step(step), p)
        cells = {"step": number, "registers": registers(step), **counts(step, report)}
        if number == "01":
            print("| " + " | ".join(cells) + " |")
            print("|" + " --: |" * len(cells))
        print(
            "| " + " | ".join(f"{v:,}" if isinstance(v, int) else v for v in cells.values()) + " |"
        )


def shortfall(step: Step, p: Problem) -> float:
    """Mean of (exact - D) / exact."""
    d, _ = launch(step, compile_step(step), p)
    exact = p.a.double() @ p.b.double().T
    return float(((exact - d) / exact).mean())


def print_accuracy() -> None:
    p = problem(128, 128, 4096, positive=True)
    for number in ("03", "04"):
        print(f"{STEPS[number].name:24} mean relative shortfall {shortfall(STEPS[number], p):.1e}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*STEPS, "all", "counts", "accuracy"])
    parser.add_argument(
        "--shape", type=int, nargs=3, metavar=("M", "N", "K"), default=(200, 264, 656)
    )
    options = parser.parse_args(arguments)
    if min(options.shape) < 1:
        parser.error("--shape must be three numbers above 0")
    try:
        if options.what == "counts":
            print_counts()
        elif options.what == "accuracy":
            print_accuracy()
        else:
            p = problem(*options.shape)
            steps = list(STEPS.values()) if options.what == "all" else [STEPS[options.what]]
            return int(not all([check(step, p) for step in steps]))
    except (sim.CompileError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
