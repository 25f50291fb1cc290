"""Measures linear layers with BF16 and with FP8 weights: bytes, and the time of a forward.

    OMP_NUM_THREADS=2 python tools/measure_inference.py [--features 4096] [--rows 1 16 256]
    python tools/measure_inference.py --device cuda [...]

Prints bytes for each parameter, and the milliseconds of a forward: medians of seven interleaved
calls. On a CPU this is the CPU time of all threads, so that other work on the machine does
not count. The layers together are larger than most caches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import get_args

import torch

from torchext.nn import FP8Linear
from torchext.nn.fp8_linear import Mode


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 256])
    options = parser.parse_args()
    size = options.features, options.features
    layers = [
        torch.nn.Linear(*size, False, options.device, torch.bfloat16) for _ in range(options.layers)
    ]
    models = {"bf16": torch.nn.Sequential(*layers)}
    mode: Mode
    for mode in get_args(Mode):
        models[mode] = torch.nn.Sequential(*(FP8Linear.from_linear(each, mode) for each in layers))
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    for name, model in models.items():
        count = options.layers * options.features**2
        print(f"{sum(p.nbytes for p in model.parameters()) / count:.5f} bytes  {name}")
    for rows in options.rows:
        x = torch.randn(rows, options.features, dtype=torch.bfloat16, device=options.device)
        samples: dict[str, list[float]] = {name: [] for name in models}
        with torch.inference_mode():
            for _ in range(8):
                for name, model in models.items():
                    start = clock()
                    model(x)
                    if options.device == "cuda":
                        torch.cuda.synchronize()
                    samples[name].append(1e3 * (clock() - start))
        for name, times in samples.items():
            print(f"{statistics.median(times[1:]):9.2f} ms  {name}, {rows} rows")


if __name__ == "__main__":
    main()
