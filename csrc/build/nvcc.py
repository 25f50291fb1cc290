"""A wrapper of nvcc with four more duties than compiling.

setup.py makes torch's build run this in place of nvcc (PYTORCH_NVCC).
- It compiles a file for the GPUs that follow from the file's folder: `architectures`.
- Beside every object file it writes the PTX from which the machine code was made, one file per
  architecture (X.o -> X.90a.ptx), for the simulator; and the report of ptxas (X.ptxas).
- It writes a list of the headers that were read (X.o.d). torch makes nvcc do so only if torch
  itself has CUDA.
- It fails the build if ptxas says that it ignored setmaxnreg (C7508), serialized wgmma (C7510,
  C7518), spilled registers or put anything in local memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from architectures import ARCHITECTURES, TABLE

FORBIDDEN_WARNINGS = ("C7508", "C7510", "C7518")
BY_FOLDER = "--arch-by-folder"  # setup.py passes it; torch then adds no architectures of its own


def _portable() -> dict[str, tuple[str, ...]]:
    reals: dict[str, tuple[str, ...]] = {}
    for number, row in ARCHITECTURES.items():
        if row.portable_from:
            virtual = str(row.portable_from)
            reals[virtual] = (*reals.get(virtual, ()), str(number))
    return reals


# What a portable kernel is compiled for: {N of compute_N: (N of each sm_N that gets machine code)}.
# There is an entry for each generation whose new instructions change the kernel. sm_80 has none,
# because it has nothing new for quantizers. Machine code runs on later GPUs of the same major
# version: sm_86 runs sm_80's.
PORTABLE = _portable()


def architectures(source: Path) -> dict[str, tuple[str, ...]]:
    """What a source is compiled for, in PORTABLE's form."""
    if match := re.fullmatch(r"sm(\d+)", source.parent.name):
        target = ARCHITECTURES[int(match[1])].target
        return {target: (target,)}
    return PORTABLE


def gencodes(source: Path) -> list[str]:
    """nvcc's options. They include the PTX of the last architecture, which the driver compiles for
    newer GPUs; but not the PTX of sm_Na or sm_Nf, which no later generation can run."""
    numbers = architectures(source)
    *_, last = numbers
    options = []
    for virtual, real in numbers.items():
        codes = [f"sm_{number}" for number in real]
        if virtual == last and last.isdecimal():
            codes.append(f"compute_{last}")
        listed = codes[0] if len(codes) == 1 else f"[{','.join(codes)}]"
        options.append(f"-gencode=arch=compute_{virtual},code={listed}")
    return options


def is_outdated(obj: Path) -> bool:
    """Whether an object is older than a file that it was compiled from, or than this wrapper."""
    listed = Path(f"{obj}.d")
    if not listed.exists():
        return True
    _, _, read = listed.read_text().replace("\\\n", " ").partition(":")
    files = [*read.split(), __file__, str(TABLE)]
    built = obj.stat().st_mtime
    return any(not os.path.exists(file) or os.path.getmtime(file) > built for file in files)


def findings(report: str) -> list[str]:
    """The faults in the output of `ptxas -v`: one line for each, which names the kernel."""
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
    if "-c" not in arguments:  # for example, torch asks for the version
        return subprocess.call([nvcc, *arguments])
    (source,) = (Path(argument) for argument in arguments if argument.endswith(".cu"))
    obj = Path(arguments[arguments.index("-o") + 1])
    if BY_FOLDER in arguments:
        at = arguments.index(BY_FOLDER)
        arguments[at : at + 1] = gencodes(source)
    if "-MF" not in arguments:
        arguments = [*arguments, "-MD", "-MF", f"{obj}.d"]
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
        for stale in obj.parent.glob(f"{obj.stem}.*.ptx"):
            stale.unlink()
        for ptx in Path(kept).glob("*.ptx"):
            text = ptx.read_text()
            target = re.search(r"^\.target sm_(\w+)", text, re.MULTILINE)
            assert target is not None, f"{ptx} names no target"
            obj.with_suffix(f".{target[1]}.ptx").write_text(text)
    obj.with_suffix(".ptxas").write_text(result.stdout)
    warnings = [line for line in result.stdout.splitlines() if "warning" in line]
    if warnings:
        print(*warnings, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
