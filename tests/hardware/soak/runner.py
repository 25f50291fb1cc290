"""Launches drawn jobs repeatedly, on concurrent streams, in CUDA graphs and, on the simulator,
under other schedules, and records each result that differs from the expected one."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from benchmarks.problems import WrongResultError

from .jobs import Job, draw
from .operands import Lab, Outputs, differing

STREAMS = 4


@dataclass
class Fault:
    round: int
    job: str
    how: str  # how the job was launched
    what: str

    def __str__(self) -> str:
        return f"round {self.round}, {self.how}: {self.job}: {self.what}"


@dataclass
class Soak:
    """Runs rounds. Round i of a seed always draws the same jobs, independently of other rounds."""

    lab: Lab
    seed: int
    draw: Callable[[Lab, random.Random], Job] = draw
    launches: int = 0  # calls of ops, including replays of captured calls
    faults: list[Fault] = field(default_factory=list)

    def run(self, deadline: float, progress: Callable[[Soak, int], None], most: int = 10) -> int:
        """Runs rounds until `deadline` (time.monotonic()) or `most` faults; returns how many."""
        number = 0
        while number == 0 or (time.monotonic() < deadline and len(self.faults) < most):
            self.round(number)
            number += 1
            progress(self, number)
        return number

    def round(self, number: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        jobs = [self.draw(self.lab, rng) for _ in range(rng.randint(2, 5) if self.cuda else 1)]
        wants = {}
        for i, job in enumerate(jobs):
            with self.watch(number, job, "alone"), self.schedule(rng):
                wants[i] = self.alone(number, job)
        jobs = [job for i, job in enumerate(jobs) if i in wants]
        known = list(wants.values())
        if self.cuda and jobs:
            label = " + ".join(job.name for job in jobs)
            with self.watch(number, label, "on streams"):
                self.on_streams(number, jobs, known, rng)
            with self.watch(number, label, "in a graph"):
                self.in_graph(number, jobs, known, rng)
            return
        for job, want in zip(jobs, known, strict=True):
            how = "again"
            with self.watch(number, job, how), self.schedule(rng):
                self.compare(number, job, how, self.call(job), want)

    @property
    def cuda(self) -> bool:
        return self.lab.device == "cuda"

    @contextlib.contextmanager
    def watch(self, number: int, job: Job | str, how: str) -> Iterator[None]:
        """Records an exception in the block as a fault; the soak goes on."""
        name = job if isinstance(job, str) else job.name
        try:
            yield
            if self.cuda:
                torch.cuda.synchronize()
        except WrongResultError as error:
            self.faults.append(Fault(number, name, how, str(error)))
        except Exception as error:  # a kernel or the simulator may raise anything
            self.faults.append(Fault(number, name, how, f"{type(error).__name__}: {error}"))

    @contextlib.contextmanager
    def schedule(self, rng: random.Random) -> Iterator[None]:
        """On the simulator, a random order of warps, lanes and completions."""
        if self.lab.device != "sim":
            yield
            return
        from torchext import sim

        seed = rng.getrandbits(31)
        completion = rng.choice(("eager", "late", "random"))
        with sim.simulate(seed=seed, completion=completion, num_sms=self.lab.sm_count):
            yield

    def call(self, job: Job) -> Outputs:
        self.launches += 1
        return job.call()

    def alone(self, number: int, job: Job) -> Outputs:
        """Runs the job alone and checks it. Returns the bits that every other launch must give: the
        expected ones or, if none are promised, this result."""
        got = self.call(job)
        if self.cuda:
            torch.cuda.synchronize()
        job.bound(got)
        if job.expect is None:
            return got
        want = job.expect()
        self.compare(number, job, "alone", got, want)
        return want

    def compare(self, number: int, job: Job, how: str, got: Outputs, want: Outputs) -> None:
        what = differing(got, want)
        if what:
            self.faults.append(Fault(number, job.name, how, what))

    def on_streams(
        self, number: int, jobs: list[Job], wants: list[Outputs], rng: random.Random
    ) -> None:
        """Runs all jobs, some several times, on streams without synchronization in between."""
        current = torch.cuda.current_stream()
        streams = [torch.cuda.Stream() for _ in range(STREAMS)]
        for stream in streams:
            stream.wait_stream(current)
        results = []
        order = [i for i in range(len(jobs)) for _ in range(rng.randint(1, 4))]
        rng.shuffle(order)
        for i in order:
            with torch.cuda.stream(rng.choice(streams)):
                results.append((i, self.call(jobs[i])))
        torch.cuda.synchronize()
        for i, got in results:
            self.compare(number, jobs[i], "on streams", got, wants[i])

    def in_graph(
        self, number: int, jobs: list[Job], wants: list[Outputs], rng: random.Random
    ) -> None:
        """Captures all jobs once, on one or several streams, and replays the graph, at times beside
        another job."""
        graph = torch.cuda.CUDAGraph()
        branches = [torch.cuda.Stream() for _ in range(rng.randint(0, 2))]
        results = []
        with torch.cuda.graph(graph):
            root = torch.cuda.current_stream()
            for stream in branches:
                stream.wait_stream(root)
            for job in jobs:
                with torch.cuda.stream(rng.choice([root, *branches])):
                    results.append(job.call())
            for stream in branches:
                root.wait_stream(stream)
        beside = torch.cuda.Stream()
        for _ in range(rng.randint(2, 4)):
            for outputs in results:  # so that a replay that writes nothing is noticed
                for output in outputs:
                    output.fill_(float("nan") if output.is_floating_point() else 0xA5)
            other = None
            for _ in range(rng.randint(1, 8)):
                graph.replay()
                self.launches += len(jobs)
            if rng.random() < 0.5:
                i = rng.randrange(len(jobs))
                with torch.cuda.stream(beside):
                    other = i, self.call(jobs[i])
            torch.cuda.synchronize()
            for job, got, want in zip(jobs, results, wants, strict=True):
                self.compare(number, job, "in a graph", got, want)
            if other:
                self.compare(number, jobs[other[0]], "beside a graph", other[1], wants[other[0]])
