"""Published timings of Hopper's GEMMs, which the simulator's timing model is validated against.

SOURCES.md says where each table comes from. No time here was measured by this project. `extract.py`
makes the tables of frameworks from NVIDIA's wheel.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
GPUS = ("h100", "h200")
README_REVISIONS = ("2025-02-25", "2025-03-25", "2025-04-09")


@dataclass(frozen=True)
class Timings:
    """Measured times of one kernel on one GPU.

    Attributes:
        gpu: "h100", "h800" or "h200".
        name: what was measured, and by whom.
        m, n, k: int64 [points], the sizes of D[M, N] = A[M, K] @ B[N, K].T.
        microseconds: float64 [points].
        quantizes: the time includes a kernel that quantizes A from BF16.
    """

    gpu: str
    name: str
    m: np.ndarray
    n: np.ndarray
    k: np.ndarray
    microseconds: np.ndarray
    quantizes: bool

    def __len__(self) -> int:
        return len(self.m)

    def where(self, chosen: np.ndarray) -> Timings:
        """The points that `chosen`, a boolean mask or an array of indices, selects."""
        columns = (self.m, self.n, self.k, self.microseconds)
        m, n, k, microseconds = (column[chosen] for column in columns)
        return Timings(self.gpu, self.name, m, n, k, microseconds, self.quantizes)


@dataclass(frozen=True)
class TilePair:
    """One product, measured with two tile shapes on one card.

    Attributes:
        m, n, k, groups: sizes; with several groups, m is the rows of one group.
        tiles: (rows, columns) of both tiles.
        microseconds: the time with each tile.
    """

    m: int
    n: int
    k: int
    groups: int
    tiles: tuple[tuple[int, int], tuple[int, int]]
    microseconds: tuple[float, float]


def _rows(name: str) -> Iterator[dict[str, str]]:
    with (FOLDER / name).open(newline="") as file:
        yield from csv.DictReader(line for line in file if not line.startswith("#"))


def _timings(gpu: str, name: str, points: list[tuple[int, int, int, float]], q: bool) -> Timings:
    if not points:
        raise ValueError(f"timing_data: gpu and name must be in the tables (got {gpu!r}, {name!r})")
    table = np.array(points)
    m, n, k = (table[:, i].astype(np.int64) for i in range(3))
    return Timings(gpu, name, m, n, k, table[:, 3], q)


@cache
def deep_gemm(gpu: str, framework: str = "sglang") -> Timings:
    """DeepGEMM's FP8 block-scaled product and the quantization of its input, as a framework runs
    them, for N and K of at least 512 and M of at least 16.

    `framework` is "sglang", or "vllm" for the products of more than 4e11 FLOP: vLLM was timed
    without CUDA graphs, so smaller ones measure the host.
    """
    points = []
    for row in _rows(f"deep_gemm_{framework}.csv"):
        if row["gpu"] == gpu:
            n, k = int(row["n"]), int(row["k"])
            points += [(int(m), n, k, float(us)) for m, us in row.items() if m.isdigit() and us]
    return _timings(gpu, f"DeepGEMM in {framework}", points, True)


@cache
def readme(revision: str = "2025-04-09") -> Timings:
    """The dense products of DeepGEMM's README on an H800 SXM5, at one of README_REVISIONS."""
    points = [
        (int(row["m"]), int(row["n"]), int(row["k"]), float(row["us"]))
        for row in _rows("deep_gemm_readme.csv")
        if row["revision"] == revision and row["groups"] == "1" and not row["tile"]
    ]
    return _timings("h800", f"DeepGEMM README {revision}", points, False)


@cache
def tile_pairs() -> tuple[TilePair, ...]:
    """The products that DeepGEMM's pull request 74 timed with 128x128 and with 128x160 tiles."""
    times: dict[tuple[int, ...], dict[tuple[int, int], float]] = {}
    for row in _rows("deep_gemm_readme.csv"):
        if row["tile"]:
            rows, columns = map(int, row["tile"].split("x"))
            key = tuple(int(row[name]) for name in ("m", "n", "k", "groups"))
            times.setdefault(key, {})[rows, columns] = float(row["us"])
    pairs = []
    for (m, n, k, groups), by_tile in times.items():
        (first, before), (second, after) = by_tile.items()
        pairs.append(TilePair(m, n, k, groups, (first, second), (before, after)))
    return tuple(pairs)


@cache
def cublas_bf16(gpu: str, framework: str) -> Timings:
    """cuBLAS's BF16 products, timed by "sglang" and by "trtllm": two collections of one kernel."""
    points = [
        (int(row["m"]), int(row["n"]), int(row["k"]), float(row[f"{gpu}_{framework}"]))
        for row in _rows("cublas_bf16.csv")
    ]
    return _timings(gpu, f"cuBLAS BF16 in {framework}", points, False)


@cache
def static_quantization(gpu: str, framework: str) -> Timings:
    """BF16 [M, K] to FP8 with a known scale, by "vllm" and "trtllm". `n` is 0."""
    points = [
        (int(row["m"]), 0, int(row["k"]), float(row[f"{gpu}_{framework}"]))
        for row in _rows("static_quantization.csv")
    ]
    return _timings(gpu, f"static quantization in {framework}", points, True)


@cache
def clock_predictions() -> dict[str, tuple[Timings, np.ndarray]]:
    """By set of shapes: what was measured, and what the simulator's clock predicted of the GEMM
    alone, in microseconds (`python -m benchmarks.simulated_times` writes them)."""
    rows: dict[str, list[dict[str, str]]] = {}
    for row in _rows("clock_predictions.csv"):
        rows.setdefault(row["set"], []).append(row)
    sets = {}
    for name, lines in rows.items():
        points = [(int(r["m"]), int(r["n"]), int(r["k"]), float(r["measured_us"])) for r in lines]
        measured = _timings(lines[0]["gpu"], name, points, "README" not in name)
        sets[name] = measured, np.array([float(r["predicted_gemm_us"]) for r in lines])
    return sets


@cache
def clock_tile_pairs() -> dict[TilePair, tuple[float, float]]:
    """What the simulator's clock predicted for both tiles of each of tile_pairs(), in microseconds
    (`python -m benchmarks.simulated_times` writes it)."""
    times: dict[tuple[int, ...], list[float]] = {}
    for row in _rows("clock_tile_pairs.csv"):
        key = tuple(int(row[name]) for name in ("groups", "m", "n", "k"))
        times.setdefault(key, []).append(float(row["predicted_us"]))
    pairs = {}
    for pair in tile_pairs():
        before, after = times[pair.groups, pair.m, pair.n, pair.k]
        pairs[pair] = before, after
    return pairs
