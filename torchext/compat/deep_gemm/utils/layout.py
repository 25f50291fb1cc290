"""Layouts of scales, and the alignment to which DeepGEMM's callers pad the groups of a product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...._dispatch.layout import ceil_div, round_up
from .._operands import checked_scale
from .math import exponents_in_ints

_DEFAULT_ALIGNMENT = 128
_alignment = _DEFAULT_ALIGNMENT


def get_tma_aligned_size(mn: int, element_size: int) -> int:
    """`mn` elements of `element_size` bytes, rounded up to a multiple of 16 bytes, in elements."""
    if element_size <= 0 or 16 % element_size != 0:
        raise ValueError(
            "get_tma_aligned_size: element_size must be 1, 2, 4, 8 or 16 bytes (got "
            f"{element_size})"
        )
    return round_up(mn, 16 // element_size)


def get_mn_major_tma_aligned_tensor(sf: Tensor) -> Tensor:
    """Scales with M (or N) adjacent, as TMA loads them. A copy, unless sf has this layout already.

    Args:
        sf: [MN, K / 128] or [G, MN, K / 128], float32, of any strides.

    Returns:
        The same values with strides (1, P) or (K / 128 * P, 1, P), P = round_up(MN, 4).

    Raises:
        TypeError: sf is not float32.
        ValueError: sf has not 2 or 3 dimensions.
    """
    if sf.dtype != torch.float32:
        raise TypeError(
            f"get_mn_major_tma_aligned_tensor: sf must be torch.float32 (got {sf.dtype})"
        )
    if sf.dim() not in (2, 3):
        raise ValueError(
            "get_mn_major_tma_aligned_tensor: sf must be [MN, K / 128] or [G, MN, K / 128] (got "
            f"shape {list(sf.shape)})"
        )
    rows, groups = sf.shape[-2:]
    pitch = get_tma_aligned_size(rows, 4)
    strides = (groups * pitch, 1, pitch)[3 - sf.dim() :]
    if sf.stride() == strides:
        return sf
    return sf.new_empty_strided(sf.shape, strides).copy_(sf)


def get_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: Tensor, psum_layout: Tensor | None = None
) -> Tensor:
    """Powers of two as exponents, four of a row to an int32, with M (or N) adjacent.

    Scales of Blackwell's kernels; the products here take them too, and decode them at each call.

    Args:
        sf: [MN, K / 128] or [G, MN, K / 128], float32, positive powers of two, of any strides.
        psum_layout: [G], int32, where groups of rows end, as `m_grouped_fp8_gemm_nt_contiguous`
            takes it with use_psum_layout: rows between groups may hold anything, and count as 1.

    Returns:
        int32 [MN, ceil(K / 512)] or [G, MN, ceil(K / 512)], with strides (1, P) or
        (ceil(K / 512) * P, 1, P), P = round_up(MN, 4). Padding in the last int32 is 0.

    Raises:
        TypeError: sf is not float32.
        ValueError: sf has not 2 or 3 dimensions, or 3 with psum_layout; a value is no power of two.
    """
    op = "get_mn_major_tma_aligned_packed_ue8m0_tensor"
    if sf.dtype != torch.float32:
        raise TypeError(f"{op}: sf must be torch.float32 (got {sf.dtype})")
    if sf.dim() not in (2, 3) or (psum_layout is not None and sf.dim() != 2):
        raise ValueError(
            f"{op}: sf must be [MN, K / 128] or, without psum_layout, [G, MN, K / 128] (got shape "
            f"{list(sf.shape)})"
        )
    if psum_layout is not None:
        ids, _ = rows_of_groups(psum_layout, sf.shape[0])
        sf = torch.where((ids < 0)[:, None], 1.0, sf)
    packed = exponents_in_ints(op, "sf", sf)
    pitch = get_tma_aligned_size(packed.shape[-2], 4)
    strides = (packed.shape[-1] * pitch, 1, pitch)[3 - sf.dim() :]
    return packed.new_empty_strided(packed.shape, strides).copy_(packed)


def get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: Tensor,
    grouped_layout: Tensor,
    ks_cpu: Sequence[int],
    gran_k: int = 128,
    k_alignment: int = 128,
    use_psum_layout: bool = False,
) -> Tensor:
    """Scales of K-grouped operands as exponents, four of a column to an int32, group by group.

    Args:
        sf: [sum(ceil(k / gran_k)), MN], float32, positive powers of two: one group after the other.
        grouped_layout: [G], int32: the same numbers as ks_cpu, on the device. Not read.
        ks_cpu: K of each group, on the host.
        gran_k: elements to a scale; the products here take 128.
        k_alignment: ignored: groups may have any K.
        use_psum_layout: False; DeepGEMM has it on Blackwell.

    Returns:
        int32 [sum(ceil(k / (4 * gran_k))), MN], contiguous. Padding in the last int32 of a
        group is 0.

    Raises:
        TypeError: sf is not float32.
        ValueError: shapes that do not fit together; a value is no power of two; use_psum_layout.
    """
    op = "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor"
    if sf.dtype != torch.float32:
        raise TypeError(f"{op}: sf must be torch.float32 (got {sf.dtype})")
    if use_psum_layout:
        raise ValueError(
            f"{op}: use_psum_layout must be False, as on Hopper in DeepGEMM (got {use_psum_layout})"
        )
    rows = [ceil_div(k, gran_k) for k in ks_cpu]
    if sf.dim() != 2 or sf.shape[0] != sum(rows) or len(rows) != grouped_layout.numel():
        raise ValueError(
            f"{op}: sf must be [{sum(rows)}, MN] for ks_cpu = {list(ks_cpu)} and gran_k = "
            f"{gran_k}, and grouped_layout as long as ks_cpu (got shapes {list(sf.shape)} and "
            f"{list(grouped_layout.shape)})"
        )
    packed = [exponents_in_ints(op, "sf", group.t()).t() for group in sf.split(rows)]
    return torch.cat([sf.new_empty(0, sf.shape[1], dtype=torch.int32), *packed])


def rows_of_groups(ends: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """For `m` rows in groups that end at `ends`: each row's group or -1, and whether it is padding.

    A group begins where the one before it ends, rounded up to the alignment of contiguous layouts.
    Padding is the rows between the end of a group and the begin of the next. Rows after the last
    group's padding belong to no group and are not padding.
    """
    rows = torch.arange(m, dtype=torch.int32, device=ends.device)
    ids = torch.searchsorted(ends, rows, right=True, out_int32=True)
    aligned = (ends + (_alignment - 1)) // _alignment * _alignment
    starts = torch.cat((aligned.new_zeros(1), aligned))  # of the rows after the last group, too
    ids = torch.where((rows >= starts[ids]) & (ids < len(ends)), ids, -1)
    return ids, (ids < 0) & (rows < starts[-1])


def transform_sf_into_required_layout(
    sf: Tensor,
    mn: int,
    k: int,
    recipe: tuple[int, ...],
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    psum_layout: Tensor | None = None,
) -> Tensor:
    """Scales in the layout that the GEMMs read in place. Call it once for weights.

    Args:
        sf: float32 or, of 1x128 groups, int32 with four UE8M0 exponents each, which become float32:
            [ceil(mn / r), ceil(k / 128)], and [num_groups, ...] if num_groups is given.
        mn: rows of the operand.
        k: its columns.
        recipe: (1, 128, 128) or (1, 1, 128) for (rows of a, rows of b, columns) to a scale, with
            is_sfa; or (1, 128) or (128, 128), without.
        num_groups: of a grouped operand.
        is_sfa: whether sf belongs to a or to b.
        disable_ue8m0_cast: ignored: scales are FP32, and no kernel casts them.
        psum_layout: ignored: DeepGEMM uses it to skip the padding between groups.

    Returns:
        1x128 scales as `get_mn_major_tma_aligned_tensor` returns them, 128x128 scales as they are.

    Raises:
        ValueError: a recipe or a shape that Hopper's kernels do not have.
        TypeError: sf is neither float32 nor int32.
    """
    op = "transform_sf_into_required_layout"
    if (len(recipe) == 3) != (is_sfa is not None) or len(recipe) not in (2, 3):
        raise ValueError(
            f"{op}: is_sfa must be given with a recipe of 3 numbers, and with none of 2 (got "
            f"recipe={recipe}, is_sfa={is_sfa})"
        )
    rows, columns = (recipe[0 if is_sfa else 1], recipe[2]) if len(recipe) == 3 else recipe
    if (rows, columns) not in ((1, 128), (128, 128)):
        raise ValueError(
            f"{op}: recipe must give 1x128 or 128x128 elements to a scale (got {rows}x{columns})"
        )
    leading = (ceil_div(mn, rows),) if num_groups is None else (num_groups, ceil_div(mn, rows))
    sf = checked_scale(op, "sf", sf, leading, k, rows)
    return get_mn_major_tma_aligned_tensor(sf) if rows == 1 else sf


def get_mk_alignment_for_contiguous_layout() -> int:
    """The multiple to which DeepGEMM's callers pad each group of a contiguous layout: 128.

    The kernels here need none: groups may have any length. Kernels that lay groups out for
    DeepGEMM rely on 128, so that is the default.
    """
    return _alignment


def set_mk_alignment_for_contiguous_layout(new_value: int) -> None:
    """Sets what `get_mk_alignment_for_contiguous_layout` returns and `use_psum_layout` uses.

    Raises ValueError unless new_value is positive.
    """
    global _alignment  # noqa: PLW0603  (a setting of the process, as in DeepGEMM)
    if new_value <= 0:
        raise ValueError(
            f"set_mk_alignment_for_contiguous_layout: new_value must be positive (got {new_value})"
        )
    _alignment = new_value


def get_theoretical_mk_alignment_for_contiguous_layout(
    expected_m: int | None = None, num_groups: int | None = None
) -> int:
    """The alignment that DeepGEMM recommends on Hopper, whatever the sizes: 128."""
    return _DEFAULT_ALIGNMENT


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
get_k_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
