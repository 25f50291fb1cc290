"""Command line of the GPU check, its stages and their order."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from benchmarks import goals, processes
from benchmarks.environment import gpu_name, slug
from benchmarks.report import markdown
from benchmarks.results import Results, scrub

from . import staging
from .pytest_stage import GOOD, TestRun, run_tests
from .sanitizer import TOOLS, OpCalls, run_tool

REPOSITORY = Path(__file__).resolve().parents[3]
# With start-up and clean-up, a check of this length ends within nine minutes.
BUDGET_S = 520.0
REPORT_S = 25.0  # kept back for the report
CORRECTNESS_SHARE = 0.5  # of the budget: for tests and sanitizer, which run side by side
SOAK_MINUTES = 0.75
# Tests of single instructions, whose launches are repeated on the GPU.
SHADOWED = ("tests/sim", "-k", "test_op_ or test_initializers or test_cuda_features")
LOG_BYTES = 4_000_000


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.hardware.gpu_check", description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="torchext's wheel")
    parser.add_argument("--peer-wheels", type=Path, help="folder of peers' wheels to install too")
    parser.add_argument(
        "--out", type=Path, help="default: $OUT, else benchmarks/results/<date>-gpu"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal"
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS")
    parser.add_argument("--quick", action="store_true", help="only the most important benchmarks")
    parser.add_argument("--shapes", nargs="+", default=[], help="as in python -m benchmarks")
    parser.add_argument("--suite", nargs="+", default=[], help="as in python -m benchmarks")
    parser.add_argument(
        "--test-limit", type=float, default=90.0, metavar="SECONDS", help="limit of a test"
    )
    parser.add_argument("--commit", help="the commit to record if git fails")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def default_folder(options: argparse.Namespace) -> Path:
    """benchmarks/results/<date>-<GPU>, or <date>-cpu in a rehearsal."""
    name = (gpu_name() if options.device == "cuda" else None) or options.device
    return options.repository / "benchmarks" / "results" / f"{date.today()}-{slug(name)}"


class StageError(Exception):
    """A stage did not pass; the message says why."""


class Check:
    """The state of one check: results so far, folders and deadline.

    target: the temporary copy of the repository, in which the stages run.
    """

    def __init__(self, options: argparse.Namespace, target: Path):
        self.options = options
        self.device: str = options.device
        self.target = target
        self.deadline = time.monotonic() + options.budget
        self.out: Path = (
            options.out
            or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
            or default_folder(options)
        ).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        self.results = Results(self.out / "results.json")
        self.results.private = [(str(target), "."), (str(options.repository), ".")]
        self.results.data |= {"stages": [], "wheel": options.wheel.name}

    def log(self, name: str) -> Path:
        return self.out / f"{name}.log"

    def left(self, reserve: float = REPORT_S) -> float:
        return max(0.0, self.deadline - reserve - time.monotonic())

    def put(self, **values: object) -> None:
        """Sets `values` in results.json and writes the file at once."""
        with self.lock:
            self.results.data |= values
            self.results.write()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Runs the block as a stage and records its outcome. An exception fails the stage only."""
        start = time.monotonic()
        status, reason = "passed", ""
        print(f"{name} ...", flush=True)
        try:
            yield
        except Exception as error:  # any error: later stages must still run
            status, reason = "failed", f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        with self.lock:
            self.results.data["stages"].append(
                {"name": name, "status": status, "seconds": seconds, "reason": reason}
            )
            self.results.write()
        print(f"{name}: {status} in {seconds:.0f} s {reason}", flush=True)

    def passed(self, name: str) -> bool:
        return any(
            s["name"] == name and s["status"] == "passed" for s in self.results.data["stages"]
        )

    def benchmarks(self, *arguments: str, limit_s: float, cwd: Path | None = None) -> int:
        command = (sys.executable, "-m", "benchmarks", "--device", self.device, *arguments)
        outcome = processes.run(
            command,
            self.log("benchmarks"),
            limit_s,
            cwd or self.target,
            staging.environment(self.target),
        )
        if outcome.returncode is None:
            raise StageError(outcome.reason)
        return outcome.returncode


def install(check: Check) -> None:
    peers = sorted(check.options.peer_wheels.glob("*.whl")) if check.options.peer_wheels else []
    wheels = [check.options.wheel, *peers]
    log = check.log("benchmarks")
    staging.stage(check.options.repository, wheels, check.target, log, min(90.0, check.left()))


def environment(check: Check) -> None:
    """Records hardware and versions. Fails if there is no GPU or torchext does not load."""
    done = subprocess.run(
        (sys.executable, "-m", "benchmarks.environment", "--device", check.device),
        capture_output=True,
        text=True,
        timeout=min(120.0, check.left()),
        cwd=check.target,
        env=staging.environment(check.target),
        check=False,
    )
    if done.returncode != 0:
        raise StageError(done.stderr.strip().splitlines()[-1] if done.stderr else "no output")
    facts = json.loads(done.stdout) | _commit(check.options)
    check.put(environment=facts)
    for problem in (facts.get("gpu", {}).get("reason"), facts.get("torchext_reason")):
        if problem:
            raise StageError(problem)


def _commit(options: argparse.Namespace) -> dict:
    """The repository's commit, which the copy without .git cannot tell; `--commit` if git fails."""
    git = ("git", "-C", str(options.repository))
    try:
        head = subprocess.run(
            (*git, "rev-parse", "HEAD"), capture_output=True, text=True, timeout=20, check=True
        )
        status = subprocess.run(
            (*git, "status", "--porcelain", "--untracked-files=no"),
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": options.commit, "uncommitted_changes": None}
    return {"commit": head.stdout.strip(), "uncommitted_changes": bool(status.stdout.strip())}


def tests(check: Check, deadline: float) -> None:
    cores = os.cpu_count() or 1
    jobs = max(1, min(8, cores // 2))
    run = TestRun(
        check.target,
        check.device,
        deadline,
        check.log("tests"),
        test_limit_s=check.options.test_limit,
        threads=max(1, cores // jobs),
    )
    summary = run_tests(run, jobs, lambda values: check.put(tests=values))
    check.put(tests=summary)
    bad = {outcome: n for outcome, n in summary["counts"].items() if outcome not in GOOD}
    if bad or not summary["counts"].get("passed"):
        raise StageError(f"{summary['counts']}")


def sanitizer(check: Check, deadline: float) -> None:
    run = OpCalls(check.target, check.device, deadline, check.log("sanitizer"))
    answers: list[dict] = []

    said = threading.Lock()  # keeps an older list from overwriting a newer one

    def one(tool: str | None, skip: Collection[str] = ()) -> dict:
        answer = run_tool(run, tool, skip)
        with said:
            answers.append(answer)
            check.put(sanitizer=list(answers))
        return answer

    broke = one(None)["broke"]
    # memcheck says where a kernel broke; the other tools need not start again after each.
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        jobs = [pool.submit(one, tool, () if tool == "memcheck" else broke) for tool in TOOLS]
        for future in jobs:
            future.result()
    bad = [f"{a['tool']}: {a['summary']}" for a in answers if a["status"] == "failed"]
    if bad:
        raise StageError("; ".join(bad))


def correctness(check: Check) -> None:
    """Runs tests and sanitizer side by side, while peers compile in the background."""
    until = min(
        time.monotonic() + CORRECTNESS_SHARE * check.options.budget,
        check.deadline - REPORT_S,
    )
    selection = selected(check.options)

    def staged(name: str, work: Callable[[Check, float], None]) -> None:
        with check.stage(name):
            work(check, until)

    def warm_up() -> None:
        with check.stage("peers' kernels compiled ahead"):
            left = until - time.monotonic()
            check.benchmarks(*selection, "--warm-up", "4", "--budget", str(left), limit_s=left + 5)

    jobs = [lambda: staged("tests", tests), lambda: staged("sanitizer", sanitizer)]
    if check.device == "cuda":
        jobs.append(warm_up)
    with ThreadPoolExecutor(len(jobs)) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


def soak(check: Check) -> None:
    """Runs the soak for SOAK_MINUTES or a tenth of the budget, whichever is less. The soak ends
    itself if a round hangs."""
    minutes = min(SOAK_MINUTES, 0.1 * check.options.budget / 60)
    command = (sys.executable, "-m", "tests.hardware.soak", "--device", check.device)
    log = check.target / "soak.log"
    env = staging.environment(check.target)
    limit_s = min(60 * minutes + 150, check.left())
    outcome = processes.run((*command, "--minutes", f"{minutes}"), log, limit_s, check.target, env)
    text = log.read_text(errors="replace")
    with check.log("sanitizer").open("a") as output:  # the check writes at most eight files
        output.write(f"==== soak ====\n{text[-400_000:]}\n")
    said = staging.last_line(log)
    check.put(soak={"summary": said, "ok": outcome.ok})
    if not outcome.ok:
        raise StageError(f"{outcome.reason}: {said}")


def comparisons(check: Check) -> dict[str, tuple[tuple[str, ...], float]]:
    """Commands that compare the GPU with the simulator bit for bit, and their limits in seconds."""
    python = (sys.executable, "-m")
    out = ("--out", str(check.target / "comparison"), "--device", check.device)
    share = check.options.budget / BUDGET_S
    chosen: dict[str, tuple[tuple[str, ...], float]] = {
        "bits": ((*python, "tests.hardware.bits", *out, "--budget", f"{40 * share}"), 60 * share)
    }
    capability = check.results.data["environment"].get("gpu", {}).get("compute_capability")
    if capability == "9.0":
        chosen["tensor cores"] = ((*python, "tests.hardware.tensor_core", *out), 30 * share)
        jobs = ("-n", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") else ()
        report = str(check.target / "shadow.txt")
        chosen["instructions"] = (
            (*python, "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", *jobs, *SHADOWED,
             "-p", "tests.hardware.shadow.plugin", "--shadow-gpu", report), 60 * share,
        )  # fmt: skip
    return chosen


def comparison(check: Check) -> None:
    """Compares the GPU with the simulator. The output goes behind the soak's in sanitizer.log."""
    answers: list[dict] = []
    for name, (command, limit_s) in comparisons(check).items():
        log = check.target / "comparison.log"
        log.write_text("")
        env = staging.environment(check.target)
        outcome = processes.run(command, log, min(limit_s, check.left()), check.target, env)
        with check.log("sanitizer").open("a") as output:  # the check writes at most eight files
            text = log.read_text(errors="replace")[-400_000:]
            output.write(f"==== comparison with the simulator: {name} ====\n{text}\n")
        said = staging.last_line(log)
        reason = "" if outcome.ok else outcome.reason
        answers.append({"name": name, "summary": said, "reason": reason})
        check.put(comparison=answers)
    bad = [f"{a['name']}: {a['reason']}: {a['summary']}" for a in answers if a["reason"]]
    if bad:
        raise StageError("; ".join(bad))


def selected(options: argparse.Namespace) -> list[str]:
    shapes = ["--shapes", *options.shapes] if options.shapes else []
    suites = ["--suite", *options.suite] if options.suite else []
    return shapes + suites + (["--quick"] if options.quick else [])


def benchmarks(check: Check) -> None:
    budget = check.left() - 10
    arguments = (*selected(check.options), "--budget", str(budget), "--out", str(check.out))
    try:
        code = check.benchmarks(*arguments, limit_s=check.left())
    finally:
        check.results.data = json.loads(check.results.path.read_text())
    if code != 0:
        raise StageError("torchext failed, was wrong or was absent: see the measurements")


def report(check: Check) -> None:
    check.put(goals=goals.evaluate(check.results.data))
    command = (sys.executable, "-m", "benchmarks.report", str(check.out))
    cwd = check.target if check.passed("install") else check.options.repository
    outcome = processes.run(command, check.log("benchmarks"), REPORT_S, cwd)
    said = staging.last_line(check.log("benchmarks"))
    if not outcome.ok:
        raise StageError(f"plots: {outcome.reason}: {said}")
    check.put(plots=sorted(plot.name for plot in check.out.glob("*.png")) or said)


def finish(check: Check) -> int:
    """Trims the logs, hides this machine's paths, prints a summary, returns the exit status."""
    places = [*check.results.private, (sys.prefix, "<python>"), (str(Path.home()), "~")]
    for log in check.out.glob("*.log"):
        log.write_text(scrub(log.read_text(errors="replace")[-LOG_BYTES:], places))
    data = check.results.data
    (check.out / "report.md").write_text(markdown(json.loads(check.results.path.read_text())))
    print()
    for goal in data.get("goals", []):
        value = "" if goal["value"] is None else f" {goal['value']:.3f} ({goal['bound']})"
        print(f"  {goal['verdict']:>12}: {goal['text']}{value}")
    if "tests" in data:
        print(f"  tests: {data['tests']['counts']}")
    if "soak" in data:
        print(f"  {data['soak']['summary']}")
    for stage in data["stages"]:
        print(f"  {stage['status']:>12}: {stage['name']} {stage['reason']}")
    print(f"  {check.out}")
    return 0 if all(stage["status"] == "passed" for stage in data["stages"]) else 1


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: every stage passed. 1: one failed. 2: no GPU, or the wheel cannot be used."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        check = Check(options, Path(folder))
        with check.stage("install"):
            install(check)
        if check.passed("install"):
            with check.stage("environment"):
                environment(check)
        ready = check.passed("environment")
        if ready:
            correctness(check)
            with check.stage("soak"):
                soak(check)
            with check.stage("comparison"):
                comparison(check)
            with check.stage("benchmarks"):
                benchmarks(check)
        with check.stage("report"):
            report(check)
        code = finish(check)
    return code if ready else 2


if __name__ == "__main__":
    sys.exit(main())
