"""Messages between ranks that hold experts, part of `torchext.ops`: pack and unpack.

A message is a uint8 matrix. Each row has a token's FP8 data with one scale for every 128 elements
and, in a header, the experts that the token chose with their weights:

    bytes [0, K)                    data; zeros up to the next multiple of 16
    4 * ceil(K / 128)               scales, FP32
    4 * k                           the token's choices, int32
    4 * k                           their weights, FP32; zeros up to the next multiple of 16

`torchext.moe.Dispatcher` sends such rows with one all-to-all of bytes, on gloo and NCCL alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dispatch.batching import each, each_quantized
from .._dispatch.declaration import declare
from .._dispatch.errors import python_error
from .._dispatch.layout import (
    GROUP,
    ceil_div,
    empty_contiguous,
    empty_data,
    empty_group_scale,
    round_up,
)
from .._dispatch.sharding_rules import replicated
from .._dispatch.sm_budget import communication_sms

Dtype = torch.dtype | None


class MessageLayout(NamedTuple):
    """Where the parts of a message's row begin, in bytes, and how long the row is.

    Attributes:
        scales: of the scales.
        ids: of the header's ids.
        weights: of the header's weights.
        pitch: the length of a row, a multiple of 16.
    """

    scales: int
    ids: int
    weights: int
    pitch: int

    @classmethod
    def of(cls, columns: int, choices: int) -> MessageLayout:
        """For tokens of `columns` elements and headers of `choices`; 0 choices: no header."""
        scales = round_up(columns, 16)
        ids = scales + 4 * ceil_div(columns, GROUP)
        weights = ids + 4 * choices
        return cls(scales, ids, weights, round_up(weights + 4 * choices, 16))


def _fake_pack(
    x: Tensor,
    slots: Tensor,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    rows: int | None = None,
    *,
    dtype: Dtype = None,
    pow2_scale: bool = False,
    num_sms: int = 0,
) -> Tensor:
    layout = MessageLayout.of(x.shape[1], 0 if ids is None else ids.shape[1])
    rows = slots.shape[0] * slots.shape[1] if rows is None else rows
    return empty_contiguous(x, (rows,), layout.pitch, torch.uint8)


_BETWEEN_RANKS = "messages are one rank's own (torchext.moe.Dispatcher sends them)"

_pack = declare(
    "moe_pack_1x128",
    fake=_fake_pack,
    flops=None,
    batching=each,
    sharding=replicated("moe_pack_1x128", _BETWEEN_RANKS),
).op


def moe_pack_1x128(
    x: Tensor,
    slots: Tensor,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    rows: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    num_sms: int = 0,
) -> Tensor:
    """Tokens as rows of a message, quantized with one scale for every 128 elements.

    Each token is read and quantized once, and written into all of its rows: one for each rank that
    holds an expert of its choice. The bits are those of `quantize_1x128(x)`.

    Args:
        x: [T, K], bfloat16, float16 or float32, of any strides.
        slots: [T, R], int32, of any strides: the row of each token for each rank. No two are the
            same, and a negative slot is no row.
        ids: [T, k], int64 or int32, of any strides: the experts that each token chose. An id that
            is negative or no int32 is sent as -1. None, with weights, for rows without headers.
        weights: [T, k], float32, of any strides: the weights of the choices.
        rows: the number of rows of the message; T * R if None. Rows of no token have the ids -1;
            their other bytes are not written.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.
        num_sms: the number of SMs that the CUDA kernel may occupy; 0 for all, or for those of
            an open `torchext.sm_budget`.

    Returns:
        message: [rows, pitch], uint8, contiguous. The pitch in bytes is that of
            `MessageLayout.of(K, k)`: 7,456 for K = 7168 and k = 8.

    Raises:
        ValueError: a shape does not fit, ids or weights is given alone, or, on the CPU, a slot is
            not below rows.
        TypeError: a tensor has another dtype, or `dtype` is not an FP8 dtype.
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
        return _pack(x, slots, ids, weights, rows, **options)
    except RuntimeError as error:
        raise python_error(error) from None


def _fake_unpack(
    message: Tensor,
    slots: Tensor,
    offsets: Tensor,
    columns: int,
    rows: int | None = None,
    *,
    header: bool = True,
    dtype: Dtype = None,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = slots.shape[0] * slots.shape[1] if rows is None else rows
    data = empty_data(message, (rows,), columns, dtype or torch.float8_e4m3fn)
    scale = empty_group_scale(message, (rows,), columns)
    return data, scale, message.new_empty((rows,), dtype=torch.float32)


_unpack = declare(
    "moe_unpack_1x128",
    fake=_fake_unpack,
    flops=None,
    batching=each_quantized,
    sharding=replicated("moe_unpack_1x128", _BETWEEN_RANKS),
).op


def moe_unpack_1x128(
    message: Tensor,
    slots: Tensor,
    offsets: Tensor,
    columns: int,
    rows: int | None = None,
    *,
    header: bool = True,
    dtype: torch.dtype | None = None,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a message in the rows of their choices, as grouped GEMMs read them.

    Args:
        message: [M, pitch], uint8: rows that moe_pack_1x128 wrote, contiguous ones that start at
            multiples of 16 bytes.
        slots: [M, k], int32, of any strides: the row of each choice, such as moe_route gives for
            the ids in the headers. A negative slot is no row.
        offsets: [E], int32: where the rows of each expert end. Rows from offsets[-1] on, which no
            choice may have, become zeros with scales of 1 and weights of 0.
        columns: K.
        rows: the number of rows of the result; M * k if None.
        header: whether rows have headers of k choices. Without them, weights are 1.
        dtype: the FP8 dtype that was packed, torch.float8_e4m3fn (None) or torch.float8_e5m2.
        num_sms: the number of SMs that the CUDA kernel may occupy; 0 for all, or for those of
            an open `torchext.sm_budget`.

    Returns:
        data: [rows, K], FP8, with the strides of `quantize_1x128`'s data.
        scale: [rows, ceil(K / 128)], float32, with the strides of `quantize_1x128`'s scale.
        weight: [rows], float32: of the choice that has the row.

    Raises:
        ValueError: a shape or a stride does not fit, or, on the CPU, a slot is not below rows.
        TypeError: a tensor has another dtype, or `dtype` is not an FP8 dtype.
    """
    options: dict[str, Any] = {}
    if header is not True:
        options["header"] = header
    if dtype is not None:
        options["dtype"] = dtype
    num_sms = num_sms or communication_sms(message)
    if num_sms != 0:
        options["num_sms"] = num_sms
    try:
        return _unpack(message, slots, offsets, columns, rows, **options)
    except RuntimeError as error:
        raise python_error(error) from None
