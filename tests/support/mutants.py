"""Faults planted in shipping kernels, and how the simulator catches each.

A planted fault (`Mutant`) is an edit of a kernel's source, so the kernels need no test switches. An
edit whose text is no longer there fails loudly. Each edited kernel is compiled to PTX and run by
its op, in every completion mode and under several seeds; every run must have a finding or wrong
numbers. Without asynchronous instructions all modes run alike (tests/sim/test_kernels.py): one run
counts for all of them. `python tests/support/mutants.py` prints the table of ptx/sim/README.md.
Above 500 lines because the faults of all kernels stand in one table.
"""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from support.completion import MODES, is_asynchronous, modes_that_differ
from support.op_interface import without_simulator
from torchext import gemm_selection, ops, sim
from torchext._catalog import CATALOG
from torchext._catalog.entry import random
from torchext._catalog.moe import ids_of, slots_of, weights_of

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2)
RUNS = len(SEEDS) * len(MODES)

KERNEL = "csrc/gemm/sm90/fp8_gemm_nt.cuh"
RING = "csrc/device/sm90/ring.cuh"
TMA_STORE = "csrc/device/sm90/tma_store.cuh"
SCHEDULE = "csrc/gemm/sm90/schedule.cuh"
MAINLOOP = "csrc/gemm/sm90/mainloop.cuh"
EPILOGUE = "csrc/gemm/sm90/epilogue.cuh"
ACTIVATION = "csrc/gemm/sm90/activation.cuh"
MMA = "csrc/gemm/mma/fp8_gemm_nt.cuh"
LINEAR = "csrc/gemm/mma/fp8_linear.cuh"
GROUPS = "csrc/quantize/cuda/groups.cu"
GROUP_TILES = "csrc/device/quantize_groups.cuh"
BLOCKS = "csrc/quantize/cuda/blocks.cu"
NORMS = "csrc/norm/cuda/norms.cu"
NORM_GRADIENTS = "csrc/norm/cuda/gradients.cu"
NORM_ROWS = "csrc/norm/cuda/norm.cuh"
FORWARD = "csrc/activation/cuda/forward.cu"
BACKWARD = "csrc/activation/cuda/backward.cu"
ROUTE = "csrc/moe/cuda/route.cu"
ROWS = "csrc/moe/cuda/rows.cuh"
MESSAGE = "csrc/moe/cuda/message.cu"


def _kernel(tile: str, granularity: str = "1d2d", op: str = "", output: str = "kStored") -> str:
    """The text of a .cu file with one of Hopper's GEMM kernels; `tile` is a line of tiles.h."""
    upper = granularity.replace("d", "D")
    return f"""
#include "fp8_gemm_nt.cuh"
TORCHEXT_GEMM_KERNEL({tile}, sm90_fp8_gemm_nt{op}_{granularity}_e4m3_e4m3, k{upper}, e4m3, e4m3,
                     {output})
"""


MEDIUM = "128x128, 128, 128, 5, false"
LARGE = "256x128, 256, 128, 3, false"
SWAPPED = "swap_16x128, 128, 16, 10, true"
GATED = "128x128, 128, 256, 3, false"
MMA_SOURCE = """
#include "../mma/fp8_gemm_nt.cuh"
TORCHEXT_MMA_KERNEL(mma89_fp8_gemm_nt_1d2d_e4m3_e4m3_128x128x128, Sm89, k1D2D, e4m3, e4m3, Large)
"""
LINEAR_SOURCE = """
#include "../mma/fp8_linear.cuh"
TORCHEXT_LINEAR_KERNEL(mma80_fp8_linear_bf16_e4m3_128x128x128, ToBf16, e4m3, LinearLarge)
"""


@dataclass(frozen=True)
class Problem:
    """A call that planted faults must spoil: what to compile, and what to run on which SMs."""

    source: str  # text of a .cu file to put beside the kernel, or path of a .cu file
    run: Callable[[], tuple[torch.Tensor, ...]]
    num_sms: int = 2  # few, so that CTAs reuse the slots of their rings and their buffers
    capability: int = 90  # of the simulated GPU: 10 * major + minor
    tile: str | None = None  # forces this tile of Hopper's GEMM
    split_k: int = 1
    cluster: int = 1

    def outputs(self) -> tuple[torch.Tensor, ...]:
        if self.tile is None:
            return self.run()
        name = self.tile.split(",", maxsplit=1)[0]
        with gemm_selection.forced(name, split_k=self.split_k, cluster=self.cluster):
            return self.run()

    @property
    def arch(self) -> str:
        return "90a" if self.capability == 90 else str(self.capability)


def _gemm(
    m: int, n: int, k: int, out_dtype: torch.dtype = torch.bfloat16
) -> Callable[[], tuple[torch.Tensor, ...]]:
    def run() -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(m + n + k)
        rows = torch.randn(m, k, generator=generator) * torch.logspace(-2, 2, m)[:, None]
        weight = torch.randn(n, k, generator=generator)
        a, b = _on_the_cpu(ops.quantize_1x128, rows), _on_the_cpu(ops.quantize_128x128, weight)
        return (ops.fp8_gemm_nt(*a, *b, out_dtype=out_dtype),)

    return run


def _linear() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(256, 1000, generator=generator).bfloat16()
    weight = _on_the_cpu(ops.quantize_1x128, torch.randn(128, 1000, generator=generator))
    return (ops.fp8_linear(x, *weight),)


def _on_the_cpu(op: Callable, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with without_simulator():
        return op(x)


def _apart(x: torch.Tensor) -> torch.Tensor:
    """x in the middle of a tensor, 16 KiB from either end. A store beyond an output then hits no x
    that happens to lie there, which would add kinds of findings by chance."""
    rows = max(64, -(-(16 << 10) // (x.stride(0) * x.element_size())))
    around = x.new_zeros(x.shape[0] + 2 * rows, *x.shape[1:])
    around[rows:-rows] = x
    return around[rows:-rows]


def _dual() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(200, 272, generator=generator).bfloat16()
    return ops.quantize_1x128_dual(_apart(x))


def _dual_bias_grad() -> tuple[torch.Tensor, ...]:
    """Two rows of tiles."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(140, 136, generator=generator).bfloat16()
    return ops.quantize_1x128_dual_bias_grad(x)


def _blocks() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(200, 272, generator=generator).bfloat16()
    return ops.quantize_128x128_dual(_apart(x))


def _activation() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(14)
    x = torch.randn(140, 400, generator=generator).bfloat16()
    return ops.silu_mul_quantize_1x128_dual(_apart(x))


def _activation_gradient() -> tuple[torch.Tensor, ...]:
    """Two rows of tiles, and lanes that have gates and ups."""
    generator = torch.Generator().manual_seed(15)
    grad, gate_up = (
        torch.randn(140, columns, generator=generator).bfloat16() for columns in (133, 266)
    )
    results = ops.silu_mul_backward_quantize_1x128_dual(
        grad, gate_up, bias_grad=True, activation_dtype=torch.float8_e4m3fn
    )
    return tuple(result for result in results if result is not None)


def _norm() -> tuple[torch.Tensor, ...]:
    """Two warps share a row."""
    generator = torch.Generator().manual_seed(14)
    x, residual = torch.randn(2, 20, 1100, generator=generator).bfloat16()
    weight, bias = torch.randn(2, 1100, generator=generator)
    return ops.layer_norm_quantize_1x128_dual(
        x, weight, bias, 1e-6, residual=residual, return_normed=True
    )


def _norm_gradient() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(15)
    grad, x = torch.randn(2, 130, 200, generator=generator).bfloat16()
    weight, mean = torch.randn(200, generator=generator), torch.randn(130, generator=generator)
    return ops.layer_norm_backward_quantize_1x128_dual(grad, x, weight, mean, mean.abs())


def _along_k() -> tuple[torch.Tensor, ...]:
    """Groups along K whose ends lie inside a K block, so that some of its columns are masked."""
    generator = torch.Generator().manual_seed(9)
    a, b = (
        _on_the_cpu(ops.quantize_1x128, torch.randn(rows, 400, generator=generator))
        for rows in (140, 136)
    )
    offsets = torch.tensor([150, 290, 400], dtype=torch.int32)
    return (ops.k_grouped_fp8_gemm_nt(*a, *b, offsets),)


def _groups() -> tuple[torch.Tensor, ...]:
    """Groups of rows that fill tiles of 256 rows only in part."""
    generator = torch.Generator().manual_seed(10)
    a = _on_the_cpu(ops.quantize_1x128, torch.randn(600, 200, generator=generator))
    b = _on_the_cpu(ops.quantize_128x128, torch.randn(3, 136, 200, generator=generator))
    offsets = torch.tensor([200, 400, 600], dtype=torch.int32)
    return (ops.m_grouped_fp8_gemm_nt_contiguous(*a, *b, offsets),)


def _unaligned_groups() -> tuple[torch.Tensor, ...]:
    """Groups that begin at odd rows, with more K blocks than the ring has slots."""
    generator = torch.Generator().manual_seed(12)
    a = _on_the_cpu(ops.quantize_1x128, torch.randn(300, 900, generator=generator))
    b = _on_the_cpu(ops.quantize_128x128, torch.randn(3, 136, 900, generator=generator))
    offsets = torch.tensor([37, 202, 300], dtype=torch.int32)
    return (ops.m_grouped_fp8_gemm_nt_contiguous(*a, *b, offsets),)


def _swiglu() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(11)
    a = _on_the_cpu(ops.quantize_1x128, torch.randn(140, 300, generator=generator))
    b = _on_the_cpu(ops.quantize_128x128, torch.randn(400, 300, generator=generator))
    return ops.fp8_gemm_nt_swiglu_quantize(*a, *b)


def _route() -> tuple[torch.Tensor, ...]:
    """Three CTAs."""
    return ops.moe_route(ids_of(1200, 4, 37), 37)


def _permute() -> tuple[torch.Tensor, ...]:
    """The last slots lie beyond the rows. Every row has a choice."""
    x, slots = random(60, 200), slots_of(60, 2)
    return ops.moe_permute_quantize_1x128(_apart(x), _apart(slots), 110)


def _pack() -> tuple[torch.Tensor, ...]:
    """Two warps to a token, rows that end amid 16 elements, headers that end amid 16 bytes; a scale
    that is NaN makes codes of nothing NaN, too."""
    x, slots = random(30, 600), slots_of(30, 2)
    x[5, 590] = torch.nan
    return (ops.moe_pack_1x128(_apart(x), slots, ids_of(30, 3, 9), weights_of(30, 3)),)


def _unpack() -> tuple[torch.Tensor, ...]:
    given = CATALOG["moe_unpack_1x128"].sample("ragged")
    message, *rest = given.args
    return ops.moe_unpack_1x128(_apart(message), *rest)


PROBLEMS = {
    # One CTA computes two tiles of eight K blocks.
    "by TMA": Problem(_kernel(MEDIUM), _gemm(256, 128, 1024), num_sms=1, tile=MEDIUM),
    # A tile has four boxes, but the buffers hold two.
    "in FP32": Problem(_kernel(MEDIUM), _gemm(256, 256, 256, torch.float32), tile=MEDIUM),
    # Rows of out are not 16-byte aligned.
    "by threads": Problem(_kernel(MEDIUM), _gemm(70, 101, 300), tile=MEDIUM),
    "in pairs": Problem(_kernel(MEDIUM), _gemm(200, 256, 900), tile=MEDIUM, cluster=2),
    "split": Problem(
        _kernel(SWAPPED), _gemm(40, 200, 1100), num_sms=4, tile=SWAPPED, split_k=4, cluster=4
    ),
    "along K": Problem(_kernel(MEDIUM, "1d1d"), _along_k, tile=MEDIUM),
    "groups": Problem(_kernel(LARGE), _groups, tile=LARGE),
    "unaligned groups": Problem(_kernel(SWAPPED), _unaligned_groups, tile=SWAPPED),
    "gated": Problem(_kernel(GATED, op="_swiglu_quantize", output="kGated"), _swiglu, tile=GATED),
    "by cp.async": Problem(MMA_SOURCE, _gemm(256, 128, 1024), num_sms=1, capability=89),
    "weights only": Problem(LINEAR_SOURCE, _linear, num_sms=1, capability=80),
    "dual": Problem(GROUPS, _dual),
    "dual with sums": Problem(GROUPS, _dual_bias_grad),
    "blocks": Problem(BLOCKS, _blocks),
    "norm": Problem(NORMS, _norm),
    "gradient of a norm": Problem(NORM_GRADIENTS, _norm_gradient),
    "activation": Problem(FORWARD, _activation),
    "activation gradient": Problem(BACKWARD, _activation_gradient),
    "route": Problem(ROUTE, _route),
    "permute": Problem("csrc/moe/cuda/permute.cu", _permute),
    "pack": Problem(MESSAGE, _pack),
    "unpack": Problem(MESSAGE, _unpack),
}


@dataclass(frozen=True)
class Mutant:
    name: str
    problem: str
    file: str
    old: str
    new: str


START_AND_FINISH = """      multiply<L, A, B>(pending, 0, 0, block);
      prepare(k_block, pending);
      return pending;
    };
    const auto finish = [&](const Pending<L>& pending, float (&block)[L::kRegisters]) {
#pragma unroll
      for (float& value : block) ptx::wgmma_pin(value);
      if constexpr (!Shared<L>::kColumnVector) release(pending);
"""
MULTIPLY, FINISH = "      return pending;", "if constexpr (!Shared<L>::kColumnVector) "
WAIT_AND_FINISH = """      ptx::wgmma_wait_group<1>();
      finish(first, even);
      first = start"""
KEEP = """  ptx::fence_proxy_async_shared();
  ptx::bar_sync(kConsumersBarrier, L::kConsumers);
"""

SCALE = """    if (threadIdx.x % 8 == 0 && step * i < rows)
      scale_to[step * i * out.scale_row_stride] = scale.scale;
"""
CHECK_SCALE = """
    if (threadIdx.x % 8 == 0 && step * i < rows &&
        __ldg(scale_to + step * i * out.scale_row_stride) != scale.scale)
      __trap();
"""

MUTANTS = [
    Mutant("slot released before wgmma has read it", "by TMA", MAINLOOP, START_AND_FINISH,
           START_AND_FINISH.replace(MULTIPLY, "      release(pending);\n" + MULTIPLY).replace(
               FINISH + "release(pending);", "")),
    Mutant("no wgmma.fence", "by TMA", MAINLOOP, "  ptx::wgmma_fence();\n", ""),
    Mutant("no wgmma.commit_group", "by TMA", MAINLOOP, "  ptx::wgmma_commit_group();\n", ""),
    Mutant("no wgmma.wait_group", "by TMA", MAINLOOP, "      ptx::wgmma_wait_group<1>();\n", ""),
    Mutant("wgmma.wait_group one group short", "by TMA", MAINLOOP,
           "wgmma_wait_group<1>", "wgmma_wait_group<2>"),
    Mutant("accumulators read in flight", "by TMA", MAINLOOP, WAIT_AND_FINISH,
           WAIT_AND_FINISH.replace("      ptx::wgmma_wait_group<1>();\n", "").replace(
               "first = start", "ptx::wgmma_wait_group<1>();\n      first = start")),
    Mutant("mbarriers initialized without a fence", "by TMA", KERNEL,
           "    ptx::fence_mbarrier_init();\n", ""),
    Mutant("mbarriers used before the CTA has met", "by TMA", KERNEL,
           "  __syncthreads();\n  if (place.cluster", "  if (place.cluster"),
    Mutant("producer keeps eight registers too many", "by TMA", KERNEL,
           "setmaxnreg_dec<kProducerRegisters>", "setmaxnreg_dec<kProducerRegisters + 8>"),
    Mutant("no fence.proxy.async before the TMA store", "by TMA", TMA_STORE,
           "    ptx::fence_proxy_async_shared();\n", ""),
    Mutant("fence.proxy.async for global memory alone", "by TMA", "ptx/isa/fence.h",
           "fence.proxy.async.shared::cta;", "fence.proxy.async.global;"),
    Mutant("only the storing thread fences", "by TMA", TMA_STORE,
           "    ptx::fence_proxy_async_shared();\n",
           "    if (at.thread() == 0) ptx::fence_proxy_async_shared();\n"),
    Mutant("no barrier before the TMA store", "by TMA", TMA_STORE,
           "    ptx::fence_proxy_async_shared();\n    ptx::bar_sync(warpgroup_barrier(at), 128);\n",
           "    ptx::fence_proxy_async_shared();\n"),
    Mutant("box refilled before the store has read it", "in FP32", TMA_STORE,
           "    if (at.thread() == 0) ptx::cp_async_bulk_wait_group_read<kBoxes - 1>();\n", ""),
    Mutant("exit without waiting for the last store", "by TMA", KERNEL,
           "    if (at.thread() == 0) ptx::cp_async_bulk_wait_group<0>();\n", ""),
    Mutant("store never committed to a group", "by TMA", TMA_STORE,
           "    ptx::cp_async_bulk_commit_group();\n", ""),
    Mutant("producer waits for the wrong phase", "by TMA", MAINLOOP,
           "mbarrier_wait(&shared.empty[ring.slot], ring.phase ^ 1)",
           "mbarrier_wait(&shared.empty[ring.slot], ring.phase)"),
    Mutant("consumer waits for the wrong phase", "by TMA", MAINLOOP,
           "&shared.full[ring.slot], ring.phase", "&shared.full[ring.slot], ring.phase ^ 1"),
    Mutant("phase not flipped when the ring wraps", "by TMA", RING, "      phase ^= 1;", ""),
    Mutant("expect_tx 16 bytes short", "by TMA", MAINLOOP,
           "S::kBytesPerStage + scale", "S::kBytesPerStage - 16 + scale"),
    Mutant("expect_tx 16 bytes long", "by TMA", MAINLOOP,
           "S::kBytesPerStage + scale", "S::kBytesPerStage + 16 + scale"),
    Mutant("one arrival too many expected", "by TMA", KERNEL,
           "2 * warps : warps);", "2 * warps : warps + 1);"),
    Mutant("one warpgroup's arrivals not expected", "by TMA", KERNEL,
           "2 * warps : warps);", "2 * warps : warps - 4);"),
    Mutant("one warpgroup forgets to release", "by TMA", MAINLOOP,
           "tells = at.lane < (p.multicast ? 2 : 1);",
           "tells = at.warpgroup == 0 && at.lane < (p.multicast ? 2 : 1);"),
    Mutant("scales of all slots loaded into one", "along K", MAINLOOP,
           "scales = shared.column_scale[ring.slot];", "scales = shared.column_scale[0];"),
    Mutant("named barrier expects a warp too few", "by TMA", TMA_STORE,
           "ptx::bar_sync(warpgroup_barrier(at), 128);\n    return box",
           "ptx::bar_sync(warpgroup_barrier(at), 96);\n    return box"),
    Mutant("wrong swizzle of the staged tile", "by TMA", TMA_STORE,
           "(j + at.lane / 16) ^ (row % 8)", "(j + at.lane / 16) ^ (row % 4)"),
    Mutant("wrong stride in the wgmma descriptor", "by TMA", "ptx/isa/wgmma.h",
           "kStrideOffset = 1024 >> 4", "kStrideOffset = 512 >> 4"),
    Mutant("scale of the wrong row", "by TMA", MAINLOOP,
           "const int r = i * 64 + h * 8;", "const int r = i * 64 + h * 4;"),
    Mutant("scale of the wrong K block of b", "by TMA", MAINLOOP,
           "      blocks[i] += uint32_t(p.b_scale_k_block);\n", ""),
    Mutant("misaligned staging", "by TMA", TMA_STORE,
           "tensor_3d_store(target.map(), box,", "tensor_3d_store(target.map(), box + 64,"),
    Mutant("row bound off by one", "by threads", EPILOGUE,
           "if (row_of(i) >= work.m_end) continue;", "if (row_of(i) > work.m_end) continue;"),
    Mutant("column bound off by one", "by threads", EPILOGUE,
           "if (c + 1 < p.n) out[1] = uint16_t(pair >> 16);",
           "if (c < p.n) out[1] = uint16_t(pair >> 16);"),
    Mutant("pair not met before it multicasts", "in pairs", KERNEL,
           "  if (place.cluster > 1) {\n    ptx::barrier", "  if (false) {\n    ptx::barrier"),
    Mutant("slot released to one CTA of the pair alone", "in pairs", MAINLOOP,
           "p.multicast ? at.lane % 2 : ptx::cluster_ctarank()",
           "p.multicast ? 0 : ptx::cluster_ctarank()"),
    Mutant("both halves of the rows from one place", "in pairs", MAINLOOP,
           "full, k, row + half, 0b11", "full, k, row, 0b11"),
    Mutant("sums read before all parts are there", "split", EPILOGUE,
           "    ptx::mbarrier_wait_cluster(&shared.staged_full, phase);\n", ""),
    Mutant("sums overwritten while a CTA reads them", "split", EPILOGUE,
           "    ptx::mbarrier_wait(&shared.staged_empty, phase ^ 1);\n", ""),
    Mutant("parts announced at .cta scope", "split", "ptx/isa/cluster.h",
           "mbarrier.arrive.release.cluster.", "mbarrier.arrive.release.cta."),
    Mutant("parts waited for at .cta scope", "split", "ptx/isa/cluster.h",
           "try_wait.parity.acquire.cluster.", "try_wait.parity.acquire.cta."),
    Mutant("lanes announced before they have written", "split", EPILOGUE,
           "    __syncwarp();\n    if (at.lane < place.cluster) ptx::mbarrier_arrive_cluster(",
           "    if (at.lane < place.cluster) ptx::mbarrier_arrive_cluster("),
    Mutant("a part of K counted twice", "split", EPILOGUE,
           "ptx::mapa(address, rank)", "ptx::mapa(address, rank & ~1u)"),
    Mutant("masked columns not fenced", "along K", MAINLOOP,
           KEEP, KEEP.replace("  ptx::fence_proxy_async_shared();\n", "")),
    Mutant("masked columns multiplied before all are masked", "along K", MAINLOOP,
           KEEP, "  ptx::fence_proxy_async_shared();\n"),
    Mutant("columns of the next group kept", "along K", MAINLOOP,
           "first > 0 || last < kTileK", "first > 0"),
    Mutant("scales of any row loaded by TMA", "unaligned groups", MAINLOOP,
           "return count == 0 || row % 4 == 0;", "return true;"),
    Mutant("scales copied before the slot is empty", "unaligned groups", MAINLOOP,
           "        __syncwarp();  // the slot is empty\n", ""),
    Mutant("slot announced before all lanes have copied", "unaligned groups", MAINLOOP,
           "        __syncwarp();\n      }\n      if (!leader)", "      }\n      if (!leader)"),
    Mutant("rows of the next group stored", "groups", EPILOGUE,
           "first_row_of<L>(work, at, b) + 64 <= work.m_end", "work.m < work.m_end"),
    Mutant("boxes of the last tile taken for free", "groups", EPILOGUE,
           "  if (at.thread() == 0) ptx::cp_async_bulk_wait_group_read<0>();\n", ""),
    Mutant("amax over half a row", "gated", ACTIVATION,
           "    largest[h] = max(largest[h], __shfl_xor_sync(~0u, largest[h], 2));\n", ""),
    Mutant("up's scale of the gate's block", "gated", MAINLOOP,
           "i == 1 && next_block < kScaleGroup", "false"),
    Mutant("cp.async.wait_group one group short", "by cp.async", MMA,
           "cp_async_wait_group<C::kStages - 2>", "cp_async_wait_group<C::kStages - 1>"),
    Mutant("no cp.async.wait_group", "by cp.async", MMA,
           "    ptx::cp_async_wait_group<C::kStages - 2>();\n", ""),
    Mutant("first copies never committed", "by cp.async", MMA,
           "    ptx::cp_async_commit_group();\n", ""),
    Mutant("no barrier after the copies of a block", "by cp.async", MMA,
           "    __syncthreads();  // the block is there for all", "    // "),
    Mutant("slot refilled while it is read", "by cp.async", MMA,
           "slot == 0 ? C::kStages - 1 : slot - 1", "slot"),
    Mutant("tile loaded before the last one is stored", "by cp.async", MMA,
           "  __syncthreads();  // the last tile's slots have been read\n", ""),
    Mutant("product laid over operands that are still read", "by cp.async", MMA,
           "      __syncthreads();  // operands have been read: the product may take their place\n",
           ""),
    Mutant("swizzle of the copies and of ldmatrix differ", "by cp.async", MMA,
           "(threadIdx.x % 8) ^ (row % 8)", "(threadIdx.x % 8) ^ (row % 4)"),
    Mutant("no cp.async.wait_group", "weights only", LINEAR,
           "      ptx::cp_async_wait_group<C::kStages - 2>();\n", ""),
    Mutant("no barrier after the copies of a block", "weights only", LINEAR,
           "      __syncthreads();  // the block is there for all", "      // "),
    Mutant("slot refilled while it is read", "weights only", LINEAR,
           "slot == 0 ? C::kStages - 1 : slot - 1", "slot"),
    Mutant("tile loaded before the last one is stored", "weights only", LINEAR,
           "    __syncthreads();  // the last tile has been finished\n", ""),
    Mutant("product laid over operands that are still read", "weights only", LINEAR,
           "    __syncthreads();  // operands have been read: the product may take their place\n",
           ""),
    Mutant("product finished before all have written it", "weights only", LINEAR,
           "    __syncthreads();\n    finish_tile", "    finish_tile"),
    Mutant("swizzle of the copies and of the loads of x differ", "weights only", LINEAR,
           "x_row % C::kSwizzle * C", "x_row % 2 * C"),
    Mutant("x read past the end of K", "weights only", LINEAR,
           "valid >> i & 1 ? x_bytes : 0", "valid >> i & 1 ? 16 : 0"),
    Mutant("two weights exchanged", "weights only", LINEAR, "0x3424", "0x2434"),
    Mutant("scales of the first K block for all", "weights only", LINEAR,
           "p.b_scale + k_block * p.b_scale_k_block", "p.b_scale"),
    Mutant("no barrier between a tile's two passes", "dual", GROUPS,
           "  __syncthreads();\n", ""),
    Mutant("rows' bound off by one", "dual", GROUPS,
           "const int rows = interior ? kTile : valid_of(row, x.rows, kTile);",
           "const int rows = interior ? kTile : valid_of(row, x.rows + 1, kTile);"),
    Mutant("scales read back through ld.global.nc", "dual", GROUP_TILES,
           SCALE, SCALE + CHECK_SCALE),
    Mutant("amax of half a group", "dual", GROUP_TILES,
           "reduce_magnitudes<Value>(largest[j], 8)", "reduce_magnitudes<Value>(largest[j], 4)"),
    Mutant("no barrier between a tile's two passes", "activation", FORWARD,
           "  __syncthreads();\n", ""),
    Mutant("gates taken for ups", "activation", FORWARD,
           "load16<In>(address + a.up_offset,", "load16<In>(address,"),
    Mutant("rows' bound off by one", "activation", FORWARD,
           "const int rows = valid_of(row, a.x.rows, kTile)",
           "const int rows = valid_of(row, a.x.rows + 1, kTile)"),
    Mutant("no barrier between a tile's two passes", "activation gradient", BACKWARD,
           "    __syncthreads();\n    quantize_tile_columns", "    quantize_tile_columns"),
    Mutant("tile overwritten while it is read", "activation gradient", BACKWARD,
           "    __syncthreads();  // the next tile", "    // the next tile"),
    Mutant("an up taken for a gate", "activation gradient", BACKWARD,
           "0xffffu << wrap & 0xffff", "0xfffeu << wrap & 0xffff"),
    Mutant("sums of all rows of tiles in one place", "activation gradient", GROUP_TILES,
           "sums.data[row_group * sums.stride + col + lane]", "sums.data[col + lane]"),
    Mutant("sums without the last row of tiles", "activation gradient", GROUP_TILES,
           "i < row_tiles; ++i) sum", "i + 1 < row_tiles; ++i) sum"),
    Mutant("sums without the second half of a tile", "dual with sums", GROUP_TILES,
           "distance < 8; distance *= 2)\n        sum =",
           "distance < 4; distance *= 2)\n        sum ="),
    Mutant("segments added before all warps have theirs", "norm", NORM_ROWS,
           "  __syncthreads();\n  add(0);", "  add(0);"),
    Mutant("segments overwritten while they are added", "norm", "csrc/norm/cuda/rows.cuh",
           "    __syncthreads();  // the segments have been read\n", ""),
    Mutant("last segment of a row left out", "norm", NORM_ROWS,
           "(place.cols - col + kSegment - 1) / kSegment", "(place.cols - col) / kSegment"),
    Mutant("normed values stored beyond the last column", "norm", NORM_ROWS,
           "store_elements16<In>(address, aligned, valid, rounded)",
           "store_elements16<In>(address, aligned, 16, rounded)"),
    Mutant("runs of rows added before all warps have theirs", "gradient of a norm", NORM_GRADIENTS,
           "runs[warp][lane * 17 + i] = sums.at[i];\n  __syncthreads();",
           "runs[warp][lane * 17 + i] = sums.at[i];"),
    Mutant("runs overwritten while they are added", "gradient of a norm", NORM_GRADIENTS,
           "  __syncthreads();  // the runs have been read\n", ""),
    Mutant("sums of the first 128 rows alone", "gradient of a norm", NORM_GRADIENTS,
           "for (int64_t i = 1; i < count; ++i) sum", "for (int64_t i = 1; i < 1; ++i) sum"),
    Mutant("choices counted before all counts are zero", "route", ROUTE,
           "counts[i] = 0;\n  __syncthreads();", "counts[i] = 0;"),
    Mutant("rows given before each class has its first", "route", ROUTE,
           "  __syncthreads();\n\n  int32_t* next", "\n  int32_t* next"),
    Mutant("next row read while another lane writes it", "route", ROUTE,
           "    __syncwarp();\n    if (exists && lane", "    if (exists && lane"),
    Mutant("choices of earlier CTAs left out", "route", ROUTE,
           "earlier[j] += cta < blockIdx.x ? count : 0;", ""),
    Mutant("slots beyond the rows not ignored", "permute", ROWS,
           "return row < rows ? row : -1;", "return row;"),
    Mutant("a token beyond the last", "permute", ROWS,
           "i < tokens * chunks; i += step", "i <= tokens * chunks; i += step"),
    Mutant("codes beyond the columns sent", "pack", MESSAGE,
           "kept >= 4 ? ~0u : kept <= 0 ? 0 : (1u << 8 * kept) - 1", "~0u"),
    Mutant("headers written by every warp of a token", "pack", MESSAGE,
           "if (col < kColumns) store_header", "store_header"),
    Mutant("zeros behind a row's end", "pack", MESSAGE,
           "if (4 * lane < layout.pitch - layout.end)", "if (lane < 4)"),
    Mutant("the last row of an expert zeroed", "unpack", MESSAGE,
           "first = __ldg(used);", "first = __ldg(used) - 1;"),
]  # fmt: skip


# The formats for which each kernel of a .cu file is compiled. Problems call it for one.
FORMATS = "csrc/device/formats.cuh"
COMPILED_FORMATS = re.compile(r"(#define TORCHEXT_(INPUTS|QUANTIZERS)\(APPLY\))(?:.*\\\n)*.*")
CALLED_FORMATS = {"INPUTS": "APPLY(bf16)", "QUANTIZERS": "APPLY(bf16, e4m3)"}
PTX = "kernel.ptx"


def _compile(problem: Problem, edit: tuple[str, str, str] | None, folder: Path) -> sim.Module:
    """The compiled kernel, whose PTX is left in `folder` / PTX."""
    for part in ("csrc", "ptx"):
        shutil.copytree(ROOT / part, folder / part)
    text, count = COMPILED_FORMATS.subn(
        lambda found: f"{found[1]} {CALLED_FORMATS[found[2]]}", (folder / FORMATS).read_text()
    )
    if count != len(CALLED_FORMATS):
        raise ValueError(f"{FORMATS} no longer lists the formats of kernels")
    (folder / FORMATS).write_text(text)
    if edit is not None:
        file, old, new = edit
        text = (folder / file).read_text()
        if text.count(old) < 1:
            raise ValueError(f"{file} no longer has the text of a mutant: {old!r}")
        (folder / file).write_text(text.replace(old, new, 1))
    if problem.source.endswith(".cu"):
        source = folder / problem.source
    else:
        source = folder / "csrc/gemm/sm90/mutant.cu"
        source.write_text(problem.source)
    options = [f"-I{folder}", *(f"-I{path}" for path in cpp_extension.include_paths())]
    options += ["-DTORCHEXT_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    return sim.compile_cuda(source, arch=problem.arch, options=options, keep=folder / PTX)


@dataclass(frozen=True)
class Outcome:
    kinds: tuple[str, ...]  # of findings and notes over all runs, the most frequent first
    caught: int  # runs with a finding or with wrong numbers
    by_checker: int  # runs with a finding
    wrong: int | None  # unchecked runs with wrong numbers; None: unsafe to run unchecked


def _bits(outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [t.contiguous().reshape(-1).view(torch.uint8) for t in outputs]


def _run(problem: Problem, ptx: Path, seed: int, mode: str, checks: bool):
    """(outputs, or None if the run failed; kinds of findings)"""
    options: dict[str, Any] = {"seed": seed, "completion": mode, "num_threads": 1}
    options |= {"num_sms": problem.num_sms, "compute_capability": problem.capability}
    with sim.simulate(ptx=[ptx], checks=checks, **options) as simulation:
        try:
            outputs = problem.outputs()
        except RuntimeError:
            if not simulation.reports or simulation.reports[-1].ok:
                raise  # the simulator failed, which does not count as catching the fault
            outputs = None
    return outputs, [finding.kind for report in simulation.reports for finding in report.findings]


# A kernel with findings of these kinds must not run unchecked.
UNSAFE = {"out of bounds", "misaligned access", "deadlock", "read-only memory", "tensor map"}


def examine(mutant: Mutant | None, problem: Problem, truth: list[torch.Tensor] | None) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        edit = None if mutant is None else (mutant.file, mutant.old, mutant.new)
        module, ptx = _compile(problem, edit, Path(folder)), Path(folder, PTX)
        modes = modes_that_differ(
            is_asynchronous(module._module, kernel.name) for kernel in module.kernels()
        )
        alike = len(MODES) // len(modes)  # runs for which one run counts
        kinds: dict[str, int] = {}
        by_checker = caught = wrong = 0
        for seed, mode in itertools.product(SEEDS, modes):
            outputs, found = _run(problem, ptx, seed, mode, checks=True)
            for kind in found:
                kinds[kind] = kinds.get(kind, 0) + 1
            by_checker += alike * bool(found)
            caught += alike * (bool(found) or not _same(outputs, truth))
        safe = not any(kind in UNSAFE for kind in kinds)
        if safe:
            for seed, mode in itertools.product(SEEDS, modes):
                outputs, _ = _run(problem, ptx, seed, mode, checks=False)
                wrong += alike * (outputs is None or not _same(outputs, truth))
    order = tuple(sorted(kinds, key=lambda kind: (-kinds[kind], kind)))
    return Outcome(order, caught, by_checker, wrong if safe else None)


def _same(outputs: tuple[torch.Tensor, ...], truth: list[torch.Tensor] | None) -> bool:
    return truth is None or all(map(torch.equal, _bits(outputs), truth))


def truth_of(problem: Problem) -> list[torch.Tensor]:
    """The output bits of the shipping kernel."""
    with sim.simulate(num_sms=problem.num_sms, compute_capability=problem.capability):
        return _bits(problem.outputs())


def row(mutant: Mutant, outcome: Outcome) -> str:
    """A row of the table: | planted fault | kernel | caught by | right numbers |"""
    kernel = Path(mutant.file).name if mutant.file.startswith("ptx") else Path(mutant.file).stem
    by = ", ".join(outcome.kinds) or "numbers"
    right = "not run unchecked" if outcome.wrong is None else f"{RUNS - outcome.wrong} of {RUNS}"
    return f"| {mutant.name} | {kernel} | {by} | {right} |"


if __name__ == "__main__":
    truths = {name: truth_of(problem) for name, problem in PROBLEMS.items()}
    for mutant in MUTANTS:
        problem = PROBLEMS[mutant.problem]
        print(row(mutant, examine(mutant, problem, truths[mutant.problem])), flush=True)
