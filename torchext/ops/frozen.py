"""Products of wide activations with FP8 weights that do not train.

    fprop  y  = x  @ w.T     x is quantized along K
    dgrad  dx = dy @ w       dy is quantized along N, w is transposed in backward

The weight is [N, K], or [E, N, K] with one matrix for each expert. Its scales are laid out as on
disk (`weight_scale_inv`). Nothing but FP8 weights and their scales is kept for backward, and no
copy of them: the transpose lives only while dgrad runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dispatch.layout import GROUP, ceil_div, pitched
from .gemm import fp8_gemm_nt
from .grouped import m_grouped_fp8_gemm_nt_contiguous
from .linear_function import differentiable_once, foldable, gradient_of_bias
from .quantize import quantize_1x128, quantize_rowwise
from .weights_only import gradient_of_x

_E4M3 = torch.float8_e4m3fn


def frozen_product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    offsets: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> Tensor:
    """x @ dequantized weight.T (+ bias), with x quantized to e4m3 and gradients for x and bias.

    Args:
        x: [..., K], FP32, BF16 or FP16; with `offsets` [M, K], sorted by expert.
        weight: [N, K], FP8, or [E, N, K] with `offsets`.
        scale: FP32, [..., ceil(N / 128), ceil(K / 128)], [..., N, 1] or one element; the gradient
            of x needs one of the first and the last for experts.
        bias: [N].
        out_dtype: of the result.
        offsets: [E], int32: where each expert's rows end. Rows after the last are 0.
        x_scale: one element, FP32, to quantize all of x by; None for a scale for each row and 128
            of K, or for each row if the weight has no scales along K.

    Returns:
        [..., N], out_dtype.
    """
    product = _Product(out_dtype, offsets, x_scale)
    needs_graph = x.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and needs_graph:
        return _FrozenProduct.apply(x, weight, scale, bias, *product)
    return product(x, weight, scale, bias)


class _Product(NamedTuple):
    """What frozen_product's options say."""

    out_dtype: torch.dtype
    offsets: Tensor | None = None
    x_scale: Tensor | None = None

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        rows = foldable(x)
        a, a_scale = _quantized(rows, scale.shape[-1], self.x_scale)
        if self.offsets is None:
            y = fp8_gemm_nt(a, a_scale, weight, scale, bias=bias, out_dtype=self.out_dtype)
            return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])
        out = x.new_zeros((x.shape[0], weight.shape[1]), dtype=self.out_dtype)
        return m_grouped_fp8_gemm_nt_contiguous(a, a_scale, weight, scale, self.offsets, out=out)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, scale, bias, *options = inputs
        product = _Product(*options)
        ctx.save_for_backward(weight, scale, product.offsets)
        ctx.x_dtype, ctx.x_shape = x.dtype, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(x, weight, scale, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():
            return _gradients(ctx, grads[0])
        return differentiable_once(grads[0], lambda: _gradients(ctx, grads[0]))


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, offsets = ctx.saved_tensors
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = _dgrad(ctx, dy, weight, scale, offsets)
    if ctx.needs_input_grad[3]:
        db = gradient_of_bias(foldable(dy), ctx.bias_dtype)
    return dx, None, None, db, None, None, None


def _dgrad(ctx: Any, dy: Tensor, weight: Tensor, scale: Tensor, offsets: Tensor | None) -> Tensor:
    rows = weight.shape[-2]
    if scale.shape[-2] not in (1, ceil_div(rows, GROUP)):  # a scale for each row of the weight
        if offsets is None:
            return gradient_of_x(dy.to(ctx.x_dtype), ctx.x_shape, weight, scale)
        raise RuntimeError(
            "torchext: scale of frozen experts must be [E, ceil(N / 128), ceil(K / 128)] or have "
            f"one element for the gradient of their input (got {list(scale.shape)} for a weight "
            f"{list(weight.shape)}); detach the input, or requantize with quantize_128x128"
        )
    transposed = pitched(weight.mT)
    return _Product(ctx.x_dtype, offsets)(dy, transposed, scale.mT, None)


def _quantized(x: Tensor, groups: int, x_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x in e4m3 with the scales that fit a weight with `groups` scales along K."""
    if x_scale is None:
        along_k = groups > 1 or x.shape[-1] <= GROUP
        return quantize_1x128(x) if along_k else quantize_rowwise(x)
    limit = torch.finfo(_E4M3).max
    data = (x.float() / x_scale).clamp(-limit, limit).to(_E4M3)
    matrix = pitched(data.view(-1, data.shape[-1]))
    if groups == 1:
        return matrix, x_scale.view(1, 1)
    padded = ceil_div(matrix.shape[0], 4) * 4
    columns = x_scale.view(1, 1).expand(groups, padded).contiguous()
    return matrix, columns.t()[: matrix.shape[0]]
