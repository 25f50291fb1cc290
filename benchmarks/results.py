"""results.json: one dictionary, rewritten after every step, so that a run that is cut short leaves
its results.

Schema: docs/benchmarks.md. `write` replaces paths of this machine by short names.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SCHEMA = 1


class Results:
    """data: the dictionary. `write` replaces the file atomically."""

    def __init__(self, path: Path, data: dict | None = None):
        self.path = path
        self.private: list[tuple[str, str]] = []  # more (path, name) pairs to replace, see scrub
        self.data = data or {
            "schema": SCHEMA,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": {},
            "ceilings": {},
            "contenders": [],
            "measurements": [],
        }

    @staticmethod
    def open(path: Path) -> Results:
        """The results that an earlier step wrote to `path`, or new ones if there are none."""
        return Results(path, json.loads(path.read_text()) if path.exists() else None)

    def write(self) -> None:
        text = json.dumps(finite(self.data), indent=1, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(scrub(text, [*self.private, *usual_places()]) + "\n")
        temporary.replace(self.path)


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as strings, since JSON cannot hold them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def usual_places() -> list[tuple[str, str]]:
    return [
        (os.getcwd(), "."),
        (sys.prefix, "<python>"),
        (sys.base_prefix, "<python>"),
        (str(Path.home()), "~"),
    ]


def scrub(text: str, places: Iterable[tuple[str, str]]) -> str:
    """`text` with the paths in `places` replaced by their names."""
    for path, name in places:
        if len(path) > 1:
            text = text.replace(path, name)
    return text
