"""Measures the simulator's speed in warp-instructions per second, on one core and on all cores.

    python tools/measure_simulator_speed.py

Simulates ops of torchext at the sizes that CI simulates, with all checks and completion="random".
The time is the best of three launches, without the parsing of PTX, which happens once for each
kernel and process.
"""

import os
import platform
from collections.abc import Callable

import torch

import torchext
from torchext import sim


def cases() -> dict[str, Callable[[], object]]:
    """The ops to measure, by their names in the table."""
    torch.manual_seed(0)
    x = torch.randn(256, 1024).bfloat16()
    a = torchext.ops.quantize_1x128(torch.randn(256, 512).bfloat16())
    b = torchext.ops.quantize_128x128(torch.randn(256, 512).bfloat16())
    w = torchext.ops.quantize_1x128(torch.randn(256, 512).bfloat16())
    return {
        "quantize_1x128, 256 x 1024": lambda: torchext.ops.quantize_1x128(x),
        "quantize_128x128, 256 x 1024": lambda: torchext.ops.quantize_128x128(x),
        "fp8_gemm_nt 1D2D, 256 x 256 x 512": lambda: torchext.ops.fp8_gemm_nt(*a, *b),
        "fp8_gemm_nt 1D1D, 256 x 256 x 512": lambda: torchext.ops.fp8_gemm_nt(*a, *w),
    }


def best(run: Callable[[], object], threads: int) -> tuple[int, float]:
    """(warp-instructions, seconds) of the fastest of three runs, over all kernels of the op."""
    outcomes = []
    for _ in range(3):
        with sim.simulate(completion="random", num_threads=threads) as simulation:
            run()
            run()  # only this one counts; the first parsed the PTX
        reports = simulation.reports
        reports = reports[len(reports) // 2 :]
        outcomes.append(
            (sum(r.seconds for r in reports), sum(r.warp_instructions for r in reports))
        )
    seconds, instructions = min(outcomes)
    return instructions, seconds


def main() -> None:
    cores = os.cpu_count() or 1
    print(
        f"{platform.processor() or platform.machine()}, {cores} cores, torch {torch.__version__}\n"
    )
    print(f"| op | warp-instructions | 1 core | per second | {cores} cores | per second |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, run in cases().items():
        row = f"| {name} "
        for threads in (1, cores):
            instructions, seconds = best(run, threads)
            row += f"| {instructions:,} " if threads == 1 else ""
            row += f"| {seconds:.3f} s | {instructions / seconds / 1e3:,.0f} k "
        print(row + "|")


if __name__ == "__main__":
    main()
