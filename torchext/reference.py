"""What every op computes, in plain PyTorch: short and slow; kernels are tested against it.

Each function has the name and arguments of its op in `torchext.ops` (without `num_sms`) and returns
tensors of the same shapes, dtypes and strides. It runs on every device of torch. CPU and CUDA
kernels of quantizers and of `dequantize` return the same bits as the functions here. GEMMs are
computed in float64, and kernels approximate them within the bounds of docs/numerics.md; those of
activations without a GEMM and of norms have the same bits as well. The functions do not check their
arguments. They are all in this file, which makes it long.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch.layout import (
    GROUP,
    ceil_div,
    empty_block_scale,
    empty_contiguous,
    empty_data,
    empty_group_scale,
    folded_strides,
)
from ._float32 import GELU, GELU_TANH, RELU2, SILU, Curve, column_sums, pairwise_sums

_SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal


def quantize_1x128(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """One scale for each 128 elements of a row; see `torchext.ops.quantize_1x128`."""
    data, scale = _quantize(_matrix(x), (1, GROUP), dtype, pow2_scale)
    leading, columns = x.shape[:-1], x.shape[-1]
    return (
        empty_data(x, leading, columns, data.dtype).copy_(data.reshape(x.shape)),
        empty_group_scale(x, leading, columns).copy_(scale.reshape(*leading, scale.shape[-1])),
    )


def quantize_1x128_t(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128` of the transpose; see `torchext.ops.quantize_1x128_t`."""
    return quantize_1x128(_matrix(x).t(), dtype=dtype, pow2_scale=pow2_scale)


def quantize_1x128_dual(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_1x128` and `quantize_1x128_t`; see `torchext.ops.quantize_1x128_dual`."""
    rows = quantize_1x128(x, dtype=dtype, pow2_scale=pow2_scale)
    return *rows, *quantize_1x128_t(x, dtype=dtype, pow2_scale=pow2_scale)


def quantize_1x128_dual_bias_grad(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, ...]:
    """And the sums over rows; see `torchext.ops.quantize_1x128_dual_bias_grad`."""
    quantized = quantize_1x128_dual(x, dtype=dtype, pow2_scale=pow2_scale)
    return *quantized, column_sums(_matrix(x).float())


def quantize_128x128(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """One scale for each 128x128 block of each matrix; see `torchext.ops.quantize_128x128`."""
    data = empty_data(x, x.shape[:-1], x.shape[-1], dtype or torch.float8_e4m3fn)
    scale = empty_block_scale(x)
    for index in itertools.product(*map(range, x.shape[:-2])):
        of_matrix = _quantize(x[index], (GROUP, GROUP), dtype, pow2_scale)
        data[index].copy_(of_matrix[0])
        scale[index].copy_(of_matrix[1])
    return data, scale


def quantize_128x128_dual(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_128x128` and the transposed data; see `torchext.ops.quantize_128x128_dual`."""
    data, scale = quantize_128x128(x, dtype=dtype, pow2_scale=pow2_scale)
    data_t, _ = quantize_128x128(x.mT, dtype=dtype, pow2_scale=pow2_scale)
    return data, scale, data_t


def quantize_rowwise(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """One scale for each row; see `torchext.ops.quantize_rowwise`."""
    data, scale = _quantize(_matrix(x), (1, None), dtype, pow2_scale)
    leading, columns = x.shape[:-1], x.shape[-1]
    return (
        empty_data(x, leading, columns, data.dtype).copy_(data.reshape(x.shape)),
        empty_contiguous(x, leading, 1, torch.float32).copy_(scale.reshape(*leading, 1)),
    )


def quantize_tensorwise(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """One scale for the whole tensor; see `torchext.ops.quantize_tensorwise`."""
    data, scale = _quantize(_matrix(x), (None, None), dtype, pow2_scale)
    return (
        empty_data(x, x.shape[:-1], x.shape[-1], data.dtype).copy_(data.reshape(x.shape)),
        scale.reshape(1, 1),
    )


def dequantize(data: Tensor, scale: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """data * scale in FP32, rounded to `out_dtype`; see `torchext.ops.dequantize`."""
    product = _matrix(data).float() * _spread(_matrix(scale), *_matrix(data).shape)
    y = empty_contiguous(data, data.shape[:-1], data.shape[-1], out_dtype)
    return y.copy_(product.reshape(data.shape))


def silu_mul_quantize_1x128(
    gate_up: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128` of the activation; see `torchext.ops.silu_mul_quantize_1x128`."""
    activated = _activate(SILU, gate_up, gated=True)
    return quantize_1x128(activated, dtype=dtype, pow2_scale=pow2_scale)


def silu_mul_quantize_1x128_t(
    gate_up: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128_t` of the activation; see `torchext.ops.silu_mul_quantize_1x128_t`."""
    activated = _activate(SILU, gate_up, gated=True)
    return quantize_1x128_t(activated, dtype=dtype, pow2_scale=pow2_scale)


def silu_mul_quantize_1x128_dual(
    gate_up: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_1x128_dual` of the activation; see `torchext.ops.silu_mul_quantize_1x128_dual`."""
    activated = _activate(SILU, gate_up, gated=True)
    return quantize_1x128_dual(activated, dtype=dtype, pow2_scale=pow2_scale)


def gelu_mul_quantize_1x128(
    gate_up: Tensor,
    *,
    tanh_approximation: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128` of the activation; see `torchext.ops.gelu_mul_quantize_1x128`."""
    activated = _activate(_gelu(tanh_approximation), gate_up, gated=True)
    return quantize_1x128(activated, dtype=dtype, pow2_scale=pow2_scale)


def gelu_mul_quantize_1x128_t(
    gate_up: Tensor,
    *,
    tanh_approximation: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128_t` of the activation; see `torchext.ops.gelu_mul_quantize_1x128_t`."""
    activated = _activate(_gelu(tanh_approximation), gate_up, gated=True)
    return quantize_1x128_t(activated, dtype=dtype, pow2_scale=pow2_scale)


def gelu_mul_quantize_1x128_dual(
    gate_up: Tensor,
    *,
    tanh_approximation: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_1x128_dual` of the activation; see `torchext.ops.gelu_mul_quantize_1x128_dual`."""
    activated = _activate(_gelu(tanh_approximation), gate_up, gated=True)
    return quantize_1x128_dual(activated, dtype=dtype, pow2_scale=pow2_scale)


def gelu_quantize_1x128(
    x: Tensor,
    *,
    tanh_approximation: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128` of the activation; see `torchext.ops.gelu_quantize_1x128`."""
    activated = _activate(_gelu(tanh_approximation), x, gated=False)
    return quantize_1x128(activated, dtype=dtype, pow2_scale=pow2_scale)


def gelu_quantize_1x128_t(
    x: Tensor,
    *,
    tanh_approximation: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128_t` of the activation; see `torchext.ops.gelu_quantize_1x128_t`."""
    activated = _activate(_gelu(tanh_approximation), x, gated=False)
    return quantize_1x128_t(activated, dtype=dtype, pow2_scale=pow2_scale)


def gelu_quantize_1x128_dual(
    x: Tensor,
    *,
    tanh_approximation: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_1x128_dual` of the activation; see `torchext.ops.gelu_quantize_1x128_dual`."""
    activated = _activate(_gelu(tanh_approximation), x, gated=False)
    return quantize_1x128_dual(activated, dtype=dtype, pow2_scale=pow2_scale)


def relu2_quantize_1x128(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128` of the activation; see `torchext.ops.relu2_quantize_1x128`."""
    activated = _activate(RELU2, x, gated=False)
    return quantize_1x128(activated, dtype=dtype, pow2_scale=pow2_scale)


def relu2_quantize_1x128_t(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128_t` of the activation; see `torchext.ops.relu2_quantize_1x128_t`."""
    activated = _activate(RELU2, x, gated=False)
    return quantize_1x128_t(activated, dtype=dtype, pow2_scale=pow2_scale)


def relu2_quantize_1x128_dual(
    x: Tensor, *, dtype: torch.dtype | None = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_1x128_dual` of the activation; see `torchext.ops.relu2_quantize_1x128_dual`."""
    activated = _activate(RELU2, x, gated=False)
    return quantize_1x128_dual(activated, dtype=dtype, pow2_scale=pow2_scale)


def silu_mul_backward_quantize_1x128_dual(
    grad: Tensor,
    gate_up: Tensor,
    *,
    gate_up_scale: Tensor | None = None,
    bias_grad: bool = False,
    activation_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor | None, ...]:
    """See `torchext.ops.silu_mul_backward_quantize_1x128_dual`."""
    return _gradient(
        SILU,
        grad,
        gate_up
        if gate_up_scale is None
        else dequantize(gate_up, gate_up_scale, out_dtype=torch.float32),
        gated=True,
        bias_grad=bias_grad,
        activation_dtype=activation_dtype,
        dtype=dtype,
        pow2_scale=pow2_scale,
    )


def gelu_mul_backward_quantize_1x128_dual(
    grad: Tensor,
    gate_up: Tensor,
    *,
    gate_up_scale: Tensor | None = None,
    tanh_approximation: bool = False,
    bias_grad: bool = False,
    activation_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor | None, ...]:
    """See `torchext.ops.gelu_mul_backward_quantize_1x128_dual`."""
    return _gradient(
        _gelu(tanh_approximation),
        grad,
        gate_up
        if gate_up_scale is None
        else dequantize(gate_up, gate_up_scale, out_dtype=torch.float32),
        gated=True,
        bias_grad=bias_grad,
        activation_dtype=activation_dtype,
        dtype=dtype,
        pow2_scale=pow2_scale,
    )


def gelu_backward_quantize_1x128_dual(
    grad: Tensor,
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    tanh_approximation: bool = False,
    bias_grad: bool = False,
    activation_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor | None, ...]:
    """See `torchext.ops.gelu_backward_quantize_1x128_dual`."""
    return _gradient(
        _gelu(tanh_approximation),
        grad,
        x if x_scale is None else dequantize(x, x_scale, out_dtype=torch.float32),
        gated=False,
        bias_grad=bias_grad,
        activation_dtype=activation_dtype,
        dtype=dtype,
        pow2_scale=pow2_scale,
    )


def relu2_backward_quantize_1x128_dual(
    grad: Tensor,
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    bias_grad: bool = False,
    activation_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor | None, ...]:
    """See `torchext.ops.relu2_backward_quantize_1x128_dual`."""
    return _gradient(
        RELU2,
        grad,
        x if x_scale is None else dequantize(x, x_scale, out_dtype=torch.float32),
        gated=False,
        bias_grad=bias_grad,
        activation_dtype=activation_dtype,
        dtype=dtype,
        pow2_scale=pow2_scale,
    )


def rms_norm_quantize_1x128(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    return_normed: bool = False,
) -> tuple[Tensor, ...]:
    """RMSNorm in FP32, quantized; see `torchext.ops.rms_norm_quantize_1x128`."""
    y, _, *rest = _norm(
        x,
        weight,
        None,
        eps,
        residual=residual,
        unit_offset=unit_offset,
        centers=False,
        return_normed=return_normed,
    )
    return *quantize_1x128(y, dtype=dtype, pow2_scale=pow2_scale), *rest


def rms_norm_quantize_1x128_dual(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    return_normed: bool = False,
) -> tuple[Tensor, ...]:
    """The same both ways; see `torchext.ops.rms_norm_quantize_1x128_dual`."""
    y, _, *rest = _norm(
        x,
        weight,
        None,
        eps,
        residual=residual,
        unit_offset=unit_offset,
        centers=False,
        return_normed=return_normed,
    )
    return *quantize_1x128_dual(y, dtype=dtype, pow2_scale=pow2_scale), *rest


def layer_norm_quantize_1x128(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    return_normed: bool = False,
) -> tuple[Tensor, ...]:
    """LayerNorm in FP32, quantized; see `torchext.ops.layer_norm_quantize_1x128`."""
    y, *rest = _norm(
        x,
        weight,
        bias,
        eps,
        residual=residual,
        unit_offset=unit_offset,
        centers=True,
        return_normed=return_normed,
    )
    return *quantize_1x128(y, dtype=dtype, pow2_scale=pow2_scale), *rest


def layer_norm_quantize_1x128_dual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    return_normed: bool = False,
) -> tuple[Tensor, ...]:
    """The same both ways; see `torchext.ops.layer_norm_quantize_1x128_dual`."""
    y, *rest = _norm(
        x,
        weight,
        bias,
        eps,
        residual=residual,
        unit_offset=unit_offset,
        centers=True,
        return_normed=return_normed,
    )
    return *quantize_1x128_dual(y, dtype=dtype, pow2_scale=pow2_scale), *rest


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight in FP32; see `torchext.ops.rms_norm_backward`."""
    dx, dweight, _ = _norm_backward(
        grad, x, weight, None, rstd, residual_grad=residual_grad, unit_offset=unit_offset
    )
    return dx, dweight


def rms_norm_backward_quantize_1x128_dual(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, ...]:
    """And dx quantized; see `torchext.ops.rms_norm_backward_quantize_1x128_dual`."""
    dx, dweight, _ = _norm_backward(
        grad, x, weight, None, rstd, residual_grad=residual_grad, unit_offset=unit_offset
    )
    return dx, dweight, *quantize_1x128_dual(dx, dtype=dtype, pow2_scale=pow2_scale)


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias in FP32; see `torchext.ops.layer_norm_backward`."""
    return _norm_backward(
        grad, x, weight, mean, rstd, residual_grad=residual_grad, unit_offset=unit_offset
    )


def layer_norm_backward_quantize_1x128_dual(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, ...]:
    """And dx quantized; see `torchext.ops.layer_norm_backward_quantize_1x128_dual`."""
    gradients = _norm_backward(
        grad, x, weight, mean, rstd, residual_grad=residual_grad, unit_offset=unit_offset
    )
    return *gradients, *quantize_1x128_dual(gradients[0], dtype=dtype, pow2_scale=pow2_scale)


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
) -> Tensor:
    """dequantized a @ dequantized b.T (+ bias) (+ out), computed in float64.

    See `torchext.ops.fp8_gemm_nt`. Here out_dtype=None means float64. The result is rounded once,
    to `out_dtype` or to the dtype of `out`.
    """
    left, right = (
        _matrix(data).double() * _spread(_matrix(scale), *_matrix(data).shape)
        for data, scale in ((a, a_scale), (b, b_scale))
    )
    product = (left @ right.t()).view(*a.shape[:-1], b.shape[0])
    if bias is not None:
        product = product + bias.double()
    if out is None:
        return product.to(out_dtype or torch.float64)
    return out.copy_(out.double() + product if accumulate else product)


def fp8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x @ dequantized weight.T (+ bias), computed in float64, which is also the result's dtype.

    See `torchext.ops.fp8_linear`.
    """
    scale = _spread(_matrix(weight_scale), *weight.shape)
    product = x.double() @ (weight.double() * scale).t()
    return product if bias is None else product + bias.double()


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
) -> Tensor:
    """`fp8_gemm_nt` of the rows of each group.

    See `torchext.ops.m_grouped_fp8_gemm_nt_contiguous`. Rows of no group are NaN in a new output,
    and unchanged in an `out`.
    """
    if out is None:
        out = a.new_full((a.shape[0], b.shape[1]), torch.nan, dtype=out_dtype or torch.float64)
    rows = torch.arange(a.shape[0], device=a.device)
    if group_ids is None:
        assert offsets is not None
        group_ids = torch.searchsorted(offsets, rows, right=True, out_int32=True)
    for group in range(b.shape[0]):
        rows_of_group = rows[group_ids == group]
        out[rows_of_group] = fp8_gemm_nt(
            a[rows_of_group],
            a_scale[rows_of_group] if a_scale.shape[0] == a.shape[0] else a_scale,
            b[group],
            _of_group(b_scale, group),
            out=out[rows_of_group],
            accumulate=accumulate,
            bias=None if bias is None else bias[group],
        )
    return out


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
) -> Tensor:
    """`fp8_gemm_nt` of the first rows of each group.

    See `torchext.ops.m_grouped_fp8_gemm_nt_masked`. Other rows are NaN in a new output, and
    unchanged in an `out`.
    """
    groups, rows, _ = a.shape
    if out is None:
        out = a.new_full((groups, rows, b.shape[1]), torch.nan, dtype=out_dtype or torch.float64)
    for group, count in enumerate(masked_m.tolist()):
        fp8_gemm_nt(
            a[group, :count],
            a_scale[group, :count] if a_scale.numel() > 1 else a_scale,
            b[group],
            _of_group(b_scale, group),
            out=out[group, :count],
            accumulate=accumulate,
            bias=None if bias is None else bias[group],
        )
    return out


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
) -> Tensor:
    """One GEMM for each group of columns; see `torchext.ops.k_grouped_fp8_gemm_nt`."""
    left, right = (
        data.double() * _spread(scale, *data.shape) for data, scale in ((a, a_scale), (b, b_scale))
    )
    ends = offsets.tolist()
    products = [
        left[:, start:end] @ right[:, start:end].t()
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    if out is None:
        out_dtype = out_dtype or torch.float64
        out = a.new_empty((len(ends), a.shape[0], b.shape[0]), dtype=out_dtype)
    for of_group, product in zip(out, products, strict=True):
        of_group.copy_(of_group.double() + product if accumulate else product)
    return out


def fp8_gemm_nt_swiglu_quantize(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128` of silu(gate) * up, which is computed in float64.

    See `torchext.ops.fp8_gemm_nt_swiglu_quantize`.
    """
    gate, up = fp8_gemm_nt(a, a_scale, b, b_scale, bias=bias).chunk(2, dim=-1)
    activated = torch.nn.functional.silu(gate) * up
    return quantize_1x128(activated, dtype=dtype, pow2_scale=pow2_scale)


def fp8_gemm_nt_gelu_quantize(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    tanh_approximation: bool = False,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128` of gelu(x), which is computed in float64.

    See `torchext.ops.fp8_gemm_nt_gelu_quantize`.
    """
    x = fp8_gemm_nt(a, a_scale, b, b_scale, bias=bias)
    approximate = "tanh" if tanh_approximation else "none"
    activated = torch.nn.functional.gelu(x, approximate=approximate)
    return quantize_1x128(activated, dtype=dtype, pow2_scale=pow2_scale)


def fp8_gemm_nt_relu2_quantize(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128` of relu(x)**2, which is computed in float64.

    See `torchext.ops.fp8_gemm_nt_relu2_quantize`.
    """
    x = fp8_gemm_nt(a, a_scale, b, b_scale, bias=bias)
    return quantize_1x128(x.relu().square(), dtype=dtype, pow2_scale=pow2_scale)


def _gelu(tanh_approximation: bool) -> Curve:
    return GELU_TANH if tanh_approximation else GELU


def _activate(curve: Curve, x: Tensor, gated: bool) -> Tensor:
    """The activation in FP32."""
    if not gated:
        return curve.value(x.float())
    gate, up = x.float().chunk(2, dim=-1)
    return curve.value(gate) * up


def _gradient(
    curve: Curve,
    grad: Tensor,
    x: Tensor,
    *,
    gated: bool,
    bias_grad: bool,
    activation_dtype: torch.dtype | None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """The gradient with respect to x, quantized both ways, and what else was asked for."""
    dy = grad.float()
    if gated:
        gate, up = x.float().chunk(2, dim=-1)
        dx = torch.cat((curve.slope(gate) * (dy * up), curve.value(gate) * dy), dim=-1)
    else:
        dx = curve.slope(x.float()) * dy
    results = *quantize_1x128_dual(dx, **options), column_sums(_matrix(dx)) if bias_grad else None
    if activation_dtype is None:
        return results
    options["dtype"] = activation_dtype
    return *results, *quantize_1x128_t(_activate(curve, x, gated), **options)


def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None,
    unit_offset: bool,
    centers: bool,
    return_normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The normed values to quantize, mean (0 unless `centers`), rstd, the new residual (empty
    without a residual), and the normed values to return (empty unless `return_normed`)."""
    new_residual = x.new_empty((0,))
    if residual is not None:
        new_residual = empty_contiguous(x, x.shape[:-1], x.shape[-1], x.dtype)
        x = new_residual.copy_(x.float() + residual.float())
    h, count = _matrix(x).float(), _number(x, x.shape[-1])
    mean = pairwise_sums(h) / count if centers else h.new_zeros(len(h))
    deviation = h - mean[:, None] if centers else h
    variance = pairwise_sums(deviation * deviation) / count
    # By way of float64, because torch's FP32 square root is not always rounded to nearest.
    rstd = _number(x, 1) / (variance + _number(x, eps)).double().sqrt().float()
    y = (deviation * rstd[:, None]) * (1 + weight.float() if unit_offset else weight.float())
    y = y if bias is None else y + bias.float()
    rows = [_row_values(x).copy_(value.reshape(x.shape[:-1])) for value in (mean, rstd)]
    y, normed = y.reshape(x.shape), x.new_empty((0,))
    if return_normed:
        y = normed = empty_contiguous(x, x.shape[:-1], x.shape[-1], x.dtype).copy_(y)
    return y, rows[0], rows[1], new_residual, normed


def _norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None,
    unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; `mean` is None for RMSNorm."""
    g, count = _matrix(grad).float(), _number(x, x.shape[-1])
    scale = rstd.reshape(-1, 1)
    x_hat = _matrix(x).float()
    x_hat = (x_hat if mean is None else x_hat - mean.reshape(-1, 1)) * scale
    weighted = g * (1 + weight.float() if unit_offset else weight.float())
    of_products = pairwise_sums(weighted * x_hat) / count
    centered = weighted
    if mean is not None:
        centered = weighted - (pairwise_sums(weighted) / count)[:, None]
    gradient = scale * (centered - x_hat * of_products[:, None])
    if residual_grad is not None:
        gradient = gradient + _matrix(residual_grad).float()
    dx = empty_contiguous(x, x.shape[:-1], x.shape[-1], x.dtype).copy_(gradient.reshape(x.shape))
    return dx, column_sums(g * x_hat), column_sums(g)


def _number(like: Tensor, value: float) -> Tensor:
    """A number in FP32. CUDA divides by a tensor; it multiplies by the reciprocal of a number."""
    return like.new_full((1,), value, dtype=torch.float32)


def _row_values(x: Tensor) -> Tensor:
    """Uninitialized FP32 values, one for each row of x [..., K]: [...], contiguous."""
    strides = folded_strides(x.shape[:-1], 1, 1)[:-1]
    return x.new_empty_strided(x.shape[:-1], strides, dtype=torch.float32)


def _of_group(scale: Tensor, group: int) -> Tensor:
    """The scales of one matrix of b; a tensor-wise scale as it is."""
    return scale.reshape(1, 1) if scale.numel() == 1 else scale[group]


def _matrix(x: Tensor) -> Tensor:
    """x as a matrix, with all leading dimensions folded into rows."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _quantize(
    x: Tensor, group: tuple[int | None, int | None], dtype: torch.dtype | None, pow2_scale: bool
) -> tuple[Tensor, Tensor]:
    """Data and scales of a matrix, with one scale for each group[0] x group[1] elements. None in
    `group` means all rows or all columns."""
    dtype = dtype or torch.float8_e4m3fn
    x = x.float()
    amax = _group_amax(_group_amax(x.abs(), group[1]).t(), group[0]).t()
    scale = _scale(amax, torch.finfo(dtype).max, pow2_scale)
    data = x / _spread(scale, *x.shape)
    largest = torch.finfo(dtype).max
    return data.clamp(-largest, largest).to(dtype), scale  # clamp keeps NaN


def _group_amax(x: Tensor, group: int | None) -> Tensor:
    """The maximum over each `group` columns, of which the last may be fewer. NaN propagates."""
    rows, columns = x.shape
    if group is None:
        # amax refuses an empty dimension, so a column of zeros is added.
        return torch.cat((x, x.new_zeros(rows, 1)), dim=1).amax(1, keepdim=True)
    groups = ceil_div(columns, group)
    padded = torch.nn.functional.pad(x, (0, groups * group - columns))
    return padded.reshape(rows, groups, group).amax(2)


def _scale(amax: Tensor, largest: float, pow2_scale: bool) -> Tensor:
    # By a number, or by a scalar tensor on the CPU, CUDA multiplies with the rounded reciprocal.
    quotient = amax / amax.new_full((), largest)
    scale = quotient.clamp(min=_SMALLEST_NORMAL)
    if pow2_scale:
        mantissa, exponent = torch.frexp(scale)  # mantissa * 2**exponent, 0.5 <= mantissa < 1
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        scale = ((exponent + 127) << 23).view(torch.float32)  # 2**exponent, exactly
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(amax.isfinite(), scale, torch.nan)


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """The scale of each element of a [rows, columns] matrix."""
    for dim, size in ((0, rows), (1, columns)):
        scales = scale.shape[dim]
        if scales == size:
            continue
        group = GROUP if scales == ceil_div(size, GROUP) else size
        scale = scale.repeat_interleave(group, dim).narrow(dim, 0, size)
    return scale


def moe_route(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """A stable sort of the choices by expert; see `torchext.ops.moe_route`."""
    flat = ids.reshape(-1).long()
    classes = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = classes.argsort(stable=True)
    slots = torch.empty_like(order, dtype=torch.int32)
    slots[order] = torch.arange(len(order), dtype=torch.int32, device=ids.device)
    counts = torch.bincount(classes, minlength=num_experts + 1)[:num_experts]
    shaped = empty_contiguous(ids, ids.shape[:1], ids.shape[1], torch.int32)
    return shaped.copy_(slots.view(ids.shape)), counts.cumsum(0, dtype=torch.int32)


def moe_permute_quantize_1x128(
    x: Tensor,
    slots: Tensor,
    rows: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """Tokens in the rows of their choices; see `torchext.ops.moe_permute_quantize_1x128`."""
    return quantize_1x128(moe_permute(x, slots, None, rows), dtype=dtype, pow2_scale=pow2_scale)


def moe_permute(
    x: Tensor, slots: Tensor, weights: Tensor | None = None, rows: int | None = None
) -> Tensor:
    """y[slots[t, j]] = x[t] * weights[t, j]; see `torchext.ops.moe_permute`."""
    y = empty_contiguous(x, (slots.numel() if rows is None else rows,), x.shape[1], x.dtype)
    for token, choice in itertools.product(*map(range, slots.shape)):
        slot = int(slots[token, choice])
        if slot >= 0:
            factor = 1.0 if weights is None else weights[token, choice]
            y[slot] = (x[token].float() * factor).to(x.dtype)
    return y


def moe_combine(
    y: Tensor,
    slots: Tensor,
    weights: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """FP32 sums of each token's rows; see `torchext.ops.moe_combine`."""
    tokens, choices = slots.shape
    sums = y.new_zeros((tokens, y.shape[1]), dtype=torch.float32)
    for choice in range(choices):
        column = slots[:, choice].long()
        there = column >= 0
        products = y[column[there]].float()
        if weights is not None:
            products *= weights[there, choice, None]
        sums[there] += products
    if residual is not None:
        sums += residual.float()
    out = empty_contiguous(y, (tokens,), y.shape[1], out_dtype or y.dtype)
    return out.copy_(sums)


def moe_pack_1x128(
    x: Tensor,
    slots: Tensor,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    rows: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Tensor:
    """Tokens as rows of a message; see `torchext.ops.moe_pack_1x128`. Rows of no token are zero
    but for their ids."""
    tokens, columns = x.shape
    data, scale = quantize_1x128(x, dtype=dtype, pow2_scale=pow2_scale)
    parts = [data, data.new_zeros((tokens, -columns % 16)), scale]
    choices = 0
    if ids is not None and weights is not None:
        choices = ids.shape[1]
        is_id = (ids >= 0) & (ids <= torch.iinfo(torch.int32).max)
        parts += [torch.where(is_id, ids, -1).int(), weights]
    as_bytes = [_bytes_of(part) for part in parts]
    used = sum(part.shape[1] for part in as_bytes)
    packed = F.pad(torch.cat(as_bytes, 1), (0, -used % 16))
    rows = slots.numel() if rows is None else rows
    message = empty_contiguous(x, (rows,), packed.shape[1], torch.uint8).zero_()
    first_id = columns + -columns % 16 + 4 * scale.shape[1]
    message[:, first_id : first_id + 4 * choices] = 255
    for rank in range(slots.shape[1]):
        there = slots[:, rank] >= 0
        message[slots[there, rank].long()] = packed[there]
    return message


def _bytes_of(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    if matrix.numel() == 0:
        shape = (rows, columns * matrix.element_size())
        return torch.empty(shape, dtype=torch.uint8, device=matrix.device)
    return matrix.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def moe_unpack_1x128(
    message: Tensor,
    slots: Tensor,
    offsets: Tensor,
    columns: int,
    rows: int | None = None,
    *,
    header: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A message in the rows of its choices; see `torchext.ops.moe_unpack_1x128`. Rows of no choice
    are zero."""
    count, choices = slots.shape
    groups = ceil_div(columns, GROUP)
    rows = slots.numel() if rows is None else rows
    fp8 = dtype or torch.float8_e4m3fn
    data, scale = (
        empty_data(message, (rows,), columns, fp8),
        empty_group_scale(message, (rows,), columns),
    )
    data.view(torch.uint8).zero_()
    scale.fill_(1)
    weight = torch.zeros(rows, device=message.device)
    first_scale = columns + -columns % 16
    first_weight = first_scale + 4 * (groups + choices)

    def floats(first: int, number: int) -> Tensor:
        if number * count == 0:
            return torch.empty((count, number), device=message.device)
        part = message[:, first : first + 4 * number]
        return part.clone(memory_format=torch.contiguous_format).view(torch.float32)

    for choice in range(choices if count else 0):
        there = slots[:, choice] >= 0
        to = slots[there, choice].long()
        data.view(torch.uint8)[to] = message[there, :columns]
        scale[to] = floats(first_scale, groups)[there]
        weight[to] = floats(first_weight, choices)[there, choice] if header else 1.0
    return data, scale, weight
