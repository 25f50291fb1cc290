"""Layouts of scales, and the alignment to which DeepGEMM's callers pad the groups of a product."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._layout import ceil_div, round_up
from .._operands import checked_scale

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
    """Scales with M (or N) adjacent, as TMA loads them. A copy, unless they lie so already.

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
    """Scales as the GEMMs read them without a copy: once for weights, say, instead of at each call.

    Args:
        sf: float32 or, of 1x128 groups, int32 with four UE8M0 exponents each, which become float32:
            [ceil(mn / r), ceil(k / 128)], and [num_groups, ...] if num_groups is given.
        mn: rows of the operand.
        k: its columns.
        recipe: (1, 128, 128) or (1, 1, 128) for (rows of a, rows of b, columns) to a scale, with
            is_sfa; or (1, 128) or (128, 128), without.
        num_groups: of a grouped operand.
        is_sfa: whether sf belongs to a or to b.
        disable_ue8m0_cast: of no effect: scales are FP32, and no kernel casts them.
        psum_layout: of no effect: DeepGEMM skips the padding between groups by it.

    Returns:
        1x128 scales as `get_mn_major_tma_aligned_tensor` returns them, 128x128 scales as they are.

    Raises:
        ValueError: a recipe or a shape that Hopper's kernels have not got.
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
    """Sets what `get_mk_alignment_for_contiguous_layout` returns and `use_psum_layout` goes by.

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
