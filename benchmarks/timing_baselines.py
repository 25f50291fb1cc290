"""Predictors of a GEMM's time that need no simulation: two rooflines and a closed form.

The simulator's timing model has to do better than these. All return microseconds of the GEMM kernel
alone. Their results are predictions, not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from .deep_gemm_kernel import BLOCK_K, choose
from .timing_data import Timings

SMS = 132
# Bytes per microsecond: what streaming kernels reach, not the data sheet's 3.35 and 4.8 TB/s.
MEMORY_BANDWIDTH = {"h100": 2.95e6, "h800": 2.95e6, "h200": 4.1e6}
LAUNCH_MICROSECONDS = 2.0  # a quantizer and a GEMM of no work take 3.3 us, a quantizer 1.3

# DeepGEMM's tiles: a warpgroup has 64 rows, and a tile of over 128 columns holds at most two scales
# of B in the ways that its unrolled loop knows.
TILES = tuple(
    (rows, columns)
    for rows in (64, 128, 256)
    for columns in (*range(16, 129, 16), 144, 160, 192)
    if rows < 256 or columns <= 128
)

Tile = tuple[int, int]


def _memory_microseconds(gpu: str, m: np.ndarray, n: np.ndarray, k: np.ndarray) -> np.ndarray:
    """FP8 operands and a BF16 result, each moved once."""
    return (m * k + n * k + 2.0 * m * n) / MEMORY_BANDWIDTH[gpu]


@dataclass(frozen=True)
class Roofline:
    """The larger of arithmetic at `tflops` and of memory traffic, plus a launch."""

    tflops: float

    def __call__(
        self, gpu: str, m: np.ndarray, n: np.ndarray, k: np.ndarray, *, tile: Tile | None = None
    ) -> np.ndarray:
        compute = 2.0 * m * n * k / (self.tflops * 1e6)
        return np.maximum(compute, _memory_microseconds(gpu, m, n, k)) + LAUNCH_MICROSECONDS


@dataclass(frozen=True)
class ClosedForm:
    """Waves of tiles, each a main loop that tensor cores or L2 bound, and a serial epilogue.

    Attributes, fitted but for the last:
        clock_ghz: SM clock under this load.
        drain: cycles of each K block in which the tensor cores are idle.
        l2_bytes: bytes per cycle that one SM gets from L2.
        tile_cycles: of a tile, beside its main loop and its store.
        start: microseconds before and after the tiles.
        own_tiles: assume the tile that DeepGEMM chooses, not the best.
    """

    clock_ghz: float
    drain: float
    l2_bytes: float
    tile_cycles: float
    start: float
    own_tiles: bool = False

    def __call__(
        self, gpu: str, m: np.ndarray, n: np.ndarray, k: np.ndarray, *, tile: Tile | None = None
    ) -> np.ndarray:
        """Time with `tile`, by default with the one DeepGEMM chooses or the best of TILES."""
        if tile is not None:
            return self.with_tile(gpu, m, n, k, tile)
        if self.own_tiles:
            chosen = choose(m, n, k)
            return self.with_tile(gpu, m, n, k, (chosen.block_m, chosen.block_n))
        times = (self.with_tile(gpu, m, n, k, tile) for tile in TILES)
        return np.minimum.reduce(list(times))

    def with_tile(
        self, gpu: str, m: np.ndarray, n: np.ndarray, k: np.ndarray, tile: tuple[Any, Any]
    ) -> np.ndarray:
        """Time with one tile for all shapes, or with arrays that have a tile for each."""
        rows, columns = tile
        # The interval of one wgmma m64nNk32: operands at 128 bytes per cycle from shared memory, or
        # the tensor cores' N/2 cycles. Four make a K block of one warpgroup's 64 rows.
        wgmma = np.maximum((64 + columns) / 4, columns / 2) + 0.7
        tensor = 4 * np.maximum(rows // 64, 1) * wgmma
        load = (rows + columns) * BLOCK_K / self.l2_bytes
        store = 2.0 * rows * columns / self.l2_bytes
        waves = -(-(-(-m // rows) * -(-n // columns)) // SMS)
        block = np.maximum(tensor + self.drain, load)
        cycles = waves * (-(-k // BLOCK_K) * block + self.tile_cycles + store)
        busy = np.maximum(cycles / (self.clock_ghz * 1e3), _memory_microseconds(gpu, m, n, k))
        return busy + self.start


def fit_closed_form(
    timings: Timings, added: np.ndarray, start: ClosedForm, rounds: int = 40
) -> ClosedForm:
    """The parameters that make the mean of |log(predicted / measured)| least.

    A pattern search from `start`: deterministic, and without further packages. `added` is the part
    of the measured microseconds that is not the GEMM's.
    """
    t = timings
    chosen = choose(t.m, t.n, t.k)

    def made(parameters: Sequence[float]) -> ClosedForm:
        clock, drain, l2, tile, begin = parameters
        return ClosedForm(clock, drain, l2, tile, begin, start.own_tiles)

    def loss(parameters: Sequence[float]) -> float:
        if start.own_tiles:
            tiles = chosen.block_m, chosen.block_n
            gemm = made(parameters).with_tile(t.gpu, t.m, t.n, t.k, tiles)
        else:
            gemm = made(parameters)(t.gpu, t.m, t.n, t.k)
        return float(np.abs(np.log((gemm + added) / t.microseconds)).mean())

    best = list(astuple(start)[:-1])
    least, step = loss(best), 0.1
    for _ in range(rounds):
        before = least
        for i in range(len(best)):
            for factor in (1 + step, 1 / (1 + step)):
                trial = [*best[:i], best[i] * factor, *best[i + 1 :]]
                if (value := loss(trial)) < least:
                    best, least = trial, value
        if least == before:
            step /= 2
        if step < 1e-3:
            break
    return made(best)


# From physical constants of published microbenchmarks; where the fit starts.
PHYSICAL = ClosedForm(clock_ghz=1.5, drain=46.0, l2_bytes=38.0, tile_cycles=1500.0, start=2.0)
