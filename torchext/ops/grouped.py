"""FP8 matrix products in groups, part of `torchext.ops`: the layers of a mixture of experts.

Group boundaries are an int32 tensor on the operands' device. Only the kernel reads them, so calls
never synchronize, and can be captured into a CUDA graph and replayed with other groups. On the CPU
an index out of range raises a ValueError. A GPU cannot raise: the result for such a group is
unspecified, though memory outside the tensors is never touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch.autograd import Gradient, asks_gradient
from .._dispatch.batching import each_product
from .._dispatch.declaration import declare
from .._dispatch.errors import python_error
from .._dispatch.flops import product_flops


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
    """Row g: the sum of grad's rows from starts[g] up to starts[g + 1], in FP32. Deterministic, and
    waits for nothing."""
    return torch.segment_reduce(grad.float(), "sum", offsets=starts, axis=0, unsafe=True)


def _sum_groups(
    grad: Tensor, bias_shape: torch.Size, offsets: Tensor | None, group_ids: Tensor | None
) -> Tensor:
    if offsets is not None:
        return _sum_runs(grad, torch.nn.functional.pad(offsets, (1, 0)))
    assert group_ids is not None  # the op has checked that it is one of the two
    ids, order = group_ids.sort(stable=True)
    numbers = torch.arange(bias_shape[0] + 1, dtype=ids.dtype, device=ids.device)
    return _sum_runs(grad[order], torch.searchsorted(ids, numbers))


_contiguous, _contiguous_alias, _write_contiguous = declare(
    "m_grouped_fp8_gemm_nt_contiguous",
    fake=_fake_contiguous,
    flops=product_flops,
    batching=each_product,
    gradient=Gradient("bias", _sum_groups, saved=("offsets", "group_ids")),
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
    """Rows of `a`, in groups, each group times its own matrix: fprop and dgrad of experts.

    out[r] = dequantized a[r] @ dequantized b[g].T (+ bias[g]) for each row r of group g. Groups are
    given in one of two ways, and may be of any length, 0 included, on any row:

        offsets     group g is the rows from offsets[g - 1] (from 0 for g = 0) up to offsets[g];
                    rows from offsets[-1] on belong to no group
        group_ids   row r belongs to group group_ids[r], or, where that is negative, to none; ids
                    need not be sorted

    Rows of no group are not computed. In a new output they hold whatever its memory held before,
    NaN perhaps; an `out` keeps what it has there: pass torch.zeros(...) for zeros.

    Granularities, as `fp8_gemm_nt`'s, by the shapes of the scales:

        a_scale             b_scale
        [M, ceil(K / 128)]  [G, ceil(N / 128), ceil(K / 128)]  1D2D: `quantize_128x128(b)`
        [M, ceil(K / 128)]  [G, N, ceil(K / 128)]              1D1D: `quantize_1x128(b)`
        [M, 1] or [1, 1]    [G, N, 1], [G, 1, 1] or [1, 1]     row-wise, tensor-wise

    It has a gradient with respect to `bias` (summed over each group in FP32) when `out` is None.
    Arithmetic and error bounds are `fp8_gemm_nt`'s.

    Args:
        a: [M, K], FP8, laid out as the quantizers return it.
        a_scale: float32, laid out as for `fp8_gemm_nt`.
        b: [G, N, K], FP8, whose rows fold into [G * N, K], as the quantizers return it.
        b_scale: float32. Of 1D1D, M-major over all G * N rows, as `quantize_1x128` returns it.
        offsets: [G], int32, ascending, at most M.
        group_ids: [M], int32, below G.
        out: write here instead: [M, N], bfloat16, float16 or float32, contiguous rows.
        accumulate: add the product to `out`: the sum is taken in FP32 and rounded once.
        bias: [G, N], bfloat16, float16 or float32, contiguous.
        out_dtype: bfloat16 (None), float16 or float32. With `out`, whose dtype decides, None.
        num_sms: how many SMs the CUDA kernel may occupy; 0 for all.

    Returns:
        [M, N], contiguous, of out_dtype; or `out`.

    Raises:
        ValueError: offsets and group_ids, or neither; on the CPU, an index out of range; otherwise
            as `fp8_gemm_nt` does.
        TypeError: an operand, scale, index, bias or output of another dtype.
        RuntimeError: a GPU that this build has no kernels for; out= where `out` or `bias` requires
            a gradient.
    """
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
        raise python_error(error) from None


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
    """The first masked_m[g] rows of each a[g] times b[g]: decoding, where each expert has room for
    M tokens and only the device knows how many came.

    out[g, r] = dequantized a[g, r] @ dequantized b[g].T (+ bias[g]) for r < masked_m[g]. Other rows
    are not computed. In a new output they hold whatever its memory held before, NaN perhaps; an
    `out` keeps what it has there.

    Granularities, as `fp8_gemm_nt`'s, by the shapes of the scales:

        a_scale                a's scales come from    b_scale
        [G, M, ceil(K / 128)]  `quantize_1x128(a)`     [G, ceil(N / 128), ceil(K / 128)]  1D2D
        [G, M, ceil(K / 128)]  `quantize_1x128(a)`     [G, N, ceil(K / 128)]              1D1D
        [G, M, 1] or [1, 1]    `quantize_rowwise(a)`   [G, N, 1], [G, 1, 1] or [1, 1]

    It has a gradient with respect to `bias` when `out` is None. Arithmetic and error bounds are
    `fp8_gemm_nt`'s.

    Args:
        a: [G, M, K], FP8, whose rows fold into [G * M, K], as the quantizers return it.
        a_scale: float32. Per 1x128 group, M-major over all G * M rows, as `quantize_1x128` returns
            it: strides (M, 1, round_up(G * M, 4)).
        b: [G, N, K], FP8, whose rows fold into [G * N, K], as the quantizers return it.
        b_scale: float32. Of 1D1D, M-major over all G * N rows, as `quantize_1x128` returns it.
        masked_m: [G], int32, from 0 to M.
        expected_m: how many rows a group is likely to have, which helps to choose a kernel and
            changes no result beyond its rounding; 0 if unknown.
        out: write here instead: [G, M, N], bfloat16, float16 or float32, rows contiguous and one
            stride apart.
        accumulate: add the product to `out`: the sum is taken in FP32 and rounded once.
        bias: [G, N], bfloat16, float16 or float32, contiguous.
        out_dtype: bfloat16 (None), float16 or float32. With `out`, whose dtype decides, None.
        num_sms: how many SMs the CUDA kernel may occupy; 0 for all.

    Returns:
        [G, M, N], contiguous, of out_dtype; or `out`.

    Raises:
        ValueError: on the CPU, a count out of range; expected_m < 0; otherwise as `fp8_gemm_nt`
            does.
        TypeError: an operand, scale, count, bias or output of another dtype.
        RuntimeError: a GPU that this build has no kernels for; out= where `out` or `bias` requires
            a gradient.
    """
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
        raise python_error(error) from None


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
    """One product for each group of columns of `a` and `b`: wgrad of experts.

    out[g] = dequantized a[:, s:e] @ dequantized b[:, s:e].T, with s = offsets[g - 1] (0 for g = 0)
    and e = offsets[g]. K is the tokens, sorted by expert; a group may have any number of them.
    Columns from offsets[-1] on belong to no group. An empty group gives zeros, or, with
    `accumulate`, leaves out[g] as it is.

    Scales are those of 1x128 groups of the whole K, which `quantize_1x128_t` of all tokens at once
    gives: groups of scales and groups of tokens are independent of each other. Where a block of 128
    tokens is shared by several experts, each uses its scale with its own tokens. So a NaN or Inf in
    one expert's tokens, which makes the block's scale and all of its data NaN, reaches every expert
    that shares the block; a NaN in the data alone reaches its own expert only.

    It has no gradient. Arithmetic and error bounds are `fp8_gemm_nt`'s.

    Args:
        a: [M, K], FP8, laid out as the quantizers return it.
        a_scale: [M, ceil(K / 128)], float32, M-major, as the quantizers return it.
        b: [N, K], FP8; e4m3 and e5m2 mix.
        b_scale: [N, ceil(K / 128)], float32, M-major.
        offsets: [G], int32, ascending, at most K.
        out: write here instead: [G, M, N], bfloat16, float16 or float32, contiguous rows.
        accumulate: add the product to `out`: the sum is taken in FP32 and rounded once.
        out_dtype: bfloat16 (None), float16 or float32. With `out`, whose dtype decides, None.
        num_sms: how many SMs the CUDA kernel may occupy; 0 for all.

    Returns:
        [G, M, N], contiguous, of out_dtype; or `out`.

    Raises:
        ValueError: on the CPU, offsets out of range; scales of another granularity; otherwise as
            `fp8_gemm_nt` does.
        TypeError: an operand, scale, index or output of another dtype.
        RuntimeError: a GPU that this build has no kernels for; an `out` that requires a gradient.
    """
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
        raise python_error(error) from None


def _check_accumulate(op: str, accumulate: bool) -> None:
    """Without `out`, there is nothing to accumulate into."""
    if accumulate:
        raise ValueError(
            f"{op}: out must be the tensor to add to when accumulate=True (got None); pass out=, "
            "or leave accumulate=False"
        )


def _check_out_dtype(op: str, out: Tensor, out_dtype: torch.dtype | None) -> None:
    """With `out`, its dtype decides."""
    if out_dtype is not None and out_dtype != out.dtype:
        raise ValueError(
            f"{op}: out_dtype must be None or out's own {out.dtype} when out is given (got "
            f"{out_dtype}); omit it, or pass an out of that dtype"
        )
