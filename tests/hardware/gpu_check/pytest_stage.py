"""Runs the test suite, one process for each file and several at once. A test that hangs or kills
its process fails; a new process runs the rest of its file."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import EventProcess, describe_exit

from . import staging

START_LIMIT_S = 100.0
# Tests of this harness, some of which would start this stage again, and tests that need no GPU.
LEFT_OUT = ("benchmarks", "hardware", "packaging", "sim")
GOOD = ("passed", "skipped", "xfailed")
NOT_RUN = "not run"


@dataclass
class TestRun:
    """Where to test, with which limits."""

    target: Path
    device: str
    deadline: float  # a value of time.monotonic()
    log: Path
    test_limit_s: float
    threads: int = 1  # in each process


def run_tests(run: TestRun, jobs: int, write: Callable[[dict], None]) -> dict:
    """Runs `jobs` files at a time and returns the summary: counts of outcomes, failures with their
    messages, tests and files that were not run, reasons for skips, the slowest tests. `write` gets
    the summary after each file."""
    start = time.monotonic()
    outcomes: dict[str, dict] = {}
    lock = threading.Lock()

    def summary() -> dict:
        counts = Counter(end["outcome"] for end in outcomes.values())
        bad = [end for end in outcomes.values() if end["outcome"] not in (*GOOD, NOT_RUN)]
        not_run = [end for end in outcomes.values() if end["outcome"] == NOT_RUN]
        skips = Counter(e["message"] for e in outcomes.values() if e["outcome"] == "skipped")
        slowest = sorted(outcomes.values(), key=lambda end: -end["seconds"])[:10]
        return {
            "counts": dict(counts),
            "seconds": time.monotonic() - start,
            "failures": [{k: end[k] for k in ("test", "outcome", "message")} for end in bad],
            "not_run": [{k: end[k] for k in ("test", "message")} for end in not_run],
            "skip_reasons": dict(skips.most_common(20)),
            "slowest": [{"test": end["test"], "seconds": end["seconds"]} for end in slowest],
        }

    def one(file: Path) -> None:
        ends = _run_file(run, file)
        with lock:
            outcomes.update(ends)
            write(summary())

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(one, file) for file in files_to_test(run.target, run.device)]:
            future.result()
    return summary()


def files_to_test(target: Path, device: str) -> list[Path]:
    """Test files relative to `target`, the largest first since they take longest. On a GPU, without
    those of which tests/conftest.py would skip every test: no text of theirs names `device`."""
    files = [
        path
        for path in (target / "tests").rglob("test_*.py")
        if path.relative_to(target / "tests").parts[0] not in LEFT_OUT
        and (device != "cuda" or "device" in path.read_text())
    ]
    files.sort(key=lambda path: -path.stat().st_size)
    return [path.relative_to(target) for path in files]


def _run_file(run: TestRun, file: Path) -> dict[str, dict]:
    """Runs all tests in `file`; returns the `end` event of each test."""
    ends: dict[str, dict] = {}
    while True:
        if time.monotonic() >= run.deadline:
            ends[str(file)] = _end(str(file), NOT_RUN, "no time was left")
            return ends
        before = len(ends)
        if _run_process(run, file, ends):
            return ends
        if len(ends) == before:
            return ends  # no test ran, so another process would not help; `ends` says why


def _run_process(run: TestRun, file: Path, ends: dict[str, dict]) -> bool:
    """Runs one pytest process and adds its `end` events to `ends`. False: tests may remain."""
    name = str(file).replace(os.sep, ".")
    done = run.target / f".{name}.done"
    done.write_text("\n".join(ends))
    log = run.target / f".{name}.log"
    options = ("--device", run.device, "--done", str(done), "--tb=short", "-v")
    trace_after = ("--trace-after", str(0.8 * run.test_limit_s))
    plugin = ("-p", "tests.hardware.gpu_check.pytest_events", "-p", "no:cacheprovider")
    command = (sys.executable, "-m", "pytest", str(file), *plugin, *options, *trace_after)
    start = time.monotonic()
    env = {**staging.environment(run.target), "OMP_NUM_THREADS": str(run.threads)}
    process = EventProcess(command, log, cwd=run.target, env=env)
    pending: list[str] = []
    current: str | None = None
    limit = START_LIMIT_S
    try:
        while True:
            left = max(0.0, run.deadline - time.monotonic())
            try:
                event = process.next_event(min(limit, left))
            except TimeoutError:
                if time.monotonic() < run.deadline:
                    at = current or str(file)
                    ends[at] = _end(at, "hung", f"no end after {limit:.0f} s", limit)
                    return False
                for test in pending or [str(file)]:
                    ends[test] = _end(test, NOT_RUN, "the time for tests was up")
                return True
            if event is None:
                code = process.returncode
                exit_text = describe_exit(code, time.monotonic() - start)
                if current:
                    ends[current] = _end(current, "crashed", exit_text)
                    pending.remove(current)
                elif not ends and not pending and code not in (0, 5):
                    message = f"{exit_text}: {staging.last_line(log)}"
                    ends[str(file)] = _end(str(file), "error", message)
                return not pending
            if event["event"] == "collected":
                pending = event["tests"]
            elif event["event"] == "begin":
                current, limit = event["test"], run.test_limit_s
            else:
                _add(ends, event)
                current, limit = None, START_LIMIT_S
                if event["test"] in pending:
                    pending.remove(event["test"])
    finally:
        process.close()
        _collect_log(log, run.log, file)


def _add(ends: dict[str, dict], event: dict) -> None:
    """Adds an `end` event. A test whose teardown fails has two: the failure stays."""
    known = ends.get(event["test"])
    if known is None or known["outcome"] in GOOD:
        ends[event["test"]] = event


def _end(test: str, outcome: str, message: str, seconds: float = 0.0) -> dict:
    return {"test": test, "outcome": outcome, "message": message, "seconds": seconds}


def _collect_log(log: Path, whole: Path, file: Path, last: int = 200_000) -> None:
    """Appends the last characters of a process's output to the common log, in one write."""
    text = log.read_text(errors="replace")[-last:]
    log.unlink()
    with whole.open("a") as output:
        output.write(f"==== {file} ====\n{text}\n")
