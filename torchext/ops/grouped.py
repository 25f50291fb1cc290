"""Grouped GEMMs in FP8, for the layers of a mixture of experts; part of `torchext.ops`.

Group boundaries are an int32 tensor on the operands' device. Only the kernel reads them. So calls
never synchronize, and a call that is captured into a CUDA graph can be replayed with other groups.
On the CPU an index out of range raises a ValueError. A GPU cannot raise: the result for such a
group is unspecified, but the kernel never accesses memory outside the tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._dispatch.autograd import Gradient, asks_gradient
from .._dispatch.batching import each_product
from .._dispatch.declaration import declare
from .._dispatch.flops import product_flops
from .._dispatch.scales import call_with_float32_scales, float32_in_graph
from .._dispatch.sharding_rules_grouped import grouped_product, product_along_groups
from .._dispatch.sm_budget import gemm_sms


def _fake_contiguous(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor | None = None,
    *,
    group_ids: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    num_sms: int = 0,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype or torch.bfloat16)


def _sum_runs(grad: Tensor, starts: Tensor) -> Tensor:
    """Row g is the FP32 sum of grad's rows from starts[g] up to starts[g + 1]. Deterministic, and
    does not synchronize with the device."""
    return torch.segment_reduce(grad.float(), "sum", offsets=starts, axis=0, unsafe=True)


def _sum_groups(
    grad: Tensor, bias_shape: torch.Size, offsets: Tensor | None, group_ids: Tensor | None
) -> Tensor:
    if offsets is not None:
        return _sum_runs(grad, torch.nn.functional.pad(offsets, (1, 0)))
    assert group_ids is not None  # the op has checked that one of the two is given
    ids, order = group_ids.sort(stable=True)
    numbers = torch.arange(bias_shape[0] + 1, dtype=ids.dtype, device=ids.device)
    return _sum_runs(grad[order], torch.searchsorted(ids, numbers))


_contiguous, _contiguous_alias, _write_contiguous = declare(
    "m_grouped_fp8_gemm_nt_contiguous",
    fake=_fake_contiguous,
    flops=product_flops,
    batching=each_product,
    gradient=Gradient("bias", _sum_groups, saved=("offsets", "group_ids")),
    sharding=grouped_product("m_grouped_fp8_gemm_nt_contiguous"),
    out=True,
)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor | None = None,
    *,
    group_ids: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    num_sms: int = 0,
) -> Tensor:
    """Multiplies each group of rows of `a` by the group's own matrix: fprop and dgrad of experts.

    out[r] = dequantized a[r] @ dequantized b[g].T (+ bias[g]) for each row r of group g. A group
    may start at any row and have any length, including 0. Groups are given in one of two ways:

        offsets     group g is the rows from offsets[g - 1] (from 0 for g = 0) up to offsets[g];
                    rows from offsets[-1] on belong to no group
        group_ids   row r belongs to group group_ids[r], or to no group if that is negative; ids
                    need not be sorted

    Rows of no group are not computed. In a new output they are uninitialized memory, which may be
    NaN. An `out` keeps the values that it has there: pass torch.zeros(...) for zeros.

    The shapes of the scales determine the granularity, as for `fp8_gemm_nt`:

        a_scale             b_scale
        [M, ceil(K / 128)]  [G, ceil(N / 128), ceil(K / 128)]  1D2D: `quantize_128x128(b)`
        [M, ceil(K / 128)]  [G, N, ceil(K / 128)]              1D1D: `quantize_1x128(b)`
        [M, 1] or [1, 1]    [G, N, 1], [G, 1, 1] or [1, 1]     row-wise, tensor-wise

    If `out` is None, the op has a gradient with respect to `bias` (summed over each group in FP32).
    Arithmetic and error bounds are those of `fp8_gemm_nt`.

    Args:
        a: [M, K], FP8, laid out as the quantizers return it.
        a_scale: float32, laid out as for `fp8_gemm_nt`.
        b: [G, N, K], FP8, whose rows fold into [G * N, K], as the quantizers return it.
        b_scale: float32. For 1D1D, M-major over all G * N rows, as `quantize_1x128` returns it.
        offsets: [G], int32, ascending, at most M.
        group_ids: [M], int32, below G.
        out: [M, N], bfloat16, float16 or float32, with contiguous rows; the result is written to
            it.
        accumulate: add the GEMM's result to `out`. The sum is computed in FP32 and rounded once.
        bias: [G, N], bfloat16, float16 or float32, contiguous.
        out_dtype: bfloat16 (None), float16 or float32. With `out`: None, or the dtype of `out`.
        num_sms: the number of SMs that the CUDA kernel may occupy; 0 for all, or for those that an
            open `torchext.sm_budget` leaves to GEMMs.

    Returns:
        `out` if it is given, else a contiguous [M, N] tensor of dtype out_dtype.

    Raises:
        ValueError: both offsets and group_ids are given, or neither; on the CPU, an index is out of
            range; otherwise as for `fp8_gemm_nt`.
        TypeError: an operand, scale, index, bias or output has another dtype.
        RuntimeError: this build has no kernels for the GPU; `out` is given, and it or `bias`
            requires a gradient.
    """
    if is_compiling():
        a_scale, b_scale = float32_in_graph((a, a_scale), (b, b_scale))
    num_sms = num_sms or gemm_sms(a)
    try:
        if out is None:
            _check_accumulate("m_grouped_fp8_gemm_nt_contiguous", accumulate)
            if not asks_gradient(bias):
                return _contiguous_alias(
                    *(a, a_scale, b, b_scale, offsets, group_ids, bias, out_dtype, num_sms)
                )
            return _contiguous(
                a,
                a_scale,
                b,
                b_scale,
                offsets,
                group_ids=group_ids,
                bias=bias,
                out_dtype=out_dtype,
                num_sms=num_sms,
            )
        _check_out_dtype("m_grouped_fp8_gemm_nt_contiguous", out, out_dtype)
        _write_contiguous(
            a,
            a_scale,
            b,
            b_scale,
            offsets,
            group_ids=group_ids,
            out=out,
            accumulate=accumulate,
            bias=bias,
            num_sms=num_sms,
        )
        return out
    except RuntimeError as error:
        return call_with_float32_scales(
            error,
            m_grouped_fp8_gemm_nt_contiguous,
            *(a, a_scale, b, b_scale, offsets),
            pairs=((0, 1), (2, 3)),
            group_ids=group_ids,
            out=out,
            accumulate=accumulate,
            bias=bias,
            out_dtype=out_dtype,
            num_sms=num_sms,
        )


def _fake_masked(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    masked_m: Tensor,
    *,
    expected_m: int = 0,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    num_sms: int = 0,
) -> Tensor:
    shape = (a.shape[0], a.shape[1], b.shape[1])
    return a.new_empty(shape, dtype=out_dtype or torch.bfloat16)


def _sum_counted(grad: Tensor, bias_shape: torch.Size, masked_m: Tensor) -> Tensor:
    computed = torch.arange(grad.shape[1], device=grad.device) < masked_m[:, None]
    return grad.float().where(computed[:, :, None], 0).sum(1)


_masked, _masked_alias, _write_masked = declare(
    "m_grouped_fp8_gemm_nt_masked",
    fake=_fake_masked,
    flops=product_flops,
    batching=each_product,
    gradient=Gradient("bias", _sum_counted, saved=("masked_m",)),
    sharding=grouped_product("m_grouped_fp8_gemm_nt_masked"),
    out=True,
)


def m_grouped_fp8_gemm_nt_masked(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    masked_m: Tensor,
    *,
    expected_m: int = 0,
    out: Tensor | None = None,
    accumulate: bool = False,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    num_sms: int = 0,
) -> Tensor:
    """Multiplies the first masked_m[g] rows of each a[g] by b[g].

    This is for decoding, where each expert has room for M tokens and only the device knows how many
    tokens the expert received.

    out[g, r] = dequantized a[g, r] @ dequantized b[g].T (+ bias[g]) for r < masked_m[g]. Other rows
    are not computed. In a new output they are uninitialized memory, which may be NaN. An `out`
    keeps the values that it has there.

    The shapes of the scales determine the granularity, as for `fp8_gemm_nt`:

        a_scale                a's scales come from    b_scale
        [G, M, ceil(K / 128)]  `quantize_1x128(a)`     [G, ceil(N / 128), ceil(K / 128)]  1D2D
        [G, M, ceil(K / 128)]  `quantize_1x128(a)`     [G, N, ceil(K / 128)]              1D1D
        [G, M, 1] or [1, 1]    `quantize_rowwise(a)`   [G, N, 1], [G, 1, 1] or [1, 1]

    If `out` is None, the op has a gradient with respect to `bias` (summed in FP32). Arithmetic and
    error bounds are those of `fp8_gemm_nt`.

    Args:
        a: [G, M, K], FP8, whose rows fold into [G * M, K], as the quantizers return it.
        a_scale: float32. For 1x128 groups, M-major over all G * M rows, as `quantize_1x128` returns
            it: strides (M, 1, round_up(G * M, 4)).
        b: [G, N, K], FP8, whose rows fold into [G * N, K], as the quantizers return it.
        b_scale: float32. For 1D1D, M-major over all G * N rows, as `quantize_1x128` returns it.
        masked_m: [G], int32, each from 0 to M: the number of rows to compute in each group.
        expected_m: the number of rows that a group is likely to have; 0 if unknown. It helps to
            choose a kernel, and changes results only in their rounding.
        out: [G, M, N], bfloat16, float16 or float32, with contiguous rows and one stride between
            all of them; the result is written to it.
        accumulate: add the GEMM's result to `out`. The sum is computed in FP32 and rounded once.
        bias: [G, N], bfloat16, float16 or float32, contiguous.
        out_dtype: bfloat16 (None), float16 or float32. With `out`: None, or the dtype of `out`.
        num_sms: the number of SMs that the CUDA kernel may occupy; 0 for all, or for those that an
            open `torchext.sm_budget` leaves to GEMMs.

    Returns:
        `out` if it is given, else a contiguous [G, M, N] tensor of dtype out_dtype.

    Raises:
        ValueError: on the CPU, a count is out of range; expected_m < 0; otherwise as for
            `fp8_gemm_nt`.
        TypeError: an operand, scale, count, bias or output has another dtype.
        RuntimeError: this build has no kernels for the GPU; `out` is given, and it or `bias`
            requires a gradient.
    """
    if is_compiling():
        a_scale, b_scale = float32_in_graph((a, a_scale), (b, b_scale))
    num_sms = num_sms or gemm_sms(a)
    try:
        if out is None:
            _check_accumulate("m_grouped_fp8_gemm_nt_masked", accumulate)
            if not asks_gradient(bias):
                return _masked_alias(
                    *(a, a_scale, b, b_scale, masked_m, expected_m, bias, out_dtype, num_sms)
                )
            return _masked(
                a,
                a_scale,
                b,
                b_scale,
                masked_m,
                expected_m=expected_m,
                bias=bias,
                out_dtype=out_dtype,
                num_sms=num_sms,
            )
        _check_out_dtype("m_grouped_fp8_gemm_nt_masked", out, out_dtype)
        _write_masked(
            a,
            a_scale,
            b,
            b_scale,
            masked_m,
            expected_m=expected_m,
            out=out,
            accumulate=accumulate,
            bias=bias,
            num_sms=num_sms,
        )
        return out
    except RuntimeError as error:
        return call_with_float32_scales(
            error,
            m_grouped_fp8_gemm_nt_masked,
            *(a, a_scale, b, b_scale, masked_m),
            pairs=((0, 1), (2, 3)),
            expected_m=expected_m,
            out=out,
            accumulate=accumulate,
            bias=bias,
            out_dtype=out_dtype,
            num_sms=num_sms,
        )


def _fake_k_grouped(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    num_sms: int = 0,
) -> Tensor:
    shape = (offsets.shape[0], a.shape[0], b.shape[0])
    return a.new_empty(shape, dtype=out_dtype or torch.bfloat16)


_k_grouped, _, _write_k_grouped = declare(
    "k_grouped_fp8_gemm_nt",
    fake=_fake_k_grouped,
    sharding=product_along_groups("k_grouped_fp8_gemm_nt"),
    flops=product_flops,
    batching=each_product,
    out=True,
)


def k_grouped_fp8_gemm_nt(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
    num_sms: int = 0,
) -> Tensor:
    """One GEMM for each group of columns of `a` and `b`: wgrad of experts.

    out[g] = dequantized a[:, s:e] @ dequantized b[:, s:e].T, with s = offsets[g - 1] (0 for g = 0)
    and e = offsets[g]. The columns are tokens, sorted by expert; a group may have any number of
    them. Columns from offsets[-1] on belong to no group. An empty group gives zeros or, with
    `accumulate`, leaves out[g] as it is.

    Scales belong to 1x128 scale groups of all K columns, as `quantize_1x128_t` of all tokens
    returns them: the boundaries of scale groups do not depend on those of the experts. If several
    experts have tokens in one scale group, each uses that group's scale for its own tokens.
    Therefore a NaN or Inf that is quantized with one expert's tokens reaches every expert in the
    scale group, because it makes the scale and all of the group's data NaN. A NaN in the FP8 data
    alone reaches only its own expert.

    The op has no gradient. Arithmetic and error bounds are those of `fp8_gemm_nt`.

    Args:
        a: [M, K], FP8, laid out as the quantizers return it.
        a_scale: [M, ceil(K / 128)], float32, M-major, as the quantizers return it.
        b: [N, K], FP8, laid out like a. One operand may be e4m3 and the other e5m2.
        b_scale: [N, ceil(K / 128)], float32, M-major.
        offsets: [G], int32, ascending, at most K.
        out: [G, M, N], bfloat16, float16 or float32, with contiguous rows; the result is written
            to it.
        accumulate: add the GEMM's result to `out`. The sum is computed in FP32 and rounded once.
        out_dtype: bfloat16 (None), float16 or float32. With `out`: None, or the dtype of `out`.
        num_sms: the number of SMs that the CUDA kernel may occupy; 0 for all, or for those that an
            open `torchext.sm_budget` leaves to GEMMs.

    Returns:
        `out` if it is given, else a contiguous [G, M, N] tensor of dtype out_dtype.

    Raises:
        ValueError: on the CPU, offsets are out of range; the scales have another granularity;
            otherwise as for `fp8_gemm_nt`.
        TypeError: an operand, scale, index or output has another dtype.
        RuntimeError: this build has no kernels for the GPU; `out` requires a gradient.
    """
    if is_compiling():
        a_scale, b_scale = float32_in_graph((a, a_scale), (b, b_scale))
    num_sms = num_sms or gemm_sms(a)
    try:
        if out is None:
            _check_accumulate("k_grouped_fp8_gemm_nt", accumulate)
            return _k_grouped(a, a_scale, b, b_scale, offsets, out_dtype=out_dtype, num_sms=num_sms)
        _check_out_dtype("k_grouped_fp8_gemm_nt", out, out_dtype)
        _write_k_grouped(
            a, a_scale, b, b_scale, offsets, out=out, accumulate=accumulate, num_sms=num_sms
        )
        return out
    except RuntimeError as error:
        return call_with_float32_scales(
            error,
            k_grouped_fp8_gemm_nt,
            *(a, a_scale, b, b_scale, offsets),
            pairs=((0, 1), (2, 3)),
            out=out,
            accumulate=accumulate,
            out_dtype=out_dtype,
            num_sms=num_sms,
        )


def _check_accumulate(op: str, accumulate: bool) -> None:
    """Refuses `accumulate` without an `out` to add to."""
    if accumulate:
        raise ValueError(
            f"{op}: out must be the tensor to add to when accumulate=True (got None); pass out=, "
            "or leave accumulate=False"
        )


def _check_out_dtype(op: str, out: Tensor, out_dtype: torch.dtype | None) -> None:
    """Refuses an out_dtype that is not the dtype of `out`."""
    if out_dtype is not None and out_dtype != out.dtype:
        raise ValueError(
            f"{op}: out_dtype must be None or out's own {out.dtype} when out is given (got "
            f"{out_dtype}); omit it, or pass an out of that dtype"
        )
