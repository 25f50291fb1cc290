"""Which rows and 128x128 blocks of a weight each rank has, and what it sends of them.

FSDP2 gives rank r of W the rows [r P, (r + 1) P) of a weight [N, K], P = ceil(N / W), as far as
they exist. A block belongs to the rank that has its first row, and that rank sends its scale. If P
is no multiple of 128, blocks straddle ranks; then each rank needs the largest absolute value (amax)
of the whole block, which one all-reduce finds. A rank that knows it quantizes its rows in a buffer
whose blocks are those of the whole weight, with the amax in a row that another rank has. So the
quantizer makes the bits that it makes of the whole weight.

Experts [E, N, K] are sharded along E, so that no block straddles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch.layout import GROUP, ceil_div, round_up
from ..ops.quantize import quantize_128x128


class Message(NamedTuple):
    """What a rank sends of a weight. Its shapes are the same on all ranks.

    Attributes:
        data: uint8 [P, pitch] (experts: [P, N, pitch]): FP8 values, K of them in each row.
        scale: FP32 [ceil(P/128), ceil(K/128)] (experts: [P, ceil(N/128), ceil(K/128)]): the scales
            of the blocks that belong to the rank, and then zeros.
    """

    data: Tensor
    scale: Tensor


class Blocks(NamedTuple):
    """How a weight of `shape` is split among `world` ranks."""

    shape: tuple[int, ...]
    world: int

    @property
    def stacked(self) -> bool:
        """Whether it has experts as its first dimension."""
        return len(self.shape) == 3

    @property
    def rows_each(self) -> int:
        """P, rows (experts) of each rank; the last ranks may have fewer."""
        return ceil_div(self.shape[0], self.world)

    @property
    def pitch(self) -> int:
        """Bytes between the rows of FP8 data that GEMMs read."""
        return round_up(self.shape[-1], 16)

    @property
    def scales_each(self) -> int:
        """How many rows of scales (of experts' scales) each rank sends."""
        return self.rows_each if self.stacked else ceil_div(self.rows_each, GROUP)

    def span(self, rank: int) -> tuple[int, int]:
        """The rows [start, end) of a rank."""
        start = min(rank * self.rows_each, self.shape[0])
        return start, min(start + self.rows_each, self.shape[0])

    def straddling(self) -> list[int]:
        """The rows of blocks that more than one rank has, in order."""
        if self.stacked or self.rows_each % GROUP == 0:
            return []
        cuts = range(self.rows_each, self.shape[0], self.rows_each)
        return sorted({cut // GROUP for cut in cuts if cut % GROUP})

    # ---- before the all-gather ----

    def boundary_amax(self, shard: Tensor, rank: int) -> Tensor:
        """This rank's part of the amax of straddling blocks, as the bits of FP32 numbers.

        Bits of numbers that are not negative are ordered as the numbers, with NaN above infinity.

        Args:
            shard: the rank's rows, in the dtype in which the weight is quantized.
            rank: which rank it is.

        Returns:
            [len(straddling()), ceil(K/128)], int32; zeros for blocks of other ranks.
        """
        (start, end), columns = self.span(rank), self.shape[1]
        groups = ceil_div(columns, GROUP)
        rows = []
        for block in self.straddling():
            first, last = max(start, block * GROUP), min(end, (block + 1) * GROUP)
            if first >= last:
                rows.append(shard.new_zeros(groups, dtype=torch.float32))
                continue
            largest = shard[first - start : last - start].abs().amax(0).float()
            padded = F.pad(largest, (0, groups * GROUP - columns))
            rows.append(padded.view(groups, GROUP).amax(1))
        return torch.stack(rows).view(torch.int32)

    def message(
        self, shard: Tensor, rank: int, amax: Tensor | None, dtype: torch.dtype, pow2_scale: bool
    ) -> Message:
        """Quantizes a rank's rows.

        Args:
            shard: the rank's rows, in the dtype in which the weight is quantized.
            rank: which rank it is.
            amax: the maximum of what boundary_amax returns on all ranks; None if none straddles.
            dtype, pow2_scale: as for quantize_128x128.
        """
        start, end = self.span(rank)
        length = end - start
        matrix = (self.rows_each, *self.shape[1:-1])
        groups = ceil_div(self.shape[-1], GROUP)
        if self.stacked:
            scale_shape: tuple[int, ...] = (*matrix[:1], ceil_div(matrix[1], GROUP), groups)
        else:
            scale_shape = (self.scales_each, groups)
        if length == 0:
            return Message(
                shard.new_zeros((*matrix, self.pitch), dtype=torch.uint8),
                shard.new_zeros(scale_shape, dtype=torch.float32),
            )
        skipped, owned = 0, slice(0, length)
        if not self.stacked:
            first = start // GROUP
            skipped = start - first * GROUP
            owned = slice(ceil_div(start, GROUP) - first, ceil_div(end, GROUP) - first)
            shard = self._whole_blocks(shard, start, end, amax)
        data, scale = quantize_128x128(shard, dtype=dtype, pow2_scale=pow2_scale)
        data, scale = data[skipped : skipped + length].view(torch.uint8), scale[owned]
        if data.shape != (*matrix, self.pitch):
            sent = data.new_zeros((*matrix, self.pitch))
            sent[:length, ..., : self.shape[-1]] = data
            data = sent
        if scale.shape != scale_shape:
            sent = scale.new_zeros(scale_shape)
            sent[: len(scale)] = scale
            scale = sent
        return Message(data.contiguous(), scale.contiguous())

    def _whole_blocks(self, shard: Tensor, start: int, end: int, amax: Tensor | None) -> Tensor:
        """`shard` among zeros, so that its blocks are those of the weight, with their amax."""
        first, last = start // GROUP, ceil_div(end, GROUP)  # blocks
        rows = min(last * GROUP, self.shape[0]) - first * GROUP
        if amax is None or rows == end - start:
            return shard
        whole = shard.new_zeros((rows, self.shape[1]))
        skipped = start - first * GROUP
        whole[skipped : skipped + len(shard)] = shard
        values = amax.view(torch.float32).to(shard.dtype)  # exact: a value of this dtype
        for index, block in enumerate(self.straddling()):
            if first <= block < last:
                missing = 0 if block == first and skipped else rows - 1
                whole[missing, ::GROUP] = values[index]
        return whole

    # ---- after the all-gather ----

    def data(self, gathered: Tensor, dtype: torch.dtype) -> Tensor:
        """FP8 values [N, K] ([E, N, K]), a view of the `data` of all ranks' messages."""
        rows = gathered.view(-1, *self.shape[1:-1], self.pitch)[: self.shape[0]]
        return rows[..., : self.shape[-1]].view(dtype)

    def scale_rows(self, device: torch.device) -> Tensor | None:
        """The rows of all ranks' `scale` that are the weight's, in order; None if the first are."""
        if self.stacked or self.rows_each % GROUP == 0:
            return None
        rows = []
        for block in range(ceil_div(self.shape[0], GROUP)):
            rank = block * GROUP // self.rows_each
            within = block - ceil_div(rank * self.rows_each, GROUP)
            rows.append(rank * self.scales_each + within)
        return torch.tensor(rows, device=device)

    def scale(self, gathered: Tensor) -> Tensor:
        """The scales of all ranks' messages as [rows of scales of all ranks, ...]."""
        if self.stacked:
            return gathered.view(-1, *(ceil_div(n, GROUP) for n in self.shape[1:]))
        return gathered.view(-1, ceil_div(self.shape[1], GROUP))

    def scale_count(self) -> int:
        """The rows of scales that the weight has."""
        return self.shape[0] if self.stacked else ceil_div(self.shape[0], GROUP)
