"""The dense FP8 GEMM, part of `torchext.ops`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._dispatch.autograd import Gradient, asks_gradient
from .._dispatch.batching import multiply_rows
from .._dispatch.declaration import declare
from .._dispatch.flops import product_flops
from .._dispatch.layout import leading_sizes
from .._dispatch.scales import call_with_float32_scales, float32_in_graph
from .._dispatch.sharding_rules import product as sharding_of_product
from .._dispatch.sm_budget import gemm_sms


def _fake(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    num_sms: int = 0,
) -> Tensor:
    return a.new_empty((*leading_sizes(a), b.shape[0]), dtype=out_dtype or torch.bfloat16)


def gradient_of_bias(grad: Tensor, bias_shape: torch.Size) -> Tensor:
    rows = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
    return rows.sum(0, dtype=torch.float32)


_fp8_gemm_nt, _fp8_gemm_nt_alias, _write_fp8_gemm_nt = declare(
    "fp8_gemm_nt",
    fake=_fake,
    sharding=sharding_of_product,
    flops=product_flops,
    batching=multiply_rows,
    gradient=Gradient("bias", gradient_of_bias),
    out=True,
)


def fp8_gemm_nt(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    num_sms: int = 0,
) -> Tensor:
    """The GEMM of FP8 operands: dequantized a @ dequantized b.T (+ bias).

    The shapes of the scales determine the granularity:

        a_scale               b_scale
        [..., ceil(K / 128)]  [ceil(N / 128), ceil(K / 128)]   1D2D: 1x128 by 128x128
        [..., ceil(K / 128)]  [N, ceil(K / 128)]               1D1D: 1x128 by 1x128
        [..., 1] or [1, 1]    [N, 1] or [1, 1]                 row-wise, tensor-wise

    Tensor cores sum FP8 products over at most 128 elements of K. These sums are added, and scales
    and bias are applied, in FP32; the result is rounded once. Error bounds: docs/numerics.md.

    If `out` is None, the op has a gradient with respect to `bias` (summed in FP32). It has none
    with respect to the quantized operands and their scales: `torchext.nn.Linear` computes dgrad and
    wgrad by separate GEMMs.

    Args:
        a: [..., K], torch.float8_e4m3fn or torch.float8_e5m2; any K. Its rows, with leading
            dimensions folded, are contiguous. On a GPU they are a multiple of 16 bytes apart, and
            it starts at a 16-byte aligned address, as the quantizers return it; the CPU reads rows
            of any pitch at any address.
        a_scale: float32. For 1x128 groups it must be M-major and 16-byte aligned, as the quantizers
            return it: stride 1 between rows, and between scale groups a multiple of four elements.
            A tensor-wise scale may also have shape [1] or []. Scales in bfloat16 or
            torch.float8_e8m0fnu are converted at each call.
        b: [N, K], FP8, laid out like a. One operand may be e4m3 and the other e5m2.
        b_scale: float32. For 1x128 groups it is laid out like a_scale.
        out: [..., N], bfloat16, float16 or float32, with contiguous rows; the result is written to
            it.
        accumulate: add the GEMM's result to `out`. The sum is computed in FP32 and rounded once.
        bias: [N], bfloat16, float16 or float32, contiguous.
        out_dtype: bfloat16 (None), float16 or float32. With `out`: None, or the dtype of `out`.
        num_sms: the number of SMs that the CUDA kernel may occupy, so that other work can run on
            the rest; 0 for all.

    Returns:
        `out` if it is given, else a contiguous [..., N] tensor of dtype out_dtype.

    Raises:
        ValueError: the shapes do not fit together; TMA cannot load a tensor with this row pitch,
            alignment or scale layout; the tensors are on different devices; num_sms < 0;
            `accumulate` is given without `out`; out_dtype is not the dtype of `out`.
        TypeError: an operand, scale, bias or output has another dtype.
        RuntimeError: this build has no kernels for the GPU; `out` is given, and it or `bias`
            requires a gradient.
    """
    if is_compiling():
        a_scale, b_scale = float32_in_graph((a, a_scale), (b, b_scale))
    num_sms = num_sms or gemm_sms(a)
    try:
        if out is None:
            if accumulate:
                raise ValueError(
                    "fp8_gemm_nt: out must be the tensor to add to when accumulate=True (got "
                    "None); pass out=, or leave accumulate=False"
                )
            if not asks_gradient(bias):
                return _fp8_gemm_nt_alias(a, a_scale, b, b_scale, bias, out_dtype, num_sms)
            return _fp8_gemm_nt(
                a, a_scale, b, b_scale, bias=bias, out_dtype=out_dtype, num_sms=num_sms
            )
        if out_dtype is not None and out_dtype != out.dtype:
            raise ValueError(
                f"fp8_gemm_nt: out_dtype must be None or out's own {out.dtype} when out is given "
                f"(got {out_dtype}); omit it, or pass an out of that dtype"
            )
        _write_fp8_gemm_nt(
            a, a_scale, b, b_scale, out=out, accumulate=accumulate, bias=bias, num_sms=num_sms
        )
        return out
    except RuntimeError as error:
        return call_with_float32_scales(
            error,
            fp8_gemm_nt,
            *(a, a_scale, b, b_scale),
            pairs=((0, 1), (2, 3)),
            out=out,
            accumulate=accumulate,
            bias=bias,
            out_dtype=out_dtype,
            num_sms=num_sms,
        )


_write_below_autograd = torch.ops.torchext._fp8_gemm_nt.out


def product(a: Any, a_scale: Any, b: Any, b_scale: Any, *rest: Any) -> Tensor:
    """The GEMM below autograd, on the SMs of the open `torchext.sm_budget`.

    `rest` is bias and out_dtype, or nothing.
    """
    num_sms = gemm_sms(a)
    if num_sms == 0:
        return _fp8_gemm_nt_alias(a, a_scale, b, b_scale, *rest)  # type: ignore[no-any-return]
    return _fp8_gemm_nt_alias(a, a_scale, b, b_scale, *rest, num_sms=num_sms)  # type: ignore[no-any-return]


def write_product(*operands: Any, **options: Any) -> None:
    """As `product`, for the overload `.out`."""
    num_sms = gemm_sms(operands[0])
    if num_sms:
        options["num_sms"] = num_sms
    _write_below_autograd(*operands, **options)
