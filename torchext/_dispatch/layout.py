"""The shapes and strides of quantized tensors, for fake kernels, references and `restore_layout`.

A tensor [..., K] is treated as a matrix whose M rows are all its leading dimensions, folded. The
row pitch of FP8 data is a multiple of 16 bytes, as TMA requires. Scales of 1x128 groups are
M-major, with columns a multiple of four FP32 values apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GROUP = 128


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def round_up(a: int, b: int) -> int:
    return ceil_div(a, b) * b


def leading_sizes(x: Tensor) -> tuple[int, ...]:
    """All sizes of x [..., K] but the last."""
    if x.dim() == 0:
        raise ValueError(
            "torchext: a tensor must have shape [..., K] (got 0 dimensions); reshape it to [1]"
        )
    return tuple(x.shape[:-1])


def folded_strides(leading: Sequence[int], row: int, column: int) -> list[int]:
    """Strides of [*leading, columns] whose folded rows are `row` elements apart, and whose columns
    are `column` elements apart."""
    strides = [column]
    for size in reversed(leading):
        strides.insert(0, row)
        row = row * size
    return strides


def empty_data(x: Tensor, leading: Sequence[int], columns: int, dtype: torch.dtype) -> Tensor:
    """Uninitialized FP8 data [*leading, columns], rows round_up(columns, 16) bytes apart."""
    strides = folded_strides(leading, round_up(columns, 16), 1)
    return x.new_empty_strided((*leading, columns), strides, dtype=dtype)


def empty_group_scale(x: Tensor, leading: Sequence[int], columns: int) -> Tensor:
    """Uninitialized scales [*leading, ceil(columns / 128)] of 1x128 groups, M-major."""
    rows = math.prod(leading)
    strides = folded_strides(leading, 1, round_up(rows, 4))
    shape = (*leading, ceil_div(columns, GROUP))
    return x.new_empty_strided(shape, strides, dtype=torch.float32)


def empty_block_scale(x: Tensor) -> Tensor:
    """Uninitialized scales [..., ceil(rows / 128), ceil(columns / 128)] of x's blocks,
    contiguous."""
    *leading, rows, columns = x.shape
    blocks = (*leading, ceil_div(rows, GROUP))
    return empty_contiguous(x, blocks, ceil_div(columns, GROUP), torch.float32)


def empty_contiguous(x: Tensor, leading: Sequence[int], columns: int, dtype: torch.dtype) -> Tensor:
    """Uninitialized contiguous [*leading, columns]. Unlike torch.empty's, strides are 0 to the left
    of a dimension of size 0."""
    strides = folded_strides(leading, columns, 1)
    return x.new_empty_strided((*leading, columns), strides, dtype=dtype)


# ---- repair ----
# A copy with dense strides (torch.empty(size), clone, contiguous, cpu, safetensors) keeps the
# values but loses the layout that GEMMs require (csrc/gemm/operands.cpp).


def folded_row_stride(tensor: Tensor) -> int | None:
    """Elements between rows, with leading dimensions folded; 0 for one row, None if rows do not
    fold."""
    stride, rows = 0, 1
    for size, step in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if rows == 1:
            stride = step
        elif step != stride * rows:
            return None
        rows *= size
    return stride


def starts_aligned(tensor: Tensor) -> bool:
    """Whether `tensor` starts at a multiple of 16 bytes.

    True for a tensor without an address of its own (while a graph is traced or compiled, or in a
    transform), which is left for the GEMM to check.
    """
    if (
        type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
    ):
        return True
    return tensor.data_ptr() % 16 == 0


def pitched(data: Tensor) -> Tensor:
    """FP8 `data` [..., K] if its rows are 16-byte aligned, as GEMMs read them, else a copy."""
    strides = data.stride()
    if len(strides) == 2 and strides[1] == 1 and strides[0] % 16 == 0:  # the usual case
        fits = True
    else:
        row = folded_row_stride(data)
        fits = row is not None and row % 16 == 0 and (strides[-1] == 1 or data.shape[-1] <= 1)
    if fits and starts_aligned(data):
        return data
    copy = empty_data(data, data.shape[:-1], data.shape[-1], data.dtype)
    copy.view(torch.uint8).copy_(data.view(torch.uint8))
    return copy


def m_major(scale: Tensor) -> Tensor:
    """`scale` [..., groups] of 1x128 groups if it is M-major, as GEMMs read it, else a copy."""
    strides = scale.stride()
    if len(strides) == 2 and strides[0] == 1 and strides[1] % 4 == 0:  # the usual case
        fits = True
    else:
        one_row = math.prod(scale.shape[:-1]) <= 1
        one_group = scale.shape[-1] <= 1
        fits = (one_row or folded_row_stride(scale) == 1) and (one_group or strides[-1] % 4 == 0)
    if fits and starts_aligned(scale):
        return scale
    layout = folded_strides(scale.shape[:-1], 1, round_up(math.prod(scale.shape[:-1]), 4))
    return scale.new_empty_strided(scale.shape, layout).copy_(scale)


def fits_data(data: Tensor, scale: Tensor) -> bool:
    """Whether `scale` has a shape that some quantizer returns with data of this shape."""
    if data.dim() == 0 or scale.dim() == 0:
        return False
    *leading, columns = data.shape
    *scale_leading, groups = scale.shape
    *matrices, rows = leading or [1]
    grouped = [  # each row, blocks of each matrix, or blocks of the folded rows
        leading,
        [*matrices, ceil_div(rows, GROUP)],
        [ceil_div(math.prod(leading), GROUP)],
    ]
    whole = [leading, [*matrices, 1]]  # each row, or each matrix
    return (
        (groups == ceil_div(columns, GROUP) and scale_leading in grouped)
        or (groups == 1 and scale_leading in whole)
        or scale.numel() == 1
    )


def laid_out(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A quantized pair with the layout that GEMMs require; a tensor that has it is not copied."""
    shape, groups = data.shape, scale.shape
    if groups[-1] == ceil_div(shape[-1], GROUP) and groups[:-1] == shape[:-1]:
        scale = m_major(scale)
    elif len(groups) > 2 and folded_row_stride(scale) is None:
        scale = scale.contiguous()
    return pitched(data), scale
