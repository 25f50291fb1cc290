"""Compares predicted times of DeepGEMM's FP8 GEMM with published measurements.

    python -m benchmarks.validate_timing [--predictor module:name] [--sample N] [--plot file.png]

The protocol (docs/timing_validation.md has the results):

- Points are split by a hash of (N, K). What is fitted is fitted on one half of the H100's points;
  figures come from the other half, and from the H200, of which only the memory bandwidth is known.
- A band of shapes that SGLang's DeepGEMM runs 1.5 to 3 times slower than other frameworks do is
  left out of both halves.
- A framework's time includes the quantization of A. The same estimate of it is added to what every
  predictor says of the GEMM.
- A predictor passes if the errors of the H100's held-out half have a median of at most 8 % and a
  mean of at most 10 %.

A predictor is a callable `f(gpu, m, n, k, *, tile=None)` that returns microseconds of the GEMM
kernel alone, for arrays m, n and k, where `tile` is (rows, columns), or None for the kernel's own
choice; `per_point` makes one of a function of numbers. No GPU is used.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np

from . import timing_data
from .deep_gemm_kernel import choose
from .report import replace_between
from .report import table as markdown_table
from .timing_baselines import (
    PHYSICAL,
    ClosedForm,
    Roofline,
    Tile,
    fit_closed_form,
)
from .timing_data import TilePair, Timings

PASS_MEDIAN, PASS_MEAN = 0.08, 0.10

# The smallest quantizer in a CUDA graph takes 1.14 to 1.27 us; large ones move 3 bytes per element.
QUANTIZER_MICROSECONDS = 1.3
QUANTIZER_BANDWIDTH = {"h100": 3.03e6, "h800": 3.03e6, "h200": 4.25e6}  # bytes per microsecond

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "timing_validation.md"
PICTURE = DOCUMENT.parent / "images" / "timing_validation.png"
BEGIN, END = "<!-- begin: make validate-timing -->", "<!-- end -->"

MOST_SAMPLED_FLOPS = 1e12

M_CLASSES = ((1, 128), (129, 1024), (1025, math.inf))
K_CLASSES = ((1, 512), (513, 2048), (2049, math.inf))


class Predictor(Protocol):
    def __call__(
        self, gpu: str, m: np.ndarray, n: np.ndarray, k: np.ndarray, *, tile: Tile | None = None
    ) -> np.ndarray: ...


def per_point(function: Callable[..., float]) -> Predictor:
    """A predictor from `function(gpu, m, n, k, *, tile)`, which takes and returns numbers."""

    def predict(
        gpu: str, m: np.ndarray, n: np.ndarray, k: np.ndarray, *, tile: Tile | None = None
    ) -> np.ndarray:
        sizes = zip(m.tolist(), n.tolist(), k.tolist(), strict=True)
        return np.array([function(gpu, *size, tile=tile) for size in sizes])

    return predict


# The split, and what is left out


@cache
def half_of(n: int, k: int) -> int:
    """0: points of this N and K may be fitted. 1: they are reported."""
    return zlib.crc32(f"{n}x{k}".encode()) & 1


def in_slow_band(m: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The shapes of 67 to 132 tiles of 256x128, which fill one wave more than half."""
    tiles = -(-m // 256) * -(-n // 128)
    return (m >= 256) & (tiles >= 67) & (tiles <= 132)


def split(timings: Timings) -> tuple[Timings, Timings]:
    """The half to fit and the half to report, both without the slow band."""
    reported = np.array([half_of(n, k) for _, n, k in _shapes(timings)], bool)
    kept = ~in_slow_band(timings.m, timings.n)
    return timings.where(~reported & kept), timings.where(reported & kept)


def sample(timings: Timings, count: int) -> Timings:
    """At most `count` points of up to MOST_SAMPLED_FLOPS, a third from each class of M, chosen by a
    hash of the shape."""
    timings = timings.where(2.0 * timings.m * timings.n * timings.k <= MOST_SAMPLED_FLOPS)
    hashes = [zlib.crc32(f"{m},{n},{k}".encode()) for m, n, k in _shapes(timings)]
    order = np.array(hashes).argsort()
    chosen = [
        order[np.isin(order, np.flatnonzero(_within(timings.m, bounds)))][: count // len(M_CLASSES)]
        for bounds in M_CLASSES
    ]
    return timings.where(np.sort(np.concatenate(chosen)))


def row_differences(timings: Timings) -> tuple[Timings, Timings]:
    """Pairs of points of which one has twice the other's N: the difference of their times has no
    launch and no quantization.

    Returns the points of smaller and those of larger N. M is at least 256, and the smaller product
    has at least 1e11 FLOP: differences of small products are noise.
    """

    def code(t: Timings, factor: int) -> np.ndarray:
        return (t.m << 40) + (t.k << 20) + factor * t.n

    codes = code(timings, 1)
    order = codes.argsort()
    wanted = code(timings, 2)
    at = order[np.minimum(np.searchsorted(codes, wanted, sorter=order), len(order) - 1)]
    paired = (codes[at] == wanted) & (timings.m >= 256)
    paired &= 2.0 * timings.m * timings.n * timings.k >= 1e11
    return timings.where(paired), timings.where(at[paired])


# Errors


@dataclass(frozen=True)
class Errors:
    """Statistics of predicted / measured - 1: mean, median and 90th percentile of its absolute
    value, and its median (the bias). `spearman` is the correlation of ranks."""

    points: int
    mean: float
    median: float
    p90: float
    bias: float
    spearman: float

    @property
    def passes(self) -> bool:
        return self.median <= PASS_MEDIAN and self.mean <= PASS_MEAN


def errors(predicted: np.ndarray, measured: np.ndarray) -> Errors:
    if len(measured) == 0:
        nan = math.nan
        return Errors(0, nan, nan, nan, nan, nan)
    relative = predicted / measured - 1
    mean, median = np.abs(relative).mean(), np.median(np.abs(relative))
    ranks = [values.argsort().argsort() for values in (predicted, measured)]
    spearman = np.corrcoef(ranks[0], ranks[1])[0, 1] if len(measured) > 2 else math.nan
    p90 = np.percentile(np.abs(relative), 90)
    return Errors(len(measured), *map(float, (mean, median, p90, np.median(relative), spearman)))


def predict(predictor: Predictor, timings: Timings) -> np.ndarray:
    """Microseconds of what `timings` measures: with the quantization of A, if it has one."""
    gemm = predictor(timings.gpu, timings.m, timings.n, timings.k)
    if not timings.quantizes:
        return gemm
    return gemm + quantization_microseconds(timings.gpu, timings.m, timings.k)


def quantization_microseconds(gpu: str, m: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Time of BF16 [M, K] to FP8, assumed for the frameworks' measurements."""
    return QUANTIZER_MICROSECONDS + 3.0 * m * k / QUANTIZER_BANDWIDTH[gpu]


def difference_errors(predictor: Predictor, timings: Timings) -> Errors:
    """The errors of predicted differences of times, see row_differences."""
    less, more = row_differences(timings)
    predicted = predict(predictor, more) - predict(predictor, less)
    return errors(predicted, more.microseconds - less.microseconds)


def _within(sizes: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    return (sizes >= bounds[0]) & (sizes <= bounds[1])


def classes(timings: Timings) -> Iterator[tuple[str, np.ndarray]]:
    """(name, mask) of each class of M and of K."""
    for letter, sizes, all_bounds in (("M", timings.m, M_CLASSES), ("K", timings.k, K_CLASSES)):
        for low, high in all_bounds:
            name = f"> {low - 1:.0f}" if high == math.inf else f"{low:.0f} to {high:.0f}"
            yield f"{letter} {name}", _within(sizes, (low, high))


def _shapes(timings: Timings) -> Iterator[tuple[int, int, int]]:
    return zip(timings.m.tolist(), timings.n.tolist(), timings.k.tolist(), strict=True)


@dataclass(frozen=True)
class Noise:
    """How far two collections of one kernel's times differ: percentiles 5, 25, 75 and 95 of their
    ratio, and the median error that a perfect predictor of one collection would have."""

    points: int
    ratios: tuple[float, ...]
    floor: float


def noise(first: Timings, second: Timings) -> Noise:
    """What two collections of the same shapes disagree by. Each is taken to have half the variance
    of the log ratio."""
    times = dict(zip(_shapes(first), first.microseconds.tolist(), strict=True))
    both = zip(_shapes(second), second.microseconds.tolist(), strict=True)
    ratios = np.array([us / times[shape] for shape, us in both if shape in times])
    floor = float(np.median(np.abs(np.log(ratios)))) / math.sqrt(2)
    return Noise(len(ratios), tuple(np.percentile(ratios, (5, 25, 75, 95)).tolist()), floor)


# Which tile is faster


@dataclass(frozen=True)
class Ranking:
    """Which of two tiles for one product is faster. Ratios are the second tile's time over the
    first's; regret is the time of the tile that the predictor prefers over that of the faster one,
    less 1."""

    pair: TilePair
    measured: float
    predicted: float

    @property
    def right(self) -> bool:
        return (self.predicted < 1) == (self.measured < 1)

    @property
    def regret(self) -> float:
        chosen = self.pair.microseconds[self.predicted < 1]
        return chosen / min(self.pair.microseconds) - 1


def tile_times(predictor: Predictor, pair: TilePair, gpu: str = "h800") -> tuple[float, float]:
    """Predicted microseconds with each tile of the pair. Groups count as more rows."""
    m, n, k = (np.array([size]) for size in (pair.m * pair.groups, pair.n, pair.k))
    before, after = (float(predictor(gpu, m, n, k, tile=tile)[0]) for tile in pair.tiles)
    return before, after


def ranking(pair: TilePair, times: tuple[float, float]) -> Ranking:
    before, after = pair.microseconds
    return Ranking(pair, after / before, times[1] / times[0])


def rankings(predictor: Predictor) -> list[Ranking]:
    """One for each tile pair of DeepGEMM's pull request 74."""
    return [ranking(pair, tile_times(predictor, pair)) for pair in timing_data.tile_pairs()]


def clock_rankings() -> list[Ranking]:
    """The same by the simulator's clock, from its table."""
    return [ranking(pair, times) for pair, times in timing_data.clock_tile_pairs().items()]


# Predictors


@cache
def closed_form(own_tiles: bool = False) -> ClosedForm:
    """The closed form, fitted on the half of the H100's points that may be fitted."""
    t, _ = split(timing_data.deep_gemm("h100"))
    added = quantization_microseconds(t.gpu, t.m, t.k)
    return fit_closed_form(t, added, replace(PHYSICAL, own_tiles=own_tiles))


def baselines() -> dict[str, Predictor]:
    return {
        "roofline, 1979 TFLOPS": Roofline(1979),
        "roofline, 1300 TFLOPS": Roofline(1300),
        "closed form": closed_form(),
        "closed form, DeepGEMM's tiles": closed_form(own_tiles=True),
    }


def named(name: str) -> Predictor:
    """The predictor `module:name`: a function of numbers, or an object that takes arrays."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(
            f"validate_timing: predictor must be module:name (got {name!r}); for example "
            "benchmarks.timing_baselines:PHYSICAL"
        )
    found = getattr(importlib.import_module(module), attribute)
    return per_point(found) if inspect.isfunction(found) else found


# The report

Row = Sequence[object]


def table(header: Row, rows: Sequence[Row]) -> str:
    return markdown_table(map(str, header), rows) + "\n"


def _percent(value: float, signed: bool = False) -> str:
    return "-" if math.isnan(value) else f"{100 * value:{'+' if signed else ''}.1f} %"


def _cells(e: Errors) -> list[object]:
    rank = "-" if math.isnan(e.spearman) else f"{e.spearman:.3f}"
    return [e.points, *map(_percent, (e.mean, e.median, e.p90)), _percent(e.bias, True), rank]


def _verdict(e: Errors) -> str:
    return "passes" if e.passes else "does not pass: take its predictions as relative only"


ERROR_COLUMNS = ("points", "mean", "median", "p90", "bias", "Spearman")


def held_out(gpu: str, limit: int | None = None) -> Timings:
    """The points to report: of the H100 half, of the H200 (which nothing is fitted on) all."""
    every = timing_data.deep_gemm(gpu)
    every = every.where(~in_slow_band(every.m, every.n))
    points = split(every)[1] if gpu == "h100" else every
    return points if limit is None else sample(points, limit)


def report(predictors: dict[str, Predictor], limit: int | None = None) -> Iterator[str]:
    """The tables, in Markdown. `limit` is of the points of each GPU."""
    yield "\n### Noise of the measurements: two collections of one kernel\n\n"
    rows: list[Row] = []
    for gpu in timing_data.GPUS:
        two = [timing_data.deep_gemm(gpu, name) for name in ("sglang", "vllm")]
        both = {"DeepGEMM, > 4e11 FLOP": noise(*two)}
        bf16 = [timing_data.cublas_bf16(gpu, name) for name in ("sglang", "trtllm")]
        both["cuBLAS BF16"] = noise(*bf16)
        for kernel, n in both.items():
            ratios = (f"{x:.2f}" for x in n.ratios)
            rows.append([f"{gpu} {kernel}", n.points, *ratios, _percent(n.floor)])
    percentiles = ("ratio, 5 %", "25 %", "75 %", "95 %")
    yield table(("", "points", *percentiles, "floor of the median error"), rows)

    points = {gpu: held_out(gpu, limit) for gpu in timing_data.GPUS}
    results = {
        (gpu, name): predict(predictor, points[gpu])
        for gpu in points
        for name, predictor in predictors.items()
    }
    yield "\n### Predicted against measured: held-out points\n\n"
    rows = [
        [f"{gpu} {name}", *_cells(errors(results[gpu, name], points[gpu].microseconds))]
        for gpu, name in results
    ]
    readme = timing_data.readme()
    rows += [
        [f"h800 README, {name}", *_cells(errors(predict(predictor, readme), readme.microseconds))]
        for name, predictor in predictors.items()
    ]
    yield table(("", *ERROR_COLUMNS), rows)

    yield "\n### By class\n\n"
    rows = [
        [f"{gpu} {name}, {which}", *_cells(errors(predicted[mask], points[gpu].microseconds[mask]))]
        for (gpu, name), predicted in results.items()
        if "roofline" not in name
        for which, mask in classes(points[gpu])
    ]
    yield table(("", *ERROR_COLUMNS), rows)

    if limit is None:
        yield "\n### Differences of the times of N and 2N: no launch, no quantization\n\n"
        rows = [
            [f"{gpu} {name}", *_cells(difference_errors(predictor, points[gpu]))]
            for gpu in points
            for name, predictor in predictors.items()
        ]
        yield table(("", *ERROR_COLUMNS), rows)

    yield "\n### Tile pairs of DeepGEMM's pull request 74\n\n"
    rows = []
    ranked_by = {
        name: rankings(predictor)
        for name, predictor in predictors.items()
        if not isinstance(predictor, Roofline)  # which knows no tiles
    }
    ranked_by["the simulator's clock"] = clock_rankings()
    for name, ranked in ranked_by.items():
        for r in ranked:
            shape = f"{r.pair.groups}x{r.pair.m}x{r.pair.n}x{r.pair.k}"
            right = "right" if r.right else "wrong"
            rows.append([f"{name}, {shape}", f"{r.measured:.3f}", f"{r.predicted:.3f}", right])
        regret = np.mean([r.regret for r in ranked])
        count = f"{sum(r.right for r in ranked)} of {len(ranked)} right"
        rows.append([f"{name}, all", "", count, f"regret {_percent(float(regret))}"])
    columns = ("groups x M x N x K", "time of 128x160 / 128x128, measured", "predicted", "")
    yield table(columns, rows)

    yield "\n### Measured over predicted time by what DeepGEMM chooses: all points\n\n"
    rows = []
    for gpu in timing_data.GPUS:
        every = timing_data.deep_gemm(gpu)
        ratio = every.microseconds / predict(closed_form(own_tiles=True), every)
        alone = choose(every.m, every.n, every.k).large_and_alone
        for name, mask in ("one wave of 256x128 or 128x192", alone), ("all others", ~alone):
            spread = [f"{x:.2f}" for x in np.percentile(ratio[mask], (5, 50, 95))]
            slow = _percent(float((ratio[mask] > 1.6).mean()))
            rows.append([f"{gpu}, {name}", mask.sum(), *spread, slow])
    yield table(("tiles", "points", "5 %", "median", "95 %", "above 1.6"), rows)

    yield "\n### The simulator's clock, on a sample of shapes\n\n"
    rows = []
    for name, (t, gemm) in timing_data.clock_predictions().items():
        clock = gemm + (quantization_microseconds(t.gpu, t.m, t.k) if t.quantizes else 0)
        closed = predict(closed_form(own_tiles=True), t)
        for predictor_name, times in (("clock", clock), ("closed form", closed)):
            cells = _cells(errors(times, t.microseconds))
            rows.append([f"{name}, {predictor_name}", *cells])
            for which, mask in list(classes(t))[: len(M_CLASSES)]:
                if mask.any():
                    cells = _cells(errors(times[mask], t.microseconds[mask]))
                    rows.append([f"{name}, {predictor_name}, {which}", *cells])
    yield table(("", *ERROR_COLUMNS), rows)

    yield "\n### Verdict\n\n"
    t, gemm = timing_data.clock_predictions()["h100 reported half"]
    e = errors(gemm + quantization_microseconds(t.gpu, t.m, t.k), t.microseconds)
    yield (
        f"- the simulator's clock, {e.points} shapes: median {_percent(e.median)}, mean"
        f" {_percent(e.mean)}: {_verdict(e)}.\n"
    )
    for name in predictors:
        e = errors(results["h100", name], points["h100"].microseconds)
        t = points["h100"]
        usual = ~choose(t.m, t.n, t.k).large_and_alone
        less = errors(results["h100", name][usual], t.microseconds[usual])
        yield (
            f"- {name}: median {_percent(e.median)}, mean {_percent(e.mean)}: {_verdict(e)}."
            f" Without shapes of one wave of 256x128 or 128x192: {_percent(less.median)},"
            f" {_percent(less.mean)}.\n"
        )
    yield "\n"


def plot(predictors: dict[str, Predictor], path: Path, limit: int | None = None) -> None:
    """Draws predicted over measured times by the measured time, a panel for each GPU."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {name: p for name, p in predictors.items() if not isinstance(p, Roofline)}
    figure, panels = plt.subplots(
        len(shown), len(timing_data.GPUS), figsize=(10, 3.6 * len(shown)), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for line, (name, predictor) in zip(panels, shown.items(), strict=True):
        for axes, gpu in zip(line, timing_data.GPUS, strict=True):
            points = held_out(gpu, limit)
            predicted = predict(predictor, points)
            for color, (which, mask) in zip(
                ("#D55E00", "#0072B2", "#009E73"), classes(points), strict=False
            ):
                x, y = points.microseconds[mask], predicted[mask]
                axes.scatter(x, y, s=3, color=color, label=which, linewidths=0, alpha=0.5)
            ends = [points.microseconds.min(), points.microseconds.max()]
            axes.plot(ends, ends, color="black", linewidth=0.8)
            axes.set(xscale="log", yscale="log", title=f"{name}, {gpu.upper()}, held-out points")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("predicted, µs")
    for axes in panels[-1]:
        axes.set_xlabel("measured by others, µs")
    panels[0, 0].legend(markerscale=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def with_report(text: str, tables: str) -> str:
    """The document with other tables between its two marks."""
    return replace_between(text, BEGIN, END, f"\n{tables}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.validate_timing",
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
    )
    add = parser.add_argument
    add("--predictor", action="append", default=[], metavar="MODULE:NAME",
        help="validate this predictor too; may be repeated")  # fmt: skip
    add("--sample", type=int, metavar="N",
        help="at most N held-out points of each GPU, for slow predictors")  # fmt: skip
    add("--plot", type=Path, help="write a scatter plot")
    add("--write", action="store_true", help="write the document's tables and picture")
    options = parser.parse_args(arguments)
    predictors = baselines() | {name: named(name) for name in options.predictor}
    parts = []
    for part in report(predictors, options.sample):
        print(part, end="", flush=True)
        parts.append(part)
    if options.write:
        DOCUMENT.write_text(with_report(DOCUMENT.read_text(), "".join(parts)))
        plot(predictors, PICTURE, options.sample)
    if options.plot is not None:
        plot(predictors, options.plot, options.sample)


if __name__ == "__main__":
    main()
