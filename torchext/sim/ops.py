"""Ops under simulation: `torch.ops.torchext.*` on CPU tensors through launcher and PTX."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchext import _sim
from torchext._dispatch.library import op_library

from .options import launch_options
from .report import Report, report_from

_PACKAGE = Path(__file__).resolve().parent.parent
CAPABILITIES = (75, 80, 86, 87, 89, 90)
_active: list[Any] = []  # of _sim.OpSimulator, innermost last


class Simulation:
    """What `simulate()` yields: the reports of the launches so far."""

    def __init__(self, simulator: Any) -> None:
        self._simulator = simulator

    @property
    def reports(self) -> list[Report]:
        """One Report for each kernel launched, in order; those with errors also raised."""
        return [report_from(raw) for raw in self._simulator.launches()]


def _install(simulator: Any) -> None:
    library = op_library()
    library.torchext_set_simulator.argtypes = [ctypes.c_void_p]
    library.torchext_set_simulator.restype = None
    library.torchext_set_simulator(None if simulator is None else simulator.interface)


def _kernels(compute_capability: int) -> list[str]:
    """The build's PTX that such a GPU can run, what suits it best first: that of its own
    architecture, then of older ones; "90a" runs on 90 alone."""
    folders = [path for path in (_PACKAGE / "_ptx").glob("*") if path.is_dir()]
    usable = [
        (int(path.name.rstrip("a")), path)
        for path in folders
        if path.name == f"{compute_capability}a"
        or (path.name.isdecimal() and int(path.name) <= compute_capability)
    ]
    usable.sort(key=lambda pair: (-pair[0], pair[1].name))
    return [str(file) for _, folder in usable for file in sorted(folder.glob("*.ptx"))]


@contextmanager
def simulate(
    *,
    seed: int = 0,
    completion: str = "late",
    lane_order: str = "converged",
    checks: bool = True,
    num_threads: int = 0,
    num_sms: int = 132,
    max_instructions: int = 20_000_000_000,
    compute_capability: int = 90,
    ptx: Sequence[str | Path] | None = None,
) -> Iterator[Simulation]:
    """Within it, torchext's ops on CPU tensors run their CUDA kernels on the simulator.

    The launchers (heuristics, tensor maps, shared memory, grid, cluster) and the PTX are those of a
    GPU. An op whose kernel has errors raises RuntimeError with the report; notes are in `reports`
    alone. The switch is process-wide: every thread's ops are simulated until the block ends. Blocks
    nest.

    Args:
        num_sms: of the simulated GPU, which persistent kernels fill.
        compute_capability: of the simulated GPU: 75, 80, 86, 87, 89 or 90. Launchers choose their
            kernels by it, as on a GPU.
        ptx: files to take the kernels from instead of the build's: changed kernels of the same
            names and parameters.
        others: as in `Module.launch`.

    Raises RuntimeError where this build has no CUDA kernels to simulate.
    """
    options = launch_options(
        "torchext.sim.simulate",
        seed=seed,
        completion=completion,
        lane_order=lane_order,
        checks=checks,
        num_threads=num_threads,
        num_sms=num_sms,
        max_instructions=max_instructions,
    )
    if compute_capability not in CAPABILITIES:
        raise ValueError(
            "torchext.sim.simulate: compute_capability must be one of "
            f"{', '.join(map(str, CAPABILITIES))} (got {compute_capability!r})"
        )
    files = _kernels(compute_capability) if ptx is None else [str(path) for path in ptx]
    if not files:
        raise RuntimeError(
            "torchext.sim.simulate: this build of torchext has no PTX to simulate (no nvcc was "
            "found when it was built); reinstall torchext where nvcc is on PATH or CUDA_HOME is set"
        )
    simulator = _sim.OpSimulator(files, options, compute_capability)
    _active.append(simulator)
    _install(simulator)
    try:
        yield Simulation(simulator)
    finally:
        _active.remove(simulator)
        _install(_active[-1] if _active else None)
