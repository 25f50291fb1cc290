"""Simulated ops: `torch.ops.torchext.*` on CPU tensors, through the GPU's launcher and PTX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torchext import _sim
from torchext._architectures import architectures, simulated, why_not_built
from torchext._dispatch import sm_budget
from torchext._dispatch.c_api import c_function

from .options import launch_options
from .ptx_file import read_ptx
from .report import Report, report_from

_PACKAGE = Path(__file__).resolve().parent.parent
# With the memory's rated GB/s and the number of SMs; innermost last.
_active: list[tuple[_sim.OpSimulator, int, int]] = []
# Share of the rated bandwidth that kernels reach: 0.88 on an H100, 0.83 on an H200.
_REACHED = 0.86


class Simulation:
    """The object that `simulate()` yields. It has the reports of all launches so far."""

    def __init__(self, simulator: _sim.OpSimulator) -> None:
        self._simulator = simulator

    @property
    def reports(self) -> list[Report]:
        """One Report for each kernel launch, in order, including launches whose op raised."""
        return [report_from(raw) for raw in self._simulator.launches()]


def _install(simulator: _sim.OpSimulator | None, memory: int = 0, sms: int = 0) -> None:
    sm_budget.simulated = sms
    c_function("torchext_set_simulated_memory")(memory)
    c_function("torchext_set_simulator")(None if simulator is None else simulator.interface)


def _install_innermost() -> None:
    """Installs the simulator of the innermost `simulate()`, or none."""
    _install(*(_active[-1] if _active else (None,)))


def rated_memory(gpu: str | None) -> int:
    """GB/s of a GPU of the clock; 0, the architecture table's, without one."""
    reached = {row["name"]: row["gigabytes_per_second"] for row in _sim.timing_gpus()}
    return 0 if gpu is None else round(reached[gpu] / _REACHED)


def _kernels(compute_capability: int) -> list[str]:
    """The build's PTX files that a GPU of this capability can run, best first: those for its own
    architecture, then those for older ones. PTX for 90a runs on 90 only."""
    folders = [path for path in (_PACKAGE / "_ptx").glob("*") if path.is_dir()]
    usable = [
        (int(path.name.rstrip("af")), path)
        for path in folders
        if path.name == architectures()[compute_capability].target
        or (path.name.isdecimal() and int(path.name) <= compute_capability)
    ]
    usable.sort(key=lambda pair: (-pair[0], pair[1].name))
    return [str(file) for _, folder in usable for file in sorted(folder.glob("*.ptx.gz"))]


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
    timing: str | None = None,
    timing_only: bool = False,
    compute_capability: int = 90,
    ptx: Sequence[str | Path] | None = None,
) -> Iterator[Simulation]:
    """Runs the CUDA kernels of torchext's ops on the simulator, within a `with` block.

    Ops on CPU tensors take the launchers that a GPU takes (heuristics, tensor maps, shared memory,
    grid, cluster), and the same PTX. An op whose kernel has errors raises RuntimeError with the
    report; notes appear only in `reports`. The switch is process-wide: ops of every thread are
    simulated until the block ends. Blocks may be nested.

    Args:
        num_sms: number of SMs of the simulated GPU. Persistent kernels launch as many CTAs.
        compute_capability: of the simulated GPU, 90 for 9.0; docs/architectures.md says which can
            be simulated. Launchers choose their kernels by it, as on a GPU.
        ptx: PTX files (plain, or gzip) to take the kernels from, instead of the build's. The
            kernels must have the same names and parameters.
        seed, completion, lane_order, checks, num_threads, max_instructions, timing, timing_only:
            as in `Module.launch`. With `timing_only` the ops' results are not valid.

    Raises:
        ValueError: an option has a value that is not allowed.
        RuntimeError: this build has no CUDA kernels to simulate, or none for such a GPU.
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
        timing=timing,
        timing_only=timing_only,
    )
    if compute_capability not in simulated():
        raise ValueError(
            "torchext.sim.simulate: compute_capability must be one of "
            f"{', '.join(map(str, simulated()))} (got {compute_capability!r})"
        )
    missing = why_not_built(compute_capability) if ptx is None else None
    if missing is not None:
        raise RuntimeError(f"torchext.sim.simulate: {missing}")
    files = _kernels(compute_capability) if ptx is None else [str(path) for path in ptx]
    if not files:
        raise RuntimeError(
            "torchext.sim.simulate: torchext must be built with nvcc (got a build without PTX); "
            "reinstall torchext where nvcc is on PATH or CUDA_HOME is set"
        )
    simulator = _sim.OpSimulator(files, read_ptx, options, compute_capability)
    active = simulator, rated_memory(timing), num_sms
    _active.append(active)
    _install_innermost()
    try:
        yield Simulation(simulator)
    finally:
        _active.remove(active)
        _install_innermost()
