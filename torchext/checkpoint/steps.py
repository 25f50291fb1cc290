"""The steps of a conversion: each reads one tensor band by band and writes what becomes of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .._dispatch.layout import GROUP, ceil_div
from ..ops.quantize import quantize_128x128
from .files import DTYPES, NAME_OF, CheckpointError, Entry, Reader, Spec
from .formats import Weight
from .rules import Part

# Writes elements of a tensor of the result, by its name, from the given element on.
Emit = Callable[[str, Tensor, int], None]

BAND = 1 << 20  # elements that are in memory at a time


class Step(Protocol):
    """Turns tensors of the source, most often one, into tensors of the result."""

    @property
    def sources(self) -> Sequence[Entry]: ...

    @property
    def outputs(self) -> Sequence[Spec]: ...

    def run(self, reader: Reader, emit: Emit) -> None: ...


class OfOne:
    """Base of the steps that read one tensor, `source`."""

    source: Entry

    @property
    def sources(self) -> Sequence[Entry]:
        return (self.source,)


@dataclasses.dataclass(frozen=True)
class Copy(OfOne):
    """The tensor as it is, or cast to `dtype`."""

    source: Entry
    dtype: str

    @property
    def outputs(self) -> Sequence[Spec]:
        return (Spec(self.source.name, self.dtype, self.source.shape),)

    def run(self, reader: Reader, emit: Emit) -> None:
        count = math.prod(self.source.shape)
        for start in range(0, count, BAND):
            stop = min(start + BAND, count)
            whole = reader.read(self.source, (stop - start) * self.source.itemsize)
            emit(self.source.name, whole.reshape(-1)[start:stop].to(DTYPES[self.dtype]), start)


@dataclasses.dataclass(frozen=True)
class WideRows:
    """Rows of a wide tensor, rounded to `dtype` if that is not None."""

    entry: Entry
    dtype: torch.dtype | None = None

    def open(self, reader: Reader) -> Callable[[int, int, int], Tensor]:
        rows, columns = self.entry.shape[-2:]

        def read(matrix: int, start: int, stop: int) -> Tensor:
            whole = reader.read(self.entry, (stop - start) * columns * self.entry.itemsize)
            return whole.reshape(-1, rows, columns)[matrix, start:stop].to(self.dtype)

        return read


@dataclasses.dataclass(frozen=True)
class DequantizedRows:
    """Rows of an FP8 weight in `dtype`."""

    weight: Weight
    dtype: torch.dtype

    @property
    def entry(self) -> Entry:
        return self.weight.entry

    def open(self, reader: Reader) -> Callable[[int, int, int], Tensor]:
        scale = self.weight.load_scale(reader)

        def read(matrix: int, start: int, stop: int) -> Tensor:
            whole = reader.read(self.entry, (stop - start) * self.weight.columns)
            return self.weight.dequantize(whole, scale, matrix, range(start, stop), self.dtype)

        return read


def bands(start: int, stop: int, columns: int) -> Iterator[tuple[int, int]]:
    """Runs of rows that begin at multiples of 128 after `start`."""
    rows = max(BAND // max(columns, 1) // GROUP, 1) * GROUP
    for first in range(start, stop, rows):
        yield first, min(first + rows, stop)


@dataclasses.dataclass(frozen=True)
class Quantize(OfOne):
    """FP8 parts with 128x128 blocks, with the bits of `torchext.ops.quantize_128x128`."""

    rows: WideRows | DequantizedRows
    parts: Sequence[Part]
    pow2_scale: bool

    @property
    def source(self) -> Entry:  # type: ignore[override]
        return self.rows.entry

    @property
    def outputs(self) -> Sequence[Spec]:
        return fp8_specs(self.parts)

    def run(self, reader: Reader, emit: Emit) -> None:
        read = self.rows.open(reader)
        for part in self.parts:
            scales, start = [], 0
            for matrix in part.matrices:
                for first, last in bands(part.start, part.stop, part.shape[-1]):
                    wide = read(matrix, first, last)
                    data, scale = quantize_128x128(wide, pow2_scale=self.pow2_scale)
                    emit(part.name, data, start)
                    start += data.numel()
                    scales.append(scale)
            emit(part.scale_name, finite(join(scales, part), self.source.where), 0)


@dataclasses.dataclass(frozen=True)
class Relabel(OfOne):
    """FP8 parts with 128x128 blocks whose data is the source's, byte for byte."""

    weight: Weight
    parts: Sequence[Part]

    @property
    def source(self) -> Entry:  # type: ignore[override]
        return self.weight.entry

    @property
    def outputs(self) -> Sequence[Spec]:
        weight = self.weight
        if weight.halves == 1:
            return fp8_specs(self.parts)
        specs = []
        for part in self.parts:
            data, scale = fp8_specs([part])
            rows = sum(ceil_div(b - a, GROUP) for a, b in weight.segments(part.start, part.stop))
            shape = (*scale.shape[:-2], rows, scale.shape[-1])
            specs += [data, dataclasses.replace(scale, shape=shape)]
        return specs

    def run(self, reader: Reader, emit: Emit) -> None:
        weight, scale = self.weight, self.weight.load_scale(reader)
        shapes = {spec.name: spec.shape for spec in self.outputs}
        for part in self.parts:
            scales, start = [], 0
            for matrix in part.matrices:
                for first, last in weight.segments(part.start, part.stop):
                    of_rows = weight.scale_of(scale, matrix, first, last)
                    scales.append(_in_blocks(of_rows, weight, first, last))
                for first, last in bands(part.start, part.stop, weight.columns):
                    whole = reader.read(self.source, (last - first) * weight.columns)
                    data = whole.reshape(-1, weight.rows, weight.columns)[matrix, first:last]
                    emit(part.name, data, start)
                    start += data.numel()
            emit(part.scale_name, torch.cat(scales).reshape(shapes[part.scale_name]), 0)


@dataclasses.dataclass(frozen=True)
class Widen(OfOne):
    """Parts in the dtype of `rows`."""

    rows: WideRows | DequantizedRows
    parts: Sequence[Part]

    @property
    def source(self) -> Entry:  # type: ignore[override]
        return self.rows.entry

    @property
    def outputs(self) -> Sequence[Spec]:
        dtype = NAME_OF[self.rows.dtype] if self.rows.dtype else self.source.dtype
        return [Spec(part.name, dtype, part.shape) for part in self.parts]

    def run(self, reader: Reader, emit: Emit) -> None:
        read = self.rows.open(reader)
        for part in self.parts:
            start = 0
            for matrix in part.matrices:
                for first, last in bands(part.start, part.stop, part.shape[-1]):
                    wide = read(matrix, first, last)
                    emit(part.name, wide, start)
                    start += wide.numel()


@dataclasses.dataclass(frozen=True)
class Stack:
    """A 3-D tensor of experts from the matrices of each, and one of their scales if there are any.

    Attributes:
        name: of the tensor; that of its scales is `<name>_scale_inv`.
        experts: for each expert, the steps of the matrices that lie one below the other, all of one
            width and kind. The scales of each matrix keep rows of their own.
    """

    name: str
    experts: Sequence[Sequence[Step]]

    @property
    def sources(self) -> Sequence[Entry]:
        return [entry for steps in self.experts for step in steps for entry in step.sources]

    @property
    def outputs(self) -> Sequence[Spec]:
        names = (self.name, f"{self.name}_scale_inv")
        matrices = zip(*(step.outputs for step in self.experts[0]), strict=True)
        return [
            Spec(
                name, parts[0].dtype,
                (len(self.experts), sum(p.shape[0] for p in parts), parts[0].shape[1]),
            )
            for name, parts in zip(names, matrices, strict=False)
        ]  # fmt: skip

    def run(self, reader: Reader, emit: Emit) -> None:
        begin = [0 for _ in self.outputs]
        for steps in self.experts:
            for step in steps:
                place = {
                    part.name: (to.name, start)
                    for part, to, start in zip(step.outputs, self.outputs, begin, strict=True)
                }

                def emit_within(name: str, data: Tensor, start: int, place: Any = place) -> None:
                    to, first = place[name]
                    emit(to, data, first + start)

                step.run(reader, emit_within)
                for index, part in enumerate(step.outputs):
                    begin[index] += math.prod(part.shape)


def fp8_specs(parts: Sequence[Part]) -> list[Spec]:
    """The data and the scale of each part."""
    return [
        spec
        for part in parts
        for spec in (
            Spec(part.name, "F8_E4M3", part.shape),
            Spec(part.scale_name, "F32", part.scale_shape),
        )
    ]


def join(scales: list[Tensor], part: Part) -> Tensor:
    """The scale of `part` from those of its bands."""
    return torch.cat(scales).reshape(part.scale_shape) if scales else torch.ones(part.scale_shape)


def finite(scale: Tensor, where: str) -> Tensor:
    """`scale`; raises CheckpointError if a block of the wide tensor had NaN or Inf."""
    wrong = int((~scale.isfinite()).sum())
    if wrong:
        raise CheckpointError(
            f"{where} must be finite to be quantized (got {wrong} of {scale.numel()} blocks of "
            f"{GROUP}x{GROUP} with NaN or Inf); repair the weight, or keep it wide with "
            "modules_to_not_convert"
        )
    return scale


def is_lossless(weight: Weight, parts: Sequence[Part]) -> bool:
    """Whether `Relabel` can write these parts: each of their 128x128 blocks has one scale."""
    if weight.entry.dtype != "F8_E4M3" or weight.granularity == "row":
        return False
    if weight.granularity == "tensor":
        return True
    assert weight.block is not None
    half = weight.rows // weight.halves
    return all(size % GROUP == 0 for size in weight.block) and all(
        first % half % GROUP == 0
        for part in parts
        for first, _ in weight.segments(part.start, part.stop)
    )


def _in_blocks(scale: Tensor, weight: Weight, first: int, last: int) -> Tensor:
    """A scale of rows of one half as one of 128x128 blocks."""
    grid = ceil_div(last - first, GROUP), ceil_div(weight.columns, GROUP)
    if weight.block is None:
        return scale.expand(grid)
    rows, columns = (size // GROUP for size in weight.block)
    skipped = first % (weight.rows // weight.halves) % weight.block[0] // GROUP
    wide = scale.repeat_interleave(rows, 0)[skipped : skipped + grid[0]]
    return wide.repeat_interleave(columns, 1)[:, : grid[1]]
