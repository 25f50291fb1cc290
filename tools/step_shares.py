"""Where the time of a training step of torchext.demo goes, by kind of op, not fused and fused.

    python tools/step_shares.py [STEPS]

One thread, BF16 autocast, batches of 16 x 128. Each op counts with its least CPU time over the
steps. Where root runs it, it reserves a core for itself, as other programs would slow some kinds of
ops more than others. docs/layers.md quotes its figures.
"""

from __future__ import annotations

import collections
import copy
import os
import sys
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchext import convert_to_fp8_training
from torchext.demo import train
from torchext.demo.model import ByteTransformer

Times = list[tuple[str, float]]  # the name of each op, and its milliseconds


class Clock(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.times: Times = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        start = time.thread_time_ns()
        result = func(*args, **(kwargs or {}))
        self.times.append((func._schema.name, (time.thread_time_ns() - start) / 1e6))
        return result


def kind(name: str) -> str:
    namespace, _, op = name.partition("::")
    if "gemm" in op or op in ("mm", "_gate_up"):
        return "GEMMs"
    if "scaled_dot_product" in op:
        return "attention"
    if "128x128" in op:
        return "quantizing weights"
    between = namespace == "torchext" or "rms_norm" in op or "silu" in op
    return "quantizers, norms, activations" if between else "elementwise and the rest"


def times_of_step(model: torch.nn.Module, optimizer: Any, tokens: torch.Tensor) -> Times:
    with Clock() as clock:
        train._loss(model, tokens, torch.bfloat16).backward()
    with Clock() as steps:
        optimizer.step()
    optimizer.zero_grad()
    return [*clock.times, ("optimizer", sum(t for _, t in steps.times))]


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base, tokens = ByteTransformer(), torch.randint(256, (16, 129))
    models = {}
    for fuse in (False, True):
        model = copy.deepcopy(base)
        convert_to_fp8_training(model, fuse=fuse)
        models[fuse] = model, train.new_optimizer(model)
        for _ in range(2):  # norms learn what their readers need
            times_of_step(*models[fuse], tokens)
    if os.geteuid() == 0:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    seen: dict[bool, list[Times]] = {False: [], True: []}
    for _ in range(steps):
        for fuse, pair in models.items():
            seen[fuse].append(times_of_step(*pair, tokens))
    for fuse, runs in seen.items():
        sums: dict[str, float] = collections.defaultdict(float)
        for ops in zip(*runs, strict=True):
            name = ops[0][0]
            sums[name if name == "optimizer" else kind(name)] += min(t for _, t in ops)
        total = sum(sums.values())
        print(f"{'fused' if fuse else 'not fused'}: {len(runs[0]) - 1} ops, {total:.0f} ms")
        for label, milliseconds in sorted(sums.items(), key=lambda item: -item[1]):
            print(f"  {label:<32}{milliseconds:7.1f} ms {milliseconds / total:6.1%}")


if __name__ == "__main__":
    main()
