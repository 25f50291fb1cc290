"""The arithmetic of the CUDA quantizers is plain C++; this test runs it on the host."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("cuda_numbers.cpp")


@pytest.mark.slow
def test_scales_and_quotients_are_those_of_a_true_division(tmp_path: Path) -> None:
    program = tmp_path / "cuda_numbers"
    compiler = os.environ.get("CXX", "c++")
    # If the CPU has FMA, GCC folds a negation into fmaf and loses the sign of a zero.
    exact = ["-ffp-contract=off", "-fno-builtin-fmaf"]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", *exact]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(program)], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
