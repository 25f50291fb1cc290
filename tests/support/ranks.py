"""Runs functions on several ranks (processes with gloo) that are started once for a test file.

A test file defines functions that take a `Meshes` and raise if something is wrong. `run_checks`
calls each of them on every rank, one after another, and returns what went wrong. A function that
raises on one rank only leaves the others in a collective until the timeout.
"""

from __future__ import annotations

import datetime
import importlib.util
import multiprocessing
import os
import queue
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_TIMEOUT = datetime.timedelta(seconds=60)


class Meshes(NamedTuple):
    """Meshes of all ranks.

    Attributes:
        all: one dimension.
        square: two dimensions, "outer" of half of the ranks and "inner" of two.
    """

    all: DeviceMesh
    square: DeviceMesh

    @property
    def pair(self) -> DeviceMesh:
        """The two ranks of this rank's inner dimension."""
        return self.square["inner"]


def rank_context() -> Any:
    """What starts processes as forks of one that has imported what ranks need, once for all tests.
    Importing takes seconds of a core, Dynamo as much as torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "torchext.distributed", "torchext.moe", "torch._dynamo"]
    )
    return context


def _rank(rank: int, world: int, init: str, work: tuple[str, Sequence[str]], results: Any) -> None:
    file, names = work
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1]))  # of tests/, for `support`
    dist.init_process_group(
        "gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=_TIMEOUT
    )
    meshes = Meshes(
        init_device_mesh("cpu", (world,)),
        init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("outer", "inner")),
    )
    spec = importlib.util.spec_from_file_location("checks", file)
    assert spec is not None and spec.loader is not None
    checks = importlib.util.module_from_spec(spec)
    sys.modules["checks"] = checks
    spec.loader.exec_module(checks)
    for name in names:
        torch.manual_seed(0)
        try:
            getattr(checks, name)(meshes)
            results.put((name, None))
        except Exception:
            results.put((name, f"rank {rank}:\n{traceback.format_exc()}"))
    dist.barrier()
    dist.destroy_process_group()


def _next(results: Any, ranks: Sequence[Any]) -> tuple[str, str | None]:
    """The next result. Raises queue.Empty if there is none for long, or a rank died."""
    for _ in range(75):
        try:
            return results.get(timeout=2)  # type: ignore[no-any-return]
        except queue.Empty:
            if any(rank.exitcode for rank in ranks):
                raise
    raise queue.Empty


def run_checks(file: str, names: Sequence[str], world: int, folder: Path) -> dict[str, str | None]:
    """{name: the traceback of a rank that raised, or None} of the functions `names` of `file`."""
    context = rank_context()
    results = context.Queue()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ranks = [
        context.Process(target=_rank, args=(r, world, str(folder / "init"), (file, names), results))
        for r in range(world)
    ]
    for rank in ranks:
        rank.start()
    found: dict[str, str | None] = {}
    try:
        for _ in range(world * len(names)):
            name, error = _next(results, ranks)
            found[name] = found.get(name) or error
    except queue.Empty:
        for name in names:
            found.setdefault(name, "a rank did not answer")
    finally:
        for rank in ranks:
            rank.join(30)
            rank.kill()
    return found
