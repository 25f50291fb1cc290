"""A progress bar on a terminal; nothing anywhere else."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts bytes of `total`, and draws them on stderr if it is a terminal."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._draws = total > 0 and sys.stderr.isatty()
        self._start = self._drawn = time.monotonic()

    def add(self, nbytes: int) -> None:
        """`nbytes` more are done."""
        self._done += nbytes
        now = time.monotonic()
        if self._draws and (now - self._drawn > 0.1 or self._done >= self._total):
            self._drawn = now
            share = min(self._done / self._total, 1.0)
            bar = "#" * round(30 * share)
            rate = self._done / max(now - self._start, 1e-3) / 1e6
            sys.stderr.write(
                f"\r{self._what} [{bar:<30}] {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, "
                f"{rate:.0f} MB/s "
            )
            sys.stderr.flush()

    def end(self) -> None:
        """Ends the line."""
        if self._draws:
            sys.stderr.write("\n")
