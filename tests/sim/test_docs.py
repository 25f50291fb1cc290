"""docs/simulator.md shows what the simulator prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchext.sim.compiler import CompileError, find_nvcc

ROOT = Path(__file__).resolve().parents[2]


def blocks() -> list[str]:
    return re.findall(r"```text\n(.*?)```", (ROOT / "docs" / "simulator.md").read_text(), re.DOTALL)


def without_ptx_numbers(text: str) -> str:
    """Removes what depends on the version of nvcc: PTX lines, registers and counts."""
    text = re.sub(r"%([a-z]+)\d+", r"%\1N", text)
    text = re.sub(r"(\.ptx:|, line |^ *)\d+(?=\n|:| \| *(?:cp|st)\.)", r"\1N", text, flags=re.M)
    return re.sub(r"[\d,]+ warp-instructions|0x[0-9a-f]+", "N", text)


def example(*arguments: str) -> str:
    try:
        find_nvcc()
    except CompileError:
        pytest.skip("there is no nvcc to compile with")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "docs/examples/tile_gemm.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.slow
def test_the_report_of_the_worked_example():
    assert without_ptx_numbers(example()) == without_ptx_numbers(blocks()[0])


@pytest.mark.slow
def test_the_mended_example():
    assert example("-DMENDED") == blocks()[1]
