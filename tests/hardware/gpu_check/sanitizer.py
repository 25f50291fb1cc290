"""Runs gpu_check.op_calls alone, and under each tool of NVIDIA's compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import processes

from . import staging

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 86  # exit status of a run in which the tool found an error
RETRIES = 3


@dataclass
class OpCalls:
    """Where op_calls runs, and until when."""

    target: Path
    device: str
    deadline: float  # a value of time.monotonic()
    log: Path


def run_tool(run: OpCalls, tool: str | None) -> dict:
    """{"tool", "status": passed|failed|skipped, "calls", "seconds", "summary"}.

    tool: None to run without a tool. If a call hangs, the others run again without it.
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
    command = (sys.executable, "-m", "tests.hardware.gpu_check.op_calls", "--device", run.device)
    # Without torch's caching allocator, every tensor is an allocation whose bounds are checked.
    env = {**staging.environment(run.target), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = run.target / f".sanitizer-{name}.log"
    hung: list[str] = []
    done: set[str] = set()
    text = ""
    for _ in range(RETRIES):
        log.write_text("")
        skip = ("--skip", *hung) if hung else ()
        share = 1.0 if hung else 0.6  # the first run leaves time for another
        limit = share * (run.deadline - time.monotonic())
        outcome = processes.run((*prefix, *command, *skip), log, limit, run.target, env)
        text = log.read_text(errors="replace")
        _append(run.log, name, text)
        done |= set(re.findall(r"^ok (.*)$", text, re.MULTILINE))
        calling = re.findall(r"^calling (.*)$", text, re.MULTILINE)
        if outcome.returncode is not None or not calling or time.monotonic() >= run.deadline:
            break
        hung.append(calling[-1])
    log.unlink()
    status = "passed" if outcome.ok and not hung else "failed"
    return _answer(name, status, len(done), start, _summary(text, outcome, hung))


def _summary(text: str, outcome: processes.Outcome, hung: list[str]) -> str:
    """The tool's verdict, preceded by what else failed."""
    parts = [f"{call!r} did not end" for call in hung]
    parts += re.findall(r"^(WRONG .*)$", text, re.MULTILINE)
    if outcome.returncode not in (0, 1, FOUND):
        parts.append(outcome.reason)
        parts += re.findall(r"^(\w*Error: .*)$", text, re.MULTILINE)[-1:]
    verdicts = re.findall(r"^=+ (.*(?:SUMMARY|Error).*)$", text, re.MULTILINE)
    return "; ".join(parts + verdicts[-1:]) or "all results right"


def _answer(tool: str, status: str, calls: int, start: float, summary: str) -> dict:
    seconds = time.monotonic() - start
    return {
        "tool": tool,
        "status": status,
        "calls": calls,
        "seconds": seconds,
        "summary": summary,
    }


def _append(log: Path, name: str, text: str) -> None:
    with log.open("a") as output:
        output.write(f"==== {name} ====\n{text[-400_000:]}\n")
