"""DeepGEMM's dense FP8 GEMM for Hopper: which configuration it chooses, and its kernel simulated.

    python -m benchmarks.deep_gemm_kernel 4096x7168x16384 [--keep kernel.ptx]

The kernel is compiled from the headers in the wheel of `sgl-deep-gemm`, a development dependency;
nothing of it is copied here. The rule that chooses a configuration is written after what DeepGEMM's
does (csrc/jit_kernels/heuristics/sm90.hpp, commit 10747d4, MIT). No GPU is used.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchext._architectures import architectures

if TYPE_CHECKING:
    import torch

    from torchext import sim

    Scaled = tuple[torch.Tensor, torch.Tensor]  # data, scales

WHEEL, VERSION = "sgl-deep-gemm", "0.2.5"
BLOCK_K = 128
SHARED_BYTES = architectures()[90].shared_per_block  # that a CTA may have
MOST_STAGES = 16
L2_BYTES_PER_CYCLE = int(8e6 / 1.3e3)  # DeepGEMM's estimates, for the whole GPU and for an SM
SHARED_BYTES_PER_CYCLE = 128


def _up(value: Any, multiple: int) -> Any:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Configuration:
    """What a kernel is compiled for, beside N and K.

    Attributes:
        block_m, block_n: rows and columns of a tile.
        stages: of 128 of K, in shared memory.
        multicast: CTAs of a cluster, 1 or 2, that share a tile of A or of B.
        multicast_a: they share A, and have neighboring columns of the output.
        sms: CTAs of the grid.
    """

    block_m: int
    block_n: int
    stages: int
    multicast: int = 1
    multicast_a: bool = False
    sms: int = 132

    @property
    def math_threads(self) -> int:
        return 128 if self.block_m <= 64 else 256

    @property
    def threads(self) -> int:
        """Those of the tensor cores, and a warpgroup that loads."""
        return self.math_threads + 128

    @property
    def swizzle_d(self) -> int:
        """Bytes of the swizzle of the output tile; 16 is none."""
        return next(span for span in (128, 64, 32, 16) if 2 * self.block_n % span == 0)

    def shared_bytes(self, k: int) -> int:
        fixed, stage = _shared_bytes(self.block_m, self.block_n, k)
        return fixed + self.stages * stage

    def template_arguments(self, n: int, k: int) -> list[str]:
        """The arguments of the kernel's template for this N and K, as C++ prints them."""
        sizes = [0, n, k, 1, self.block_m, self.block_n, BLOCK_K, 128, 128, self.swizzle_d]
        sizes += [self.stages, 128, self.math_threads, self.multicast]
        numbers = [f"{size}u" for size in sizes]
        return [*numbers, str(self.multicast_a).lower(), f"{self.sms}u"]


def _shared_bytes(block_m: int, block_n: int, k: Any) -> tuple[Any, int]:
    """Bytes of shared memory apart from the stages, and of each stage."""
    output = _up(2 * block_m * block_n, 1024)
    rows_of_b_scales = 1 if BLOCK_K % block_n == 0 else 2
    b_scales = _up(-(-k // BLOCK_K) * 4 * rows_of_b_scales, 8)
    stage = (block_m + block_n) * BLOCK_K + _up(4 * block_m, 128)
    return output + b_scales + MOST_STAGES * 2 * 8, stage


@dataclass(frozen=True)
class Choices:
    """The chosen configurations of many shapes, as arrays; `waves` of tiles on all SMs."""

    block_m: np.ndarray
    block_n: np.ndarray
    stages: np.ndarray
    cluster_m: np.ndarray
    cluster_n: np.ndarray
    waves: np.ndarray

    @property
    def large_and_alone(self) -> np.ndarray:
        """Mask of the shapes that get tiles of 256x128 or 128x192, and one wave of them: without
        clusters."""
        return (self.block_m * self.block_n >= 128 * 192) & (self.waves == 1)


def _candidates() -> Iterator[tuple[int, int, int, int]]:
    """(rows, columns of the tile, clusters along M, along N), in the order that decides ties."""
    for cluster_m, cluster_n in ((1, 1), (1, 2), (2, 1)):
        for block_m in (64, 128, 16, 32, 256):
            for block_n in (*range(16, 129, 16), 144, 160, 192):
                if block_m <= 128 or block_n <= 128:
                    yield block_m, block_n, cluster_m, cluster_n


def choose(
    m: np.ndarray,
    n: np.ndarray,
    k: np.ndarray,
    sms: int = 132,
    tile: tuple[int, int] | None = None,
) -> Choices:
    """The configurations that DeepGEMM chooses, from int64 arrays of sizes; `tile` fixes the tile.

    It estimates cycles: the larger of a tile's traffic to L2 and its traffic in shared memory, for
    all tiles, over the share of SMs that have a tile in the average wave. Clusters halve the L2
    traffic of what they share, and are not used for one wave.
    """
    zero = np.zeros_like(m)
    least = np.full(m.shape, np.iinfo(np.int64).max)
    best = [zero.copy() for _ in range(6)]
    for block_m, block_n, cluster_m, cluster_n in _candidates():
        if tile is not None and tile != (block_m, block_n):
            continue
        fixed, stage = _shared_bytes(block_m, block_n, k)
        stages = np.minimum((SHARED_BYTES - fixed) // stage, MOST_STAGES)
        tiles = -(-m // block_m) * -(-n // block_n)
        waves = -(-tiles // sms)

        output = 2 * block_m * block_n
        from_l2 = k * (block_m // cluster_n + block_n // cluster_m) + output
        copied, read = block_m + block_n, max(64, block_m) + block_n
        in_shared = k * (copied + read) + 2 * output
        l2_rate = min(64 * sms, L2_BYTES_PER_CYCLE)
        cycles = np.maximum(
            from_l2 * tiles // l2_rate, in_shared * tiles // (SHARED_BYTES_PER_CYCLE * sms)
        )
        busy = (tiles / (waves * sms)).astype(np.float32)
        cycles = (cycles / busy).astype(np.int64)

        better = (cycles < least) & (stages >= (3 if block_m * block_n >= 128 * 192 else 4))
        if block_m < 64:
            better &= m <= block_m
        if cluster_m * cluster_n > 1:
            better &= waves > 1
        least = np.where(better, cycles, least)
        for i, value in enumerate((block_m, block_n, stages, cluster_m, cluster_n, waves)):
            best[i] = np.where(better, value, best[i])
    return Choices(*best)


def configuration(
    m: int, n: int, k: int, sms: int = 132, tile: tuple[int, int] | None = None
) -> Configuration:
    """The configuration that DeepGEMM chooses for one shape, or would choose with this tile."""
    sizes = np.array([[m], [n], [k]], np.int64)
    c = choose(sizes[0], sizes[1], sizes[2], sms, tile)
    clusters = int(c.cluster_m[0] * c.cluster_n[0])
    shape = int(c.block_m[0]), int(c.block_n[0]), int(c.stages[0])
    return Configuration(*shape, multicast=clusters, multicast_a=bool(c.cluster_n[0] == 2), sms=sms)


def headers() -> Path:
    """The include folder of the installed wheel; ModuleNotFoundError if it is not there."""
    try:
        version = importlib.metadata.version(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    spec = importlib.util.find_spec("deep_gemm")
    if version != VERSION or spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"deep_gemm_kernel: {WHEEL} must be version {VERSION} (got {version}); "
            f"pip install --no-deps {WHEEL}=={VERSION}"
        )
    return Path(spec.submodule_search_locations[0]) / "include"


def compile_kernels(
    kernels: Sequence[tuple[Configuration, int, int]], keep: Path | None = None
) -> sim.Module:
    """A module of the kernels for each (configuration, n, k).

    Raises ModuleNotFoundError without the wheel, CompileError without nvcc.
    """
    from torchext import sim

    tensor_map = "const __grid_constant__ cute::TmaDescriptor"
    parameters = f"float*, int*, uint32_t, uint32_t, uint32_t, {', '.join(4 * [tensor_map])}"
    lines = ["#include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>", "using namespace deep_gemm;"]
    for chosen, n, k in kernels:
        arguments = ", ".join(chosen.template_arguments(n, k))
        lines.append(
            "template __global__ void deep_gemm::sm90_fp8_gemm_1d2d_impl<cute::UMMA::Major::K, "
            f"{arguments}, GemmType::Normal, cutlass::bfloat16_t>({parameters});"
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "deep_gemm_kernels.cu"
        source.write_text("\n".join(lines) + "\n")
        options = ["-I", str(headers()), "--expt-relaxed-constexpr"]
        return sim.compile_cuda(source, options=options, keep=keep)


def kernel_name(module: sim.Module, chosen: Configuration, n: int, k: int) -> str:
    """The symbol of a kernel that compile_kernels made."""
    wanted = "sm90_fp8_gemm_1d2d_impl<(cute::UMMA::Major)0, " + ", ".join(
        chosen.template_arguments(n, k)
    )
    (name,) = (x.name for x in module.kernels() if f"{wanted}, (deep_gemm::GemmType)0" in str(x))
    return name


def launch_options(chosen: Configuration, a: Scaled, b: Scaled, d: torch.Tensor) -> dict[str, Any]:
    """What `Module.launch` needs, beside the name, for D = A @ B.T.

    Shapes: a is FP8 [M, K], contiguous, with FP32 scales [K/128, M rounded up to a multiple of 4];
    b is FP8 [N, K], contiguous, with FP32 scales [ceil(N/128), K/128]; d is BF16 [M, N], written.
    """
    from torchext import sim

    (m, k), n = a[0].shape, len(b[0])
    block_m, block_n, swizzle = chosen.block_m, chosen.block_n, chosen.swizzle_d
    maps = [
        sim.tensor_map(sim.read_only(a[0], "A"), box=(block_m, BLOCK_K), swizzle=128),
        sim.tensor_map(sim.read_only(b[0], "B"), box=(block_n, BLOCK_K), swizzle=128),
        sim.tensor_map(
            sim.output(d, "D"), box=(block_m, swizzle // 2), swizzle=swizzle if swizzle > 16 else 0
        ),
        sim.tensor_map(sim.read_only(a[1], "scales of A"), box=(1, block_m)),
    ]
    sizes = [np.uint32(size) for size in (m, n, k)]
    no_groups = np.uint64(0)
    return {
        "grid": chosen.sms,
        "block": chosen.threads,
        "cluster": chosen.multicast,
        "smem": chosen.shared_bytes(k),
        "args": [sim.read_only(b[1], "scales of B"), no_groups, *sizes, *maps],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deep_gemm_kernel")
    parser.add_argument("shape", help="MxNxK")
    parser.add_argument("--sms", type=int, default=132)
    parser.add_argument("--keep", type=Path, help="compile the kernel, and leave its PTX here")
    options = parser.parse_args(arguments)
    m, n, k = map(int, options.shape.split("x"))
    chosen = configuration(m, n, k, options.sms)
    print(chosen)
    print(f"{chosen.threads} threads, {chosen.shared_bytes(k)} bytes of shared memory")
    if options.keep is not None:
        print(kernel_name(compile_kernels([(chosen, n, k)], options.keep), chosen, n, k))


if __name__ == "__main__":
    main()
