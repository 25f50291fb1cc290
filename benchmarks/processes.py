"""Child processes that cannot take their parent down: own process group, time limits, logs.

A kernel that deadlocks leaves its process beyond reason; the whole group is killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS_FD = "BENCHMARK_EVENTS_FD"
# A group of its own, to be killed as one; not a session of its own, so that whoever ends this
# process's session ends the children too.
OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
)


@dataclass
class Outcome:
    """returncode: None when the process was killed at its time limit."""

    returncode: int | None
    seconds: float

    @property
    def ok(self) -> bool:
        return self.returncode == 0

    @property
    def reason(self) -> str:
        return describe_exit(self.returncode, self.seconds)


def describe_exit(returncode: int | None, seconds: float) -> str:
    if returncode is None:
        return f"killed after {seconds:.0f} s without an end"
    if returncode < 0:
        return f"died of {signal.Signals(-returncode).name}"
    return f"exit status {returncode}"


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL to the process and all it started. Waits 10 s at most: a driver may not let go."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} did not die of SIGKILL within 10 s", flush=True)


def run(
    command: Sequence[str],
    log: Path,
    limit_s: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Runs `command`, output appended to `log`."""
    start = time.monotonic()
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env=None if env is None else dict(env),
            **OWN_GROUP,
        )
        try:
            returncode: int | None = process.wait(timeout=max(limit_s, 0))
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            kill_group(process)
    return Outcome(returncode, time.monotonic() - start)


class EventProcess:
    """A child that reports events as JSON lines through the file descriptor named by EVENTS_FD."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        stdin: str = "",
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ):
        self._reader, writer = os.pipe()
        self._buffer = b""
        # A file, not a pipe: a child that never reads must not block its parent.
        with log.open("a") as output, tempfile.TemporaryFile("w+") as source:
            source.write(stdin)
            source.seek(0)
            self._process = subprocess.Popen(
                command,
                stdin=source,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**(os.environ if env is None else env), EVENTS_FD: str(writer)},
                pass_fds=(writer,),
                **OWN_GROUP,
            )
        os.close(writer)

    def next_event(self, limit_s: float) -> dict | None:
        """The next event, None once the process has ended; TimeoutError after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            # A grandchild may hold the pipe open after the child's death, so end-of-file is not
            # the only sign.
            ended = self._process.poll() is not None
            wait = 0.0 if ended else max(0.0, min(0.5, deadline - time.monotonic()))
            readable, _, _ = select.select([self._reader], [], [], wait)
            data = os.read(self._reader, 1 << 16) if readable else b""
            self._buffer += data
            if data:
                continue
            if ended:
                return None
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no progress in {limit_s:.0f} s")
            if readable:  # end of file, but the process lives: do not spin
                time.sleep(0.05)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def close(self) -> None:
        """Kills what is left of it."""
        kill_group(self._process)
        os.close(self._reader)
