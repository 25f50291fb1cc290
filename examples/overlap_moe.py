"""A pipeline in which tokens of one micro-batch travel while experts of another multiply.

    torchrun --nproc-per-node 2 examples/overlap_moe.py --trace trace.json --picture overlap.png

Each process is a pipeline of its own with two stages, which torch's ScheduleDualPipeV runs, and
holds a part of the experts of both. With two micro-batches (--micro-batches) the schedule has one
action OVERLAP_F_B: the forward of the second stage for the last one beside the backward of the
first stage for the first one. `torchext.moe.overlap_in_schedule` makes it run them in turns: one
computes while bytes of the other travel.

It trains a step with and without overlap, compares the bits of losses and gradients, and prints,
for each exchange of the overlapped action, what the other half did meanwhile. --trace writes a
profile for chrome://tracing or ui.perfetto.dev; --picture draws the action. CPUs only, with gloo.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._profiler import _ExperimentalConfig
from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV

import torchext
from torchext.moe import Dispatcher, overlap_in_schedule

EXPERTS, CHOICES = 16, 4
STARTS, WAITS = "torchext.moe: starts ", "torchext.moe: waits for "  # ranges of the profile


class Block(nn.Module):
    """Something for attention, then experts."""

    def __init__(self, width: int, inner: int, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.attention = torchext.nn.SwiGLU(width, 2 * width)
        self.router = nn.Linear(width, EXPERTS, bias=False)
        self.experts = torchext.nn.MoE(width, inner, EXPERTS, dispatcher=dispatcher)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        weights, ids = self.router(x).softmax(-1).topk(CHOICES)
        return x + self.experts(x, ids, weights)


class Span(NamedTuple):
    """An op, or the bytes of an exchange. Milliseconds from the start of the action."""

    name: str
    half: str  # "forward" or "backward"
    start: float
    end: float


class Exchange(NamedTuple):
    """An exchange of the action.

    Attributes:
        bytes: from when to when they travel.
        gemms: of the other half's experts, between the start of the exchange and the wait for it.
    """

    bytes: Span
    gemms: list[Span]


def train(options: argparse.Namespace, group: Any, *, overlapped: bool) -> tuple[list[Tensor], Any]:
    """Losses and gradients of a step, and the profile of a second one."""
    torch.manual_seed(dist.get_rank())
    dispatcher = Dispatcher(EXPERTS)
    parts = [
        nn.Sequential(
            *(Block(options.width, options.inner, dispatcher) for _ in range(options.layers))
        )
        for _ in range(2)
    ]
    cpu = torch.device("cpu")
    stages = [PipelineStage(part, i, 2, cpu, group=group) for i, part in enumerate(parts)]
    schedule = ScheduleDualPipeV(stages, options.micro_batches, nn.MSELoss())
    if overlapped:
        overlap_in_schedule(schedule)
    x = torch.randn(options.micro_batches * options.tokens, options.width)
    losses: list[Tensor] = []
    schedule.step(x, target=torch.zeros_like(x), losses=losses)
    found = [*losses, *(p.grad.clone() for part in parts for p in part.parameters())]
    dist.barrier()
    start = time.perf_counter()
    every_thread = _ExperimentalConfig(profile_all_threads=True)
    cpu_only = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu_only, experimental_config=every_thread) as profile:
        schedule.step(x, target=torch.zeros_like(x))
    if dist.get_rank() == 0:
        how = "with overlap" if overlapped else "without"
        print(f"a step {how}: {1000 * (time.perf_counter() - start):.0f} ms under the profiler")
    return found, profile


def read(profile: Any) -> tuple[list[Span], list[Exchange]]:
    """The ops of both halves of the last overlapped action, and its exchanges."""
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    action = [event for event in events if "OVERLAP_F_B" in event.name][-1]
    begin, end = action.time_range.start, action.time_range.end
    events = [event for event in events if begin < event.time_range.start < end]
    travels = [event for event in events if event.name == "gloo:all_to_all"]

    def span(event: Any, thread: int, name: str | None = None) -> Span:
        half = "forward" if thread == action.thread else "backward"
        times = (event.time_range.start - begin) / 1e3, (event.time_range.end - begin) / 1e3
        return Span(name or event.name, half, *times)

    threads_of_bytes = {event.thread for event in travels}
    ops = [span(e, e.thread) for e in events if e.thread not in threads_of_bytes]
    starts = [event for event in events if event.name.startswith(STARTS)]
    exchanges = []
    # Gloo sends what is started first first.
    for started, bytes_travel in zip(starts, travels, strict=True):
        purpose = started.name.removeprefix(STARTS)
        sent = span(bytes_travel, started.thread, purpose)
        wait = next(
            op
            for op in ops
            if (op.name, op.half) == (WAITS + purpose, sent.half) and op.end > sent.start
        )
        gemms = [
            op
            for op in ops
            if "grouped_fp8_gemm" in op.name
            and op.half != sent.half
            and sent.start < op.start < wait.end
        ]
        exchanges.append(Exchange(sent, gemms))
    return ops, exchanges


def draw(ops: list[Span], exchanges: list[Exchange], path: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot: no display is needed

    rows = [f"{half} {what}" for half in ("backward", "forward") for what in ("bytes", "computes")]
    figure = Figure(figsize=(10, 3), dpi=150, layout="constrained")
    axes = figure.subplots()

    def bars(spans: list[Span], what: str, color: str, label: str) -> None:
        for half in ("forward", "backward"):
            ranges = [(s.start, s.end - s.start) for s in spans if s.half == half]
            height = (rows.index(f"{half} {what}") - 0.35, 0.7)
            axes.broken_barh(ranges, height, color=color, label=label)
            label = "_"  # one entry of the legend

    own = [op for op in ops if op.name.startswith(("torchext::", "aten::"))]
    bars(own, "computes", "lightsteelblue", "other ops")
    gemms = [op for op in ops if "grouped_fp8_gemm" in op.name]
    bars(gemms, "computes", "tab:blue", "experts multiply")
    sent = [exchange.bytes for exchange in exchanges]
    for word, color in (("dispatch", "tab:orange"), ("return", "tab:red"), ("counts", "gray")):
        bars([s for s in sent if word in s.name], "bytes", color, f"{word} under way")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="ms", title="One overlapped action: a forward and a backward take turns")
    figure.legend(loc="outside right center", fontsize="small")
    axes.grid(alpha=0.3, axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"tokens": 256, "width": 512, "inner": 256, "layers": 2, "micro-batches": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # A pipeline for each process: all of them make all groups.
    group = [dist.new_group([member]) for member in range(dist.get_world_size())][rank]
    expected, _ = train(options, group, overlapped=False)
    found, profile = train(options, group, overlapped=True)
    same = torch.tensor(all(map(torch.equal, found, expected)))
    dist.all_reduce(same, dist.ReduceOp.MIN)
    if rank == 0:
        print(f"losses and gradients of all ranks have the same bits: {same.item()}")
        ops, exchanges = read(profile)
        for sent, gemms in exchanges:
            print(
                f"{sent.half:>8}: {sent.name}, {sent.end - sent.start:.1f} ms under way; GEMMs of "
                f"the other half's experts before it is waited for: {len(gemms)}"
            )
        if options.trace:
            profile.export_chrome_trace(str(options.trace))
        if options.picture:
            draw(ops, exchanges, options.picture)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
