"""The supervisor of benchmarks.worker: distributes cases and contenders within a time budget.

If a worker hangs or dies, its current measurement is recorded as failed and a new worker continues
with the rest. A contender that has ended two workers is not run again.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from .cases import Case
from .contenders import SUBJECT, contenders_for
from .processes import EventProcess, describe_exit
from .results import Results

START_LIMIT_S = 120.0
CASE_LIMIT_S = 45.0
STRIKES = 2
WRITE_EVERY_S = 2.0


# By default glibc gives large blocks back to the system. To clear the pages of the next output then
# takes longer than many ops.
LIMITS = {"mmap_threshold": 4 << 30, "trim_threshold": 16 << 30}
KEEP_MEMORY = {
    "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={limit}" for name, limit in LIMITS.items())
}


class Runner:
    """Measures `cases` on `device` into `results`.

    peers: names of contenders beside torchext; None for all. rounds: samples for each contender and
    case. budget_s: seconds for everything; cases that remain are recorded as skipped. case_limit_s:
    seconds for a call with its check, and for the timing of a case; a worker that takes longer
    counts as hung. First calls that compile have a longer limit (worker.COMPILE_LIMIT_S). mode:
    "measure", or "warm-up", which only makes the first calls of contenders that compile. progress:
    is called with a line for each measurement.
    """

    def __init__(
        self,
        results: Results,
        device: str,
        cases: Sequence[Case],
        log: Path,
        *,
        peers: list[str] | None = None,
        rounds: int = 30,
        budget_s: float = float("inf"),
        case_limit_s: float = CASE_LIMIT_S,
        mode: str = "measure",
        progress: Callable[[str], None] = lambda line: None,
    ):
        self.results = results
        self.device = device
        self.cases = list(cases)
        self.log = log
        self.peers = peers
        self.rounds = rounds
        self.budget_s = budget_s
        self.deadline = time.monotonic() + budget_s
        self.case_limit_s = case_limit_s
        self.mode = mode
        self.progress = progress
        self.names = {
            suite: [c.name for c in contenders_for(device, peers) if c.suite == suite]
            for suite in {case.suite for case in cases}
        }
        self.unavailable: dict[tuple[str, str], str] = {}
        self.strikes: Counter[tuple[str, str]] = Counter()
        self.recorded: set[tuple[str, str]] = set()
        self.written = 0.0

    def run(self) -> None:
        while (work := self.work()) and self.time_left() > 0:
            if not self.run_worker(work) or self.mode == "warm-up":
                break
        if self.mode == "measure":
            for case, names in self.work():
                for name in names:
                    reason = f"the budget of {self.budget_s:.0f} s was spent"
                    self.record(case, name, "skipped", reason)
            self.results.write()

    def time_left(self) -> float:
        return self.deadline - time.monotonic()

    def work(self) -> list[tuple[Case, list[str]]]:
        """Cases with the contenders that have no record yet."""
        pending = [
            (
                case,
                [
                    name
                    for name in self.names[case.suite]
                    if case.has(name)
                    and (case.suite, name) not in self.unavailable
                    and (case.name, name) not in self.recorded
                ],
            )
            for case in self.cases
        ]
        return [(case, names) for case, names in pending if names]

    def run_worker(self, work: list[tuple[Case, list[str]]]) -> bool:
        """Starts a worker and takes its events until it ends. False: do not start another."""
        plan = {
            "device": self.device,
            "mode": self.mode,
            "rounds": self.rounds,
            "case_limit_s": self.case_limit_s,
            "peers": self.peers,
            "ceilings": self.mode == "measure" and not self.results.data["ceilings"],
            "work": [{"case": case.as_dict(), "contenders": names} for case, names in work],
        }
        command = (sys.executable, "-m", "benchmarks.worker")
        start = time.monotonic()
        env = os.environ | (KEEP_MEMORY if self.device == "cpu" else {})
        process = EventProcess(command, self.log, json.dumps(plan), env=env)
        busy: dict = {"limit_s": START_LIMIT_S}
        try:
            while True:
                try:
                    event = process.next_event(min(busy["limit_s"], max(0.0, self.time_left())))
                except TimeoutError as error:
                    if self.time_left() <= 0:
                        return False
                    return self.blame(busy, f"hung: {error}")
                if event is None:
                    code = process.returncode
                    return self.blame(busy, describe_exit(code, time.monotonic() - start))
                if event["event"] == "done":
                    return True
                busy = self.handle(event) or busy
        finally:
            process.close()

    def handle(self, event: dict) -> dict | None:
        """Processes an event. Returns the event if it says what the worker does next, else None."""
        kind = event["event"]
        if kind in ("begin", "timing"):
            return event
        if kind == "ceilings":
            self.results.data["ceilings"] = event["values"]
        elif kind == "contender":
            self.know({key: event[key] for key in event if key != "event"})
        elif kind == "record":
            values = event["values"]
            key = (values["case"], values["contender"])
            self.recorded.add(key)
            measured = self.results.data["measurements"]
            measured[:] = [old for old in measured if (old["case"], old["contender"]) != key]
            measured.append(values)
            self.progress(one_line(values))
        else:
            raise ValueError(f"unknown event {kind!r} from the worker")
        if time.monotonic() - self.written > WRITE_EVERY_S and self.mode == "measure":
            self.results.write()
            self.written = time.monotonic()
        return None

    def know(self, contender: dict) -> None:
        """Records a contender's version, or the reason why it cannot run."""
        known = self.results.data["contenders"]
        key = (contender["suite"], contender["name"])
        known[:] = [other for other in known if (other["suite"], other["name"]) != key]
        known.append(contender)
        if "reason" in contender:
            self.unavailable[key] = contender["reason"]

    def blame(self, busy: dict, reason: str) -> bool:
        """Records what the worker was doing when it ended as failed. False: it had not started."""
        self.progress(f"worker ended: {reason}")
        if "event" not in busy:
            self.results.data.setdefault("failures", []).append(f"benchmark worker: {reason}")
            return False
        if busy["case"] is None:
            if busy["contender"] == "ceilings":
                self.results.data["ceilings"] = {"reason": reason}
            else:
                for suite, names in self.names.items():
                    if busy["contender"] in names:
                        self.know({"name": busy["contender"], "suite": suite, "reason": reason})
            return True
        case = next(case for case in self.cases if case.name == busy["case"])
        blamed = busy["contenders"] if busy["event"] == "timing" else [busy["contender"]]
        if busy["event"] == "timing":
            reason = f"{reason}, while timed beside {', '.join(blamed)}"
        for name in blamed:
            self.record(case, name, "failed", reason)
        if len(blamed) == 1:
            self.strike(case.suite, blamed[0])
        return True

    def strike(self, suite: str, name: str) -> None:
        self.strikes[suite, name] += 1
        if self.strikes[suite, name] < STRIKES:
            return
        for case, names in self.work():
            if case.suite == suite and name in names:
                self.record(case, name, "skipped", f"it had already ended {STRIKES} workers")

    def record(self, case: Case, contender: str, status: str, reason: str) -> None:
        values = {**case.as_dict(), "case": case.name, "contender": contender}
        self.handle({"event": "record", "values": values | {"status": status, "reason": reason}})


def warm_up(
    jobs: int,
    device: str,
    cases: Sequence[Case],
    log: Path,
    *,
    peers: list[str] | None,
    budget_s: float,
) -> None:
    """Makes the first calls of contenders that compile, in `jobs` processes at the same time."""
    runners = [
        Runner(
            Results(log),  # never written in this mode
            device,
            cases[i::jobs],
            log,
            peers=peers,
            budget_s=budget_s,
            mode="warm-up",
        )
        for i in range(jobs)
    ]
    threads = [threading.Thread(target=runner.run) for runner in runners if runner.cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def one_line(record: dict) -> str:
    """A measurement as a line for the terminal."""
    start = f"{record['case']:<64} {record['contender']:<17}"
    if record["status"] != "ok":
        return f"{start} {record['status']}: {record['reason']}"
    line = f"{start} {record['milliseconds']['median']:10.4f} ms"
    if record["flops_per_s"]:
        line += f" {record['flops_per_s'] / 1e12:8.2f} TFLOPS"
    if record["bytes_per_s"]:
        line += f" {record['bytes_per_s'] / 1e9:8.1f} GB/s"
    return line


def subject_ok(results: Results) -> bool:
    """Whether torchext ran, with no failed and no wrong result."""
    bad = [
        record
        for record in results.data["measurements"]
        if record["contender"] == SUBJECT and record["status"] in ("failed", "wrong")
    ]
    absent = [
        known
        for known in results.data["contenders"]
        if known["name"] == SUBJECT and "reason" in known
    ]
    return not (bad or absent or results.data.get("failures"))
