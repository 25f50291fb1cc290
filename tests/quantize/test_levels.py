"""Every level of the CPU kernels (runtime/cpu_level.h) passes the tests of quantizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LEVELS = ["portable", "avx2", "avx512", "avx512_bf16", "amx", "neon"]
HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_level(level: str) -> None:
    environment = {**os.environ, "TORCHEXT_CPU": level}
    load = [sys.executable, "-c", "import torchext; print(torchext.is_available('cpu'))"]
    path = os.pathsep.join(filter(None, sys.path))
    found = subprocess.run(
        load, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    if "must name a level of this machine" in found.stdout:
        pytest.skip(f"this machine lacks {level}")
    tests = [str(HERE / name) for name in ("test_quantize.py", "test_dequantize.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]
    run = subprocess.run(
        command, check=False, env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:]
