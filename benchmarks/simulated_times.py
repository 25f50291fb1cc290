"""Predicts the time of DeepGEMM's FP8 GEMM by the simulator's clock, for validate_timing.

    python -m benchmarks.validate_timing --sample 45 \
        --predictor benchmarks.simulated_times:DEEP_GEMM

The kernels are DeepGEMM's own (deep_gemm_kernel), in the configuration that it chooses, compiled
for each N and K as it does. Predictions, not measurements.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from . import timing_data
from .deep_gemm_kernel import (
    BLOCK_K,
    Configuration,
    compile_kernels,
    configuration,
    kernel_name,
    launch_options,
)
from .validate_timing import held_out, sample, split, tile_times

if TYPE_CHECKING:
    from torchext import sim

Key = tuple[Configuration, int, int]  # what a kernel is compiled for: with N and K


@dataclass
class DeepGemm:
    """A predictor of arrays. It compiles all kernels of a call at once, and keeps them.

    launch: whether times include that of the launch, as replays of CUDA graphs do; those of a
        profiler do not.
    """

    launch: bool = True
    modules: dict[Key, sim.Module] = field(default_factory=dict)

    def __call__(
        self,
        gpu: str,
        m: np.ndarray,
        n: np.ndarray,
        k: np.ndarray,
        *,
        tile: tuple[int, int] | None = None,
    ) -> np.ndarray:
        shapes = list(zip(m.tolist(), n.tolist(), k.tolist(), strict=True))
        keys = [(configuration(*shape, tile=tile), *shape[1:]) for shape in shapes]
        missing = sorted({key for key in keys if key not in self.modules}, key=repr)
        if missing:
            module = compile_kernels(missing)
            self.modules |= {key: module for key in missing}
        times = zip(shapes, keys, strict=True)
        return np.array([self._microseconds(gpu, *shape, key) for shape, key in times])

    def _microseconds(self, gpu: str, m: int, n: int, k: int, key: Key) -> float:
        chosen = key[0]
        a, b = (torch.empty(rows, k, dtype=torch.float8_e4m3fn) for rows in (m, n))
        a_scale = torch.empty(-(-k // BLOCK_K), -(-m // 4) * 4)
        b_scale = torch.empty(-(-n // BLOCK_K), -(-k // BLOCK_K))
        d = torch.empty(m, n, dtype=torch.bfloat16)
        module = self.modules[key]
        report = module.launch(
            kernel_name(module, *key),
            timing=gpu,
            timing_only=True,
            **launch_options(chosen, (a, a_scale), (b, b_scale), d),
        )
        if report.timing is None:
            raise RuntimeError(f"simulated_times: {m}x{n}x{k}: the launch stopped: {report}")
        launch = 0 if self.launch else report.timing.launch_microseconds
        return report.timing.microseconds - launch


DEEP_GEMM = DeepGemm()


def write_tile_pairs() -> None:
    """Writes timing_data/clock_tile_pairs.csv: both tiles of each of timing_data.tile_pairs()."""
    with (timing_data.FOLDER / "clock_tile_pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["groups", "m", "n", "k", "tile", "predicted_us"])
        for pair in timing_data.tile_pairs():
            times = tile_times(DeepGemm(launch=False), pair)
            for (rows, columns), us in zip(pair.tiles, times, strict=True):
                shape = pair.groups, pair.m, pair.n, pair.k
                writer.writerow([*shape, f"{rows}x{columns}", f"{us:.4g}"])


def main() -> None:
    """Writes the tables of the clock's predictions in timing_data: about 5 s of one core for each
    of 123 shapes and 12 tiles."""
    write_tile_pairs()

    h100 = split(timing_data.deep_gemm("h100"))
    sets = {
        "h100 fitted half": sample(h100[0], 30),
        "h100 reported half": sample(h100[1], 45),
        "h800 README": timing_data.readme(),
        "h200": held_out("h200", 30),
    }
    with (timing_data.FOLDER / "clock_predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["set", "gpu", "m", "n", "k", "predicted_gemm_us", "measured_us"])
        for name, t in sets.items():
            # The README has the times of a profiler.
            predictor = DeepGemm(launch=name != "h800 README")
            predicted = predictor(t.gpu, t.m, t.n, t.k)
            for *sizes, us, measured in zip(t.m, t.n, t.k, predicted, t.microseconds, strict=True):
                writer.writerow([name, t.gpu, *sizes, f"{us:.4g}", measured])


if __name__ == "__main__":
    main()
