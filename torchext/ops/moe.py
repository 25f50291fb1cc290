"""Rows for the experts of a mixture, part of `torchext.ops`: route, permute, combine.

Each of T tokens makes k choices of an expert. A choice's slot is the row that it has among the rows
of all experts, which `m_grouped_fp8_gemm_nt_contiguous` reads as they are: nothing is padded. No
two choices have the same row, and a negative slot is no row.

    slots, offsets = moe_route(ids, experts)
    rows, scale = moe_permute_quantize_1x128(x, slots)      # each token is read and quantized once
    y = m_grouped_fp8_gemm_nt_contiguous(rows, scale, w, w_scale, offsets)
    out = moe_combine(y, slots, weights)

Nothing waits for the device, and no sum depends on a schedule. On the CPU, a slot beyond the rows
raises a ValueError; a GPU cannot raise: its kernels ignore the choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dispatch.autograd import Gradient, asks_gradient
from .._dispatch.batching import each, each_quantized
from .._dispatch.declaration import declare
from .._dispatch.errors import python_error
from .._dispatch.layout import empty_contiguous, empty_data, empty_group_scale
from .._dispatch.sharding_rules import replicated
from .._dispatch.sharding_rules_grouped import combination, permutation
from .._dispatch.sm_budget import communication_sms

Dtype = torch.dtype | None


def _fake_route(ids: Tensor, num_experts: int, *, num_sms: int = 0) -> tuple[Tensor, Tensor]:
    tokens, choices = ids.shape
    slots = empty_contiguous(ids, (tokens,), choices, torch.int32)
    return slots, ids.new_empty((num_experts,), dtype=torch.int32)


_route = declare(
    "moe_route",
    fake=_fake_route,
    flops=None,
    batching=each,
    sharding=replicated(
        "moe_route",
        "a row depends on the tokens of all ranks (torchext.moe.Dispatcher routes across ranks)",
    ),
).op


def moe_route(ids: Tensor, num_experts: int, *, num_sms: int = 0) -> tuple[Tensor, Tensor]:
    """Gives each choice of an expert a row, so that the rows of an expert follow each other.

    Within an expert, rows are in the order of the tokens and then of the choices: a stable sort by
    expert. An id outside 0 to num_experts - 1 (such as -1) is no expert; the rows of such choices
    come last, from offsets[-1] on, and grouped GEMMs leave them out.

    Args:
        ids: [T, k], int64 or int32, of any strides: the experts that each token chose. A token may
            choose an expert twice.
        num_experts: E, from 1 to 1024.
        num_sms: the number of SMs that the CUDA kernels may occupy; 0 for all, or for those of
            an open `torchext.sm_budget`.

    Returns:
        slots: [T, k], int32, contiguous: the row of each choice, a permutation of 0 to T * k - 1.
        offsets: [E], int32: where the rows of each expert end.

    Raises:
        ValueError: ids is no matrix of fewer than 2**31 elements, or num_experts is out of range.
        TypeError: ids has another dtype.
    """
    num_sms = num_sms or communication_sms(ids)
    try:
        return _route(ids, num_experts, num_sms=num_sms)
    except RuntimeError as error:
        raise python_error(error) from None


def _rows(slots: Tensor, rows: int | None) -> int:
    return slots.shape[0] * slots.shape[1] if rows is None else rows


def _fake_permute_quantize(
    x: Tensor,
    slots: Tensor,
    rows: int | None = None,
    *,
    dtype: Dtype = None,
    pow2_scale: bool = False,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:
    leading, columns = (_rows(slots, rows),), x.shape[1]
    data = empty_data(x, leading, columns, dtype or torch.float8_e4m3fn)
    return data, empty_group_scale(x, leading, columns)


_permute_quantize = declare(
    "moe_permute_quantize_1x128",
    fake=_fake_permute_quantize,
    flops=None,
    batching=each_quantized,
    sharding=permutation("moe_permute_quantize_1x128", quantizes=True),
).op


def moe_permute_quantize_1x128(
    x: Tensor,
    slots: Tensor,
    rows: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:
    """Tokens in the rows of their choices, quantized with one scale for every 128 elements.

    The result has the bits of `quantize_1x128(moe_permute(x, slots))`, but each token is read and
    quantized once, whatever the number of its choices.

    Args:
        x: [T, K], bfloat16, float16 or float32, of any strides.
        slots: [T, k], int32, of any strides: the row of each choice (see moe_route).
        rows: the number of rows of the result; T * k if None. Rows that no choice has are not
            written.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.
        num_sms: the number of SMs that the CUDA kernel may occupy; 0 for all, or for those of
            an open `torchext.sm_budget`.

    Returns:
        data: [rows, K], FP8, with the strides of `quantize_1x128`'s data.
        scale: [rows, ceil(K / 128)], float32, with the strides of `quantize_1x128`'s scale.

    Raises:
        ValueError: a shape does not fit, or, on the CPU, a slot is not below rows.
        TypeError: x or slots has another dtype, or `dtype` is not an FP8 dtype.
    """
    options: dict[str, Any] = {}
    # Defaults are not passed: each keyword argument costs a quarter of a microsecond, or more.
    if dtype is not None:
        options["dtype"] = dtype
    if pow2_scale is not False:
        options["pow2_scale"] = pow2_scale
    num_sms = num_sms or communication_sms(x)
    if num_sms != 0:
        options["num_sms"] = num_sms
    try:
        return _permute_quantize(x, slots, rows, **options)
    except RuntimeError as error:
        raise python_error(error) from None


def _fake_permute(
    x: Tensor,
    slots: Tensor,
    weights: Tensor | None = None,
    rows: int | None = None,
    *,
    num_sms: int = 0,
) -> Tensor:
    return empty_contiguous(x, (_rows(slots, rows),), x.shape[1], x.dtype)


def _of_choices(rows: Tensor, slots: Tensor) -> Tensor:
    """The row of each choice: rows [R, ...] as [T, k, ...]; zeros for choices without a row."""
    exists = (slots >= 0) & (slots < rows.shape[0])
    if rows.shape[0] == 0:
        return rows.new_zeros((*slots.shape, *rows.shape[1:]))
    found = rows[torch.where(exists, slots, 0).long()]
    return found * exists.view(*slots.shape, *(1 for _ in rows.shape[1:]))


def _token_gradient(
    grad: Tensor, shape: torch.Size, slots: Tensor, weights: Tensor | None
) -> Tensor:
    return moe_combine(grad.contiguous(), slots, weights, out_dtype=torch.float32)


def _permute_weight_gradient(grad: Tensor, shape: torch.Size, x: Tensor, slots: Tensor) -> Tensor:
    """<x, gradient of the row> for each choice, in FP32."""
    return (_of_choices(grad.float(), slots) * x.float()[:, None]).sum(-1)


_permute, _permute_alias, _ = declare(
    "moe_permute",
    fake=_fake_permute,
    flops=None,
    batching=each,
    gradient=[
        Gradient("x", _token_gradient, saved=("slots", "weights")),
        Gradient("weights", _permute_weight_gradient, saved=("x", "slots")),
    ],
    sharding=permutation("moe_permute"),
)


def moe_permute(
    x: Tensor,
    slots: Tensor,
    weights: Tensor | None = None,
    rows: int | None = None,
    *,
    num_sms: int = 0,
) -> Tensor:
    """Tokens in the rows of their choices: y[slots[t, j]] = x[t] * weights[t, j].

    Products are computed in FP32 and rounded once. It is the gradient of `moe_combine`, and has
    gradients for x (a `moe_combine`) and weights.

    Args:
        x: [T, K], bfloat16, float16 or float32, of any strides.
        slots: [T, k], int32, of any strides: the row of each choice (see moe_route).
        weights: [T, k], float32, of any strides; None for ones.
        rows: the number of rows of the result; T * k if None. Rows that no choice has are not
            written.
        num_sms: the number of SMs that the CUDA kernel may occupy; 0 for all, or for those of
            an open `torchext.sm_budget`.

    Returns:
        y: [rows, K], of x's dtype, contiguous.

    Raises:
        ValueError: a shape does not fit, or, on the CPU, a slot is not below rows.
        TypeError: x, slots or weights has another dtype.
    """
    num_sms = num_sms or communication_sms(x)
    try:
        if asks_gradient(x) or asks_gradient(weights):
            return _permute(x, slots, weights, rows, num_sms=num_sms)
        return _permute_alias(x, slots, weights, rows, num_sms)
    except RuntimeError as error:
        raise python_error(error) from None


def _fake_combine(
    y: Tensor,
    slots: Tensor,
    weights: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out_dtype: Dtype = None,
    num_sms: int = 0,
) -> Tensor:
    return empty_contiguous(y, (slots.shape[0],), y.shape[1], out_dtype or y.dtype)


def _row_gradient(grad: Tensor, shape: torch.Size, slots: Tensor, weights: Tensor | None) -> Tensor:
    """Zeros for rows that no choice has."""
    permuted = moe_permute(grad.contiguous(), slots, weights, shape[0])
    flat = slots.reshape(-1)
    rows = torch.where((flat >= 0) & (flat < shape[0]), flat, shape[0]).long()
    has_choice = slots.new_zeros(shape[0] + 1, dtype=torch.bool).index_fill(0, rows, True)
    return permuted.masked_fill(~has_choice[: shape[0], None], 0)


def _combine_weight_gradient(grad: Tensor, shape: torch.Size, y: Tensor, slots: Tensor) -> Tensor:
    """<y of the row, gradient> for each choice, in FP32."""
    return (_of_choices(y.float(), slots) * grad.float()[:, None]).sum(-1)


_combine, _combine_alias, _ = declare(
    "moe_combine",
    fake=_fake_combine,
    flops=None,
    batching=each,
    gradient=[
        Gradient("y", _row_gradient, saved=("slots", "weights")),
        Gradient("weights", _combine_weight_gradient, saved=("y", "slots")),
        Gradient("residual", lambda grad, shape: grad),
    ],
    sharding=combination("moe_combine"),
)


def moe_combine(
    y: Tensor,
    slots: Tensor,
    weights: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    num_sms: int = 0,
) -> Tensor:
    """The sum of each token's rows: out[t] = sum over j of y[slots[t, j]] * weights[t, j].

    Computed in FP32: products are rounded, then added to +0 one after another in the order of the
    choices, then the residual; the sum is rounded once. It has gradients for y (a `moe_permute`),
    weights and residual.

    Args:
        y: [rows, K], bfloat16, float16 or float32, of any strides.
        slots: [T, k], int32, of any strides: the row of each choice (see moe_route).
        weights: [T, k], float32, of any strides; None for ones.
        residual: [T, K], of y's dtype, of any strides: added to the sum, such as the result of a
            shared expert. None for none.
        out_dtype: bfloat16, float16 or float32; y's dtype if None.
        num_sms: the number of SMs that the CUDA kernel may occupy; 0 for all, or for those of
            an open `torchext.sm_budget`.

    Returns:
        out: [T, K], contiguous.

    Raises:
        ValueError: a shape does not fit, or, on the CPU, a slot is not below the rows of y.
        TypeError: a tensor or out_dtype has another dtype.
    """
    num_sms = num_sms or communication_sms(y)
    try:
        if asks_gradient(y) or asks_gradient(weights) or asks_gradient(residual):
            return _combine(
                y, slots, weights, residual=residual, out_dtype=out_dtype, num_sms=num_sms
            )
        return _combine_alias(y, slots, weights, residual, out_dtype, num_sms)
    except RuntimeError as error:
        raise python_error(error) from None
