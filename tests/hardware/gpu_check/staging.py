"""Makes the temporary folder in which the check runs: the repository with the wheel's torchext in
place of the source package."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from benchmarks import processes

# What is built or private at the top of a checkout; `torchext` must come from the wheel.
LEFT_OUT = {"torchext", "build", "dist", "demo"}


class StagingError(Exception):
    """A wheel could not be installed, or has no package torchext."""


def stage(repository: Path, wheels: list[Path], target: Path, log: Path, limit_s: float) -> None:
    """Copies the repository to `target` and installs `wheels` (torchext's first) over it."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        skip = {"__pycache__"}
        if Path(folder) == repository:
            skip |= LEFT_OUT | {n for n in names if n.startswith(".") or n.endswith(".egg-info")}
        if Path(folder) == repository / "benchmarks":
            skip.add("results")
        return skip.intersection(names)

    for wheel in wheels:
        if not wheel.is_file():
            raise StagingError(
                f"gpu_check: wheel must be a file (got {wheel}); build it with `make wheel`"
            )
    shutil.copytree(repository, target, ignore=left_out, dirs_exist_ok=True)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    outcome = processes.run(
        (*pip, "--no-deps", "--no-index", "--target", str(target), *map(str, wheels)), log, limit_s
    )
    if not outcome.ok:
        raise StagingError(f"pip install: {outcome.reason}: {last_line(log)}")
    if not (target / "torchext" / "__init__.py").is_file():
        raise StagingError(f"{wheels[0].name} holds no package torchext")


def environment(target: Path) -> dict[str, str]:
    """The environment of processes that run in the staged folder."""
    return {
        **os.environ,
        "PYTHONPATH": str(target),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",  # several processes compile at the same time
    }


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")
