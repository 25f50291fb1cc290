"""The checker's core (vector clocks, scopes, shadow memory, validity), tested in C++."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("checker.cpp")
CHECK = Path(__file__).resolve().parents[2] / "ptx" / "sim" / "check"


@pytest.mark.slow
def test_the_core_of_the_checker(tmp_path: Path) -> None:
    program = tmp_path / "checker"
    sources = [SOURCE, *(CHECK / name for name in ("scopes.cpp", "shadow.cpp", "spread.cpp"))]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    command = [os.environ.get("CXX", "c++"), *flags, *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
