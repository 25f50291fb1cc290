"""The clock's prediction for a launch: times, utilization, waits, and a timeline.

Every figure is predicted by a model (docs/timing.md), none is measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RoleWait:
    """What the warps of a role wait for.

    Attributes:
        role: "consumers" issue wgmma, the "producer" issues TMA loads, "store warps" issue TMA
            stores, "other warps" none of these.
        reason: "full[slot]": an mbarrier that counts bytes of copies; "empty[slot]": any other
            mbarrier; "wgmma groups", "bulk stores", "cp.async", "a CTA's barrier", "the cluster's
            barrier"; "operands": results of earlier instructions; "loads": the path of stores to
            L2; "the scheduler": other warps' instructions.
        share: of the role's time, 0 to 1.
        ptx_line, source: of the instruction at which it waits longest; `source` as in `Finding`.
    """

    role: str
    reason: str
    share: float
    ptx_line: int
    source: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Remark:
    """Something in the kernel that costs time.

    Attributes:
        kind: "bank conflicts", "uncoalesced access" or "serialized wgmma".
        text: how much more of the resource it takes than it could.
        cycles: that an SM's resource spends on it, predicted. Other work may hide them.
        ptx_line, source: of the instruction; `source` as in `Finding`.
    """

    kind: str
    text: str
    cycles: float
    ptx_line: int
    source: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        place = f"{self.source[0][0]}:{self.source[0][1]}" if self.source else "PTX"
        return f"{place} (PTX line {self.ptx_line}): {self.kind}: {self.text}"


@dataclass(frozen=True)
class Timing:
    """What the timing model predicts for a launch; `print(timing)` shows it as a table.

    Attributes:
        gpu: the GPU's name in the table of docs/timing.md.
        cycles: SM cycles from the first instruction to the last.
        microseconds: the kernel's time, launch ramp and drain included, at `mhz`.
        launch_microseconds: the part of `microseconds` that is launch ramp and drain. A profiler's
            time of a kernel leaves most of it out; the time of a CUDA graph's replay contains it.
        error: relative error of `microseconds` to expect, 0.25 for 25 %.
        mhz: SM clock under the load of such a kernel.
        sms, ctas_per_sm: of the GPU; CTAs of the kernel that fit on an SM.
        waves: CTAs of the launch / CTAs that fit on the GPU.
        tail: share of the SMs' time in which they have no CTA because the others are not done.
        traced_ctas: CTAs whose instructions the replay is made of.
        dram_bytes, l2_bytes: traffic of device memory, and between L2 and SMs.
        utilization: busy share of each resource, 0 to 1.
        waits: what each role waits for, longest first within a role.
        remarks: bank conflicts, uncoalesced accesses and serialized wgmmas, costliest first.
    """

    gpu: str
    cycles: float
    microseconds: float
    launch_microseconds: float
    error: float
    mhz: float
    sms: int
    ctas_per_sm: int
    waves: float
    tail: float
    traced_ctas: int
    dram_bytes: float
    l2_bytes: float
    utilization: dict[str, float]
    waits: tuple[RoleWait, ...]
    remarks: tuple[Remark, ...]
    _tracks: tuple[str, ...] = field(repr=False)
    _names: tuple[str, ...] = field(repr=False)
    _intervals: tuple[tuple[int, int, float, float], ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The prediction as a dict for JSON, without the timeline."""
        return {
            "predicted": True,
            **{k: v for k, v in vars(self).items() if k not in _LISTS and k[0] != "_"},
            "waits": [vars(wait) for wait in self.waits],
            "remarks": [vars(remark) for remark in self.remarks],
        }

    def __str__(self) -> str:
        lines = [
            f"predicted for {self.gpu}: {self.microseconds:.1f} us +- {100 * self.error:.0f} % "
            f"({self.cycles:,.0f} cycles at {self.mhz / 1000:.2f} GHz, with launch)",
            f"predicted waves: {self.waves:.2f} ({self.ctas_per_sm} CTAs per SM, {self.sms} SMs); "
            f"tail: {100 * self.tail:.0f} % of the SMs' time",
            f"predicted traffic: {self.dram_bytes / 1e6:.1f} MB of device memory, "
            f"{self.l2_bytes / 1e6:.1f} MB between L2 and SMs",
            "predicted utilization:",
        ]
        used = sorted(self.utilization.items(), key=lambda pair: -pair[1])
        lines += [f"  {share:6.1%}  {name}" for name, share in used if share >= 0.005]
        lines.append("predicted waits:")
        for wait in self.waits:
            if wait.share >= 0.01:
                lines.append(f"  {wait.role} wait {wait.share:.0%} of their time for {wait.reason}")
        lines += [f"predicted cost: {remark}" for remark in self.remarks]
        return "\n".join(lines)

    def save_trace(self, path: str | Path) -> None:
        """Writes the timeline of the first replayed cluster as Chrome trace events.

        ui.perfetto.dev and chrome://tracing open it: a track for each warp, for the tensor cores
        and for TMA. It ends where it has 60,000 intervals. Times are predicted microseconds.

        Raises OSError if the file cannot be written.
        """
        events: list[dict[str, Any]] = [
            {
                "ph": "M",
                "name": "process_name",
                "pid": 0,
                "args": {"name": f"predicted for {self.gpu}"},
            }
        ]
        for number, text in enumerate(self._tracks):
            events.append(
                {
                    "ph": "M",
                    "name": "thread_name",
                    "pid": 0,
                    "tid": number,
                    "args": {"name": text},
                }
            )
        for track, name, begin, end in self._intervals:
            events.append(
                {
                    "ph": "X",
                    "name": self._names[name],
                    "pid": 0,
                    "tid": track,
                    "ts": begin / self.mhz,
                    "dur": (end - begin) / self.mhz,
                }
            )
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))

    def plot(self, path: str | Path, begin: float = 0, end: float | None = None) -> None:
        """Draws the timeline between two times, in predicted cycles, into an image file.

        Without `end`, as far as 60 wgmmas or, in a kernel without wgmma, 200 intervals.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: nothing happens between the two times.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "torchext.sim.Timing.plot: matplotlib must be installed (got: "
                f"{error}); run `pip install matplotlib`"
            ) from error
        intervals = sorted((i for i in self._intervals if i[3] > begin), key=lambda i: i[2])
        if end is None:
            wgmmas = [i for i in intervals if self._names[i[1]].startswith("wgmma m")]
            some = wgmmas[:60] or intervals[:200]
            end = max((i[3] for i in some), default=begin)
        intervals = [i for i in intervals if i[2] < end]
        if not intervals:
            raise ValueError(
                f"torchext.sim.Timing.plot: begin and end must enclose work of the kernel "
                f"(got {begin} and {end}); the launch has {self.cycles:.0f} cycles"
            )
        used = sorted({track for track, *_ in intervals})
        rows = {track: row for row, track in enumerate(used)}
        names = sorted({name for _, name, *_ in intervals})
        figure = Figure(figsize=(12, 1 + 0.3 * len(rows)))
        axes = figure.add_subplot()
        for color, name in enumerate(names):
            spans: dict[int, list[tuple[float, float]]] = {}
            for track, which, start, stop in intervals:
                if which == name:
                    spans.setdefault(rows[track], []).append((start, stop - start))
            for k, (row, bars) in enumerate(sorted(spans.items())):
                label = self._names[name] if k == 0 else None
                axes.broken_barh(bars, (row - 0.4, 0.8), color=f"C{color % 10}", label=label)
        axes.set_yticks(range(len(rows)), [self._tracks[track] for track in used], fontsize=7)
        axes.set_xlim(begin, end)
        axes.set_xlabel(f"cycles, predicted for {self.gpu}")
        axes.legend(fontsize=7, loc="upper right")
        figure.tight_layout()
        figure.savefig(path)


_LISTS = ("waits", "remarks")


def timing_from(raw: dict[str, Any] | None) -> Timing | None:
    """The Timing of what torchext._sim returns; None for a launch without a clock."""
    if raw is None:
        return None
    fields = dict(raw)
    return Timing(
        waits=tuple(RoleWait(*rest, *place) for *rest, place in fields.pop("waits")),
        remarks=tuple(Remark(*rest, *place) for *rest, place in fields.pop("remarks")),
        _tracks=tuple(fields.pop("tracks")),
        _names=tuple(fields.pop("names")),
        _intervals=tuple(fields.pop("intervals")),
        **fields,
    )
