"""Measures a torchext.nn.Linear with its weight changed, unchanged and fixed.

    OMP_NUM_THREADS=1 python tools/measure_fp8_weights.py [--tokens 4096] [--features 2048]
    python tools/measure_fp8_weights.py --device cuda [...]

Prints the milliseconds of forward with backward, and of forward alone: medians of seven interleaved
calls. On a CPU this is CPU time, so that other work on the machine does not count.
"changed": the weight is written, as by an optimizer, and quantized again. "the same": the weight is
not written; a CPU finds this out with a hash, and CUDA quantizes without a check. "fixed": within
torchext.fixed_weights.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch

import torchext


def cases(
    linear: torchext.nn.Linear, x: torch.Tensor
) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """Case -> (untimed preparation, timed call)."""

    def change() -> None:
        with torch.no_grad():
            linear.weight.neg_()

    def step() -> None:
        linear(x).backward(x.new_ones(()).expand(len(x), linear.out_features))

    @torch.no_grad()
    def forward() -> None:
        linear(x)

    def rest() -> None:
        pass

    return {
        "step, weight changed": (change, step),
        "step, weight the same": (rest, step),
        "step, weight fixed": (rest, step),
        "forward, weight changed": (change, forward),
        "forward, weight the same": (rest, forward),
        "forward, weight fixed": (rest, forward),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--features", type=int, default=2048)
    options = parser.parse_args()
    kind = {"device": options.device, "dtype": torch.bfloat16}
    x = torch.randn(options.tokens, options.features, **kind).requires_grad_()
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    linears: dict[str, torchext.nn.Linear] = {}
    samples: dict[str, list[float]] = {}
    with contextlib.ExitStack() as fixed:
        for name in cases(torchext.nn.Linear(8, 8, **kind), x):
            linears[name] = torchext.nn.Linear(options.features, options.features, **kind)
            if name.endswith("fixed"):
                fixed.enter_context(torchext.fixed_weights(linears[name]))
        for _ in range(8):
            for name, linear in linears.items():
                before, call = cases(linear, x)[name]
                before()
                if options.device == "cuda":
                    torch.cuda.synchronize()
                start = clock()
                call()
                if options.device == "cuda":
                    torch.cuda.synchronize()
                samples.setdefault(name, []).append(1e3 * (clock() - start))
    for name, times in samples.items():
        print(f"{statistics.median(times[1:]):9.2f} ms  {name}")


if __name__ == "__main__":
    main()
