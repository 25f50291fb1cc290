"""DeepGEMM's grouped FP8 GEMMs and wgrads for Hopper: configurations, kernels, launches.

Kernels come from the same headers as the dense one's (deep_gemm_kernel), and the rule that chooses
a configuration is written after the same source, commit 10747d4 (MIT). No GPU is used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .deep_gemm_kernel import (
    BLOCK_K,
    L2_BYTES_PER_CYCLE,
    MOST_STAGES,
    SHARED_BYTES,
    SHARED_BYTES_PER_CYCLE,
    Configuration,
    headers,
)

if TYPE_CHECKING:
    import torch

    from torchext import sim

    Scaled = tuple[torch.Tensor, torch.Tensor]  # data, scales

SMS = 132
CONTIGUOUS_ROWS = 128  # a tile's; each group of a contiguous GEMM has a multiple of them
TENSOR_MAP_BYTES = 128


@dataclass(frozen=True)
class Kind:
    """A kind of GEMM.

    Attributes:
        gemm_type: DeepGEMM's name of its grouping.
        wgrad: 1x128 scales of both operands, the product added to FP32. Otherwise 1x128 by 128x128
            scales, the product stored in BF16.
    """

    gemm_type: str
    wgrad: bool


CONTIGUOUS = Kind("MGroupedContiguous", wgrad=False)
MASKED = Kind("MGroupedMasked", wgrad=False)
WGRAD = Kind("Normal", wgrad=True)
ALONG_K = Kind("KGroupedContiguous", wgrad=True)


@dataclass(frozen=True)
class Kernel:
    """The constants that a kernel is compiled for. m or k is 0 if the launch gives it instead."""

    kind: Kind
    configuration: Configuration
    m: int
    n: int
    k: int
    groups: int

    @property
    def template_arguments(self) -> list[str]:
        """The arguments of the kernel's template, as C++ prints them."""
        c = self.configuration
        sizes = [self.m, self.n, self.k, self.groups, c.block_m, c.block_n, BLOCK_K, 128, 128]
        if not self.kind.wgrad:
            sizes.append(c.swizzle_d)
        sizes += [c.stages, 128, c.math_threads, c.multicast]
        return [*(f"{size}u" for size in sizes), str(c.multicast_a).lower(), f"{c.sms}u"]

    @property
    def shared_bytes(self) -> int:
        fixed, stage = _shared_bytes(
            self.kind, self.configuration.block_m, self.configuration.block_n, self.k
        )
        return fixed + self.configuration.stages * stage


def _shared_bytes(kind: Kind, block_m: int, block_n: int, k: int) -> tuple[int, int]:
    """Bytes of shared memory apart from the stages, and of each stage."""
    fixed = _up((4 if kind.wgrad else 2) * block_m * block_n, 1024) + MOST_STAGES * 2 * 8
    stage = (block_m + block_n) * BLOCK_K + _up(4 * block_m, 128)
    if kind.wgrad:
        stage += _up(4 * block_n, 128)
    else:
        rows_of_b_scales = 1 if BLOCK_K % block_n == 0 else 2
        fixed += _up(-(-k // BLOCK_K) * 4 * rows_of_b_scales, 8)
    if kind == ALONG_K:
        fixed += 4 * TENSOR_MAP_BYTES
    return fixed, stage


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _candidates(kind: Kind, n: int, groups: int) -> Iterator[tuple[int, int, int, int]]:
    """(rows, columns of the tile, clusters along M, along N), in the order that decides ties."""
    rows = (CONTIGUOUS_ROWS,) if kind == CONTIGUOUS else (64, 128)
    # FP32 outputs of these widths have no bank conflicts; other widths spill registers.
    columns = (16, *range(24, 161, 16)) if kind.wgrad else (*range(16, 129, 16), 144, 160, 192)
    pairs = () if kind == ALONG_K and groups > 4 else ((1, 2), (2, 1))
    for cluster_m, cluster_n in ((1, 1), *pairs):
        for block_m in rows:
            for block_n in columns:
                if kind == MASKED and -(-n // block_n) % (cluster_m * cluster_n):
                    continue
                yield block_m, block_n, cluster_m, cluster_n


def configuration(kind: Kind, m: int, n: int, k: int, groups: int = 1) -> Configuration:
    """The configuration that DeepGEMM chooses.

    m: the rows of A: of all groups if they are contiguous, of one group (as expected) if masked.
    k: the size of K; along K, that of the largest group.
    """
    least, best = np.inf, None
    groups_of_tiles = groups if kind in (MASKED, ALONG_K) else 1
    for block_m, block_n, cluster_m, cluster_n in _candidates(kind, n, groups):
        fixed, stage = _shared_bytes(kind, block_m, block_n, k)
        stages = min((SHARED_BYTES - fixed) // stage, MOST_STAGES)
        if stages < (3 if block_m * block_n >= 128 * 192 else 4):
            continue
        tiles = -(-m // block_m) * -(-n // block_n) * groups_of_tiles
        waves = -(-tiles // SMS)
        clusters = cluster_m * cluster_n
        if clusters > 1 and (waves <= 1 or (kind == MASKED and m <= block_m)):
            continue

        element = 4 if kind.wgrad else 2
        output = element * block_m * block_n
        moved = output * (2 if kind.wgrad else 1)  # read and written where it is added to
        from_l2 = k * (block_m // cluster_n + block_n // cluster_m) + moved
        copied, read = block_m + block_n, max(64, block_m) + block_n
        in_shared = k * (copied + read) + output + moved
        l2_rate = min(64 * SMS, L2_BYTES_PER_CYCLE)
        cycles: float = max(
            from_l2 * tiles // l2_rate, in_shared * tiles // (SHARED_BYTES_PER_CYCLE * SMS)
        )
        cycles = int(np.float32(cycles) / np.float32(tiles / (waves * SMS)))
        if cycles < least:
            least = cycles
            best = Configuration(block_m, block_n, stages, clusters, cluster_n == 2, SMS)
    if best is None:
        raise ValueError(f"deep_gemm_grouped: no configuration for {m}x{n}x{k}, {groups} groups")
    return best


def kernel(kind: Kind, m: int, n: int, k: int, groups: int = 1) -> Kernel:
    """The kernel that DeepGEMM compiles; arguments as of `configuration`."""
    chosen = configuration(kind, m, n, k, groups)
    if kind == ALONG_K:  # compiled for M and N, where others are compiled for N and K
        return Kernel(kind, chosen, m, n, 0, groups)
    return Kernel(kind, chosen, 0, n, k, groups)


def compile_kernels(kernels: Sequence[Kernel], keep: Path | None = None) -> sim.Module:
    """A module of the kernels.

    Raises ModuleNotFoundError without the wheel, CompileError without nvcc.
    """
    from torchext import sim

    maps = "const __grid_constant__ cute::TmaDescriptor"
    lines = ["#include <deep_gemm/impls/sm90_fp8_gemm_1d1d.cuh>"]
    lines += ["#include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>", "using namespace deep_gemm;"]
    for one in dict.fromkeys(kernels):
        arguments = ", ".join(one.template_arguments)
        if one.kind.wgrad:
            name, types = f"sm90_fp8_gemm_1d1d_impl<{arguments}", "float"
            parameters = "__nv_fp8_e4m3*, __nv_fp8_e4m3*, int*, cute::TmaDescriptor*"
            count = 5
        else:
            name = f"sm90_fp8_gemm_1d2d_impl<cute::UMMA::Major::K, {arguments}"
            types, parameters, count = "cutlass::bfloat16_t", "float*, int*", 4
        parameters += f", uint32_t, uint32_t, uint32_t, {', '.join(count * [maps])}"
        lines.append(
            f"template __global__ void deep_gemm::{name}, GemmType::{one.kind.gemm_type}, {types}>"
            f"({parameters});"
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "deep_gemm_grouped.cu"
        source.write_text("\n".join(lines) + "\n")
        options = ["-I", str(headers()), "--expt-relaxed-constexpr"]
        return sim.compile_cuda(source, options=options, keep=keep)


# The numbers of DeepGEMM's enumeration, by which C++ prints a template's arguments.
_GEMM_TYPES = {"Normal": 0, "MGroupedContiguous": 1, "MGroupedMasked": 2, "KGroupedContiguous": 3}


def kernel_name(module: sim.Module, one: Kernel) -> str:
    """The symbol of a kernel that compile_kernels made."""
    impl = "sm90_fp8_gemm_1d1d_impl<" if one.kind.wgrad else "sm90_fp8_gemm_1d2d_impl<"
    arguments = ", ".join(one.template_arguments)
    gemm_type = f"(deep_gemm::GemmType){_GEMM_TYPES[one.kind.gemm_type]}"
    (name,) = (
        x.name for x in module.kernels() if impl in str(x) and f"{arguments}, {gemm_type}" in str(x)
    )
    return name


def _operand(scaled: Scaled, block: int, name: str) -> tuple[Any, Any]:
    """Tensor maps of data [rows, k] and of scales [k / 128, rows]."""
    from torchext import sim

    data = sim.tensor_map(sim.read_only(scaled[0], name), box=(block, BLOCK_K), swizzle=128)
    scales = sim.tensor_map(sim.read_only(scaled[1], f"scales of {name}"), box=(1, block))
    return data, scales


def launch_options(
    one: Kernel, a: Scaled, b: Scaled, d: torch.Tensor, layout: torch.Tensor | None = None
) -> dict[str, Any]:
    """The options of `Module.launch`, beside the kernel's name.

    Data is FP8, scales are FP32, all tensors are contiguous. G is the number of groups.

    Contiguous: a [M, K], scales [K / 128, M]; b [G * N, K], scales [G * ceil(N / 128), K / 128]; d
    BF16 [M, N]; layout int32 [M], the group of each row.
    Masked: a [G * M, K], scales [G * K / 128, M]; b as above; d BF16 [G * M, N]; layout int32 [G],
    the rows of each group that count.
    Wgrad: a [M, K], scales [K / 128, M]; b [N, K], scales [K / 128, N]; d FP32 [M, N]; no layout.
    Along K: a and b hold a contiguous matrix [M, K of the group] ([N, ...]) for each group, and
    are shaped [M, K of all groups]; scales as for wgrad; d FP32 [G * M, N]; layout int32 [G], the K
    of each group.
    """
    import torch

    from torchext import sim

    c, n = one.configuration, one.n
    options: dict[str, Any] = {
        "grid": c.sms,
        "block": c.threads,
        "cluster": c.multicast,
        "smem": one.shared_bytes,
    }
    nothing = np.uint64(0)
    groups = nothing if layout is None else sim.read_only(layout, "layout")
    if not one.kind.wgrad:
        swizzle = c.swizzle_d
        store = sim.tensor_map(
            sim.output(d, "D"),
            box=(c.block_m, swizzle // 2),
            swizzle=swizzle if swizzle > 16 else 0,
        )
        (map_a, scales_a), (map_b, _) = _operand(a, c.block_m, "A"), _operand(b, c.block_n, "B")
        rows = len(a[0]) // (one.groups if one.kind == MASKED else 1)
        sizes = [np.uint32(size) for size in (rows, n, one.k)]
        maps = [map_a, map_b, store, scales_a]
        return options | {
            "args": [sim.read_only(b[1], "scales of B"), groups, *sizes, *maps],
        }
    store = sim.tensor_map(sim.pointer(d, "read_write", "D"), box=(64, c.block_n))
    sizes = [np.uint32(size) for size in (len(a[0]), n, a[0].shape[1])]
    bases: list[Any] = [nothing, nothing]
    buffer: Any = nothing
    data_a, data_b = a[0], b[0]
    if one.kind == ALONG_K:
        assert layout is not None
        bases = [sim.read_only(x, name) for x, name in ((a[0], "A"), (b[0], "B"))]
        buffer = sim.pointer(
            torch.zeros(c.sms, 4 * TENSOR_MAP_BYTES, dtype=torch.uint8), "read_write", "tensor maps"
        )
        first = int(layout[layout > 0][0])
        data_a, data_b = (x.view(-1)[: len(x) * first].view(len(x), first) for x in (a[0], b[0]))
    (map_a, scales_a), (map_b, scales_b) = (
        _operand((data_a, a[1]), c.block_m, "A"),
        _operand((data_b, b[1]), c.block_n, "B"),
    )
    return options | {
        "args": [*bases, groups, buffer, *sizes, map_a, map_b, scales_a, scales_b, store],
    }
