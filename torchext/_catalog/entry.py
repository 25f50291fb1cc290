"""The classes of a catalog entry, and the random tensors that entries use."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import reference

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The quantizers of a GEMM's operands a and b.
GRANULARITIES = {
    "1d2d": (reference.quantize_1x128, reference.quantize_128x128),
    "1d1d": (reference.quantize_1x128, reference.quantize_1x128),
    "rowwise": (reference.quantize_rowwise, reference.quantize_rowwise),
    "tensorwise": (reference.quantize_tensorwise, reference.quantize_tensorwise),
}


class Bits(enum.Enum):
    """The bound of an op whose result is specified to the bit."""

    BITS = "bits"


BITS = Bits.BITS


@dataclass(frozen=True)
class Bound:
    """The largest error that a result may have. A quantized result is dequantized first.

    benchmarks.problems.difference computes both numbers.

    relative: |result - expected| / |expected|, in Frobenius norms.
    worst: the largest |element - expected| / (RMS of expected + |expected|) of all elements.
    """

    relative: float
    worst: float = float("inf")


@dataclass(frozen=True)
class Sample:
    """The arguments of one call, on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device | str) -> Sample:
        """The same arguments, with the same strides, on another device."""
        args, kwargs = tree_map_only(Tensor, lambda t: _to(t, device), (self.args, self.kwargs))
        return Sample(args, kwargs)


def sample(*args: Any, **kwargs: Any) -> Sample:
    return Sample(args, kwargs)


def _to(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy of all of the tensor's memory: Tensor.to drops the padding between rows."""
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    whole = memory.to(device, copy=True).view(tensor.dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@dataclass(frozen=True)
class Entry:
    """What tests, benchmarks, soak and gpu_check need to know about one op.

    samples: label -> function that makes the arguments of a call, with equal values each time.
        Samples are small enough for compute-sanitizer and the simulator. The first is ordinary, has
        ragged sizes and no `out`, defines every element of its result, and keeps its strides when
        it is cloned.
    sized: label -> function of a call's sizes that makes its arguments: of rows and columns for
        quantizers, of m, n and k for GEMMs. The labels are the cases that a graph of torch.compile
        distinguishes. At multiples of 16 the tensors keep their strides when they are cloned.
    shape: the arguments of a call -> the arguments of `bytes` and `flops`.
    bytes: least memory traffic in bytes, if inputs are read once and outputs written once.
    flops: two for each multiplication of a GEMM.
    bound: BITS, or the largest error against `reference`.
    """

    name: str
    samples: Mapping[str, Callable[[], Sample]]
    sized: Mapping[str, Callable[..., Sample]]
    shape: Callable[..., tuple[int, ...]]
    bytes: Callable[..., float]
    flops: Callable[..., float]
    bound: Bound | Bits

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(reference, self.name)

    def sample(self, label: str, device: torch.device | str = "cpu") -> Sample:
        return self.samples[label]().to(device)

    def each_sample(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, Sample]]:
        for label in self.samples:
            yield label, self.sample(label, device)

    def expected(self, label: str) -> Any:
        """What `reference` returns for a sample, on the CPU.

        GEMMs give float64, whatever out_dtype the sample has. Elements that the op leaves undefined
        are NaN.
        """
        given = self.samples[label]()
        kwargs = {k: v for k, v in given.kwargs.items() if k != "num_sms"}
        if self.bound is not BITS:
            kwargs.pop("out_dtype", None)
            if "out" in kwargs:
                kwargs["out"] = kwargs["out"].double()
        return self.reference(*given.args, **kwargs)


# ---- tensors ----


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers from N(0, 1), the same for the same shape."""
    seed = 1
    for size in shape:
        seed = seed * 10007 + size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def operands(
    granularity: str,
    rows: int | tuple[int, ...],
    n: int,
    k: int,
    *,
    groups: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, a_scale, b, b_scale, with a [*rows, k] and b [n, k], or [groups, n, k] if grouped."""
    leading = (rows,) if isinstance(rows, int) else rows
    quantize_a, quantize_b = GRANULARITIES[granularity]
    b = random(*(() if groups is None else (groups,)), n, k)
    return (*quantize_a(random(*leading, k), **options), *quantize_b(b, **options))
