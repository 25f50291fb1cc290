"""nvcc, with two duties more: it keeps the PTX, and it refuses what ptxas did to spoil a kernel.

setup.py has torch's build run this in place of nvcc (PYTORCH_NVCC). Beside every object file it
leaves the PTX that the machine code in it was made from (X.o -> X.ptx), for the simulator, and
ptxas' report (X.ptxas). The build fails where ptxas says that it ignored setmaxnreg (C7508) or
serialised wgmma (C7510), spilled registers, or put anything in local memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FORBIDDEN_WARNINGS = ("C7508", "C7510")


def findings(report: str) -> list[str]:
    """What is wrong in the output of `ptxas -v`: one line a fault, naming the kernel."""
    faults = []
    kernel = "?"
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = match[1]
        if any(code in line for code in FORBIDDEN_WARNINGS):
            faults.append(line.strip())
        match = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", line)
        if match and any(int(count) for count in match.groups()):
            faults.append(f"{kernel}: {match[0]} spill loads")
    return faults


def main(arguments: list[str]) -> int:
    nvcc = os.environ["TORCHEXT_NVCC"]
    if "-c" not in arguments:  # torch asks for the version, say
        return subprocess.call([nvcc, *arguments])
    obj = Path(arguments[arguments.index("-o") + 1])
    with tempfile.TemporaryDirectory() as kept:
        result = subprocess.run(
            [nvcc, *arguments, "-Xptxas", "-v", "--keep", "--keep-dir", kept],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        faults = findings(result.stdout)
        if result.returncode != 0 or faults:
            print(result.stdout, *(f"error: {fault}" for fault in faults), sep="\n")
            obj.unlink(missing_ok=True)
            return result.returncode or 1
        (ptx,) = Path(kept).glob("*.ptx")
        obj.with_suffix(".ptx").write_text(ptx.read_text())
    obj.with_suffix(".ptxas").write_text(result.stdout)
    warnings = [line for line in result.stdout.splitlines() if "warning" in line]
    if warnings:
        print(*warnings, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
