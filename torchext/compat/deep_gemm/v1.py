"""The names that DeepGEMM 1.x had for the same products: lhs, rhs and out are a, b and d."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._dispatch.layout import GROUP, ceil_div
from ._operands import Pair, pair
from .gemm import fp8_gemm_nt
from .grouped import (
    k_grouped_nt,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from .utils.layout import get_mn_major_tma_aligned_tensor


def gemm_fp8_fp8_bf16_nt(lhs: Pair, rhs: Pair, out: Tensor) -> None:
    """`fp8_gemm_nt(lhs, rhs, out)`."""
    fp8_gemm_nt(lhs, rhs, out)


def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
    lhs: Pair, rhs: Pair, out: Tensor, m_indices: Tensor
) -> None:
    """`m_grouped_fp8_gemm_nt_contiguous(lhs, rhs, out, m_indices)`."""
    m_grouped_fp8_gemm_nt_contiguous(lhs, rhs, out, m_indices)


def m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    lhs: Pair, rhs: Pair, out: Tensor, masked_m: Tensor, expected_m: int
) -> None:
    """`m_grouped_fp8_gemm_nt_masked(lhs, rhs, out, masked_m, expected_m)`."""
    m_grouped_fp8_gemm_nt_masked(lhs, rhs, out, masked_m, expected_m)


def wgrad_gemm_fp8_fp8_fp32_nt(lhs: Pair, rhs: Pair, out: Tensor) -> None:
    """`fp8_gemm_nt(lhs, rhs, out, c=out, recipe=(1, 1, 128))`: the product is added to `out`.

    Scales may also be transposed, [ceil(K / 128), M] and [ceil(K / 128), N].
    """
    op = "wgrad_gemm_fp8_fp8_fp32_nt"
    a, b = _upright(pair(op, "lhs", lhs, 2)), _upright(pair(op, "rhs", rhs, 2))
    fp8_gemm_nt(a, b, out, c=out, recipe=(1, 1, 128))


def _upright(operand: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    data, scale = operand
    rows, k = data.shape
    return (data, scale.t()) if scale.shape == (ceil_div(k, GROUP), rows) else operand


def k_grouped_wgrad_gemm_fp8_fp8_fp32_nt(
    lhs: Pair, rhs: Pair, out: Tensor, batch_sizes: Sequence[int]
) -> None:
    """`k_grouped_fp8_gemm_nt_contiguous(lhs, rhs, out, batch_sizes, ..., c=out)`, with scales
    [sum(ceil(k / 128)), M] and [sum(ceil(k / 128)), N], k of batch_sizes."""
    op = "k_grouped_wgrad_gemm_fp8_fp8_fp32_nt"
    (a_data, a_scale), (b_data, b_scale) = pair(op, "lhs", lhs, 0), pair(op, "rhs", rhs, 0)
    k_grouped_nt(op, (a_data, a_scale.mT), (b_data, b_scale.mT), out, batch_sizes, out)


def get_col_major_tma_aligned_tensor(x: Tensor) -> Tensor:
    """`get_mn_major_tma_aligned_tensor(x)`."""
    return get_mn_major_tma_aligned_tensor(x)
