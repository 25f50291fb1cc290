"""Which kernel an FP8 GEMM runs, and why.

`explain_gemm` shows what the library would choose for a problem: from a table measured on a GPU
where it has the problem, else by a cost model (csrc/gemm/sm90/select.cpp) whose terms it lists for
every tile that is compiled. Nothing here needs a GPU. `forced` overrules the choice of a Hopper
tile and `forced_path` that of the architecture's kernels, for tests, benchmarks and the tuner.
"""

from __future__ import annotations

import ctypes
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from ._architectures import paths
from ._dispatch.c_api import c_function

_GRANULARITIES = ("1d2d", "1d1d", "rowwise")  # the order of csrc/gemm/gemm.h
_OF_RECIPES = {"blockwise": "1d2d", "tensorwise": "rowwise"}  # torchext.Recipe's words
_GROUPINGS = ("none", "offsets", "group_ids", "masked", "along_k")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_forced_paths: list[str] = []
_log = logging.getLogger("torchext")


@dataclass(frozen=True)
class Candidate:
    """A kernel that could run, and what the cost model makes of it.

    Cycles are those of an SM, estimated: fewer is better.

    Attributes:
        name: of the tile, tokens x features.
        split_k: CTAs of a cluster that share K.
        cluster: CTAs of a cluster; 2 with split_k=1 is a pair that shares rows of a by multicast.
        tile_m, tile_n: tokens and features of a tile.
        stages: K blocks in flight.
        tiles: of the output (expected, where rows of groups are counted on the GPU).
        waves: rounds in which the SMs get through them.
        tensor_cycles: cycles the tensor cores spend on one K block.
        issue_cycles: cycles each warp scheduler spends issuing one K block, promotion included.
        shared_cycles: cycles shared memory is busy with one K block.
        load_cycles: cycles to bring the operands of one K block through L2.
        memory_cycles: cycles to move the whole product's bytes from and to memory, its launch
            included: a floor, whatever the tile.
        cycles: cycles of the whole product; the model's verdict.
    """

    name: str
    split_k: int
    cluster: int
    tile_m: int
    tile_n: int
    stages: int
    tiles: int
    waves: int
    tensor_cycles: float
    issue_cycles: float
    shared_cycles: float
    load_cycles: float
    memory_cycles: float
    cycles: float

    @property
    def bound(self) -> str:
        """What takes longest, in words."""
        if self.cycles <= self.memory_cycles:
            return f"the bytes that memory must move ({self.memory_cycles:.0f} cycles)"
        terms = {
            "tensor cores": self.tensor_cycles,
            "instruction issue": self.issue_cycles,
            "shared memory": self.shared_cycles,
            "loads through L2": self.load_cycles,
        }
        slowest = max(terms, key=lambda name: terms[name])
        return f"{slowest} ({terms[slowest]:.0f} cycles a K block)"

    def __str__(self) -> str:
        if self.split_k > 1:
            return f"{self.name} with split_k={self.split_k}"
        return f"{self.name} in pairs" if self.cluster > 1 else self.name


@dataclass(frozen=True)
class GemmExplanation:
    """What `explain_gemm` returns; `print` it for a table, whose last line says why.

    Attributes:
        candidates: all that may run, by estimated cycles, the fewest first.
        chosen: the one that runs.
        source: what decided: "cost model", "tuned table" or "forced".
        num_sms: SMs that the product may use.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    source: str
    num_sms: int

    @property
    def why(self) -> str:
        """Why `chosen` runs, in a sentence."""
        chosen, others = self.chosen, [c for c in self.candidates if c != self.chosen]
        if self.source == "tuned table":
            return f"{chosen} was the fastest when measured; the model says {self.candidates[0]}"
        if self.source == "forced":
            return f"{chosen} was asked for; the model says {self.candidates[0]}"
        waves = "1 wave" if chosen.waves == 1 else f"{chosen.waves} waves"
        sentence = (
            f"{chosen} has {chosen.tiles} tiles, {waves} of {self.num_sms} SMs, bound by "
            f"{chosen.bound}"
        )
        if others:
            more = others[0].cycles / chosen.cycles - 1
            if more >= 0:
                told = f"{more:.1%} more cycles" if more else "as many cycles"
                sentence += f"; {others[0]}, the next, takes {told}"
            else:  # as many parts of K as without num_sms, so that the bits are the same
                sentence += f"; {others[0]} is cheaper, but sums K in other parts"
        return sentence

    def __str__(self) -> str:
        columns = [field.name for field in fields(Candidate)]
        rows = [columns]
        for candidate in self.candidates:
            values = [getattr(candidate, name) for name in columns]
            rows.append([f"{v:.0f}" if isinstance(v, float) else str(v) for v in values])
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        marks = [" ", *("*" if c == self.chosen else " " for c in self.candidates)]
        table = "\n".join(f"{mark} {line}" for mark, line in zip(marks, lines, strict=True))
        return f"{table}\n* chosen by: {self.source}: {self.why}"


def explain_gemm(
    m: int,
    n: int,
    k: int,
    *,
    granularity: str = "1d2d",
    a_dtype: torch.dtype = torch.float8_e4m3fn,
    b_dtype: torch.dtype = torch.float8_e4m3fn,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: bool = False,
    grouping: str = "none",
    groups: int = 1,
    expected_m: int = 0,
    num_sms: int = 0,
    sm_count: int = 132,
) -> GemmExplanation:
    """Which kernel `fp8_gemm_nt` or a grouped product runs on a Hopper GPU, and the alternatives.

    Args:
        m, n, k: of the product; for grouped ones m is all rows of a, and k all of K.
        granularity: "1d2d", "1d1d" or "rowwise"; or as a Recipe says it, "blockwise" for 1d2d, the
            forward and dgrad of a layer (wgrad is 1d1d), and "tensorwise", which runs as rowwise.
        a_dtype, b_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        out_dtype, accumulate: as the op takes them.
        grouping: "none", "offsets", "group_ids", "masked" or "along_k".
        groups: how many, for those.
        expected_m: rows expected in a group; 0: unknown.
        num_sms: SMs that the product may use; 0: all.
        sm_count: SMs of the GPU; an H100 or H200 (SXM) has 132.

    Raises ValueError for anything else, and RuntimeError where this build has no CUDA kernels.
    """
    granularity = _OF_RECIPES.get(granularity, granularity)
    if granularity not in _GRANULARITIES or grouping not in _GROUPINGS:
        raise ValueError(
            f"explain_gemm: granularity must be one of {_GRANULARITIES} and grouping one of "
            f"{_GROUPINGS} (got {granularity!r}, {grouping!r})"
        )
    if a_dtype not in _FP8 or b_dtype not in _FP8:
        raise ValueError(
            "explain_gemm: a_dtype and b_dtype must be torch.float8_e4m3fn or torch.float8_e5m2 "
            f"(got {a_dtype}, {b_dtype})"
        )
    if min(m, n, groups, sm_count) < 1 or min(k, expected_m, num_sms) < 0 or num_sms > sm_count:
        raise ValueError(
            "explain_gemm: m, n, groups and sm_count must be positive, k and expected_m not "
            f"negative, num_sms from 0 to sm_count (got m={m}, n={n}, k={k}, groups={groups}, "
            f"expected_m={expected_m}, num_sms={num_sms}, sm_count={sm_count})"
        )
    explain = _function("torchext_explain_gemm")
    arguments = (
        m,
        n,
        k,
        _GRANULARITIES.index(granularity),
        a_dtype == torch.float8_e5m2,
        b_dtype == torch.float8_e5m2,
        out_dtype.itemsize,
        accumulate,
        _GROUPINGS.index(grouping),
        groups,
        expected_m,
        num_sms,
        sm_count,
    )
    size = explain(*arguments, None, 0)
    text = ctypes.create_string_buffer(size)
    explain(*arguments, text, size)
    answer = json.loads(text.value)
    candidates = tuple(Candidate(**candidate) for candidate in answer["candidates"])
    chosen = tuple(answer[key] for key in ("name", "split_k", "cluster"))
    return GemmExplanation(
        candidates,
        next(c for c in candidates if (c.name, c.split_k, c.cluster) == chosen),
        answer["source"],
        num_sms or sm_count,
    )


def configurations(
    granularity: str = "1d2d",
    a_dtype: torch.dtype = torch.float8_e4m3fn,
    b_dtype: torch.dtype = torch.float8_e4m3fn,
) -> list[str]:
    """Names of the tiles that are compiled for these operands, as `forced` takes them."""
    large = explain_gemm(
        4096, 4096, 4096, granularity=granularity, a_dtype=a_dtype, b_dtype=b_dtype
    )
    return sorted({candidate.name for candidate in large.candidates})


@contextmanager
def forced(name: str, *, split_k: int = 1, cluster: int = 1) -> Iterator[None]:
    """Within it, Hopper GEMMs of this process use the tile `name`; not nestable.

    Args:
        name: one of `configurations`.
        split_k: 1, 2, 4 or 8 CTAs that share K (tiles called swap_*).
        cluster: 2 for pairs that share rows of a by multicast (the other tiles). With split_k it
            is split_k, and may be left at 1.

    A product that the tile cannot compute raises ValueError.
    """
    force = _function("torchext_force_gemm")
    force(name.encode(), split_k, cluster)
    _log.debug("Hopper GEMMs use the tile %s, split_k=%d, cluster=%d", name, split_k, cluster)
    try:
        yield
    finally:
        force(None, 0, 0)
        _log.debug("Hopper GEMMs choose their tile again")


@contextmanager
def forced_path(path: str) -> Iterator[None]:
    """Within it, every GPU, simulated or real, runs the kernels of one path: "sm90", "sm89", "sm80"
    or "plain"; ops raise on a GPU that cannot. Process-wide; for tests and benchmarks."""
    numbers = paths()
    if path not in numbers:
        raise ValueError(
            f"forced_path: path must be one of {', '.join(map(repr, numbers))} (got {path!r})"
        )
    force = c_function("torchext_force_path")
    _forced_paths.append(path)
    force(numbers[path])
    _log.debug("GEMMs run the %s kernels", path)
    try:
        yield
    finally:
        _forced_paths.pop()
        force(numbers[_forced_paths[-1]] if _forced_paths else 0)
        _log.debug("GEMMs run the kernels of %s", _forced_paths[-1] if _forced_paths else "the GPU")


def _function(name: str) -> Any:
    try:
        return c_function(name)
    except AttributeError:
        raise RuntimeError(
            "torchext.gemm_selection: this build of torchext must have CUDA kernels to choose from "
            "(got none: no nvcc was found when it was built); reinstall torchext where nvcc is on "
            "PATH or CUDA_HOME is set"
        ) from None
