"""Times every configuration of the Hopper GEMM at the DeepSeek-V3 shapes, and writes
csrc/gemm/sm90/tuned.inc: the shapes at which another configuration is faster than the cost model's
choice. The table is compiled into the selector.

    python -m benchmarks.tune                 on a GPU that is otherwise idle; then build again
    python -m benchmarks.tune --timings FILE  from timings that were measured before

The table has a line `TUNED(granularity, m_low, m_high, n, k, "configuration", split_k, cluster)`
for a range of m. A measured m stands for all m above the next smaller measured one, because tiles
round m up.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch

from . import cases, timing
from .problems import PROBLEMS, GemmProblem, Run
from .selection import Configuration, Product, Selection

TABLE = Path(__file__).resolve().parents[1] / "csrc" / "gemm" / "sm90" / "tuned.inc"
NAMES = {"1d2d": "k1D2D", "1d1d": "k1D1D", "rowwise": "kRowwise"}
OPS = {"1d2d": cases.FPROP, "1d1d": cases.WGRAD, "rowwise": cases.FPROP_ROWWISE}
ROWS = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
        6144, 8192)  # fmt: skip
TOKENS = (1024, 2048, 4096, 8192)  # K of a wgrad
GOOD_ENOUGH = 1.02  # the cost model's choice stands within this factor of the best time
H200_MEMORY = 4917  # rated GB/s; the recorded timings were measured on an H200
HOPELESS = 3.0  # above this multiple of the fewest expected cycles, nothing is timed
ROUNDS, FINAL_ROUNDS, FINALISTS = 5, 30, 5
SECONDS_PER_PRODUCT = 5.0

E4M3 = torch.float8_e4m3fn
Timer = Callable[[Product, Sequence[Configuration], int], dict[Configuration, float]]


@dataclass(frozen=True)
class Entry:
    """A line of the table."""

    granularity: str
    m_low: int
    m_high: int
    n: int
    k: int
    configuration: Configuration

    def __str__(self) -> str:
        c = self.configuration
        return (
            f"TUNED({NAMES[self.granularity]}, {self.m_low}, {self.m_high}, {self.n}, {self.k},"
            f' "{c.name}", {c.split_k}, {c.cluster})'
        )

    @property
    def of(self) -> tuple[str, int, int]:
        return self.granularity, self.n, self.k


LINE = re.compile(r'^TUNED\((\w+), (\d+), (\d+), (\d+), (\d+), "(\w+)", (\d+), (\d+)\)$', re.M)


def parse(text: str) -> list[Entry]:
    granularity = {name: key for key, name in NAMES.items()}
    entries = []
    for kind, *sizes, name, split_k, cluster in LINE.findall(text):
        m_low, m_high, n, k = map(int, sizes)
        configuration = Configuration(name, int(split_k), int(cluster))
        entries.append(Entry(granularity[kind], m_low, m_high, n, k, configuration))
    return entries


def render(entries: Iterable[Entry], facts: Sequence[str]) -> str:
    head = [
        "Where measurement disagrees with the cost model: TUNED(granularity, m_low, m_high, n, k,",
        "configuration, split_k, cluster). Written by `python -m benchmarks.tune`, never by hand.",
        *facts,
    ]
    lines = [f"// {line}".rstrip() for line in head]
    ordered = sorted(entries, key=lambda e: (*e.of, e.m_low))
    return "\n".join([*lines, *map(str, ordered)]) + "\n"


def products(granularities: Iterable[str]) -> Iterator[list[Product]]:
    """Lists of GEMMs that differ in m only, by ascending m."""
    layers = [layer for layer in cases.LAYERS if layer.model == "deepseek-v3"]
    for granularity in granularities:
        for layer in layers:
            if granularity != "1d1d":
                sizes = [[(m, layer.n, layer.k) for m in ROWS]]
            else:
                sizes = [[(layer.n, layer.k, tokens)] for tokens in TOKENS]
            for group in sizes:
                yield [Product(*size, granularity, E4M3, E4M3, 0) for size in group]


def verdict(product: Product, selection: Selection, timer: Timer) -> Configuration | None:
    """The configuration that beats the cost model's choice, or None if the choice stands."""
    expected = selection.expected_cycles(product)
    least = min(expected.values())
    choice = min(expected, key=lambda c: expected[c])
    hopeful = [c for c, cycles in expected.items() if cycles <= HOPELESS * least]
    first = timer(product, hopeful, ROUNDS)
    finalists = sorted(first, key=lambda c: first[c])[:FINALISTS]
    if choice not in finalists and choice in first:
        finalists.append(choice)
    final = timer(product, finalists, FINAL_ROUNDS)
    best = min(final, key=lambda c: final[c])
    if choice in final and final[choice] <= GOOD_ENOUGH * final[best]:
        return None
    return best


def recorded(path: Path, selection: Selection) -> list[Entry]:
    """The table by the timings in a file: a list of objects with the fields of a Product ("m", "n",
    "k", "granularity") and "microseconds", by configuration."""
    groups: dict[tuple[str, int, int], list[tuple[Product, Configuration | None]]] = {}
    rows = sorted(json.loads(path.read_text()), key=lambda row: row["m"])
    for row in rows:
        product = Product(row["m"], row["n"], row["k"], row["granularity"], E4M3, E4M3, 0)
        expected = selection.expected_cycles(product)
        times = {c: row["microseconds"][str(c)] for c in expected if str(c) in row["microseconds"]}
        best = min(times, key=lambda c: times[c])
        choice = min(expected, key=lambda c: expected[c])
        stands = choice in times and times[choice] <= GOOD_ENOUGH * times[best]
        of = (product.granularity, product.n, product.k)
        groups.setdefault(of, []).append((product, None if stands else best))
    return [entry for group in groups.values() for entry in merge(group)]


def _recorded_selection() -> Selection:
    from torchext import _architectures

    return Selection(_architectures.architectures()[90].sms, H200_MEMORY)


def merge(group: Sequence[tuple[Product, Configuration | None]]) -> list[Entry]:
    """The verdicts on GEMMs of ascending m, merged into ranges of m."""
    entries: list[Entry] = []
    previous = 0
    for product, best in group:
        low = previous + 1 if len(group) > 1 else product.m
        previous = product.m
        if best is None:
            continue
        last = entries[-1] if entries else None
        if last and last.m_high == low - 1 and last.configuration == best:
            entries[-1] = replace(last, m_high=product.m)
        else:
            entries.append(Entry(product.granularity, low, product.m, product.n, product.k, best))
    return entries


def tune(
    groups: Iterable[list[Product]],
    selection: Selection,
    timer: Timer,
    *,
    old: Sequence[Entry],
    deadline: float,
    say: Callable[[str], None],
) -> list[Entry]:
    """The new table. Shapes that are not reached by `deadline` keep their old lines."""
    entries: list[Entry] = []
    kept = list(old)
    for group in groups:
        if time.monotonic() >= deadline:
            say("the time was up: the rest keeps its lines")
            break
        fresh = merge([(product, verdict(product, selection, timer)) for product in group])
        p, last = group[0], group[-1].m
        first = 1 if len(group) > 1 else p.m
        of = p.granularity, p.n, p.k
        kept = [e for e in kept if e.of != of or not first <= e.m_low <= last]
        say(f"{p.granularity} n={p.n} k={p.k}: {len(group)} products, {len(fresh)} lines")
        entries += fresh
    return [*entries, *kept]


class WrongConfigurationError(Exception):
    """A configuration's result is wrong, which must be fixed before tuning."""


class GpuTimer:
    """Median seconds of interleaved calls, after each configuration's result has been checked."""

    def __init__(self, selection: Selection):
        self.selection = selection
        self._problem: tuple[Product, GemmProblem] | None = None

    def problem(self, product: Product) -> GemmProblem:
        if self._problem is None or self._problem[0] != product:
            self._problem = None  # frees the previous memory before allocating more
            p = product
            size = (p.k, p.m, p.n) if p.granularity == "1d1d" else (p.m, p.n, p.k)
            case = cases.Case("gemm", OPS[p.granularity], "tuned", "", size)
            problem = PROBLEMS["gemm"](case, "cuda")
            assert isinstance(problem, GemmProblem)
            assert (problem.rows, problem.cols, problem.inner) == (p.m, p.n, p.k)
            self._problem = p, problem
        return self._problem[1]

    def __call__(
        self, product: Product, configurations: Sequence[Configuration], rounds: int
    ) -> dict[Configuration, float]:
        from torchext import ops

        problem = self.problem(product)
        operands = (*problem.left_fp8, *problem.right_fp8)

        def run(configuration: Configuration) -> Run:
            def call() -> object:
                with self.selection.forced(configuration):
                    return ops.fp8_gemm_nt(*operands)

            return Run(call, problem.check_fp8)

        runs = {str(c): run(c) for c in configurations}
        for name, one in runs.items():
            try:
                one.check(one.call())
            except Exception as error:
                raise WrongConfigurationError(f"{product}: {name}: {error}") from error
        times = timing.interleave(runs, "cuda", rounds, SECONDS_PER_PRODUCT)
        return {c: statistics.median(times[str(c)]) for c in configurations}


def facts_of(environment: dict) -> list[str]:
    gpu = environment["gpu"]
    return [
        f"{gpu['name']}, {gpu['sm_count']} SMs, driver {gpu.get('driver_version', 'unknown')};"
        f" {date.today()}; torch {environment['torch']}, CUDA {environment['cuda_of_torch']};",
        f"torchext {environment['torchext']}, commit {environment['commit']}."
        f" Lines are left out where the model is within {GOOD_ENOUGH - 1:.0%} of the best.",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: the table was written. 1: a configuration is wrong. 2: no Hopper GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--granularity", nargs="+", choices=tuple(NAMES), default=list(NAMES))
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--timings", type=Path, help="timings to use instead of measuring")
    options = parser.parse_args(arguments)
    if options.timings:
        entries = recorded(options.timings, _recorded_selection())
        options.out.write_text(render(entries, [f"By the timings in {options.timings}."]))
        print(f"{options.out}: {len(entries)} lines; build again to compile them in")
        return 0
    import torchext

    from .environment import describe

    available, reason = torchext.is_available("sm90")
    if not available:
        print(f"benchmarks.tune: {reason}", file=sys.stderr)
        return 2
    environment = describe("cuda")
    selection = Selection(environment["gpu"]["sm_count"])
    old = parse(options.out.read_text()) if options.out.exists() else []
    try:
        entries = tune(
            products(options.granularity),
            selection,
            GpuTimer(selection),
            old=old,
            deadline=time.monotonic() + options.budget,
            say=lambda line: print(line, flush=True),
        )
    except WrongConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    options.out.write_text(render(entries, facts_of(environment)))
    print(f"{options.out}: {len(entries)} lines; build again to compile them in")
    return 0


if __name__ == "__main__":
    sys.exit(main())
