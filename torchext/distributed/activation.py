"""GatheredInput: rows of all ranks, gathered in FP8, as the input of column-wise parallel layers.

A rank has some rows of x [..., K] (sequence parallelism). 1x128 groups lie within rows, so what is
quantized before the gather has the bits of what is quantized after it. For wgrad x is quantized
along rows, in groups of 128 that must lie within a rank; backward gathers that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._dispatch.layout import GROUP, m_major, pitched, round_up
from ..ops.linear_function import Operand, foldable, quantize_activation
from ..recipe import Recipe

_aten = torch.ops.aten
# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gathered(parts: Sequence[tuple[Tensor, int]], mesh: DeviceMesh) -> list[Tensor]:
    """Tensors of all ranks side by side, sent as one message of bytes.

    Args:
        parts: (tensor, dimension along which ranks have parts of the same size).
        mesh: of one dimension.
    """
    pieces, sizes = [], []
    for part, _ in parts:
        dense = part.contiguous()
        flat = dense.view(-1).view(torch.uint8) if dense.numel() else dense.new_empty(0).view(-1)
        sizes.append(flat.numel())
        pieces += [flat, flat.new_zeros(round_up(flat.numel(), 16) - flat.numel())]
    message = torch.cat(pieces)
    everything = message.new_empty(mesh.size() * message.numel())
    _all_gather(everything, message, group=mesh.get_group())
    rows, start, results = everything.view(mesh.size(), -1), 0, []
    for (part, dim), size in zip(parts, sizes, strict=True):
        own = rows[:, start : start + size].contiguous().view(part.dtype)
        shape = list(part.shape)
        shape[dim] *= mesh.size()
        ranks = own.view(mesh.size(), *part.shape)
        if part.itemsize == 1:  # FP8, which few ops take
            ranks = ranks.view(torch.uint8)
        results.append(ranks.movedim(0, dim).reshape(shape).view(part.dtype))
        start += round_up(size, 16)
    return results


def scattered_sum(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """This rank's part along `dim` of the sum of x over all ranks."""
    shape = [*x.shape]
    shape[dim : dim + 1] = [mesh.size(), x.shape[dim] // mesh.size()]
    parts = x.reshape(shape).movedim(dim, 0).contiguous()
    own = parts.new_empty(parts.shape[1:])
    _reduce_scatter(own.view(-1), parts.view(-1), group=mesh.get_group())
    return own


class Rows:
    """This rank's rows of x [..., K], quantized, and how to gather those of all ranks.

    Attributes:
        operand: `data` and `scale` of its rows; `data_t` [K, m] and `scale_t` [K, m/128].
        leading: the sizes of x but the last.
        dim: the dimension along which ranks have rows.
    """

    def __init__(self, operand: Operand, leading: torch.Size, dim: int, mesh: DeviceMesh) -> None:
        self.operand, self.leading, self.dim, self.mesh = operand, leading, dim, mesh
        self._transposed: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype, recipe: Recipe, dim: int, mesh: DeviceMesh) -> Rows:
        """x [..., K] of this rank, quantized both ways."""
        rows = foldable(x)
        operand = quantize_activation(rows, dtype, recipe, plain=True, transposed=True)
        return cls(operand, x.shape[:-1], dim, mesh)

    def plain_parts(self) -> list[tuple[Tensor, int]]:
        """What `gathered` takes to give `data` and `scale` of all rows."""
        data, scale = self.operand.data, self.operand.scale
        assert data is not None and scale is not None
        return [(t.reshape(*self.leading, t.shape[-1]), self.dim) for t in (data, scale)]

    def transposed_parts(self) -> list[tuple[Tensor, int]]:
        """What `gathered` takes to give `data_t` and `scale_t` of all rows."""
        data, scale = self.operand.data_t, self.operand.scale_t
        assert data is not None and scale is not None
        groups = (*self.leading[: self.dim], math.prod(self.leading[self.dim :]) // GROUP)
        dense = data.view(torch.uint8).contiguous().view(data.dtype)
        return [
            (dense.view(-1, *self.leading), self.dim + 1),
            (scale.reshape(-1, *groups), self.dim + 1),
        ]

    def gather_transposed(self) -> tuple[Tensor, Tensor]:
        """`data_t` and `scale_t` of all rows, gathered once."""
        if self._transposed is None:
            self._transposed = as_transposed(*gathered(self.transposed_parts(), self.mesh))
        return self._transposed


def as_plain(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`data` and `scale` from `gathered`, as GEMMs read them."""
    return pitched(data), m_major(scale)


def as_transposed(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`data_t` and `scale_t` from `gathered`, as GEMMs read them."""
    return pitched(data.flatten(1)), m_major(scale.flatten(1))


def check_rows(op: str, x: Tensor, dim: int) -> None:
    """Raises ValueError if a group of 128 rows would lie on two ranks."""
    run = math.prod(x.shape[dim:-1])
    if run % GROUP:
        raise ValueError(
            f"{op}: the rows that a rank has must be multiples of {GROUP} for FP8 gathers (got "
            f"{run} rows of a shard {list(x.shape)} along dimension {dim}, which cut a group of "
            "wgrad's); pad the sequence, or use torch's ColwiseParallel and RowwiseParallel"
        )


class GatheredInput(Tensor):
    """x [..., K] of all ranks, in FP8. Only `Fp8ColwiseParallel` layers can read it.

    Attributes:
        rows: this rank's rows.
        pair: `data` and `scale` of all rows.
    """

    rows: Rows
    pair: tuple[Tensor, Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, rows: Rows, pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, pair[0].shape, dtype=dtype, device=pair[0].device
        )

    def __init__(self, rows: Rows, pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        self.rows, self.pair = rows, pair

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GatheredInput(shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self = args[0]
        if func in (_aten.detach.default, _aten.alias.default):
            return GatheredInput(self.rows, self.pair, self.dtype)
        raise NotImplementedError(
            f"torchext.distributed.PrepareFp8Input: {func} must not use an input that was gathered "
            "in FP8; only Fp8ColwiseParallel layers can: use torch's PrepareModuleInput for this "
            "module"
        )


class _Gather(torch.autograd.Function):
    """apply(x, recipe, dim, mesh): GatheredInput of this rank's rows x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recipe: Recipe, dim: int, mesh: DeviceMesh) -> Tensor:
        rows = Rows.of(x, recipe.input_dtype, recipe, dim, mesh)
        ctx.dim, ctx.mesh = dim, mesh
        return GatheredInput(rows, as_plain(*gathered(rows.plain_parts(), mesh)), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return scattered_sum(grads[0], ctx.dim, ctx.mesh), None, None, None


def gather_input(op: str, x: Tensor, recipe: Recipe, dim: int, mesh: DeviceMesh) -> Tensor:
    """The rows x [..., K] of all ranks, gathered in FP8; gradients are summed and scattered."""
    dim %= x.dim()
    if dim == x.dim() - 1:
        raise ValueError(
            f"{op}: an input must be sharded along its rows (got Shard({dim}) of a tensor with "
            f"{x.dim()} dimensions); redistribute it"
        )
    check_rows(op, x, dim)
    return _Gather.apply(x, recipe, dim, mesh)  # type: ignore[no-any-return]
