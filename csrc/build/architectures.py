"""The table of GPUs (csrc/runtime/architectures.inc) for the build, tests and tools.

Needs nothing compiled and only the standard library.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TABLE = Path(__file__).resolve().parents[1] / "runtime" / "architectures.inc"


def _rows(text: str, macro: str) -> list[list[str]]:
    found = re.findall(rf"^TORCHEXT_{macro}\((.*)\)", text, re.MULTILINE)
    return [[cell.strip() for cell in row.split(",")] for row in found]


def _value(kind: str, cell: str) -> Any:
    if kind == "const char*":
        return cell.strip('"')
    if kind == "Path":
        return cell
    number, _, shift = cell.partition("<<")
    value = int(number) << int(shift or 0)
    return bool(value) if kind == "bool" else value


def read(text: str) -> tuple[dict[str, int], dict[str, int], dict[int, SimpleNamespace]]:
    """({path: number}, {limit: value}, {capability: row}); a row has its columns as attributes."""
    text = re.sub(r"//.*", "", text)
    columns = _rows(text, "COLUMN")
    rows = {}
    for cells in _rows(text, "ARCHITECTURE"):
        pairs = zip(columns, cells, strict=True)
        row = SimpleNamespace(**{name: _value(kind, cell) for (kind, name), cell in pairs})
        rows[row.capability] = row
    paths = {name: int(number) for name, number, _ in _rows(text, "PATH")}
    limits = {name: int(value) for name, value in _rows(text, "LIMIT")}
    return paths, limits, rows


PATHS, LIMITS, ARCHITECTURES = read(TABLE.read_text())
