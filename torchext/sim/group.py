"""Launches on several GPUs at the same time, which may use each other's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchext import _sim

from .memory import Arena
from .module import Module, dim3
from .options import launch_options
from .report import Finding, Report, SimulationError, report_from


@dataclass(frozen=True)
class Launch:
    """A grid of a group; see `launch_group`.

    Attributes:
        module, kernel: the kernel's module and its name (see `Module.kernel`). A module with
            `.global` variables, or whose kernel uses the device heap, belongs to one device: parse
            it once for each.
        grid, block, args, smem, cluster, non_portable_cluster: as in `Module.launch`. Arrays belong
            to this launch's device; what several devices use is a `window`.
        device: a number that names the GPU, at least 0.
    """

    module: Module
    kernel: str
    grid: int | Sequence[int]
    block: int | Sequence[int]
    args: Sequence[Any] = ()
    device: int = 0
    smem: int = 0
    cluster: int | Sequence[int] | None = None
    non_portable_cluster: bool = False


@dataclass(frozen=True)
class GroupReport:
    """The outcome of a group; `print(report)` reads like a compiler's errors.

    Attributes:
        reports: of each launch, in their order, with the findings of its own grid.
    """

    reports: tuple[Report, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings of all grids."""
        return tuple(finding for report in self.reports for finding in report.findings)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings of grade "error"."""
        return tuple(finding for finding in self.findings if finding.grade == "error")

    @property
    def ok(self) -> bool:
        """True if there are no errors. Notes do not count."""
        return not self.errors

    def raise_for_findings(self) -> None:
        """Raises SimulationError, with the rendered reports, if there are errors."""
        if not self.ok:
            raise SimulationError(str(self))

    def __str__(self) -> str:
        return "\n\n".join(str(report) for report in self.reports)


def launch_group(
    launches: Sequence[Launch],
    *,
    seed: int = 0,
    completion: str = "late",
    lane_order: str = "converged",
    checks: bool = True,
    num_sms: int = 132,
    max_instructions: int = 20_000_000_000,
) -> GroupReport:
    """Runs one grid a GPU, all at the same time, and returns what the checker saw.

    The grids take turns on one host thread, in an order that the seed decides. Each GPU runs up to
    num_sms clusters at once. Pointers to other GPUs' memory work as they do over NVLink:

        windows = [sim.window(np.zeros(64, np.int32), device=d) for d in range(2)]
        report = sim.launch_group(
            [sim.Launch(module, "exchange", 1, 32, [windows[d], windows[1 - d]], device=d)
             for d in range(2)]
        )

    Besides what one launch checks: a release, an acquire or an atomic orders GPUs only at `.sys`
    scope; a thread must not exit before its bulk store to another GPU's memory is complete; a
    deadlock report says which device, CTA and warp waits for which flag.

    Args:
        launches: 1 to 16, each on a device of its own.
        seed, completion, lane_order, checks, num_sms, max_instructions: as in `Module.launch`, for
            all launches.

    Raises as `Module.launch` does, and ValueError if a device has two launches, an array that
    kernels write belongs to two devices, or a module that must belong to one device is used on two.
    """
    where = "torchext.sim.launch_group"
    options = launch_options(
        where,
        seed=seed,
        completion=completion,
        lane_order=lane_order,
        checks=checks,
        num_threads=1,
        num_sms=num_sms,
        max_instructions=max_instructions,
    )
    arena = Arena()
    prepared = []
    for number, launch in enumerate(launches):
        if launch.device < 0:
            raise ValueError(f"{where}: device must be at least 0 (got {launch.device})")
        here = f"{where}: launch {number} of {launch.kernel}"
        kernel = launch.module.kernel(launch.kernel)
        arguments = launch.module.arguments(kernel, launch.args, here)
        arena.device = launch.device
        for i, argument in enumerate(arguments):
            argument.register(arena, f"argument {i}")
        prepared.append((launch, kernel.name, arguments, here))
    arena.place()
    raw_launches = []
    for launch, name, arguments, here in prepared:
        arena.device = launch.device
        raw_launches.append((
            launch.module.raw,
            name,
            dim3("grid", launch.grid, here),
            dim3("block", launch.block, here),
            (0, 0, 0) if launch.cluster is None else dim3("cluster", launch.cluster, here),
            launch.smem,
            launch.non_portable_cluster,
            [argument.to_bytes(arena) for argument in arguments],
            launch.device,
        ))  # fmt: skip
    raw = _sim.launch_group(raw_launches, options, arena.buffers_of_devices())
    arena.copy_back()
    return GroupReport(tuple(report_from(report) for report in raw))
