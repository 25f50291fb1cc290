"""Children that hang, crash or leave grandchildren behind."""

import sys
import time

import pytest

from benchmarks import processes
from benchmarks.processes import EventProcess

PYTHON = (sys.executable, "-c")
pytestmark = pytest.mark.alone  # tests of time limits
EVENTS = (
    "import json, os, sys, time\n"
    "events = os.fdopen(int(os.environ['BENCHMARK_EVENTS_FD']), 'w', 1)\n"
)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not alive(pid)


def test_outcomes(tmp_path):
    log = tmp_path / "log"
    assert processes.run((*PYTHON, "print('hello')"), log, 60).ok
    assert log.read_text() == "hello\n"
    assert processes.run((*PYTHON, "raise SystemExit(3)"), log, 60).reason == "exit status 3"
    crashed = processes.run((*PYTHON, "import os; os.abort()"), log, 60)
    assert not crashed.ok and crashed.reason == "died of SIGABRT"


def test_a_hanging_child_dies_with_its_children(tmp_path):
    log = tmp_path / "log"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    start = time.monotonic()
    outcome = processes.run((*PYTHON, code), log, 3)
    assert time.monotonic() - start < 20
    assert outcome.returncode is None and "killed after 3 s" in outcome.reason
    assert gone(int(log.read_text()))


def test_events_arrive_and_the_end_is_seen(tmp_path):
    code = EVENTS + "print(json.dumps({'event': 'a', 'stdin': sys.stdin.read()}), file=events)"
    process = EventProcess((*PYTHON, code), tmp_path / "log", stdin="x" * 200_000)
    assert process.next_event(60) == {"event": "a", "stdin": "x" * 200_000}
    assert process.next_event(60) is None
    assert process.returncode == 0
    process.close()


def test_silence_is_a_timeout_and_a_crash_is_an_end(tmp_path):
    process = EventProcess((*PYTHON, "import time; time.sleep(600)"), tmp_path / "log")
    with pytest.raises(TimeoutError, match="no progress in 1 s"):
        process.next_event(1)
    process.close()
    assert process.returncode is not None
    process = EventProcess((*PYTHON, "import os; os.abort()"), tmp_path / "log")
    assert process.next_event(60) is None
    process.close()


def test_a_grandchild_that_holds_the_pipe_neither_delays_the_end_nor_survives(tmp_path):
    code = EVENTS + (
        "pid = os.fork()\n"
        "if pid == 0: time.sleep(600)\n"
        "print(json.dumps({'event': 'fork', 'pid': pid}), file=events)\n"
    )
    process = EventProcess((*PYTHON, code), tmp_path / "log")
    start = time.monotonic()
    event = process.next_event(60)
    assert event is not None
    grandchild = event["pid"]
    assert process.next_event(60) is None
    assert time.monotonic() - start < 30
    assert alive(grandchild)
    process.close()
    assert gone(grandchild)
