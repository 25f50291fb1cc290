"""The table of GPUs in csrc/runtime/architectures.inc, read from the compiled ops."""

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
    """{path: oldest compute capability that can run it, as 90 for 9.0}, the latest path first."""
    return _table()["paths"]


@cache
def built_paths() -> tuple[str, ...]:
    """The paths whose GEMM kernels this build has, the latest first; TORCHEXT_ARCHS may leave some
    out when torchext is built."""
    is_built = c_function("torchext_is_path_built")
    return tuple(path for path, number in paths().items() if is_built(number))


def why_not_built(capability: int) -> str | None:
    """Why TORCHEXT_ARCHS left out the kernels for a GPU of this compute capability; None if it did
    not, or if this build has no CUDA kernels at all."""
    path = path_of(capability)
    if path is None or not built_paths() or path in built_paths():
        return None
    return (
        f"this build of torchext has no {path} kernels, which a GPU of compute capability "
        f"{capability // 10}.{capability % 10} runs, but only {', '.join(built_paths())} "
        f"(TORCHEXT_ARCHS left them out); reinstall torchext with TORCHEXT_ARCHS={paths()[path]} "
        "or without TORCHEXT_ARCHS"
    )


def limits() -> dict[str, int]:
    """{limit that is the same for all GPUs: its value}."""
    return _table()["limits"]


@cache
def architectures() -> dict[int, SimpleNamespace]:
    """{compute capability, as 90 for 9.0: the table's row, whose columns are attributes}."""
    rows = _table()["architectures"]
    return {row["capability"]: SimpleNamespace(**row) for row in rows}


def simulated() -> dict[int, SimpleNamespace]:
    """The rows of GPUs that torchext.sim can simulate, which have a known tensor core rounding."""
    return {number: row for number, row in architectures().items() if row.mma_rounding}


def path_of(capability: int) -> str | None:
    """The path of a GPU with this compute capability; None if the GPU is older than all in the
    table."""
    number = c_function("torchext_path_of_capability")(capability)
    return next((name for name, oldest in paths().items() if oldest == number), None)
