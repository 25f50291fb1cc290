"""Converts the operands that DeepGEMM's callers pass to the layouts that torchext's ops read.

Scales of 1x128 groups that are not M-major are transposed, as in DeepGEMM. FP8 operands that TMA
cannot read are copied, with a warning; DeepGEMM refuses those.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._dispatch.layout import (
    GROUP,
    ceil_div,
    empty_data,
    folded_row_stride,
    m_major,
    starts_aligned,
)
from .utils.math import unpack_ue8m0_from_int

Pair = Sequence[Tensor]  # of data and scale
Recipe = Sequence[int]

_HERE = str(Path(__file__).parent)
_warned: set[tuple[str, str]] = set()


def pair(op: str, name: str, operand: Pair, dims: int) -> tuple[Tensor, Tensor]:
    """`operand` as data and scale, each of `dims` dimensions (0: any number)."""
    if not isinstance(operand, (tuple, list)) or len(operand) != 2:
        raise TypeError(
            f"{op}: {name} must be a pair (data, scale) of tensors (got {type(operand).__name__})"
        )
    data, scale = operand
    if data.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise TypeError(
            f"{op}: the data of {name} must be torch.float8_e4m3fn or torch.float8_e5m2 (got "
            f"{data.dtype}); cast it with per_token_cast_to_fp8 or per_block_cast_to_fp8. "
            "DeepGEMM's packed FP4 is for Blackwell, and out of scope here"
        )
    for tensor in (data, scale):
        if dims and tensor.dim() != dims:
            raise ValueError(
                f"{op}: the data and the scale of {name} must have {dims} dimensions (got shapes "
                f"{list(data.shape)} and {list(scale.shape)})"
            )
    return data, scale


def k_major(op: str, name: str, data: Tensor) -> Tensor:
    """`data` [..., K], or a copy of it, with rows that TMA can read: 16-byte pitch and address."""
    strides = data.stride()
    if len(strides) == 2 and strides[1] == 1 and strides[0] % 16 == 0 and starts_aligned(data):
        return data  # the usual case, checked first
    if data.numel() == 0:
        return empty_data(data, data.shape[:-1], data.shape[-1], data.dtype)
    pitch = folded_row_stride(data)
    if data.shape[-1] != 1 and data.stride(-1) != 1:
        why = "it is not K-major (stride(-1) == 1)"
    elif pitch is None:
        why = "the rows of its groups do not lie one stride apart"
    elif pitch % 16 != 0 or not starts_aligned(data):
        why = "its rows do not start at multiples of 16 bytes"
    else:
        return data
    _warn_of_copy(op, name, why)
    copy = empty_data(data, data.shape[:-1], data.shape[-1], data.dtype)
    copy.view(torch.uint8).copy_(data.view(torch.uint8))
    return copy


# Runs while torch.compile traces, which cannot trace a warning.
@torch.compiler.assume_constant_result
def _warn_of_copy(op: str, name: str, why: str) -> None:
    if (op, name) in _warned:
        return
    _warned.add((op, name))
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"{op}: {name} is copied at each call, since {why}; to avoid that, keep it K-major, with "
        "contiguous rows that are a multiple of 16 bytes apart (this warning appears once)",
        stacklevel=level,
    )


def checked_scale(
    op: str, name: str, scale: Tensor, leading: tuple[int, ...], k: int, rows: int
) -> Tensor:
    """`scale`, of `rows` rows and 128 columns each, as float32 [*leading, ceil(k / 128)].

    UE8M0 exponents, four to an int32, are decoded: DeepGEMM has them of single rows only.
    """
    groups = ceil_div(k, GROUP)
    packed = scale.dtype == torch.int32
    if not packed and scale.dtype == torch.float32 and scale.shape == (*leading, groups):
        return scale
    if scale.dtype != torch.float32 and not (packed and rows == 1):
        expected = "torch.float32, or torch.int32 of four UE8M0 exponents each"
        raise TypeError(
            f"{op}: the scale of {name} must be {expected if rows == 1 else 'torch.float32'} (got "
            f"{scale.dtype})"
        )
    shape = [*leading, ceil_div(groups, 4) if packed else groups]
    if list(scale.shape) != shape:
        hint = "; if it has a scale for each row, pass recipe=(1, 1, 128)" if rows != 1 else ""
        raise ValueError(
            f"{op}: the scale of {name}, of {rows}x128 elements each, must have shape {shape} (got "
            f"{list(scale.shape)}){hint}"
        )
    return unpack_ue8m0_from_int(scale)[..., :groups]


def row_scale(op: str, name: str, scale: Tensor, leading: tuple[int, ...], k: int) -> Tensor:
    """The scale of 1x128 groups of data [*leading, k], M-major with rows folded, or such a copy."""
    return m_major(checked_scale(op, name, scale, leading, k, 1))


def rows_per_b_scale(
    op: str, recipe: Recipe | None, recipe_a: Recipe | None, recipe_b: Recipe | None, scale: Tensor
) -> int:
    """The rows of b that share a scale, 1 or 128, from any of DeepGEMM's arguments for it."""
    if isinstance(recipe_a, str):
        # Before 2.3 there were no recipe_a and recipe_b: these are compiled_dims, and perhaps
        # disable_ue8m0_cast, by position.
        recipe_a = recipe_b = None
    if (recipe_a is None) != (recipe_b is None) or None not in (recipe, recipe_a):
        raise ValueError(
            f"{op}: either recipe, or recipe_a and recipe_b, or none must be given (got "
            f"recipe={recipe}, recipe_a={recipe_a}, recipe_b={recipe_b})"
        )
    if recipe_a is not None and recipe_b is not None:
        if len(recipe_a) == 2 == len(recipe_b) and recipe_a[1] == recipe_b[1]:
            recipe = (recipe_a[0], recipe_b[0], recipe_a[1])
        else:
            recipe = (*recipe_a, *recipe_b)
    if recipe is None:
        return 1 if scale.dtype == torch.int32 else 128
    if tuple(recipe) not in ((1, 128, 128), (1, 1, 128)):
        raise ValueError(
            f"{op}: recipe must be (1, 128, 128) or (1, 1, 128), or recipe_a (1, 128) with "
            f"recipe_b (128, 128) or (1, 128): rows of a, rows of b and columns to a scale (got "
            f"{tuple(recipe)})"
        )
    return recipe[1]


def also_called(**old_names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Lets callers name arguments as other releases of DeepGEMM do: also_called(old="new")."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> None:
            for old, new in old_names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(
                            f"{function.__name__}: {new} must be given once (got {old} too, its "
                            "name in other releases)"
                        )
                    kwargs[new] = kwargs.pop(old)
            function(*args, **kwargs)

        return call

    return decorate


def check_c(op: str, c: Tensor | None, d: Tensor) -> None:
    if c is not None and (c.shape != d.shape or c.dtype != d.dtype):
        raise ValueError(
            f"{op}: c must have d's shape and dtype, {list(d.shape)} and {d.dtype} (got "
            f"{list(c.shape)} and {c.dtype})"
        )


def check_index(op: str, name: str, index: Tensor, length: int) -> None:
    if index.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be torch.int32 (got {index.dtype}); use .int()")
    if index.shape != (length,) or not index.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous of shape {[length]} (got shape {list(index.shape)}, "
            f"strides {index.stride()})"
        )


def check_epilogue(op: str, epilogue: object) -> None:
    if epilogue is not None:
        raise ValueError(
            f"{op}: epilogue must be None (got {epilogue!r}); apply it to d, or see "
            "torchext.ops.fp8_gemm_nt_swiglu_quantize and its like for fused activations"
        )
