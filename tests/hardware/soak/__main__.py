"""Command line of the soak, which runs random jobs for a given time; see docs/benchmarks.md."""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

from benchmarks.selection import NoSelection, Selection

from .jobs import ops_without_a_job
from .operands import Lab
from .runner import Soak

PROGRESS_S = 10.0
ROUND_LIMIT_S = {"cpu": 120.0, "sim": 600.0, "cuda": 120.0}
HUNG = 3  # exit status if a round does not end


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.hardware.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--device", choices=("cpu", "sim", "cuda"), help="default: cuda, else sim")
    parser.add_argument("--seed", type=int, help="default: a random seed")
    parser.add_argument("--round", type=int, help="only this round of --seed: repeats a fault")
    return parser.parse_args(arguments)


def laboratory(device: str | None) -> Lab:
    """The Lab for `device`, or for the default if None. Raises RuntimeError if unavailable."""
    import torchext

    if device is None:
        device = next(d for d in ("cuda", "sim", "cpu") if torchext.is_available(d)[0])
    available, reason = torchext.is_available(device)
    if not available:
        raise RuntimeError(f"--device {device}: {reason}")
    if device == "sim":
        return Lab(device, Selection(132))
    if device == "cpu":
        return Lab(device, NoSelection())
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    hopper = (properties.major, properties.minor) == (9, 0)
    count = properties.multi_processor_count
    return Lab(device, Selection(count) if hopper else NoSelection(), count)


def without(lab: Lab) -> Lab:
    """`lab` without the jobs for which the device has no kernels; prints which it leaves out."""
    if lab.device == "cpu":
        return lab
    import torch

    from torchext import ops, sim

    x = torch.zeros(16, 16, device=lab.torch_device)
    operands = (*ops.quantize_1x128(x), *ops.quantize_128x128(x))
    context = sim.simulate() if lab.device == "sim" else nullcontext()
    try:
        with context:
            ops.fp8_gemm_nt_relu2_quantize(*operands)
    except RuntimeError as error:
        if "no sm_" not in str(error):
            raise
        print(f"left out: {error}", flush=True)
        return replace(lab, without=frozenset({"fused"}))
    return lab


class Watchdog:
    """Ends the process if a round does not end, since a kernel that hangs blocks the main thread.

    A context manager: it watches until its block ends. `feed` reports that a round has ended.
    """

    def __init__(self, limit_s: float, reproduce: str):
        self.limit_s = limit_s
        self.reproduce = reproduce
        self.number = 0
        self._fed = time.monotonic()
        self._done = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def feed(self, number: int) -> None:
        self.number, self._fed = number, time.monotonic()

    def _watch(self) -> None:
        while time.monotonic() - self._fed < self.limit_s:
            if self._done.wait(min(1.0, self.limit_s / 4)):
                return
        print(f"FAULT round {self.number}: no end after {self.limit_s:.0f} s", flush=True)
        print(f"repeat it with: {self.reproduce} --round {self.number}", flush=True)
        faulthandler.dump_traceback()
        os._exit(HUNG)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: no fault. 1: faults. 2: no device, or an op has no job. 3: a round hung."""
    options = parse(arguments)
    missing = ops_without_a_job()
    if missing:
        print(
            "soak: every op must have a job"
            f" (none draws {', '.join(missing)}); add an entry to torchext/_catalog",
            file=sys.stderr,
        )
        return 2
    try:
        lab = without(laboratory(options.device))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    seed = random.randrange(1 << 31) if options.seed is None else options.seed
    reproduce = f"python -m tests.hardware.soak --device {lab.device} --seed {seed}"
    print(f"{reproduce}: {options.minutes:g} minutes", flush=True)
    soak = Soak(lab, seed)
    start = said = time.monotonic()
    printed = 0

    def progress(soak: Soak, rounds: int) -> None:
        nonlocal said, printed
        watchdog.feed(rounds)
        for fault in soak.faults[printed:]:
            print(f"FAULT {fault}\n  repeat it with: {reproduce} --round {fault.round}", flush=True)
        printed = len(soak.faults)
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            print(f"{rounds} rounds, {soak.launches} launches, {printed} faults", flush=True)

    with Watchdog(ROUND_LIMIT_S[lab.device], reproduce) as watchdog:
        if options.round is not None:
            watchdog.feed(options.round)
            soak.round(options.round)
            rounds = 1
            progress(soak, options.round)
        else:
            rounds = soak.run(start + 60 * options.minutes, progress)
    minutes = (time.monotonic() - start) / 60
    print(
        f"soak on {lab.device}, seed {seed}: {rounds} rounds, {soak.launches} launches in"
        f" {minutes:.1f} min, {len(soak.faults)} faults"
    )
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
