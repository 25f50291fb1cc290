"""Pytest plugin (-p tests.hardware.gpu_check.pytest_events) that reports each test as it runs.

Events, written to the file descriptor benchmarks.processes.EVENTS_FD: collected (tests), begin
(test), end (test, outcome, seconds, message). A test after which the CUDA context no longer works
has failed, even if it has passed: kernels fail after their launch. The process then ends at once,
and its parent starts another for the remaining tests.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from benchmarks.processes import EVENTS_FD

DEAD_CONTEXT = 71  # exit status if the CUDA context no longer works
_events = os.fdopen(int(os.environ[EVENTS_FD]), "w", buffering=1)
_terminal = os.dup(2)  # duplicated before pytest captures stderr


def emit(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), file=_events)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--done", help="file of node ids to leave out, one per line")
    parser.addoption("--trace-after", type=float, help="seconds until a test's stacks are printed")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(Path(config.getoption("--done")).read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]
    emit("collected", tests=[item.nodeid for item in items])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _end(report.nodeid or "collection", "error", 0.0, str(report.longrepr))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    emit("begin", test=item.nodeid)
    faulthandler.dump_traceback_later(item.config.getoption("--trace-after"), file=_terminal)
    try:
        result = yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    _exit_if_context_is_dead(item.nodeid)
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Reports `end` for a test's call, and for a setup or teardown that did not pass."""
    if report.when == "call" or not report.passed:
        outcome: str = report.outcome
        if report.skipped and hasattr(report, "wasxfail"):
            outcome = "xfailed"
        elif report.failed and report.when != "call":
            outcome = "error"
        _end(report.nodeid, outcome, report.duration, _message(report))
    if report.failed:  # before teardowns, which may hang in a dead context
        _exit_if_context_is_dead(report.nodeid)


def _end(test: str, outcome: str, seconds: float, message: str) -> None:
    emit("end", test=test, outcome=outcome, seconds=seconds, message=message[-600:])


def _message(report: pytest.TestReport) -> str:
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # a skip: file, line, reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash else str(report.longrepr)


def _exit_if_context_is_dead(test: str) -> None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        said = f"the CUDA context is dead: {error}"
        _end(test, "failed", 0.0, said)  # counts only if the test has not failed before
        os.write(_terminal, f"\n{said}\n".encode())
        os._exit(DEAD_CONTEXT)
