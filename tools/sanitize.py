"""Builds the CPU kernels and the simulator with GCC's sanitizers, and tests them.

    python tools/sanitize.py address|thread [arguments of pytest]

`address` is ASan and UBSan: a finding ends the process that made it. `thread` is TSan, for what the
simulator's host threads share: findings are printed, and the run fails at its end. It builds the
simulator only, and takes the op library, which these tests do not call, from the working tree. Each
build has a folder of its own (build/address, build/thread), without CUDA, that later runs bring up
to date.
Python and torch are not instrumented, so leaks are not looked for.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc" / "build"))

from toolchain import find_toolkit  # noqa: E402


@dataclass(frozen=True)
class Sanitizer:
    """What differs between the sanitizers.

    Attributes:
        libraries: to load before Python, which is not linked with them.
        options: environment variables.
        tests: the arguments of pytest that run by default.
    """

    libraries: tuple[str, ...]
    options: dict[str, str]
    tests: tuple[str, ...]


SANITIZERS = {
    "address": Sanitizer(
        ("libasan.so", "libubsan.so", "libstdc++.so.6"),  # ASan wraps libstdc++'s throw
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"},
        (
            *("-n", str(os.cpu_count()), "--dist", "worksteal"),
            *("-m", "not slow and not alone", "tests/sim"),
            *("tests/activation", "tests/gemm", "tests/norm", "tests/quantize"),
            "--ignore=tests/sim/test_host_threads.py",  # kernels that poll take minutes
            # C++ programs of their own, which this build does not instrument.
            *("--ignore=tests/sim/test_checker.py", "--ignore=tests/quantize/test_cuda_numbers.py"),
            # It measures time, which an instrumented simulator takes more of.
            "--deselect=tests/sim/test_tensor_core.py::test_a_gemm_takes_a_fraction_of_its_budget",
            # They need torchext's CUDA kernels.
            "--ignore=tests/gemm/test_selection.py",
            "--deselect=tests/sim/test_targets.py::test_ops_run_on_the_simulated_gpu",
            # It preloads a library of its own into another process, ahead of ASan's.
            "--deselect=tests/gemm/test_fp8_gemm.py"
            "::test_products_that_round_their_operands_are_noticed_and_avoided",
        ),
    ),
    "thread": Sanitizer(
        ("libtsan.so",),
        {"TSAN_OPTIONS": "exitcode=66"},
        # pytest-xdist would hide the exit code. Each test has host threads of its own.
        ("tests/sim/test_threads.py",),
    ),
}


def build(name: str) -> Path:
    """The folder to import this build's torchext from."""
    base = ROOT / "build" / name
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", f"--build-base={base}"],
        cwd=ROOT,
        env={**os.environ, "TORCHEXT_SANITIZE": name, "TORCHEXT_WERROR": "1"},
        check=True,
    )
    (package,) = base.glob("lib*/torchext")
    if name == "thread":
        shutil.copy2(ROOT / "torchext" / "_C.so", package)
    return package.parent


def path_of(library: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def shield_nvcc(folder: Path) -> dict[str, str]:
    """Environment variables with which tests find an nvcc that runs without LD_PRELOAD.

    With it, nvcc crashes.
    """
    toolkit = find_toolkit()
    if toolkit is None:
        return {}
    nvcc = folder / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(f'#!/bin/sh\nexec env -u LD_PRELOAD {shlex.quote(str(toolkit.nvcc))} "$@"\n')
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(nvcc.parents[1])}


def test(sanitizer: Sanitizer, folder: Path, arguments: list[str]) -> int:
    """Runs pytest with `folder` first on Python's path, before the torchext of the working tree."""
    # Without --capture=sys, pytest keeps the sanitizer's reports to itself.
    command = [sys.executable, "-m", "pytest", "--capture=sys"]
    return subprocess.run(
        [*command, "-o", f"pythonpath={folder} . tests", *(arguments or sanitizer.tests)],
        cwd=ROOT,
        env={
            **os.environ,
            **sanitizer.options,
            **shield_nvcc(folder),
            "OMP_NUM_THREADS": "1",
            "LD_PRELOAD": ":".join(map(path_of, sanitizer.libraries)),
        },
        check=False,
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sanitizer", choices=SANITIZERS)
    name, arguments = parser.parse_known_args()
    return test(SANITIZERS[name.sanitizer], build(name.sanitizer), arguments)


if __name__ == "__main__":
    sys.exit(main())
