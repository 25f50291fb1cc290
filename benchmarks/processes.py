"""Child processes with their own process group, time limits and logs, so that a child that hangs or
crashes does not take its parent down.

A process whose kernel deadlocks may react to nothing but SIGKILL, which its whole group gets.
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
# A process group for each child, so that the child and its children can be killed together. Not a
# session: ending this process's session must end the children too.
OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
)


@dataclass
class Outcome:
    """How a process ended. returncode: None if it was killed at its time limit."""

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
    """Sends SIGKILL to the process and its children. Waits at most 10 s: a process inside the GPU's
    driver may not end."""
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
    """Runs `command` and appends its output to `log`; kills it after `limit_s` seconds."""
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
    """A child that reports events as JSON lines through a file descriptor, whose number is in the
    environment variable EVENTS_FD."""

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
        """The next event; None once the process has ended. Raises TimeoutError after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            # The child's death also ends the events: a grandchild may hold the pipe open, so that
            # there is no end of file.
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
            if readable:  # end of file, but the process lives: avoid busy waiting
                time.sleep(0.05)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def close(self) -> None:
        """Kills the child and its children, and closes the pipe."""
        kill_group(self._process)
        os.close(self._reader)
