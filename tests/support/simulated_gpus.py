"""The GPUs that `--device sim` simulates (tests/conftest.py has the options)."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

import torchext
from torchext import _architectures

EVERY = "every"  # a value of --sim-arch
FEW_SMS = 3  # so few that launchers choose large tiles


@dataclass(frozen=True)
class SimulatedGpu:
    compute_capability: int
    num_sms: int

    def __str__(self) -> str:
        return f"sm_{self.compute_capability}"


def gpus_of(config: pytest.Config, every_architecture: bool) -> list[SimulatedGpu]:
    """The GPUs on which a test runs. With `--sim-arch every` that is Hopper, and, for a test with
    the mark `every_architecture`, one of each earlier generation with few SMs."""
    arch, num_sms = config.getoption("--sim-arch"), config.getoption("--sim-sms")
    if arch != EVERY:
        return [SimulatedGpu(int(arch), num_sms)]
    latest, *earlier = sorted(_architectures.paths().values(), reverse=True)
    others = [SimulatedGpu(number, FEW_SMS) for number in earlier]
    return [SimulatedGpu(latest, num_sms), *(others if every_architecture else [])]


def kernels_origin(compute_capability: int, patterns: list[str]) -> int:
    """The generation whose PTX a simulated GPU takes for kernels in files with such names."""
    for file in map(Path, torchext.sim.ops._kernels(compute_capability)):
        if any(fnmatch(file.name, pattern) for pattern in patterns):
            return int(file.parent.name.rstrip("af"))
    pytest.fail(f"no PTX file of sm_{compute_capability} has a name like {patterns}")
