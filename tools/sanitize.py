"""Builds the CPU kernels and the simulator with GCC's ASan and UBSan, and tests them.

    python tools/sanitize.py [arguments of pytest]

A finding ends the process that made it, and so fails the run. The build has a folder of its own
(build/address), without CUDA, that later runs bring up to date. Python and torch are not
instrumented, so leaks are not looked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "build" / "address"
# Python is not linked with them, so they must be loaded before it. libstdc++: ASan wraps its throw.
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so.6")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "OMP_NUM_THREADS": "1",
}
# What runs without arguments: tests of the CPU kernels, of the simulator's parser and of some kinds
# of instructions. One test preloads a library of its own into another process, ahead of ASan's.
TESTS = [
    "tests/quantize",
    "tests/gemm/test_fp8_gemm.py",
    "--deselect=tests/gemm/test_fp8_gemm.py"
    "::test_products_that_round_their_operands_are_noticed_and_avoided",
    *(
        f"tests/sim/test_{name}.py"
        for name in ("parser", "module", "op_integer", "op_convert", "op_copy", "op_matrix")
    ),
]


def build() -> Path:
    """The folder to import this build's torchext from."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", f"--build-base={BASE}"],
        cwd=ROOT,
        env={**os.environ, "TORCHEXT_SANITIZE": "address", "TORCHEXT_WERROR": "1"},
        check=True,
    )
    (package,) = BASE.glob("lib*/torchext")
    return package.parent


def path_of(library: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test(folder: Path, arguments: list[str]) -> int:
    """Runs pytest with `folder` first on Python's path, before the torchext of the working tree."""
    preload = ":".join(map(path_of, LIBRARIES))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-o", f"pythonpath={folder} . tests", *arguments],
        cwd=ROOT,
        env={**os.environ, **OPTIONS, "LD_PRELOAD": preload},
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(test(build(), sys.argv[1:] or TESTS))
