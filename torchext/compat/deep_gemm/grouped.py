"""DeepGEMM's grouped FP8 GEMMs, by torchext's grouped ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import ops
from ..._dispatch.layout import GROUP, ceil_div
from ._operands import (
    Pair,
    Recipe,
    also_called,
    check_c,
    check_epilogue,
    check_index,
    checked_scale,
    k_major,
    pair,
    row_scale,
    rows_per_b_scale,
)
from ._runtime import budget
from .utils.layout import rows_of_groups


@also_called(m_indices="grouped_layout")
def m_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    *,
    epilogue: None = None,
) -> None:
    """d[r] = dequantized a[r] @ dequantized b[g].T for each row r of group g, in place.

    Groups may have any length and begin at any row: neither they nor M need be multiples of
    anything, and rows of a group need not be neighbors.

    Args:
        a: (data, scale), as `fp8_gemm_nt` takes it: [M, K], and [M, ceil(K / 128)].
        b: (data, scale). Data [G, N, K]. Scale [G, ceil(N / 128), ceil(K / 128)], float32 of any
            strides; or [G, N, ceil(K / 128)] with recipe=(1, 1, 128), like a's.
        d: [M, N], written in place; bfloat16, float16 or float32, contiguous rows. Padding becomes
            zero, whatever a holds there: rows of a negative group or, with use_psum_layout, rows
            between a group's end and the next one's begin; rows after the last group's padding then
            keep what they hold.
        grouped_layout: int32, contiguous, on a's device; m_indices in older releases. [M], the
            group of each row, or a negative number for none. Or, with use_psum_layout, [G], where
            each group ends; it begins where the one before it ends, rounded up to a multiple of
            get_mk_alignment_for_contiguous_layout().
        recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast: as `fp8_gemm_nt` takes them.
        use_psum_layout: how to read grouped_layout.
        ensure_zero_padding: ignored, as on Hopper in DeepGEMM: padding becomes zero.
        expected_m_for_psum_layout: ignored.
        epilogue: None; torchext has no other.

    The call never synchronizes with the device: a CUDA graph can be replayed with other groups.

    Raises:
        ValueError: shapes or a recipe that do not fit together; strides of `d` or grouped_layout;
            on the CPU, a group that b does not have.
        TypeError: an argument of another type or dtype.
        RuntimeError: `d` requires a gradient; a GPU that this build has no kernels for.
    """
    op = "m_grouped_fp8_gemm_nt_contiguous"
    check_epilogue(op, epilogue)
    b = pair(op, "b", b, 3)
    _contiguous(op, a, b, d, grouped_layout, recipe, recipe_a, recipe_b, use_psum_layout)


@also_called(m_indices="grouped_layout")
def m_grouped_fp8_gemm_nn_contiguous(
    a: Pair,
    b: Pair,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    *,
    epilogue: None = None,
) -> None:
    """d[r] = dequantized a[r] @ dequantized b[g] for each row r of group g, in place.

    `m_grouped_fp8_gemm_nt_contiguous` of b transposed: data [G, K, N], scale
    [G, ceil(K / 128), ceil(N / 128)]. A contiguous b is copied at each call, as in `fp8_gemm_nn`.
    """
    op = "m_grouped_fp8_gemm_nn_contiguous"
    check_epilogue(op, epilogue)
    data, scale = pair(op, "b", b, 3)
    b = data.mT, scale.mT
    _contiguous(op, a, b, d, grouped_layout, recipe, recipe_a, recipe_b, use_psum_layout)


def _contiguous(
    op: str,
    a: Pair,
    b: tuple[Tensor, Tensor],
    d: Tensor,
    grouped_layout: Tensor,
    recipe: Recipe | None,
    recipe_a: Recipe | None,
    recipe_b: Recipe | None,
    use_psum_layout: bool,
) -> None:
    (a_data, a_scale), (b_data, b_scale) = pair(op, "a", a, 2), b
    (m, k), (groups, n, b_k) = a_data.shape, b_data.shape
    if k != b_k or d.shape != (m, n):
        raise ValueError(
            f"{op}: a and b must agree in K, and d must be [M, N] (got a [M, K] = {[m, k]}, b "
            f"[G, N, K] = {[groups, n, b_k]} and d {list(d.shape)})"
        )
    check_index(op, "grouped_layout", grouped_layout, groups if use_psum_layout else m)
    b_scale = _grouped_b_scale(op, b_data, b_scale, recipe, recipe_a, recipe_b)
    operands = (
        k_major(op, "a", a_data),
        row_scale(op, "a", a_scale, (m,), k),
        k_major(op, "b", b_data),
        b_scale,
    )
    # The op does not write padding, but callers of DeepGEMM rely on zeros: wgrad sums over it.
    if use_psum_layout:
        group_ids, padding = rows_of_groups(grouped_layout, m)
        d.masked_fill_(padding[:, None], 0)
    else:
        group_ids = grouped_layout
        d.zero_()  # only the device knows which rows are padding: writing all of d is cheapest
    ops.m_grouped_fp8_gemm_nt_contiguous(
        *operands,
        group_ids=group_ids,
        out=d,
        num_sms=budget(),
    )


def _grouped_b_scale(
    op: str,
    data: Tensor,
    scale: Tensor,
    recipe: Recipe | None,
    recipe_a: Recipe | None,
    recipe_b: Recipe | None,
) -> Tensor:
    groups, n, k = data.shape
    rows = rows_per_b_scale(op, recipe, recipe_a, recipe_b, scale)
    if rows == 1:
        return row_scale(op, "b", scale, (groups, n), k)
    return checked_scale(op, "b", scale, (groups, ceil_div(n, GROUP)), k, rows)


def m_grouped_fp8_gemm_nt_masked(
    a: Pair,
    b: Pair,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    *,
    epilogue: None = None,
) -> None:
    """d[g, r] = dequantized a[g, r] @ dequantized b[g].T for r < masked_m[g], in place.

    Args:
        a: (data, scale). Data [G, M, K]. Scale [G, M, ceil(K / 128)], float32 of any strides, or
            int32 as `fp8_gemm_nt` takes it. Scales that are M-major over all groups at once, as
            `torchext.ops.quantize_1x128` returns them, are read in place; others, those that are
            M-major in each group included, are transposed first.
        b: (data, scale), as `m_grouped_fp8_gemm_nt_contiguous` takes it.
        d: [G, M, N], written in place; bfloat16, float16 or float32, contiguous. Other rows keep
            what they hold.
        masked_m: [G], int32, contiguous, on a's device: from 0 to M.
        expected_m: rows that a group is likely to have, which may help to choose a kernel.
        recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast, epilogue: as `fp8_gemm_nt`
            takes them.

    The call never synchronizes with the device: a CUDA graph can be replayed with other counts.

    Raises:
        ValueError: shapes or a recipe that do not fit together; strides of `d` or masked_m; a
            negative expected_m; on the CPU, a count out of range.
        TypeError: an argument of another type or dtype.
        RuntimeError: `d` requires a gradient; a GPU that this build has no kernels for.
    """
    op = "m_grouped_fp8_gemm_nt_masked"
    check_epilogue(op, epilogue)
    (a_data, a_scale), (b_data, b_scale) = pair(op, "a", a, 3), pair(op, "b", b, 3)
    (groups, m, k), (b_groups, n, b_k) = a_data.shape, b_data.shape
    if (groups, k) != (b_groups, b_k) or d.shape != (groups, m, n):
        raise ValueError(
            f"{op}: a and b must agree in G and K, and d must be [G, M, N] (got a [G, M, K] = "
            f"{[groups, m, k]}, b [G, N, K] = {[b_groups, n, b_k]} and d {list(d.shape)})"
        )
    check_index(op, "masked_m", masked_m, groups)
    b_scale = _grouped_b_scale(op, b_data, b_scale, recipe, recipe_a, recipe_b)
    ops.m_grouped_fp8_gemm_nt_masked(
        k_major(op, "a", a_data),
        row_scale(op, "a", a_scale, (groups, m), k),
        k_major(op, "b", b_data),
        b_scale,
        masked_m,
        expected_m=expected_m,
        out=d,
        num_sms=budget(),
    )


# DeepGEMM 2.4 to 2.6 name them for FP4 operands too, and have these names for the same functions.
m_grouped_fp8_fp4_gemm_nt_contiguous = m_grouped_fp8_gemm_nt_contiguous
m_grouped_fp8_fp4_gemm_nn_contiguous = m_grouped_fp8_gemm_nn_contiguous
m_grouped_fp8_fp4_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked
fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked


@also_called(ks_cpu="ks", ks_tensor="grouped_layout")
def k_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: Tensor,
    ks: Sequence[int],
    grouped_layout: Tensor,
    c: Tensor | None = None,
    recipe: Recipe = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
    use_padded_sf_layout: bool = False,
) -> None:
    """d[g] = dequantized a_g @ dequantized b_g.T (+ c[g]) for each group g, in place: wgrad.

    Launches one GEMM for each group. Each reads its operands in place.

    Args:
        a: (data, scale). Data contiguous, of M * sum(ks) elements in any shape: the K-major
            matrices a_g [M, ks[g]], one after the other. Scale [M, sum(ceil(ks[g] / 128))], float32
            of any strides, the columns of one group after the other's.
        b: (data, scale), likewise, of N rows.
        d: [G, M, N], written in place; bfloat16, float16 or float32, contiguous rows.
        ks: K of each group, on the host; ks_cpu in some releases. A matrix whose K is no multiple
            of 16 is copied.
        grouped_layout: [G], int32, contiguous; ks_tensor in older releases. The same numbers on the
            device: checked for its shape, and not read.
        c: [G, M, N], of d's dtype, as in `fp8_gemm_nt`: `d` itself, to accumulate. None to store.
        recipe: (1, 1, 128).
        compiled_dims: ignored.
        use_psum_layout, use_padded_sf_layout: False; DeepGEMM has them on Blackwell.

    Raises:
        ValueError: shapes that do not fit together; another recipe; an option of Blackwell's.
        TypeError: an argument of another type or dtype.
        RuntimeError: `d` requires a gradient; a GPU that this build has no kernels for.
    """
    op = "k_grouped_fp8_gemm_nt_contiguous"
    a, b = pair(op, "a", a, 0), pair(op, "b", b, 0)
    _check_options(op, ks, grouped_layout, recipe, use_psum_layout, use_padded_sf_layout)
    k_grouped_nt(op, a, b, d, ks, c)


def k_grouped_nt(
    op: str,
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    ks: Sequence[int],
    c: Tensor | None,
) -> None:
    """`k_grouped_fp8_gemm_nt_contiguous`, of checked options."""
    _check_groups_of_k(op, d, ks, c)
    matrices, scales = [], []
    for name, (data, scale), rows in (("a", a, d.shape[1]), ("b", b, d.shape[2])):
        if data.numel() != rows * sum(ks) or not data.is_contiguous():
            raise ValueError(
                f"{op}: the data of {name} must be contiguous, of {rows} * {sum(ks)} elements (got "
                f"shape {list(data.shape)}, strides {data.stride()})"
            )
        lengths = [rows * k for k in ks]
        groups = data.view(-1).split(lengths)
        matrices.append([x.view(rows, k) for x, k in zip(groups, ks, strict=True)])
        scales.append(_scales_of_groups(op, name, scale, rows, ks))
    _one_by_one(op, matrices, scales, d, c)


@also_called(ks_cpu="ks", ks_tensor="grouped_layout")
def k_grouped_fp8_gemm_tn_contiguous(
    a: Pair,
    b: Pair,
    d: Tensor,
    ks: Sequence[int],
    grouped_layout: Tensor,
    c: Tensor | None = None,
    recipe: Recipe = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
    use_padded_sf_layout: bool = False,
) -> None:
    """d[g] = dequantized a_g.T @ dequantized b_g (+ c[g]) for each group g of rows, in place: wgrad
    of activations and gradients in their stored order.

    DeepGEMM has it on Blackwell only. Data are copied at each call, as in `fp8_gemm_tn`, unless
    they are transposes of K-major data. Where every K is a multiple of 128, as DeepGEMM asks, all
    groups are one launch, which reads grouped_layout; otherwise as in
    `k_grouped_fp8_gemm_nt_contiguous`.

    Args:
        a: (data, scale). Data [sum(ks), M], group after group. Scale [sum(ceil(ks[g] / 128)), M],
            float32, what `per_channel_cast_to_fp8` returns; or int32, what
            `get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor` makes of it, decoded at each
            call.
        b: (data, scale), likewise, of N columns.
        d, ks, grouped_layout, c, recipe, compiled_dims, use_psum_layout, use_padded_sf_layout: as
            `k_grouped_fp8_gemm_nt_contiguous` takes them.

    Raises as that does.
    """
    op = "k_grouped_fp8_gemm_tn_contiguous"
    a, b = pair(op, "a", a, 2), pair(op, "b", b, 2)
    _check_options(op, ks, grouped_layout, recipe, use_psum_layout, use_padded_sf_layout)
    _check_groups_of_k(op, d, ks, c)
    for name, (data, _), columns in (("a", a, d.shape[1]), ("b", b, d.shape[2])):
        if data.shape != (sum(ks), columns):
            raise ValueError(
                f"{op}: the data of {name} must have shape {[sum(ks), columns]} (got "
                f"{list(data.shape)})"
            )
    a_scale, b_scale = (
        _decoded(op, name, scale.t(), data.shape[1], ks)
        for name, (data, scale) in (("a", a), ("b", b))
    )
    if any(k % GROUP for k in ks):
        matrices = [[x.t() for x in data.split(list(ks))] for data, _ in (a, b)]
        scales = [
            _scales_of_groups(op, "a", a_scale, d.shape[1], ks),
            _scales_of_groups(op, "b", b_scale, d.shape[2], ks),
        ]
        return _one_by_one(op, matrices, scales, d, c)
    if c is not None and c is not d:
        d.copy_(c)
    ops.k_grouped_fp8_gemm_nt(
        k_major(op, "a", a[0].t()),
        row_scale(op, "a", a_scale, (d.shape[1],), sum(ks)),
        k_major(op, "b", b[0].t()),
        row_scale(op, "b", b_scale, (d.shape[2],), sum(ks)),
        grouped_layout.cumsum(0, dtype=torch.int32),
        out=d,
        accumulate=c is not None,
        num_sms=budget(),
    )


def _check_options(
    op: str,
    ks: Sequence[int],
    grouped_layout: Tensor,
    recipe: Recipe,
    use_psum_layout: bool,
    use_padded_sf_layout: bool,
) -> None:
    if use_psum_layout or use_padded_sf_layout:
        raise ValueError(
            f"{op}: use_psum_layout and use_padded_sf_layout must be False, as on Hopper in "
            f"DeepGEMM (got {use_psum_layout} and {use_padded_sf_layout})"
        )
    if tuple(recipe) != (1, 1, 128):
        raise ValueError(f"{op}: recipe must be (1, 1, 128) (got {tuple(recipe)})")
    _check_ks(op, ks)
    check_index(op, "grouped_layout", grouped_layout, len(ks))


def _check_ks(op: str, ks: Sequence[int]) -> None:
    if not isinstance(ks, (list, tuple)):
        raise TypeError(
            f"{op}: ks must be a list of integers, K of each group (got {type(ks).__name__})"
        )


def _check_groups_of_k(op: str, d: Tensor, ks: Sequence[int], c: Tensor | None) -> None:
    _check_ks(op, ks)
    if d.dim() != 3 or d.shape[0] != len(ks):
        raise ValueError(
            f"{op}: d must be [G, M, N], with G = {len(ks)} as ks says (got {list(d.shape)})"
        )
    check_c(op, c, d)


def _scales_of_groups(
    op: str, name: str, scale: Tensor, rows: int, ks: Sequence[int]
) -> tuple[Tensor, ...]:
    """The scale [rows, ceil(k / 128)] of each group, M-major, from those of all groups together."""
    if scale.dtype != torch.float32:
        raise TypeError(
            f"{op}: the scale of {name} must be torch.float32 (got {scale.dtype}); decode "
            "exponents with unpack_ue8m0_from_int"
        )
    columns = [ceil_div(k, GROUP) for k in ks]
    return row_scale(op, name, scale, (rows,), sum(columns) * GROUP).split(columns, 1)


def _decoded(op: str, name: str, scale: Tensor, rows: int, ks: Sequence[int]) -> Tensor:
    """Scales as float32. Of exponents, four to an int32, each group begins an int32 of its own."""
    if scale.dtype != torch.int32:
        return scale
    columns = [ceil_div(k, 4 * GROUP) for k in ks]
    if scale.shape != (rows, sum(columns)):
        raise ValueError(
            f"{op}: the scale of {name}, of four UE8M0 exponents each, must have shape "
            f"{[rows, sum(columns)]}, each group's beginning with an int32 of its own (got "
            f"{list(scale.shape)})"
        )
    groups = [
        checked_scale(op, name, part, (rows,), k, 1)
        for part, k in zip(scale.split(columns, 1), ks, strict=True)
    ]
    return torch.cat(groups, 1) if groups else scale.float()


def _one_by_one(
    op: str,
    matrices: Sequence[Sequence[Tensor]],
    scales: Sequence[Sequence[Tensor]],
    d: Tensor,
    c: Tensor | None,
) -> None:
    """A product for each group, of lists of matrices [rows, k] and of their scales, a's and b's."""
    if c is not None and c is not d:
        d.copy_(c)
    for out, a, b, a_scale, b_scale in zip(d.unbind(), *matrices, *scales, strict=True):
        ops.fp8_gemm_nt(
            k_major(op, "a", a),
            a_scale,
            k_major(op, "b", b),
            b_scale,
            out=out,
            accumulate=c is not None,
            num_sms=budget(),
        )
