"""DeepGEMM's GEMMs of operands without scales, by torch's own kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._operands import also_called, check_c, check_index
from .utils.layout import rows_of_groups

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def cublaslt_gemm_nt(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """d = a @ b.T (+ c), in place.

    Args:
        a, b: [M, K] and [N, K], both of one dtype, bfloat16, float16 or float32; or both FP8, whose
            values are multiplied without scales.
        d: [M, N], of any of these dtypes but FP8, written in place.
        c: [M, N], of d's dtype: added to the product. None to store.

    Sums are FP32 and rounded once, but for two cases on CUDA. Tensor cores sum FP8 with fewer bits
    (docs/numerics.md). And where a, b and d are all bfloat16 or all float16, cuBLAS may round
    partial sums, and the product before c is added, to that dtype. Where d's dtype is not the
    operands', the product is first an FP32 tensor, and operands other than FP8 are widened: as a
    yardstick of speed, take equal dtypes, or FP8 with N and K multiples of 16.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    _product("cublaslt_gemm_nt", a, b, d, c)


def cublaslt_gemm_nn(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """d = a @ b (+ c): `cublaslt_gemm_nt` of b [K, N]."""
    _product("cublaslt_gemm_nn", a, b.mT, d, c)


def cublaslt_gemm_tn(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """d = a.T @ b (+ c): `cublaslt_gemm_nt` of a [K, M] and b [K, N]."""
    _product("cublaslt_gemm_tn", a.mT, b.mT, d, c)


def cublaslt_gemm_tt(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """d = a.T @ b.T (+ c): `cublaslt_gemm_nt` of a [K, M]."""
    _product("cublaslt_gemm_tt", a.mT, b, d, c)


def _product(op: str, a: Tensor, b: Tensor, d: Tensor, c: Tensor | None) -> None:
    """d = a @ b.T (+ c), of a [M, K] and b [N, K] of any strides."""
    fp8 = a.dtype in _FP8 and b.dtype in _FP8
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or not (fp8 or a.dtype == b.dtype):
        raise ValueError(
            f"{op}: a and b must be matrices that agree in K and in dtype (got, as operands of "
            f"cublaslt_gemm_nt, {list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype})"
        )
    if d.shape != (a.shape[0], b.shape[0]) or d.dtype in _FP8:
        raise ValueError(
            f"{op}: d must be [M, N] = {[a.shape[0], b.shape[0]]}, and not FP8 (got "
            f"{list(d.shape)} {d.dtype})"
        )
    check_c(op, c, d)
    if a.dtype == d.dtype:
        if c is None:
            torch.mm(a, b.t(), out=d)
        else:
            torch.addmm(c, a, b.t(), out=d)
        return
    if (
        fp8
        and a.shape[1] % 16 == 0 == b.shape[0] % 16
        and torch.float8_e4m3fn in (a.dtype, b.dtype)
    ):
        one = torch.ones((), device=a.device)
        operands = a.contiguous(), b.contiguous().t()  # K-major, as tensor cores read FP8
        product = torch._scaled_mm(*operands, one, one, out_dtype=torch.float32)
    else:
        product = a.float() @ b.float().t()
    d.copy_(product if c is None else product.add_(c))


@also_called(m_indices="grouped_layout")
def m_grouped_bf16_gemm_nt_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    grouped_layout: Tensor,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """d[r] = a[r] @ b[g].T for each row r of group g, in place: experts in BF16.

    Rows are sorted by group for torch.nn.functional.grouped_mm, so that a and d are copied.

    Args:
        a: [M, K], bfloat16.
        b: [G, N, K], bfloat16.
        d: [M, N], bfloat16, written in place. Padding becomes zero.
        grouped_layout, use_psum_layout: as `m_grouped_fp8_gemm_nt_contiguous` takes them.
        compiled_dims, ensure_zero_padding, expected_m_for_psum_layout: ignored.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: an argument of another dtype.
    """
    _m_grouped("m_grouped_bf16_gemm_nt_contiguous", a, b, d, grouped_layout, use_psum_layout)


@also_called(m_indices="grouped_layout")
def m_grouped_bf16_gemm_nn_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    grouped_layout: Tensor,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
) -> None:
    """`m_grouped_bf16_gemm_nt_contiguous` of b [G, K, N]."""
    _m_grouped("m_grouped_bf16_gemm_nn_contiguous", a, b.mT, d, grouped_layout, use_psum_layout)


def _m_grouped(
    op: str, a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor, use_psum_layout: bool
) -> None:
    """The grouped GEMM of a [M, K] and b [G, N, K]."""
    for name, tensor, dims in (("a", a, 2), ("b", b, 3), ("d", d, 2)):
        if tensor.dtype != torch.bfloat16:
            raise TypeError(f"{op}: {name} must be torch.bfloat16 (got {tensor.dtype})")
        if tensor.dim() != dims:
            raise ValueError(f"{op}: {name} must have {dims} dimensions (got {list(tensor.shape)})")
    (m, k), (groups, n, b_k) = a.shape, b.shape
    if k != b_k or d.shape != (m, n):
        raise ValueError(
            f"{op}: a and b must agree in K, and d must be [M, N] (got a [M, K] = {[m, k]}, b "
            f"[G, N, K] = {[groups, n, b_k]} and d {list(d.shape)})"
        )
    check_index(op, "grouped_layout", grouped_layout, groups if use_psum_layout else m)
    if use_psum_layout:
        ids, padding = rows_of_groups(grouped_layout, m)
    else:
        ids, padding = grouped_layout, grouped_layout < 0
    sorted_ids, order = torch.where(ids < 0, groups, ids).sort(stable=True)
    ends = torch.searchsorted(
        sorted_ids, torch.arange(groups, device=a.device), right=True, out_int32=True
    )
    product = F.grouped_mm(a[order], b.mT, offs=ends)
    in_groups = torch.where((ids < 0)[order, None], d[order], product)
    d.index_copy_(0, order, in_groups).masked_fill_(padding[:, None], 0)
