"""GatheredWeight: a parameter that exists only in FP8, with a scale for each 128x128 block.

FSDP2 makes one of each FP8 all-gather (torchext.distributed). quantize_weight returns its values
and scales, so that no layer quantizes it. It has the shape and the dtype of the parameter that it
stands for, and so has its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default)
_TRANSPOSED = (_aten.t.default, _aten.transpose.int)
# What a new tensor of the same shape is made by; none of them reads values.
_LIKE = (
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.empty_like.default,
    _aten.full_like.default,
)


class GatheredWeight(Tensor):
    """A weight [..., N, K] of FP8 values `data` with scales [..., ceil(N/128), ceil(K/128)].

    Ops on it other than those of torchext's layers raise NotImplementedError, because they would
    compute with rounded values.
    """

    data_fp8: Tensor
    scale: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor, dtype: torch.dtype) -> GatheredWeight:
        """`data` [..., N, K], FP8, of any strides; `dtype` is what the weight claims to have."""
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, data.shape, dtype=dtype, device=data.device
        )

    def __init__(self, data: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.data_fp8, self.scale = data, scale

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GatheredWeight(shape={list(self.shape)}, dtype={self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["data_fp8", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any
    ) -> GatheredWeight:
        return GatheredWeight(inner["data_fp8"], inner["scale"], dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self = args[0] if args else None
        if isinstance(self, GatheredWeight):
            if func in _SAME or _is_whole_view(func, self, args):
                return GatheredWeight(self.data_fp8, self.scale, self.dtype)
            if func is _aten.select.int and args[1] == 0 and self.dim() == 3:  # one expert
                part = args[2]
                return GatheredWeight(self.data_fp8[part], self.scale[part], self.dtype)
            if func in _TRANSPOSED and _swaps_matrix(self, args[1:]):
                return GatheredWeight(self.data_fp8.mT, self.scale.mT, self.dtype)
        if func in _LIKE:
            plain = tree_map_only(GatheredWeight, _shape_only, args)
            return func(*plain, **{"device": args[0].device, **(kwargs or {})})
        raise NotImplementedError(
            f"torchext.distributed.shard_fp8: {func} must not use a weight that was gathered in "
            "FP8 (its rounded values would stand for the parameter's); only forwards of torchext's "
            'layers can: shard this module with gather="bfloat16"'
        )


def _is_whole_view(func: Any, weight: GatheredWeight, args: tuple[Any, ...]) -> bool:
    """Whether it is a view with the shape and strides of the weight, as FSDP2 makes one."""
    if func is _aten.as_strided.default:
        same = tuple(args[1]) == weight.shape and tuple(args[2]) == weight.stride()
        return same and (len(args) < 4 or not args[3])
    return func is _aten.view.default and tuple(args[1]) == weight.shape


def _swaps_matrix(weight: Tensor, dims: tuple[int, ...]) -> bool:
    if not dims:
        return weight.dim() == 2
    return {dim % weight.dim() for dim in dims} == {weight.dim() - 2, weight.dim() - 1}


def _shape_only(weight: GatheredWeight) -> Tensor:
    return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")


def is_gathered(weight: Any) -> bool:
    """Whether it is a parameter that was gathered in FP8."""
    return type(weight) is GatheredWeight


def is_weight(weight: Any) -> bool:
    """Whether fused layers can use it: a plain parameter, or one gathered in FP8."""
    return type(weight) in (torch.nn.Parameter, GatheredWeight)
