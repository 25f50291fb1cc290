"""Counts the instructions that CPU kernels execute, and checks that none got slower.

    python tools/instruction_counts.py             measures and prints
    python tools/instruction_counts.py --check     compares with tools/instruction_counts.json
    python tools/instruction_counts.py --update    writes that file

valgrind's callgrind counts. A count is of one warm call on one thread, and covers the op library
alone (torchext/_C.so): not Python, torch, or libc. So it is the same on every machine, whatever
else the machine does, and depends only on the sources and the compiler. valgrind 3.19 does not know
AVX-512, so the kernels run at the AVX2 level. Counting is on during the counted calls only, because
it slows everything else down, too. The check compares nothing, and says why, without valgrind, on
other processors than x86-64, or if another compiler than the table's made the library.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from elf import Elf  # noqa: E402

TABLE = ROOT / "tools" / "instruction_counts.json"
LIBRARY = ROOT / "torchext" / "_C.so"
TOLERANCE = 0.02
WARM_UPS = 2
SWITCH = "TORCHEXT_COUNTING_SWITCH"  # names the library made of SWITCH_SOURCE
SWITCH_SOURCE = """
#include <valgrind/callgrind.h>
void start_counting(void) { CALLGRIND_START_INSTRUMENTATION; }
void stop_counting(void) { CALLGRIND_STOP_INSTRUMENTATION; CALLGRIND_DUMP_STATS; }
"""
ENVIRONMENT = {
    "TORCHEXT_CPU": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}


def calls() -> dict[str, Callable[[], object]]:
    """Name of a count -> the call. Names have M, N and K of products, rows and columns of x."""
    import torch

    from torchext import ops

    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16()

    x, weight = random(128, 512), random(256, 512)
    factors, rstd = random(512), torch.ones(128)
    a, b = ops.quantize_1x128(x), ops.quantize_128x128(weight)
    x_t, weight_t = ops.quantize_1x128(x.t().contiguous()), ops.quantize_1x128(random(256, 128))
    few = ops.quantize_1x128(x[:2])
    small = ops.quantize_1x128(random(16, 128)), ops.quantize_128x128(random(16, 128))
    experts = ops.quantize_128x128(random(4, 128, 512))
    ends = torch.tensor([1, 50, 50, 128], dtype=torch.int32)
    return {
        "quantize_1x128 128x512": lambda: ops.quantize_1x128(x),
        "quantize_1x128_t 128x512": lambda: ops.quantize_1x128_t(x),
        "quantize_1x128_dual 128x512": lambda: ops.quantize_1x128_dual(x),
        "quantize_128x128 256x512": lambda: ops.quantize_128x128(weight),
        "quantize_128x128_dual 256x512": lambda: ops.quantize_128x128_dual(weight),
        "quantize_rowwise 128x512": lambda: ops.quantize_rowwise(x),
        "quantize_tensorwise 128x512": lambda: ops.quantize_tensorwise(x),
        "quantize_1x128_dual_bias_grad 128x512": lambda: ops.quantize_1x128_dual_bias_grad(x),
        "silu_mul_quantize_1x128_dual 128x512": lambda: ops.silu_mul_quantize_1x128_dual(x),
        "rms_norm_quantize_1x128_dual 128x512": (
            lambda: ops.rms_norm_quantize_1x128_dual(x, factors, 1e-6)
        ),
        "rms_norm_backward 128x512": lambda: ops.rms_norm_backward(x, x, factors, rstd),
        "dequantize 128x512": lambda: ops.dequantize(*a, out_dtype=torch.bfloat16),
        "fp8_gemm_nt 1D2D 128x256x512": lambda: ops.fp8_gemm_nt(*a, *b),
        "fp8_gemm_nt 1D1D 512x256x128": lambda: ops.fp8_gemm_nt(*x_t, *weight_t),
        "fp8_gemm_nt 1D2D 2x256x512": lambda: ops.fp8_gemm_nt(*few, *b),
        "fp8_gemm_nt 1D2D 16x16x128": lambda: ops.fp8_gemm_nt(*small[0], *small[1]),
        "fp8_linear 128x256x512": lambda: ops.fp8_linear(x, *b),
        "fp8_linear 2x256x512": lambda: ops.fp8_linear(x[:2], *b),
        "fp8_gemm_nt_swiglu_quantize 128x256x512": (
            lambda: ops.fp8_gemm_nt_swiglu_quantize(*a, *b)
        ),
        "m_grouped_fp8_gemm_nt_contiguous 4 groups, 128x128x512": (
            lambda: ops.m_grouped_fp8_gemm_nt_contiguous(*a, *experts, ends)
        ),
    }


def run_calls() -> None:
    """In the measured process: prints the names, then makes each call, and counts the last time.

    Whenever counting stops, callgrind writes the counts.
    """
    sys.path.insert(0, str(ROOT))
    switch = ctypes.CDLL(os.environ[SWITCH])
    every = calls()
    print(json.dumps(list(every)), flush=True)
    for call in every.values():
        for _ in range(WARM_UPS):
            call()
        switch.start_counting()
        call()
        switch.stop_counting()


def instructions(lines: Iterable[str], library: str) -> int:
    """Instructions executed in `library` (the end of its path), of a file that callgrind wrote
    without compressed strings and positions.

    A cost line is a position and a count. That after `calls=` is the callee's, which counts by
    itself.
    """
    total, inside, of_callee = 0, False, False
    for line in lines:
        if line.startswith("ob="):
            inside = line.rstrip().endswith(library)
        elif line.startswith("calls="):
            of_callee = True
        elif line[:1].isdigit():
            if inside and not of_callee:
                total += int(line.split()[1])
            of_callee = False
    return total


def make_switch(folder: Path) -> Path:
    """The library that turns counting on and off: valgrind has macros of C for that."""
    source, library = folder / "switch.c", folder / "switch.so"
    source.write_text(SWITCH_SOURCE)
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    return library


def measure() -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        done = subprocess.run(
            [
                "valgrind", "--tool=callgrind", "--instr-atstart=no",
                "--compress-strings=no", "--compress-pos=no", f"--callgrind-out-file={out}",
                sys.executable, __file__, "--run-calls",
            ],
            env={**os.environ, **ENVIRONMENT, SWITCH: str(make_switch(Path(folder)))},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"instruction_counts: valgrind failed\n{done.stdout}{done.stderr}")
        names = json.loads(done.stdout.splitlines()[0])
        parts = len(list(Path(folder).glob("out.*")))
        if parts != len(names):
            raise RuntimeError(
                f"instruction_counts: callgrind must write {len(names)} parts (got {parts})"
            )
        counts = {}
        for i, name in enumerate(names, 1):
            with Path(f"{out}.{i}").open() as part:
                counts[name] = instructions(part, "torchext/_C.so")
        return counts


def compiler(library: Path = LIBRARY) -> str:
    """The compiler that made the op library, from the ELF section `.comment`."""
    comments = Elf(library.read_bytes()).by_name[".comment"].data.split(b"\0")
    return comments[0].decode()


def reason_to_skip(table: dict) -> str | None:
    if platform.machine() != "x86_64":
        return f"the counts are of x86-64 (this is {platform.machine()})"
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (Debian and Ubuntu: apt-get install valgrind)"
    if compiler() != table["compiler"]:
        return f"the table is of {table['compiler']} (this build is of {compiler()})"
    return None


def compare(old: dict[str, int], new: dict[str, int]) -> tuple[list[str], list[str]]:
    """(what fails, what improved), a line for each count."""
    failures, improved = [], []
    for name in old.keys() | new.keys():
        if name not in old or name not in new:
            where = "the table" if name not in old else "the measurement"
            failures.append(f"{name}: not in {where}")
            continue
        change = new[name] / old[name] - 1
        line = f"{name}: {old[name]:,} -> {new[name]:,} ({change:+.1%})"
        if change > TOLERANCE:
            failures.append(line)
        elif change < -TOLERANCE:
            improved.append(line)
    return sorted(failures), sorted(improved)


def check() -> int:
    """Exit status: 0 unless a count grew by more than TOLERANCE."""
    table = json.loads(TABLE.read_text())
    if reason := reason_to_skip(table):
        print(f"instruction counts: SKIPPED: {reason}")
        return 0
    failures, improved = compare(table["counts"], measure())
    advice = "python tools/instruction_counts.py --update; commit it with the change"
    for line in improved:
        print(f"fewer instructions: {line}")
    if improved and not failures:
        print(f"instruction counts: better than the table; keep it: {advice}")
    for line in failures:
        print(f"FAILED: {line}", file=sys.stderr)
    if failures:
        print(
            f"more than {TOLERANCE:.0%} above the table. If it must be: {advice}", file=sys.stderr
        )
        return 1
    print(f"instruction counts: {len(table['counts'])} within {TOLERANCE:.0%}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true")
    mode.add_argument("--update", action="store_true")
    mode.add_argument("--run-calls", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run_calls:
        run_calls()
        return 0
    if options.check:
        return check()
    counts = measure()
    if options.update:
        TABLE.write_text(json.dumps({"compiler": compiler(), "counts": counts}, indent=1) + "\n")
    for name, count in counts.items():
        print(f"{count:12,}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
