"""The report of a simulated launch, and its findings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .timing import Timing, timing_from


class SimulationError(RuntimeError):
    """A simulated kernel has errors; `str(error)` is the rendered report."""


@dataclass(frozen=True)
class Finding:
    """A fault, or a note, that the checker found in a kernel.

    Attributes:
        kind: such as "data race" or "out of bounds"; docs/simulator.md lists all kinds.
        grade: "error", or "note" for what breaks PTX's rules but is harmless on existing GPUs.
        message: one sentence.
        kernel: the kernel's name.
        module, ptx_line, opcode: the name of the module, and the instruction's line in its text.
        source: the CUDA lines it comes from, as (file, line), innermost inlined function first and
            the kernel's own line last; empty where the PTX has no `-lineinfo`.
        device: of a group, that executed it; None for a launch on one GPU.
        cta, warp, lanes: where it executed. `lanes` is empty if no thread executed it, but TMA.
        address: of the access; in shared memory, the offset in the CTA's window. 0 if none.
        other, other_module, other_ptx_line, other_source: the other access or event that it
            conflicts with, if there is one.
        other_device, other_cta, other_warp, other_lane: the thread of the other access. None if it
            is not known, or if no thread made the access, but TMA.
        remedy: the usual remedy, in one sentence.
        seed: the seed of the schedule in which it was found.
    """

    kind: str
    grade: str
    message: str
    kernel: str
    module: str
    ptx_line: int
    opcode: str
    source: tuple[tuple[str, int], ...]
    device: int | None
    cta: tuple[int, int, int]
    warp: int
    lanes: tuple[int, ...]
    address: int
    other: str
    other_module: str
    other_ptx_line: int
    other_source: tuple[tuple[str, int], ...]
    other_device: int | None
    other_cta: tuple[int, int, int] | None
    other_warp: int | None
    other_lane: int | None
    remedy: str
    seed: int


@dataclass(frozen=True)
class Report:
    """The outcome of one simulated launch; `print(report)` reads like a compiler's errors.

    Attributes:
        kernel: the kernel's name.
        findings: errors, then notes; one for each kind and pair of PTX lines.
        findings_truncated: there were more than the simulator keeps.
        instructions: warp-instructions executed, by opcode.
        warp_instructions: their sum.
        seconds: wall-clock time of the launch.
        output: what the kernel printed.
        unwritten: (buffer, bytes, offset of the first) of output buffers with bytes that the kernel
            did not write. No fault in itself: padding is often left alone.
        timing: what the timing model predicts, if the launch asked for it and had no error that
            stopped it; see `Timing`.
    """

    kernel: str
    findings: tuple[Finding, ...]
    findings_truncated: bool
    instructions: dict[str, int]
    warp_instructions: int
    seconds: float
    output: str
    unwritten: tuple[tuple[str, int, int], ...]
    text: str = field(repr=False)
    timing: Timing | None = None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings of grade "error"."""
        return tuple(finding for finding in self.findings if finding.grade == "error")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """The findings of grade "note", which are harmless on existing GPUs."""
        return tuple(finding for finding in self.findings if finding.grade == "note")

    @property
    def ok(self) -> bool:
        """True if there are no errors. Notes do not count."""
        return not self.errors

    def raise_for_findings(self) -> None:
        """Raises SimulationError, with the rendered report, if there are errors."""
        if not self.ok:
            raise SimulationError(self.text)

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict for JSON: `ok` and every attribute except `text`."""
        fields = {k: v for k, v in vars(self).items() if k not in ("text", "timing", "findings")}
        fields["findings"] = tuple(asdict(finding) for finding in self.findings)
        if self.timing is not None:
            fields["timing"] = self.timing.to_dict()
        unwritten = [
            {"buffer": buffer, "bytes": count, "first_offset": first}
            for buffer, count, first in self.unwritten
        ]
        return {"ok": self.ok, **fields, "unwritten": unwritten}

    def __str__(self) -> str:
        return self.text


def report_from(raw: dict[str, Any]) -> Report:
    """The Report of what torchext._sim returns."""
    findings = tuple(Finding(**finding) for finding in raw["findings"])
    timing = timing_from(raw["timing"])
    unwritten = tuple(raw["unwritten"])
    return Report(**{**raw, "findings": findings, "unwritten": unwritten, "timing": timing})
