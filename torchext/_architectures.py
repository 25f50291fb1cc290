"""The table of GPUs, csrc/runtime/architectures.inc, as the compiled ops carry it."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace
from typing import Any

from ._dispatch.c_api import c_function


@cache
def _table() -> dict[str, Any]:
    return json.loads(c_function("torchext_architectures")())


def paths() -> dict[str, int]:
    """{path: the oldest compute capability that can run its kernels}, the latest path first."""
    return _table()["paths"]


def limits() -> dict[str, int]:
    """What is the same for all GPUs."""
    return _table()["limits"]


@cache
def architectures() -> dict[int, SimpleNamespace]:
    """{compute capability: its row, with a column's value as an attribute of the column's name}."""
    rows = _table()["architectures"]
    return {row["capability"]: SimpleNamespace(**row) for row in rows}


def simulated() -> dict[int, SimpleNamespace]:
    """The rows that torchext.sim can simulate: those whose tensor cores' rounding is known."""
    return {number: row for number, row in architectures().items() if row.mma_rounding}


def path_of(capability: int) -> str | None:
    """The GEMM kernels that such a GPU takes; None for one older than all that torchext knows."""
    number = c_function("torchext_path_of_capability")(capability)
    return next((name for name, oldest in paths().items() if oldest == number), None)
