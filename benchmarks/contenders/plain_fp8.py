"""Quantizers in plain PyTorch, written for speed as a user might write them: contender "plain".

Layouts and numbers equal those of `torchext.ops` for finite input and float8_e4m3fn: scale =
amax / 448 (1 if amax = 0), data = x / scale rounded to nearest even. Results are compared with
torchext.reference, not with this module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
GROUP = 128


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _scale(amax: Tensor) -> Tensor:
    # By a number, CUDA would multiply with the rounded reciprocal.
    quotient = amax / amax.new_full((), E4M3_MAX)
    scale = quotient.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(amax == 0, 1.0, scale)


def _pitched(data: Tensor) -> Tensor:
    """`data` with a row pitch of round_up(columns, 16) bytes, as TMA requires."""
    columns = data.shape[1]
    if columns % 16 == 0:
        return data.contiguous()
    return F.pad(data.view(torch.uint8), (0, -columns % 16)).view(data.dtype)[:, :columns]


def quantize_1x128(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    groups = F.pad(x.float(), (0, -columns % GROUP)).view(rows, -1, GROUP)
    scale = _scale(groups.abs().amax(2))
    data = (groups / scale.unsqueeze(2)).to(torch.float8_e4m3fn).view(rows, -1)[:, :columns]
    m_major = scale.new_empty(scale.shape[1], round_up(rows, 4)).t()[:rows]
    return _pitched(data), m_major.copy_(scale)


def quantize_1x128_t(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_1x128(x.t().contiguous())


def quantize_1x128_dual(x: Tensor) -> tuple[Tensor, ...]:
    return *quantize_1x128(x), *quantize_1x128_t(x)


def quantize_1x128_dual_bias_grad(x: Tensor) -> tuple[Tensor, ...]:
    """The order of the sums is that of docs/numerics.md."""
    padded = F.pad(x.float(), (0, 0, 0, -x.shape[0] % GROUP))
    tiles = padded.view(-1, 8, GROUP // 8, x.shape[1])
    sums = tiles[:, :, 0]
    for i in range(1, tiles.shape[2]):
        sums = sums + tiles[:, :, i]
    for _ in range(3):
        sums = sums[:, ::2] + sums[:, 1::2]
    total = sums[0, 0]
    for of_tile in sums[1:, 0]:
        total = total + of_tile
    return *quantize_1x128_dual(x), total


def quantize_128x128(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    padded = F.pad(x.float(), (0, -columns % GROUP, 0, -rows % GROUP))
    blocks = padded.view(padded.shape[0] // GROUP, GROUP, -1, GROUP)
    scale = _scale(blocks.abs().amax((1, 3)))
    data = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(padded.shape)
    return _pitched(data[:rows, :columns]), scale


def quantize_128x128_dual(x: Tensor) -> tuple[Tensor, ...]:
    data, scale = quantize_128x128(x)
    return data, scale, _pitched(data.t().contiguous())


def quantize_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = _scale(wide.abs().amax(1, keepdim=True))
    return _pitched((wide / scale).to(torch.float8_e4m3fn)), scale


def quantize_tensorwise(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = _scale(wide.abs().amax().view(1, 1))
    return _pitched((wide / scale).to(torch.float8_e4m3fn)), scale


def expand_scale(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Scales of any granularity, broadcastable to [rows, columns]: one value for each element."""

    def along(scale: Tensor, dim: int, size: int) -> Tensor:
        if scale.shape[dim] in (1, size):
            return scale  # broadcasts
        return scale.repeat_interleave(GROUP, dim).narrow(dim, 0, size)

    return along(along(scale, 0, rows), 1, columns)


def dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    wide = data.to(torch.promote_types(dtype, torch.float32))
    return (wide * expand_scale(scale, *data.shape)).to(dtype)
