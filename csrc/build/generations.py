"""TORCHEXT_ARCHS: builds the kernels of some generations of GPUs only, to build in less time.

setup.py reads the variable here, and makes torch's build run this file in place of nvcc.py with the
generations as first argument. A generation is the number of a path in the table of GPUs
(csrc/runtime/architectures.inc), and names the folders csrc/*/smN. What a build leaves out has weak
stand-ins in csrc/gemm/*/absent.cpp.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

import nvcc
from architectures import ARCHITECTURES, PATHS

VARIABLE = "TORCHEXT_ARCHS"
EVERY = tuple(sorted(PATHS.values()))
# Files that another generation needs, too: sm_89 has no weights-only products of its own.
SHARED = {"csrc/gemm/sm80/mma80_fp8_linear.cu": ("sm80", "sm89")}


def parse(text: str) -> tuple[int, ...]:
    """The generations that a value of the variable asks for, sorted; all if it is empty.

    Each GPU is a compute capability, as "90", "90a", "9.0" or "sm_90a", and means the generation
    whose kernels the GPU runs. Spaces, commas and semicolons separate them.

    Raises ValueError: a GPU that is not in the table.
    """
    found = set()
    for item in filter(None, re.split(r"[\s,;]+", text)):
        match = re.fullmatch(r"(?:sm_|compute_)?(\d+)\.?(\d)[af]?", item)
        row = ARCHITECTURES.get(int(match[1] + match[2])) if match else None
        if row is None:
            raise ValueError(
                f"{VARIABLE}: each GPU must be one of {', '.join(map(str, ARCHITECTURES))}, for "
                f"example {VARIABLE}=90a for Hopper (got {item!r}); unset it to build the kernels "
                "of all"
            )
        found.add(PATHS[row.path])
    return tuple(sorted(found)) or EVERY


def needs(source: str, generations: Iterable[int]) -> bool:
    """Whether a build for some generations compiles a source, given as a path from the root."""
    if not source.endswith(".cu"):
        return True
    if source in SHARED:
        return any(PATHS[path] in generations for path in SHARED[source])
    match = re.fullmatch(r"sm(\d+)", Path(source).parent.name)
    return match is None or int(match[1]) in generations


def portable(generations: Iterable[int]) -> dict[str, tuple[str, ...]]:
    """The part of nvcc.PORTABLE that some generations need."""
    chosen = {str(number) for number in generations}
    every = {
        virtual: tuple(real for real in reals if real in chosen)
        for virtual, reals in nvcc.PORTABLE.items()
    }
    return {virtual: reals for virtual, reals in every.items() if reals}


def main(arguments: list[str]) -> int:
    generations, *rest = arguments
    nvcc.PORTABLE = portable(map(int, generations.split(",")))
    return nvcc.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
