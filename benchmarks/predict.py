"""Compares our GEMMs with DeepGEMM's by predicted times, and predicts every other op's time.

    python -m benchmarks.predict            the tables, from predictions.csv; predicts what it lacks
    python -m benchmarks.predict --write    also writes docs/predicted.md and its plots
    python -m benchmarks.predict --fresh    predicts everything anew

Every time is one that the simulator's clock predicts (docs/timing.md); no GPU is used. Both sides
go through the same model: our kernels as built, with the tile that the library selects, and
DeepGEMM's, compiled from its wheel's headers in the configuration that it chooses.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cases
from .cases import Case
from .predict_selection import (
    MEASURED,
    measured_regrets,
    regrets,
    selection_shapes,
    selection_table,
    short,
)
from .predictions import TORCHEXT, OutOfTimeError, Prediction, Predictor
from .report import replace_between, table

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "predicted.md"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- begin: python -m benchmarks.predict -->\n", "<!-- end -->\n"

GPUS = ("h100", "h200")
ROWS = (1, 16, 64, 128, 512, 2048, 4096, 8192)
FUSED_ROWS = (64, 512, 4096)
TOKENS = 4096  # the K of a wgrad
FEW_ROWS = 64
DENSE, GROUPED, WGRAD, FUSED = "dense", "grouped", "wgrad", "fused"


def dense_cases() -> list[Case]:
    return [
        Case("gemm", cases.FPROP, layer.model, layer.name, (m, layer.n, layer.k))
        for layer in cases.LAYERS
        for m in ROWS
    ]


def grouped_cases() -> list[Case]:
    return [
        case
        for case in cases.cuda_cases()
        if case.model == "deepseek-v3" and case.op in GROUPED_OPS
    ]


GROUPED_OPS = (cases.CONTIGUOUS, cases.MASKED)


def wgrad_cases() -> list[Case]:
    dense = [
        Case("gemm", cases.WGRAD_ACCUMULATE, x.model, x.name, (TOKENS, x.n, x.k))
        for x in cases.LAYERS
    ]
    along_k = [
        case for case in cases.cuda_cases() if case.op == cases.ALONG_K and case.model != "small"
    ]
    return [*dense, *along_k]


def fused_cases() -> list[Case]:
    return [
        Case("fused", cases.SWIGLU, x.model, x.name, (m, x.n, x.k))
        for x in cases.LAYERS
        if x.name == "gate_up_proj"
        for m in FUSED_ROWS
    ]


CLASSES: dict[str, Callable[[], list[Case]]] = {
    GROUPED: grouped_cases,
    FUSED: fused_cases,
    WGRAD: wgrad_cases,
    DENSE: dense_cases,
}
AT_A_TIME = 8  # nvcc compiles the kernels of this many cases in one file


@dataclass(frozen=True)
class Pair:
    """A case's predictions: ours, and what it is compared with."""

    case: Case
    ours: Prediction
    other: Prediction

    @property
    def ratio(self) -> float:
        """The other's time over ours: above 1, we are faster."""
        return self.other.microseconds / self.ours.microseconds


def pairs(predictor: Predictor, kind: str, gpu: str) -> list[Pair]:
    """The cases that are predicted before the time is up, the quickest to predict first."""
    wanted = sorted(CLASSES[kind](), key=lambda case: math.prod(case.shape))
    other = predictor.unfused if kind == FUSED else predictor.deep_gemm
    found = []
    for i in range(0, len(wanted), AT_A_TIME):
        part = wanted[i : i + AT_A_TIME]
        if kind != FUSED:
            predictor.compile_for(part, gpu)
        for case in part:
            try:
                found.append(Pair(case, predictor.ours(case, gpu), other(case, gpu)))
            except OutOfTimeError:
                continue
    return found


# ---- verdicts ----


@dataclass(frozen=True)
class Goal:
    text: str
    kinds: tuple[str, ...]
    at_least: float
    worst: bool = False  # the goal is for the smallest ratio, not for the geometric mean
    most_rows: int | None = None

    def verdict(self, compared: dict[str, list[Pair]]) -> tuple[float, int, Pair] | None:
        """(value, number of shapes, the worst shape), or None without shapes."""
        covered = [
            pair
            for kind in self.kinds
            for pair in compared.get(kind, [])
            if self.most_rows is None or pair.case.shape[0] <= self.most_rows
        ]
        if not covered:
            return None
        ratios = [pair.ratio for pair in covered]
        value = min(ratios) if self.worst else statistics.geometric_mean(ratios)
        return value, len(covered), min(covered, key=lambda pair: pair.ratio)


GOALS = (
    Goal("dense against DeepGEMM, geometric mean", (DENSE,), 1.05),
    Goal(f"dense, M <= {FEW_ROWS}, geometric mean", (DENSE,), 1.3, most_rows=FEW_ROWS),
    Goal("grouped against DeepGEMM, geometric mean", (GROUPED,), 1.1),
    Goal("wgrad against DeepGEMM, geometric mean", (WGRAD,), 1.1),
    Goal("every shape against DeepGEMM, the worst", (DENSE, GROUPED, WGRAD), 0.97, worst=True),
    Goal("SwiGLU + quantize fused, against GEMM and a kernel, geometric mean", (FUSED,), 1.2),
)


def verdicts(compared: dict[str, list[Pair]]) -> list[list[str]]:
    rows = [["goal, all times predicted for an H100", "wanted", "predicted", "", "shapes", "worst"]]
    for goal in GOALS:
        answer = goal.verdict(compared)
        if answer is None:
            rows.append([goal.text, f">= {goal.at_least:g}", "-", "not predicted", "0", ""])
            continue
        value, count, worst = answer
        of = sum(
            goal.most_rows is None or case.shape[0] <= goal.most_rows
            for kind in goal.kinds
            for case in CLASSES[kind]()
        )
        met = "met" if value >= goal.at_least else "**missed**"
        at = f"{worst.ratio:.2f} at {name(worst.case)}"
        shapes = f"{count} of {of}"
        rows.append([goal.text, f">= {goal.at_least:g}", f"{value:.2f}", met, shapes, at])
    return rows


def name(case: Case) -> str:
    return f"{case.op} {'x'.join(map(str, case.shape))}"


# ---- tables ----


def ratios_by_rows(dense: Sequence[Pair]) -> str:
    """A row for each layer, a column for each M."""
    at = {(p.case.model, p.case.layer, p.case.shape[0]): p for p in dense}
    ms = sorted({pair.case.shape[0] for pair in dense})
    rows = [["predicted, DeepGEMM's time over ours", "N x K", *(f"M={m}" for m in ms)]]
    for layer in cases.LAYERS:
        of_layer = [at.get((layer.model, layer.name, m)) for m in ms]
        if any(of_layer):
            cells = [f"{pair.ratio:.2f}" if pair else "" for pair in of_layer]
            rows.append([f"{layer.model} {layer.name}", f"{layer.n} x {layer.k}", *cells])
    means = [
        statistics.geometric_mean([p.ratio for p in dense if p.case.shape[0] == m]) for m in ms
    ]
    rows.append(["geometric mean", "", *(f"{mean:.2f}" for mean in means)])
    return table(rows[0], rows[1:], 2)


def details(compared: Iterable[Pair], other: str) -> str:
    rows = [["shape", "ours, tile", f"{other}, tile", "ours, predicted us",
             f"{other}, predicted us", "ratio"]]  # fmt: skip
    rows += [
        [
            name(p.case),
            short(p.ours.key.configuration),
            short(p.other.key.configuration),
            f"{p.ours.microseconds:.1f}",
            f"{p.other.microseconds:.1f}",
            f"{p.ratio:.2f}",
        ]
        for p in compared
    ]
    return table(rows[0], rows[1:], 3)


def losses(compared: dict[str, list[Pair]], count: int = 12) -> str:
    """A table of the worst shapes, and of what the roles of both kernels wait for."""
    everything = [p for kind in (DENSE, GROUPED, WGRAD) for p in compared.get(kind, [])]
    worst = sorted(everything, key=lambda p: p.ratio)[:count]
    rows = [["shape", "ratio, predicted", "ours: tile, tensor cores busy, waits",
             "DeepGEMM: tile, tensor cores busy, waits"]]  # fmt: skip

    def facts(p: Prediction) -> str:
        return f"{short(p.key.configuration)}, {p.tensor:.0%}; {p.waits}"

    rows += [[name(p.case), f"{p.ratio:.2f}", facts(p.ours), facts(p.other)] for p in worst]
    return table(rows[0], rows[1:], 4)


# ---- against what was measured on an H200 ----


def measured_ratios(predictor: Predictor) -> str:
    """The shapes at which both sides were timed on an H200, beside what the clock predicts."""
    results = json.loads((MEASURED / "results.json").read_text())
    times: dict[tuple[int, ...], dict[str, float]] = {}
    for record in results["measurements"]:
        if record["status"] == "ok" and record["op"] == cases.FPROP and record["model"] != "small":
            of_shape = times.setdefault(tuple(record["shape"]), {})
            of_shape[record["contender"]] = 1e3 * record["milliseconds"]["median"]
    rows = [["H200", "ours, measured us", "DeepGEMM, measured us", "ratio, measured",
             "ours, predicted us", "DeepGEMM, predicted us", "ratio, predicted"]]  # fmt: skip
    both = [(shape, t) for shape, t in sorted(times.items()) if {TORCHEXT, "deepgemm"} <= {*t}]
    ratios: list[tuple[float, float]] = []
    for shape, t in both:
        case = Case("gemm", cases.FPROP, "deepseek-v3", "", shape)
        try:
            pair = Pair(case, predictor.ours(case, "h200"), predictor.deep_gemm(case, "h200"))
        except OutOfTimeError:
            continue
        ratios.append((t["deepgemm"] / t[TORCHEXT], pair.ratio))
        rows.append([
            "x".join(map(str, shape)),
            f"{t[TORCHEXT]:.1f}",
            f"{t['deepgemm']:.1f}",
            f"{ratios[-1][0]:.2f}",
            f"{pair.ours.microseconds:.1f}",
            f"{pair.other.microseconds:.1f}",
            f"{pair.ratio:.2f}",
        ])  # fmt: skip
    if not ratios:
        return ""
    measured, predicted = (
        statistics.geometric_mean(column) for column in zip(*ratios, strict=True)
    )
    rows.append(["geometric mean", "", "", f"{measured:.2f}", "", "", f"{predicted:.2f}"])
    return table(rows[0], rows[1:])


# ---- all other ops ----

OP_SIZES = {"quantize": ((4096, 7168), (16384, 16384)), "activation": ((4096, 2048), (8192, 14336)),
            "norm": ((4096, 7168), (8192, 4096))}  # fmt: skip
OPS = {"quantize": cases.QUANTIZERS, "activation": cases.ACTIVATIONS, "norm": cases.NORMS}


def op_cases() -> Iterator[Case]:
    for suite, ops in OPS.items():
        for op in ops:
            for shape in OP_SIZES[suite]:
                yield Case(suite, op, "", "", shape)


def ops_table(predictor: Predictor, gpu: str) -> str:
    """A table of every op that is no GEMM: its predicted time, and its rate as a share of the rate
    that copies reach."""
    from torchext import _sim
    from torchext._catalog import CATALOG

    (rate,) = (row["gigabytes_per_second"] for row in _sim.timing_gpus() if row["name"] == gpu)
    rows = [["op", "rows x columns", "launches", f"predicted us, {gpu}",
             "predicted GB/s", "share of copy, predicted", "without launch"]]  # fmt: skip
    for case in op_cases():
        try:
            p = predictor.ours(case, gpu)
        except OutOfTimeError:
            continue
        moved = CATALOG[case.op].bytes(*case.shape) / 1e3  # bytes per microsecond: GB/s
        alone = p.microseconds - p.launch_microseconds
        rows.append([
            f"`{case.op}`",
            "x".join(map(str, case.shape)),
            str(p.kernels.count(" + ") + 1),
            f"{p.microseconds:.1f}",
            f"{moved / p.microseconds:.0f}",
            f"{moved / p.microseconds / rate:.0%}",
            f"{moved / alone / rate:.0%}",
        ])  # fmt: skip
    return table(rows[0], rows[1:], 2)


# ---- plots ----


def plot(compared: dict[str, list[Pair]], folder: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 4.4), layout="constrained", sharey=True)
    for axis, model in zip(axes, cases.MODELS, strict=False):
        for layer in (x for x in cases.LAYERS if x.model == model):
            points = sorted(
                (p.case.shape[0], p.ratio)
                for p in compared[DENSE]
                if (p.case.model, p.case.layer) == (model, layer.name)
            )
            if not points:
                continue
            x, y = zip(*points, strict=True)
            axis.plot(x, y, marker="o", ms=3, label=f"{layer.name} {layer.n}x{layer.k}")
        axis.set(title=f"fprop, {model}", xlabel="M", xscale="log")
    others = sorted(compared[GROUPED] + compared[WGRAD], key=lambda p: (p.case.op, p.ratio))
    for op in dict.fromkeys(p.case.op for p in others):
        points = [(i, p.ratio) for i, p in enumerate(others) if p.case.op == op]
        axes[3].plot(*zip(*points, strict=True), "o", ms=4, label=op)
    axes[3].set(title="grouped and wgrad, one point a shape", xticks=[])
    axes[0].set_ylabel("DeepGEMM's time / torchext's, predicted for an H100")
    for axis in axes:
        axis.axhline(1, color="black", lw=0.8)
        if axis.lines[:-1]:
            axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.suptitle("Predicted by the simulator's clock, not measured; above 1, torchext is faster")
    path = folder / "predicted_gemm.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# ---- the document ----


def text_of(predictor: Predictor, only: Sequence[str]) -> tuple[str, dict[str, list[Pair]]]:
    compared = {kind: pairs(predictor, kind, "h100") for kind in CLASSES if kind in only}
    goals = verdicts(compared)
    parts = ["### Goals\n", table(goals[0], goals[1:])]
    if DENSE in compared:
        parts += [
            "\n### Dense, by M\n\n![Ratios by M](images/predicted_gemm.png)\n",
            ratios_by_rows(compared[DENSE]),
        ]
    if GROUPED in compared or WGRAD in compared:
        parts += [
            "\n### Grouped GEMMs and wgrads\n",
            details([*compared.get(GROUPED, []), *compared.get(WGRAD, [])], "DeepGEMM"),
        ]
    if FUSED in compared:
        parts += [
            "\n### SwiGLU and quantization in the GEMM's epilogue, against two kernels\n",
            details(compared[FUSED], "two kernels"),
        ]
    parts += ["\n### The worst shapes, and what the warps wait for\n", losses(compared)]
    if "measured" in only:
        for title, text in (
            ("Beside measurements on an H200", measured_ratios(predictor)),
            ("Who picks tiles better on an H200", measured_regrets(predictor)),
        ):
            parts += [f"\n### {title}\n", text] if text else []
    if "selection" in only:
        for gpu in GPUS:
            found = regrets(predictor, gpu)
            if not found:
                continue
            mean = statistics.mean(regret.share for regret in found)
            parts += [
                f"\n### The library's choice of tiles, by the clock, {gpu}\n",
                f"{len(found)} of {len(selection_shapes())} shapes, mean regret, predicted: "
                f"{mean:.1%} (goal: at most 3 %); above 2 % in "
                f"{sum(r.share > 0.02 for r in found)}:\n",
                selection_table(found),
            ]
    if "ops" in only:
        parts += ["\n### All other ops\n", ops_table(predictor, "h100")]
    return "\n".join(parts) + "\n", compared


PARTS = (*CLASSES, "measured", "selection", "ops")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--write", action="store_true", help="docs/predicted.md and its plots")
    parser.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="after this time, only what the table has",
    )
    parser.add_argument("--fresh", action="store_true", help="predict everything anew")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    predictor = Predictor(
        say=lambda line: print(line, file=sys.stderr, flush=True), deadline=begin + options.budget
    )
    if options.fresh:
        predictor.table.clear()
    elif changed := predictor.drifted():
        print("the clock has changed: all is predicted anew", *changed, sep="\n", file=sys.stderr)
        predictor.table.clear()
    text, compared = text_of(predictor, options.only)
    print(text)
    if options.write:
        DOCUMENT.write_text(replace_between(DOCUMENT.read_text(), BEGIN, END, f"\n{text}\n"))
        plot(compared, IMAGES)
    print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
