"""The wheel under test, which is built once from the tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, str(ROOT / "tools" / "build_wheel.py"), "--python", "--to"]
    subprocess.run([*command, str(folder)], check=True)  # what `make wheel` does
    (built,) = folder.glob("*.whl")
    return built
