"""Plots of results.json: gemm.png (TFLOPS by M, for every peer), layers.png (grouped GEMMs and
Linear), quantize.png and, of a CPU, rows.png (time by M, and speedup by threads).

`python -m benchmarks.plots benchmarks/results/FOLDER docs/images/PREFIX_` draws the first three as
SVG, for the documents.
"""

from __future__ import annotations

import argparse
import json
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
    figures = _figures(data)
    figures["rows"] = rows(data)
    for name, figure in figures.items():
        if figure is None:
            continue
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        yield path


def _figures(data: dict) -> dict[str, plt.Figure | None]:
    records = [r for r in data["measurements"] if r["status"] == "ok" and not r["host"]]
    plots = {"gemm": _gemm, "layers": _layers, "quantize": _quantize}
    figures = {name: plot(records, data["ceilings"]) for name, plot in plots.items()}
    for name, figure in figures.items():
        if figure is not None:
            figure.suptitle(f"{name} on {_hardware(data)}, {data['created'][:10]}")
    return figures


LABELS = {
    SUBJECT: "FP8: quantize_1x128, fp8_gemm_nt",
    "torchext_w8a16": "FP8 weight only: fp8_linear",
    "bf16": "BF16 F.linear",
    "fp32": "FP32 F.linear",
}


def rows(data: dict) -> plt.Figure | None:
    """Time of a product by M, on all threads and on one, and the speedup of all threads."""
    sweep = [
        record
        for record in data["measurements"]
        if record["model"] == "sweep" and record["status"] == "ok"
    ]
    times = {(r.get("threads", 0), r["contender"], r["shape"][0]): r for r in sweep}
    names = [name for name in LABELS if any(r["contender"] == name for r in sweep)]
    if not names:
        return None
    figure, (both, one, scaling) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    threads = data["environment"].get("cpu_threads")
    for axis, count, title in ((both, 0, f"{threads} threads"), (one, 1, "1 thread")):
        for i, name in enumerate(names):
            points = sorted(
                (m, r["milliseconds"]["median"])
                for (of, who, m), r in times.items()
                if (of, who) == (count, name)
            )
            if points:
                x, y = zip(*points, strict=True)
                axis.plot(x, y, color=COLORS[i], marker=MARKERS[i], ms=4, label=LABELS[name])
        axis.set(title=title, ylabel="milliseconds", yscale="log")
    for i, name in enumerate(names):
        speedups = sorted(
            (m, record["milliseconds"]["median"] / times[0, name, m]["milliseconds"]["median"])
            for (of, who, m), record in times.items()
            if (of, who) == (1, name) and (0, name, m) in times
        )
        if speedups:
            x, y = zip(*speedups, strict=True)
            scaling.plot(x, y, color=COLORS[i], marker=MARKERS[i], ms=4)
    scaling.set(title=f"speedup of {threads} threads over 1", ylim=(0, None))
    n, k = cases.SWEEP
    for axis in (both, one, scaling):
        axis.set_xscale("log", base=2)
        axis.set_xlabel(f"M, rows (N {n}, K {k})")
        axis.grid(alpha=0.3)
    both.legend(fontsize="small")
    version = data["environment"].get("torch")
    figure.suptitle(f"{_hardware(data)}, torch {version}, {data['created'][:10]}")
    return figure


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots")
    parser.add_argument("folder", type=Path, help="the folder that has results.json")
    parser.add_argument("prefix", help="the beginning of the names of the files to write")
    options = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "torchext"  # the same file from the same data
    data = json.loads((options.folder / "results.json").read_text())
    for name, figure in _figures(data).items():
        if figure is not None:
            metadata = {"Source": options.folder.as_posix(), "Date": None}
            figure.savefig(f"{options.prefix}{name}.svg", metadata=metadata)


if __name__ == "__main__":
    main()
