"""How long products and quantizers take: predicted for a GPU, from a few measurements for this CPU.

Times are in microseconds. They order layers by what FP8 gains; they are no measurements of a model.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ._architectures import architectures
from .gemm_selection import explain_gemm
from .ops import fp8_gemm_nt, fp8_linear, quantize_1x128, quantize_1x128_dual, quantize_128x128


class Product(NamedTuple):
    """The product of a [m, k] and a weight [n, k], or one for each of `groups` experts.

    Attributes:
        m: the rows of a, of all groups together.
        n, k: the sizes of each weight.
        groups: the number of experts; 1 for a linear layer.
        along_k: the product for a weight's gradient: `groups` of [m, n], with k rows in all.
    """

    m: int
    n: int
    k: int
    groups: int = 1
    along_k: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def bytes(self, of_a: float, of_weight: float, of_out: float) -> float:
        """The fewest bytes that can be moved: every element once.

        of_a, of_weight, of_out: the bytes of an element.
        """
        weights = 1 if self.along_k else self.groups
        outputs = self.groups if self.along_k else 1
        return (
            self.m * self.k * of_a
            + weights * self.n * self.k * of_weight
            + outputs * self.m * self.n * of_out
        )


class Rates(Protocol):
    """The times of a layer's parts on a device, in microseconds.

    Attributes:
        source: where the figures come from, for the report.
        wide_bytes: the bytes of an element of the wide layer with which FP8 is compared.
    """

    source: str
    wide_bytes: int

    def wide(self, product: Product) -> float: ...

    def fp8(self, product: Product) -> float: ...

    def weights_only(self, product: Product) -> float: ...

    def quantize(self, elements: int, *, both: bool) -> float:
        """both: quantize along rows and along columns, from one read."""
        ...


# ---- GPUs ----

# Fitted by hand to BF16 products (cuBLAS) on an H200, benchmarks/results/2026-11-26-h200: within
# 5 % for 4,096 rows of DeepSeek-V3's layers, up to 19 % too fast for 64 rows.
_WIDE_EFFICIENCY = 0.93  # the share of the tensor cores' BF16 rate that products reach
_WIDE_TILE = 128 * 256  # elements of the output
_WIDE_TILE_CYCLES = 1500  # that each tile takes besides
# From the same run: the smallest kernels, launch included.
_WIDE_START, _QUANTIZER_START = 8.0, 5.5
# Multiply-adds per cycle and SM of BF16 mma.sync: each of four schedulers issues an instruction of
# 2,048 in 6.26 cycles (docs/timing.md). fp8_linear was never timed on a GPU.
_MMA_MACS = 4 * 2048 / 6.26


class GpuRates:
    """Predicted: FP8 products by the cost model behind explain_gemm, the others by rooflines."""

    wide_bytes = 2

    def __init__(self, gpu: dict[str, Any]) -> None:
        """gpu: a row of the simulator's table of GPUs (docs/timing.md)."""
        self.source = (
            f"predicted for the GPU {gpu['name']!r} by the cost model of explain_gemm; the wide "
            "layers are BF16; nothing was measured"
        )
        self._sms: int = gpu["sms"]
        self._bandwidth: float = gpu["gigabytes_per_second"] * 1e3  # bytes per microsecond
        from .sim.ops import rated_memory  # loads the simulator

        self._rated_memory = rated_memory(gpu["name"])
        self._fp8_mhz: float = gpu["fp8_mhz"]
        self._wide_mhz: float = gpu["tensor_mhz"]
        self._idle_mhz: float = gpu["other_mhz"]
        self._wide_macs: int = architectures()[gpu["capability"]].fp16_macs

    def wide(self, product: Product) -> float:
        return self._tensor_time(product, self._wide_macs * _WIDE_EFFICIENCY, 2)

    def weights_only(self, product: Product) -> float:
        macs = min(_MMA_MACS, self._wide_macs) * _WIDE_EFFICIENCY
        return self._tensor_time(product, macs, 1)

    def _tensor_time(self, product: Product, macs: float, weight_bytes: int) -> float:
        tiles = product.m * product.n / _WIDE_TILE
        depth = product.k / product.groups if product.along_k else product.k
        outputs = product.groups if product.along_k else 1
        cycles = tiles * outputs / self._sms * (_WIDE_TILE * depth / macs + _WIDE_TILE_CYCLES)
        memory = product.bytes(2, weight_bytes, 2) / self._bandwidth
        return max(cycles / self._wide_mhz, memory) + _WIDE_START

    def fp8(self, product: Product) -> float:
        # A launch and its first tile run at the clock of an idle GPU.
        start = self._fp8_cycles(Product(1, 1, 1))
        busy = (self._fp8_cycles(product) - start) / self._fp8_mhz
        memory = product.bytes(1, 1, 2) / self._bandwidth
        return max(busy, memory) + start / self._idle_mhz

    def _fp8_cycles(self, product: Product) -> float:
        return _fp8_cycles(product, self._sms, self._rated_memory)

    def quantize(self, elements: int, *, both: bool) -> float:
        return elements * (2 + (2 if both else 1)) / self._bandwidth + _QUANTIZER_START


@functools.cache
def _fp8_cycles(product: Product, sms: int, gigabytes_per_second: int) -> float:
    grouping = "none"
    if product.groups > 1:
        grouping = "along_k" if product.along_k else "offsets"
    explained = explain_gemm(
        product.m, product.n, product.k,
        granularity="1d1d" if product.along_k else "1d2d",
        grouping=grouping, groups=product.groups, sm_count=sms,
        memory_gigabytes_per_second=gigabytes_per_second,
    )  # fmt: skip
    return explained.chosen.cycles


def gpu_rates(name: str) -> GpuRates:
    """Rates of a GPU of the timing model's table.

    Raises:
        ValueError: the table has no such GPU.
        ImportError: the simulator, which has the table, was not built.
        RuntimeError: this build has no CUDA kernels.
    """
    rows = {row["name"]: row for row in _gpus()}
    if name not in rows:
        raise ValueError(
            f"advise: device must be {', '.join(map(repr, rows))} or 'cpu' (got {name!r}); choose "
            "the nearest"
        )
    return GpuRates(rows[name])


def name_of_gpu(device: str) -> str:
    """The name in the table of a GPU that torch calls `device`, such as "NVIDIA H200"."""
    names = sorted((row["name"] for row in _gpus()), key=len, reverse=True)
    words = device.lower().replace(" ", "_")
    return next((name for name in names if name in words), device)


def _gpus() -> list[dict[str, Any]]:
    try:
        simulator = importlib.import_module("torchext._sim")
    except ImportError as error:
        raise ImportError(
            "advise: the simulator, which has the table of GPUs, must be built for this Python "
            f"(got {error}); reinstall torchext from source, or pass device='cpu'"
        ) from None
    rows: list[dict[str, Any]] = simulator.timing_gpus()
    return rows


# ---- this CPU ----

_ROWS, _SIDE, _LONG_SIDE = 128, 512, 2048  # the sizes of the products that are timed
_REPEATS = 3


class _Rate(NamedTuple):
    """flops and bytes per microsecond."""

    flops: float
    bytes: float

    def time(self, flops: float, moved: float) -> float:
        return max(flops / self.flops, moved / self.bytes)


class CpuRates:
    """From a dozen small products and quantizers that were timed on this CPU."""

    def __init__(
        self,
        wide: _Rate,
        fp8: _Rate,
        weights_only: _Rate,
        quantizers: tuple[float, float],
        *,
        wide_bytes: int,
        source: str,
    ) -> None:
        """quantizers: elements per microsecond, along rows, and along both."""
        self._wide, self._fp8, self._weights_only = wide, fp8, weights_only
        self._quantizers, self.wide_bytes, self.source = quantizers, wide_bytes, source

    def wide(self, product: Product) -> float:
        b = self.wide_bytes
        return self._wide.time(product.flops, product.bytes(b, b, b))

    def fp8(self, product: Product) -> float:
        return self._fp8.time(product.flops, product.bytes(1, 1, self.wide_bytes))

    def weights_only(self, product: Product) -> float:
        b = self.wide_bytes
        return self._weights_only.time(product.flops, product.bytes(b, 1, b))

    def quantize(self, elements: int, *, both: bool) -> float:
        return elements / self._quantizers[both]


def cpu_rates(dtype: torch.dtype) -> CpuRates:
    """Rates of this CPU for layers of this dtype; measured at the first call, in some 0.1 s."""
    return _measured(dtype, torch.get_num_threads())


@functools.cache
def _measured(dtype: torch.dtype, threads: int) -> CpuRates:
    with torch.no_grad():
        wide = _rate(dtype, lambda w: w, F.linear, dtype.itemsize)
        fp8 = _rate(dtype, quantize_128x128, _multiply_fp8, 1)
        weights_only = _rate(dtype, quantize_128x128, lambda x, w: fp8_linear(x, *w), 1)
        x = torch.ones(_ROWS, _LONG_SIDE, dtype=dtype)
        quantizers = tuple(
            x.numel() / _microseconds(functools.partial(quantizer, x))
            for quantizer in (quantize_1x128, quantize_1x128_dual)
        )
    source = (
        f"predicted from rates measured on this CPU: a few small products in {dtype} and FP8 with "
        f"{threads} threads"
    )
    pair = (quantizers[0], quantizers[1])
    return CpuRates(wide, fp8, weights_only, pair, wide_bytes=dtype.itemsize, source=source)


def _multiply_fp8(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor]) -> Tensor:
    (data, scale), (weight_data, weight_scale) = x, weight
    return fp8_gemm_nt(data, scale, weight_data, weight_scale)


def _rate(
    dtype: torch.dtype,
    prepare: Callable[[Tensor], Any],
    multiply: Callable[[Any, Any], Tensor],
    weight_bytes: int,
) -> _Rate:
    """The flops that a product of many rows reaches, and the bytes that a product of one row with a
    larger weight reaches.

    Args:
        dtype: of x, and of the weight before `prepare`.
        prepare: makes the weight that `multiply` takes.
        multiply: called with x, quantized for `_multiply_fp8`, and the weight.
        weight_bytes: the bytes of an element of the prepared weight.
    """

    def timed(rows: int, side: int) -> float:
        x: Any = torch.ones(rows, side, dtype=dtype)
        if multiply is _multiply_fp8:
            x = quantize_1x128(x)
        weight = prepare(torch.ones(side, side, dtype=dtype))
        return _microseconds(lambda: multiply(x, weight))

    many = 2 * _ROWS * _SIDE**2 / timed(_ROWS, _SIDE)
    return _Rate(many, _LONG_SIDE**2 * weight_bytes / timed(1, _LONG_SIDE))


def _microseconds(call: Callable[[], Any]) -> float:
    """The shortest of a few calls, after one to warm up."""
    call()
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return max(best, 1e-9) * 1e6
