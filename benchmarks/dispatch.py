"""Dispatch and combine of experts' tokens between two processes, over gloo.

    python -m benchmarks.dispatch                  4,096 tokens of 7168, 8 of 256 experts
    python -m benchmarks.dispatch --tokens 256     seconds

Compares torchext.moe.Dispatcher with all-to-alls in BF16 that send a row for every choice of a
token, and return it. There are no experts: only communication and what it needs (quantize, pack,
sort, sum) are timed. Both sides sort and sum with torchext's ops. Each round runs every contender
once, in turns. The table has the medians of the slower rank, and the bytes that a rank sends.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from torchext import ops
from torchext.moe import Dispatcher

RANKS = 2


class EveryRow:
    """BF16 rows of all choices to their ranks and back, by torchext's kernels where they help."""

    def __init__(self, experts: int) -> None:
        self.experts, self.sent = experts, 0

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        here = self.experts // RANKS
        self.weights = weights
        self.slots, ends = ops.moe_route(ids // here, RANKS)
        sent = ends.diff(prepend=ends.new_zeros(1)).long()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        self.splits = received.tolist(), sent.tolist()
        sorted_ids = torch.empty_like(ids.flatten())
        sorted_ids[self.slots.flatten().long()] = ids.flatten()
        arrived_ids = sorted_ids.new_empty(sum(self.splits[0]))
        dist.all_to_all_single(arrived_ids, sorted_ids, *self.splits)
        arrived = x.new_empty((sum(self.splits[0]), x.shape[1]))
        dist.all_to_all_single(arrived, ops.moe_permute(x, self.slots), *self.splits)
        self.by_expert, _ = ops.moe_route(arrived_ids[:, None] % here, here)
        return ops.moe_permute(arrived, self.by_expert)

    def combine(self, y: Tensor) -> Tensor:
        back = ops.moe_combine(y, self.by_expert)  # a row each: puts rows where they came from
        returned = y.new_empty((sum(self.splits[1]), y.shape[1]))
        dist.all_to_all_single(returned, back, *self.splits[::-1])
        away = [sum(split) - split[dist.get_rank()] for split in self.splits]
        self.sent += sum(away) * 2 * y.shape[1]
        return ops.moe_combine(returned, self.slots, self.weights)


class InFp8:
    def __init__(self, experts: int, *, exact: bool) -> None:
        self.dispatcher, self.exact = Dispatcher(experts), exact

    @property
    def sent(self) -> int:
        return self.dispatcher.bytes_sent

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.routing = self.dispatcher.create_routing(ids, weights)
        return self.dispatcher.dispatch(x, self.routing).data

    def combine(self, y: Tensor) -> Tensor:
        return self.dispatcher.combine(y, self.routing, exact=self.exact)


def measure(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(options.threads)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS
    )
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(options.tokens, options.hidden, generator=generator).bfloat16()
    scores = torch.rand(options.tokens, options.experts, generator=generator)
    weights, ids = scores.topk(options.topk, -1)
    contenders: dict[str, EveryRow | InFp8] = {
        "BF16, every row": EveryRow(options.experts),
        "FP8, exact": InFp8(options.experts, exact=True),
        "FP8, summed by rank": InFp8(options.experts, exact=False),
    }
    y = torch.zeros(0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    sent = {}
    for _ in range(options.rounds + 1):
        for name, contender in contenders.items():
            before = contender.sent
            dist.barrier()
            start = time.perf_counter()
            rows = contender.dispatch(x, ids, weights)
            middle = time.perf_counter()
            if len(y) != len(rows):
                y = torch.ones(len(rows), options.hidden, dtype=torch.bfloat16)  # the experts'
            del rows
            dist.barrier()
            again = time.perf_counter()
            contender.combine(y)
            times[name].append(time.perf_counter() - again + middle - start)
            sent[name] = contender.sent - before
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    torch.save((medians, sent), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 4096), ("hidden", 7168), ("topk", 8), ("experts", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (options, folder), RANKS)
        results = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]
    first = "BF16, every row"
    slower = {name: max(medians[name] for medians, _ in results) for name in results[0][0]}
    sent = {name: max(bytes_[name] for _, bytes_ in results) for name in slower}
    print(f"{'':<20}{'ms':>8}{'':>7}{'MB sent':>9}")
    for name, seconds in slower.items():
        print(
            f"{name:<20}{1e3 * seconds:>8.1f}{seconds / slower[first]:>7.2f}"
            f"{sent[name] / 1e6:>9.1f}{sent[name] / sent[first]:>7.2f}"
        )


if __name__ == "__main__":
    main()
