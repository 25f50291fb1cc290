"""Fp8ShardedWeight: a rank's rows of a weight, which FSDP2 gathers in FP8.

FSDP2 calls fsdp_pre_all_gather of the local tensor of a parameter, sends what it returns, and makes
the parameter of what fsdp_post_all_gather returns. The optimizer sees ordinary numbers.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from ..ops.gathered_weight import GatheredWeight
from .blocks import Blocks

_aten = torch.ops.aten
# FSDP2 makes shards of parameters, and shards of shards, by these ops. The result of any other op,
# such as an optimizer's state, is an ordinary tensor.
_PARTS = (
    _aten.detach.default,
    _aten.alias.default,
    _aten.split.Tensor,
    _aten.slice.Tensor,
    _aten.new_zeros.default,
    _aten._to_copy.default,
    _aten._pin_memory.default,
)


class Group:
    """Weights that one FSDP2 module gathers together, and so reduces together.

    Attributes:
        places: the modules that have them, and their names in the modules.
        dtype: what weights are cast to before they are quantized; None for their own dtype.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.places: list[tuple[torch.nn.Module, str]] = []
        self.dtype = dtype
        self._amax: dict[int, Tensor] = {}

    def amax(self, index: int, mesh: DeviceMesh, device: torch.device) -> Tensor:
        """The amax of the straddling blocks of weight `index`, as Blocks.boundary_amax returns it.

        The first weight of an all-gather reduces for all.
        """
        if index not in self._amax:
            self._amax = {}
            parts: dict[int, Tensor] = {}
            for other, (module, name) in enumerate(self.places):
                local = module._parameters[name]
                while isinstance(local, DTensor):
                    local = local._local_tensor
                assert isinstance(local, Fp8ShardedWeight)
                blocks = local.blocks(mesh)
                if blocks.straddling():
                    numbers = local.numbers(device)
                    parts[other] = blocks.boundary_amax(numbers, mesh.get_local_rank())
            joined = torch.cat([part.view(-1) for part in parts.values()])
            dist.all_reduce(joined, dist.ReduceOp.MAX, group=mesh.get_group())
            pieces = joined.split([part.numel() for part in parts.values()])
            for (other, part), piece in zip(parts.items(), pieces, strict=True):
                self._amax[other] = piece.view(part.shape)
        return self._amax.pop(index)


class Fp8ShardedWeight(Tensor):
    """Rows of a weight [N, K], or experts of a weight [E, N, K], in their own dtype.

    `shard_fp8` makes it. It shares the memory of the tensor that it is made of, and every op that
    PyTorch has sees that tensor; pickles (checkpoints) contain that tensor.

    Attributes:
        plain: that tensor.
    """

    plain: Tensor
    _group: Group
    _index: int
    _whole: tuple[int, ...]
    _options: tuple[torch.dtype, bool]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, plain: Tensor, *rest: Any) -> Fp8ShardedWeight:
        return Tensor._make_subclass(cls, plain)  # type: ignore[no-any-return]

    def __init__(
        self,
        plain: Tensor,
        group: Group,
        index: int,
        whole: tuple[int, ...],
        options: tuple[torch.dtype, bool],
    ) -> None:
        """
        Args:
            plain: the numbers.
            group: the weights that are gathered with this one.
            index: its place among them.
            whole: the shape of the weight on all ranks.
            options: FP8 dtype and `pow2_scale` of its quantization.
        """
        self.plain = plain
        self._group, self._index = group, index
        self._whole, self._options = whole, options

    def _like(self, plain: Tensor) -> Fp8ShardedWeight:
        return Fp8ShardedWeight(plain, self._group, self._index, self._whole, self._options)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Fp8ShardedWeight({self.plain})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.plain, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        first = args[0] if args else None
        plain_args, plain_kwargs = tree_map_only(
            Fp8ShardedWeight, lambda weight: weight.plain, (args, kwargs or {})
        )
        result = func(*plain_args, **plain_kwargs)
        if isinstance(first, Fp8ShardedWeight):
            materialized = func is _aten.empty_like.default and first.is_meta
            if func in _PARTS or materialized:
                return tree_map_only(Tensor, first._like, result)
            if result is first.plain:  # an op in place
                return first
        return result

    # ---- for Group ----

    def blocks(self, mesh: DeviceMesh) -> Blocks:
        return Blocks(self._whole, mesh.size())

    def numbers(self, device: torch.device) -> Tensor:
        """The numbers that are quantized."""
        return self.plain.detach().to(device, self._group.dtype or self.dtype)

    # ---- for FSDP2 ----

    # FSDP2 also calls this with five arguments. Then each message must have the shape of the shard,
    # which leaves no room for scales. A message of this weight has its own shape.
    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[Tensor, ...], Any]:
        """What this rank sends: FP8 values and scales."""
        blocks, rank, numbers = self.blocks(mesh), mesh.get_local_rank(), self.numbers(self.device)
        amax = None
        if blocks.straddling():
            amax = self._group.amax(self._index, mesh, self.device)
        message = blocks.message(numbers, rank, amax, *self._options)
        metadata = (blocks, self._options[0])
        if mesh.size() > 1:
            return tuple(message), metadata
        # FSDP2 takes only the first tensor where there is nothing to gather.
        return (torch.cat([part.view(-1).view(torch.uint8) for part in message]),), metadata

    def fsdp_post_all_gather(
        self,
        outputs: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The weight of all ranks' messages; its values are a view of what arrived."""
        blocks, dtype = metadata
        if len(outputs) == 1:
            size = math.prod(blocks.shape[:-1]) * blocks.pitch
            outputs = outputs[0][:size], outputs[0][size:].view(torch.float32)
        data, scales = outputs[0], blocks.scale(outputs[1])
        if out is not None:
            gathered = out._local_tensor if isinstance(out, DTensor) else out
            assert isinstance(gathered, GatheredWeight)
            rows = blocks.scale_rows(scales.device)
            if rows is not None:  # otherwise the scales are a view, too
                with torch.autograd._unsafe_preserve_version_counter((gathered.scale,)):
                    torch.index_select(scales, 0, rows, out=gathered.scale)
            return None
        rows = blocks.scale_rows(scales.device)
        scale = scales[: blocks.scale_count()] if rows is None else scales[rows]
        weight = GatheredWeight(blocks.data(data, dtype), scale, param_dtype)
        return weight, () if rows is None else (scale,)  # FSDP2 frees what it finds there
