"""`verify`: checks the scales of a checkpoint against its weights, and weights against a wide
original."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .._dispatch.layout import GROUP
from .files import Checkpoint, CheckpointError, Entry, Reader, open_checkpoint
from .formats import GATE_UP, Weight, pair, unmatched_problems
from .progress import Progress
from .rules import Part, is_weight, parts_of
from .stacks import PARTS
from .steps import BAND, DequantizedRows, WideRows, bands

# A block this small may hold one magnitude only, all of it saturated.
_SMALL = 128


@dataclasses.dataclass(frozen=True)
class WeightError:
    """The error of an FP8 weight against the original.

    Attributes:
        name: of the FP8 weight.
        sqnr: signal to quantization noise, in dB; inf if they are equal.
        max_error: the largest absolute difference.
    """

    name: str
    sqnr: float
    max_error: float


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found; `print` it for a summary.

    Attributes:
        path: the folder or file.
        weights: how many FP8 weights were checked, with their scales.
        errors: against the original, the largest first; empty without an original.
        problems: one sentence each.
    """

    path: str
    weights: int
    errors: tuple[WeightError, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, strings and numbers; an SQNR of inf is None."""
        plain = dataclasses.asdict(self) | {"ok": self.ok}
        for error in plain["errors"]:
            error["sqnr"] = error["sqnr"] if math.isfinite(error["sqnr"]) else None
        return plain

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict()` as JSON; `indent` as in json.dumps."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.weights:,} FP8 weights checked"]
        lines += [
            f"{e.name}: SQNR {e.sqnr:.1f} dB, largest error {e.max_error:.3g}" for e in self.errors
        ]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join([*lines, "ok" if self.ok else f"{len(self.problems)} problems"])


def verify(
    path: str | os.PathLike[str],
    *,
    original: str | os.PathLike[str] | None = None,
    min_sqnr: float = 25.0,
    allow_unmatched: bool = False,
    weight_block_size: tuple[int, int] | None = None,
    gate_up: str | None = None,
) -> Verification:
    """Reads every FP8 weight and its scale, and looks for what would make a model wrong silently.

    Each FP8 weight must have a scale of a shape that fits, and each scale a weight; scales must be
    finite and above 0, and powers of two if `scale_fmt` is ue8m0; weights must not be NaN, and no
    block of at least 128 elements may be saturated throughout; every pattern of the configuration
    must match. With an original, each weight must be close to it.

    Args:
        path: a folder with safetensors files, or one file.
        original: the wide checkpoint that this one was quantized from.
        min_sqnr: in dB; an FP8 weight whose error against `original` is larger is a problem.
            e4m3 with 128x128 blocks has about 31 dB.
        allow_unmatched, weight_block_size, gate_up: as in `convert`.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or the index disagrees with the
            files.
    """
    checkpoint = open_checkpoint(path)
    pairing = pair(checkpoint, weight_block_size, gate_up)
    origins = _origins(open_checkpoint(original)) if original is not None else None
    problems = list(pairing.problems)
    if not allow_unmatched:
        problems += unmatched_problems(pairing.patterns, "quantization_config of config.json")
    weights = pairing.weights.values()
    progress = Progress("verifying", sum(weight.entry.nbytes for weight in weights))
    reader, of_original = Reader(), Reader()
    errors = []
    for weight in weights:
        problems += _check(weight, reader, pairing.scheme.pow2)
        if origins is not None:
            try:
                errors.append(_compare(weight, reader, origins, of_original))
            except CheckpointError as error:
                problems += error.problems
        progress.add(weight.entry.nbytes)
    progress.end()
    problems += [
        f"{weight_error.name} must be within {min_sqnr:g} dB of the original (got "
        f"{weight_error.sqnr:.1f} dB); its scale, or the original, belongs to another weight"
        for weight_error in errors
        if not weight_error.sqnr >= min_sqnr
    ]
    errors.sort(key=lambda weight_error: weight_error.sqnr)
    unique = tuple(dict.fromkeys(problems))
    return Verification(str(checkpoint.path), len(weights), tuple(errors), unique)


def _check(weight: Weight, reader: Reader, pow2: bool) -> Iterator[str]:
    try:
        scale = weight.load_scale(reader)
    except CheckpointError as error:
        yield from error.problems
        return
    if pow2 and (inexact := int((torch.frexp(scale).mantissa != 0.5).sum())):
        yield (
            f"{weight.scale.where} must have powers of two, as scale_fmt ue8m0 says (got {inexact} "
            "scales that are none); a loader that rounds them would make the weights wrong"
        )
    rows, columns = weight.block or (GROUP, GROUP)
    nan = saturated = 0
    where = None
    for matrix in range(weight.matrices):
        for half_start, half_stop in weight.segments(0, weight.rows):
            step = max(BAND // max(weight.columns, 1) // rows, 1) * rows
            for first in range(half_start, half_stop, step):
                last = min(first + step, half_stop)
                whole = reader.read(weight.entry, (last - first) * weight.columns)
                data = whole.reshape(-1, weight.rows, weight.columns)[matrix, first:last]
                magnitude = data.contiguous().view(torch.uint8) & 0x7F
                infinite = 0x7F if weight.entry.dtype == "F8_E4M3" else 0x7C
                if magnitude.numel() and int(magnitude.max()) >= infinite:
                    nan += int((magnitude >= infinite).sum())
                full = list(_full_blocks(magnitude, infinite - 1, rows, columns))
                saturated += len(full)
                if full and where is None:
                    where = matrix, first + full[0][0], full[0][1]
    if nan:
        yield (
            f"{weight.entry.where} must be finite (got {nan} elements that are NaN or Inf); the "
            "file is damaged, or the original was not finite"
        )
    if where is not None:
        yield (
            f"{weight.entry.where} must have blocks that are not saturated throughout (got "
            f"{saturated} of {rows}x{columns}, the first in matrix {where[0]} at row {where[1]}, "
            f"column {where[2]}); its scales are too small"
        )


def _full_blocks(
    magnitude: Tensor, largest: int, rows: int, columns: int
) -> Iterator[tuple[int, int]]:
    """Row and column where each block begins that has `_SMALL` elements or more, all `largest`."""
    for index in (magnitude[::rows, ::columns] == largest).nonzero().tolist():
        row, column = index[0] * rows, index[1] * columns
        block = magnitude[row : row + rows, column : column + columns]
        if block.numel() >= _SMALL and bool((block == largest).all()):
            yield row, column


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Rows of the original that a weight consists of.

    Attributes:
        matrix, start: the weight's matrix that has the rows, and its row where they begin.
        entry, of_entry: the original's tensor, and the matrix of it that has the rows.
        first, last: the rows in that matrix: from `first` to before `last`.
    """

    matrix: int
    start: int
    entry: Entry
    of_entry: int
    first: int
    last: int


def _pieces(
    weight: Entry, origins: Mapping[str, tuple[Entry, Part]]
) -> tuple[tuple[int, ...] | None, list[_Piece]]:
    """The shape of the original of `weight`, and the rows that it consists of; None and no rows if
    the original lacks it."""
    entry, part = origins.get(weight.name, (None, None))
    if entry is not None and part is not None:
        rows = part.start, part.stop
        return part.shape, [_Piece(i, 0, entry, m, *rows) for i, m in enumerate(part.matrices)]
    module, _, name = weight.name.rpartition(".")
    if len(weight.shape) != 3:
        return None, []
    pieces, rows_of_matrices, columns = [], set(), set()
    for expert in range(weight.shape[0]):
        start = 0
        for matrix in PARTS if name == GATE_UP else (name,):
            entry, part = origins.get(f"{module}.{expert}.{matrix}.weight", (None, None))
            if entry is None or part is None:
                return None, []
            pieces.append(_Piece(expert, start, entry, part.matrices[0], part.start, part.stop))
            start += part.stop - part.start
            columns.add(entry.shape[-1])
        rows_of_matrices.add(start)
    if len(rows_of_matrices) != 1 or len(columns) != 1:
        return None, []
    return (weight.shape[0], rows_of_matrices.pop(), columns.pop()), pieces


def _origins(wide: Checkpoint) -> dict[str, tuple[Entry, Part]]:
    """For each name that a weight of the original may have in FP8, where it comes from."""
    origins = {}
    for experts in ("one_by_one", "keep"):
        for name, entry in wide.entries.items():
            if is_weight(entry):
                for part in parts_of(name, entry.shape, experts):
                    origins[part.name] = entry, part
    return origins


def _compare(
    weight: Weight,
    reader: Reader,
    origins: Mapping[str, tuple[Entry, Part]],
    of_original: Reader,
) -> WeightError:
    shape, pieces = _pieces(weight.entry, origins)
    if shape != weight.entry.shape:
        got = "none" if shape is None else f"{list(shape)}"
        raise CheckpointError(
            f"{weight.entry.where} must have a wide tensor of its name and shape, "
            f"{list(weight.entry.shape)}, in the original (got {got}); pass the checkpoint that "
            "this one was quantized from"
        )
    quantized = DequantizedRows(weight, torch.float32).open(reader)
    signal = noise = largest = 0.0
    for piece in pieces:
        exact = WideRows(piece.entry, torch.float32).open(of_original)
        offset = piece.start - piece.first
        for first, last in bands(piece.first, piece.last, weight.columns):
            expected = exact(piece.of_entry, first, last)
            error = quantized(piece.matrix, first + offset, last + offset).sub_(expected)
            signal += float(torch.linalg.vector_norm(expected)) ** 2
            noise += float(torch.linalg.vector_norm(error)) ** 2
            low, high = torch.aminmax(error)
            largest = max(largest, -float(low), float(high))
    if not noise:
        return WeightError(weight.entry.name, math.inf, largest)
    ratio = signal / noise
    return WeightError(weight.entry.name, 10 * math.log10(ratio) if ratio else -math.inf, largest)
