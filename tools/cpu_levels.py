"""Prints the levels of the CPU kernels that this machine has below the one it uses, one a line.

The Makefile runs the tests of ops at each of them (TORCHEXT_CPU).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORT = "import torchext; print(torchext.is_available('cpu').reason)"


def answer(level: str | None) -> str:
    """What torchext says of the CPU when `level`, if given, is forced, in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name != "TORCHEXT_CPU"}
    if level is not None:
        env["TORCHEXT_CPU"] = level
    command = [sys.executable, "-c", REPORT]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def lower_levels() -> list[str]:
    """Lowest first."""
    in_use = answer(None).rpartition(" ")[2]
    # The error about a level that does not exist lists those of the machine.
    listed = re.search(r"a level of this machine: (.*) \(got ", answer("none"))
    if listed is None:
        raise RuntimeError(f"cpu_levels: torchext must refuse TORCHEXT_CPU=none ({answer('none')})")
    levels = listed[1].split(", ")
    return levels[: levels.index(in_use)]


if __name__ == "__main__":
    print(*lower_levels(), sep="\n")
