"""Plots of results.json: gemm.png (TFLOPS by M, for every peer), layers.png (grouped GEMMs and
Linear) and quantize.png."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import cases
from .contenders import SUBJECT

# Okabe and Ito's colors, which color-blind readers can tell apart; torchext always has the first.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>"


def draw(data: dict, folder: Path) -> Iterator[Path]:
    """Writes the plots for which `data` has figures, and yields their paths."""
    records = [r for r in data["measurements"] if r["status"] == "ok" and not r["host"]]
    for name, plot in (("gemm", _gemm), ("layers", _layers), ("quantize", _quantize)):
        figure = plot(records, data["ceilings"])
        if figure is None:
            continue
        figure.suptitle(f"{name} on {_hardware(data)}")
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        yield path


def _of(suite: str, records: list[dict]) -> list[dict]:
    return [record for record in records if record["suite"] == suite]


def _hardware(data: dict) -> str:
    facts = data["environment"]
    return (facts.get("gpu") or {}).get("name") or facts.get("cpu") or "unknown hardware"


def _names(records: list[dict]) -> list[str]:
    return sorted({r["contender"] for r in records}, key=lambda name: (name != SUBJECT, name))


def _gemm(records: list[dict], ceilings: dict) -> plt.Figure | None:
    """TFLOPS of fprop by M, with a panel for each layer that has more than two values of M."""
    records = _of("gemm", records)
    fprops = [record for record in records if record["op"] == cases.FPROP]
    layers: dict[tuple[str, str], list[dict]] = {}
    for record in fprops:
        layers.setdefault((record["model"], record["layer"]), []).append(record)
    panels = {k: v for k, v in layers.items() if len({r["shape"][0] for r in v}) > 2}
    if not panels:
        return _bars([records], "flops_per_s", 1e12, "TFLOPS", ceilings.get("fp8_flops_per_s"))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False, layout="constrained"
    )
    names = _names(fprops)
    for axis, ((model, layer), group) in zip(axes.flat, panels.items(), strict=False):
        for i, name in enumerate(names):
            points = sorted(
                (r["shape"][0], r["flops_per_s"] / 1e12) for r in group if r["contender"] == name
            )
            if points:
                axis.plot(
                    *zip(*points, strict=True), color=COLORS[i], marker=MARKERS[i], label=name
                )
        _, n, k = group[0]["shape"]
        axis.set(title=f"{model} {layer}: N {n}, K {k}", xlabel="M", ylabel="TFLOPS")
        axis.set_xscale("log", base=2)
        if ceilings.get("fp8_flops_per_s"):
            ceiling = ceilings["fp8_flops_per_s"] / 1e12
            axis.axhline(ceiling, color="gray", linestyle="--", label="measured ceiling")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    axes.flat[0].legend(fontsize="small")
    return figure


def _layers(records: list[dict], ceilings: dict) -> plt.Figure | None:
    linears = _of("linear", records)
    steps = [record for record in linears if record["op"] == cases.FORWARD_BACKWARD]
    suites = [_of("grouped", records), _of("fused", records), steps or linears]
    return _bars(suites, "flops_per_s", 1e12, "TFLOPS", ceilings.get("fp8_flops_per_s"))


def _quantize(records: list[dict], ceilings: dict) -> plt.Figure | None:
    suites = [_of("quantize", records)]
    return _bars(suites, "bytes_per_s", 1e9, "GB/s", ceilings.get("copy_bytes_per_s"))


def _bars(
    suites: list[list[dict]], key: str, unit: float, label: str, ceiling: float | None
) -> plt.Figure | None:
    """Horizontal bars: a panel for each suite, a group of bars for each case, a bar for each
    contender."""
    suites = [records for records in suites if records]
    if not suites:
        return None
    heights = [
        1.0 + 0.16 * len(_names(records)) * len({r["case"] for r in records}) for records in suites
    ]
    figure, axes = plt.subplots(
        len(suites),
        1,
        figsize=(10, 0.5 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, records in zip(axes.flat, suites, strict=True):
        names, labels = _names(records), list(dict.fromkeys(r["case"] for r in records))
        height = 0.8 / len(names)
        for i, name in enumerate(names):
            mine = [record for record in records if record["contender"] == name]
            places = [labels.index(record["case"]) + i * height for record in mine]
            axis.barh(places, [r[key] / unit for r in mine], height, color=COLORS[i], label=name)
        ticks = [place + 0.4 - height / 2 for place in range(len(labels))]
        axis.set_yticks(ticks, [text.partition("/")[2] for text in labels], fontsize="small")
        axis.margins(y=0.01)
        axis.invert_yaxis()
        axis.set(xlabel=label, title=records[0]["suite"])
        if ceiling:
            axis.axvline(ceiling / unit, color="gray", linestyle="--", label="measured ceiling")
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize="small")
    return figure
