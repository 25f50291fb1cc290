"""Which kernel an FP8 GEMM runs, and why.

`explain_gemm` shows which kernel the library chooses for a GEMM, and why. The choice comes from a
table of measurements on a GPU if the table has the GEMM, else from a cost model
(csrc/gemm/sm90/select.cpp). `explain_gemm` lists the model's terms for every compiled tile. Nothing
here needs a GPU. For tests, benchmarks and the tuner, `forced` overrides the choice of a Hopper
tile, and `forced_path` the choice of the kernels' path.
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

from ._architectures import architectures, paths, why_not_built
from ._dispatch.c_api import c_function

_GRANULARITIES = ("1d2d", "1d1d", "rowwise")  # the order of csrc/gemm/gemm.h
_OF_RECIPES = {"blockwise": "1d2d", "tensorwise": "rowwise"}  # the names in torchext.Recipe
_GROUPINGS = ("none", "offsets", "group_ids", "masked", "along_k")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_forced_paths: list[str] = []
_log = logging.getLogger("torchext")


@dataclass(frozen=True)
class Candidate:
    """A kernel that can run the GEMM, with the cost model's estimates.

    Cycles are estimated clock cycles of an SM.

    Attributes:
        name: the tile's name, tokens x features.
        split_k: the number of CTAs of a cluster that share K; 1 without split K.
        cluster: the number of CTAs in a cluster; 2 with split_k=1 is a pair, which shares rows of
            `a` by multicast.
        tile_m, tile_n: tokens and features of a tile.
        stages: the number of slots in the ring, each for one K block.
        tiles: the number of tiles of the output; an expected number if the GPU counts the rows of
            groups.
        waves: the number of waves in which the SMs compute these tiles.
        tensor_cycles: cycles the tensor cores spend on one K block.
        issue_cycles: cycles each warp scheduler spends issuing one K block, promotion included.
        shared_cycles: cycles shared memory is busy with one K block.
        load_cycles: cycles to bring the operands of one K block through L2.
        memory_cycles: cycles to move all bytes of the GEMM from and to memory, and to launch it: a
            lower limit for every tile.
        cycles: estimated cycles of the whole GEMM. The model chooses the candidate with the fewest.
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
        """What limits the speed of this candidate, in words."""
        if self.cycles <= self.memory_cycles:
            return f"the bytes that memory must move ({self.memory_cycles:.0f} cycles)"
        terms = {
            "tensor cores": self.tensor_cycles,
            "instruction issue": self.issue_cycles,
            "shared memory": self.shared_cycles,
            "loads through L2": self.load_cycles,
        }
        slowest = max(terms, key=lambda name: terms[name])
        return f"{slowest} ({terms[slowest]:.0f} cycles per K block)"

    def __str__(self) -> str:
        if self.split_k > 1:
            return f"{self.name} with split_k={self.split_k}"
        return f"{self.name} in pairs" if self.cluster > 1 else self.name


@dataclass(frozen=True)
class GemmExplanation:
    """The result of `explain_gemm`. It prints as a table, whose last line says why.

    Attributes:
        candidates: all kernels that can run, the fewest estimated cycles first.
        chosen: the candidate that runs.
        source: what decided: "cost model", "tuned table" or "forced".
        num_sms: the number of SMs that the GEMM may use.
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
            else:  # split_k does not depend on num_sms, so that num_sms does not change the bits
                sentence += f"; {others[0]} is cheaper, but splits K differently"
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
    memory_gigabytes_per_second: int | None = None,
) -> GemmExplanation:
    """Which kernel `fp8_gemm_nt` or a grouped GEMM runs on a Hopper GPU, and the alternatives.

    Args:
        m, n, k: sizes of the GEMM. For grouped GEMMs, m is the number of all rows of `a`, and k the
            number of all columns.
        granularity: "1d2d", "1d1d" or "rowwise". Names of a Recipe work, too: "blockwise" means
            "1d2d", which a layer's fprop and dgrad run (its wgrad runs "1d1d"), and "tensorwise"
            means "rowwise", whose kernels it runs.
        a_dtype, b_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        out_dtype: torch.bfloat16, torch.float16 or torch.float32.
        accumulate: whether the op adds to `out`.
        grouping: "none"; for m_grouped_fp8_gemm_nt_contiguous "offsets" or "group_ids"; for
            m_grouped_fp8_gemm_nt_masked "masked"; for k_grouped_fp8_gemm_nt "along_k".
        groups: the number of groups; 1 if grouping is "none".
        expected_m: the number of rows expected in a group; 0 if unknown.
        num_sms: the number of SMs that the GEMM may use; 0 for all.
        sm_count: the number of SMs of the GPU; an H100 or H200 (SXM) has 132.
        memory_gigabytes_per_second: the rated bandwidth of the GPU's memory: 3350 for an H100 SXM,
            4917 for an H200. None: that of the current CUDA device or, without one, of an H100 SXM.

    Returns:
        A GemmExplanation, which prints as a table of the candidates.

    Raises:
        ValueError: an argument has another value.
        RuntimeError: this build has no CUDA kernels.
    """
    granularity = _OF_RECIPES.get(granularity, granularity)
    if granularity not in _GRANULARITIES or grouping not in _GROUPINGS:
        raise ValueError(
            f"explain_gemm: granularity must be one of {_GRANULARITIES} and grouping one of "
            f"{_GROUPINGS} (got {granularity!r}, {grouping!r}); a Recipe's granularity also works"
        )
    if a_dtype not in _FP8 or b_dtype not in _FP8:
        raise ValueError(
            "explain_gemm: a_dtype and b_dtype must be torch.float8_e4m3fn or torch.float8_e5m2 "
            f"(got {a_dtype}, {b_dtype}); the dtype of the output is out_dtype"
        )
    if min(m, n, groups, sm_count) < 1 or min(k, expected_m, num_sms) < 0 or num_sms > sm_count:
        raise ValueError(
            "explain_gemm: m, n, groups and sm_count must be positive, k and expected_m not "
            f"negative, num_sms from 0 to sm_count (got m={m}, n={n}, k={k}, groups={groups}, "
            f"expected_m={expected_m}, num_sms={num_sms}, sm_count={sm_count})"
        )
    if memory_gigabytes_per_second is None:
        memory_gigabytes_per_second = _memory_gigabytes_per_second()
    if memory_gigabytes_per_second < 1:
        raise ValueError(
            "explain_gemm: memory_gigabytes_per_second must be positive "
            f"(got {memory_gigabytes_per_second})"
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
        memory_gigabytes_per_second,
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


def _memory_gigabytes_per_second() -> int:
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        return c_function("torchext_memory_gigabytes_per_second")(device)
    return architectures()[90].gigabytes_per_second


def configurations(
    granularity: str = "1d2d",
    a_dtype: torch.dtype = torch.float8_e4m3fn,
    b_dtype: torch.dtype = torch.float8_e4m3fn,
) -> list[str]:
    """Names of the tiles that are compiled for these operands, for `forced`. Arguments and errors
    as in `explain_gemm`."""
    large = explain_gemm(
        4096, 4096, 4096, granularity=granularity, a_dtype=a_dtype, b_dtype=b_dtype
    )
    return sorted({candidate.name for candidate in large.candidates})


@contextmanager
def forced(name: str, *, split_k: int = 1, cluster: int = 1) -> Iterator[None]:
    """Within this context all Hopper GEMMs of the process use the tile `name`. It does not nest.

    A GEMM that the tile cannot compute raises a ValueError.

    Args:
        name: a name from `configurations()`.
        split_k: the number of CTAs that share K: 1, 2, 4 or 8 for tiles called swap_*, 1 for the
            others.
        cluster: 2 for pairs that share rows of `a` by multicast, which tiles called swap_* lack. A
            cluster with split_k > 1 has split_k CTAs; cluster may then be 1.

    Raises:
        RuntimeError: this build has no CUDA kernels.
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
    """Within this context every GPU, simulated or real, runs the kernels of one path.

    For tests and benchmarks. It applies to the whole process, and nests. GEMMs raise on a GPU that
    cannot run these kernels.

    Args:
        path: "sm90", "sm89", "sm80" or "plain".

    Raises:
        ValueError: path is none of these.
    """
    numbers = paths()
    if path not in numbers:
        raise ValueError(
            f"forced_path: path must be one of {', '.join(map(repr, numbers))} (got {path!r}); see "
            "docs/architectures.md"
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
        function = c_function(name)
    except AttributeError:
        raise RuntimeError(
            "torchext.gemm_selection: this build of torchext must have CUDA kernels to choose from "
            "(got none: no nvcc was found when it was built); reinstall torchext where nvcc is on "
            "PATH or CUDA_HOME is set"
        ) from None
    missing = why_not_built(paths()["sm90"])
    if missing is not None:
        raise RuntimeError(f"torchext.gemm_selection: {missing}")
    return function
