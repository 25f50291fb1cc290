"""Runs gpu_check.op_calls alone, and under each tool of NVIDIA's compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from benchmarks import processes

from . import staging

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 86  # exit status of a run in which the tool found an error
RESTARTS = 20
CALL_LIMIT_S = 60.0


@dataclass
class OpCalls:
    """Where op_calls runs, and until when."""

    target: Path
    device: str
    deadline: float  # a value of time.monotonic()
    log: Path


def run_tool(run: OpCalls, tool: str | None, skip: Collection[str] = ()) -> dict:
    """{"tool", "status": passed|failed|skipped, "calls", "seconds", "summary", "broke": [calls]}.

    tool: None to run without a tool. skip: names of calls to leave out. If a call hangs or ends the
    process, a new process makes the calls after it.
    """
    start = time.monotonic()
    name = tool or "none"
    prefix: tuple[str, ...] = ()
    if tool:
        program = shutil.which("compute-sanitizer")
        if program is None or run.device != "cuda":
            reason = "needs a GPU" if program else "compute-sanitizer is not on PATH"
            return _answer(name, "skipped", 0, start, reason)
        prefix = (program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "50")
    command: tuple[str, ...] = (sys.executable, "-m", "tests.hardware.gpu_check.op_calls")
    command += ("--device", run.device)
    command += ("--call-limit", f"{CALL_LIMIT_S}")
    if tool == "initcheck":  # does not see what TMA stores write, and so refuses copies of results
        command += ("--no-results",)
    # Without torch's caching allocator, every tensor is an allocation whose bounds are checked.
    env = {**staging.environment(run.target), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = run.target / f".sanitizer-{name}.log"
    begun = dict.fromkeys(skip)  # in order, so that a log can be read against it
    broke: dict[str, str] = {}
    done: set[str] = set()
    found: dict[str, None] = {}  # wrong results and the tool's verdicts, each once
    failed = False
    for _ in range(RESTARTS):
        log.write_text("")
        # A run that is killed at its limit leaves time for another.
        limit = 0.6 * (run.deadline - time.monotonic())
        outcome = processes.run((*prefix, *command, "--skip", *begun), log, limit, run.target, env)
        text = log.read_text(errors="replace")
        _append(run.log, name, text)
        done |= set(re.findall(r"^ok (.*)$", text, re.MULTILINE))
        found |= dict.fromkeys(_findings(text))
        failed |= not outcome.ok
        calling = re.findall(r"^calling (.*)$", text, re.MULTILINE)
        complete = re.search(r"^end of calls$", text, re.MULTILINE)
        if complete or not calling:
            if outcome.returncode not in (0, 1, FOUND):
                found[outcome.reason] = None
            break
        broke[calling[-1]] = _cause(text, outcome)
        begun |= dict.fromkeys(calling)
        if time.monotonic() >= run.deadline:
            found["no time was left for later calls"] = None
            break
    else:
        found[f"later calls were left out after {RESTARTS} restarts"] = None
    log.unlink()
    status = "failed" if failed or broke else "passed"
    parts = [f"{call!r} {cause}" for call, cause in broke.items()]
    summary = "; ".join([*parts, *found]) or "all results right"
    return _answer(name, status, len(done), start, summary, broke=broke)


def _findings(text: str) -> list[str]:
    """Wrong results, or the error that kept op_calls from starting, and the tool's verdict."""
    wrong = re.findall(r"^(WRONG .*)$", text, re.MULTILINE)
    if not re.search(r"^calling ", text, re.MULTILINE):
        wrong += re.findall(r"^(\w*Error: .*)$", text, re.MULTILINE)[-1:]
    verdicts = re.findall(r"^=+ (.*(?:SUMMARY|Error).*)$", text, re.MULTILINE)
    return wrong + verdicts[-1:]


def _cause(text: str, outcome: processes.Outcome) -> str:
    """How a call that has no result ended the process."""
    if outcome.returncode is None or re.search(r"^Timeout \(.*\)!$", text, re.MULTILINE):
        return "did not end"
    said = re.findall(r"^(?:BROKEN CONTEXT|  what\(\)): +(.*)$", text, re.MULTILINE)
    return f"broke the process: {said[-1] if said else outcome.reason}"


def _answer(
    tool: str, status: str, calls: int, start: float, summary: str, *, broke: Collection[str] = ()
) -> dict:
    seconds = time.monotonic() - start
    return {
        "tool": tool,
        "status": status,
        "calls": calls,
        "seconds": seconds,
        "summary": summary,
        "broke": list(broke),
    }


def _append(log: Path, name: str, text: str) -> None:
    with log.open("a") as output:
        output.write(f"==== {name} ====\n{text[-400_000:]}\n")
