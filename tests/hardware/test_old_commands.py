"""The former commands of the hardware programs, from when they were in benchmarks/, still work."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("program", ["gpu_check", "soak"])
@pytest.mark.slow
def test_an_old_command_works_and_warns(program):
    command = (sys.executable, "-m", f"benchmarks.{program}", "--help")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert f"usage: python -m tests.hardware.{program}" in done.stdout
    assert f"DeprecationWarning: use `python -m tests.hardware.{program}`" in done.stderr
