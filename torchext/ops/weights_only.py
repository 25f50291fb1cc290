"""The weights-only product (w8a16), part of `torchext.ops`: x stays wide, the weight is FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._dispatch.autograd import Gradient, asks_gradient
from .._dispatch.batching import multiply_wide_rows
from .._dispatch.declaration import Sharding, declare
from .._dispatch.dtensor import is_distributed
from .._dispatch.flops import linear_flops
from .._dispatch.layout import GROUP, leading_sizes, pitched
from .._dispatch.scales import call_with_float32_scales, float32_in_graph
from .._dispatch.sm_budget import gemm_sms
from .gemm import gradient_of_bias


def _fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    num_sms: int = 0,
) -> Tensor:
    return x.new_empty((*leading_sizes(x), weight.shape[0]))


def gradient_of_x(
    grad: Tensor, x_shape: torch.Size, weight: Tensor, weight_scale: Tensor
) -> Tensor:
    """grad @ dequantize(weight), by products with the transposed weight (one byte an element).

    Blocks keep their scales when they are transposed. A scale for each row of the weight belongs to
    a column of `grad`: FP32 copies of `grad` take these scales, one copy for each group of K.
    """
    n, k = weight.shape
    if n == 0 or 0 in x_shape:
        return grad.new_zeros(x_shape)
    transposed = pitched(weight.t())
    groups = weight_scale.shape[-1] if weight_scale.dim() else 1
    scale = weight_scale.reshape(-1, groups)
    if scale.numel() == 1 or scale.shape[0] != n:
        return _fp8_linear(grad, transposed, scale.t())
    columns = transposed.split(GROUP if scale.shape[1] > 1 else k)
    one = scale.new_ones(1, 1)
    parts = [
        _fp8_linear(grad.float() * scale[:, group], block, one)
        for group, block in enumerate(columns)
    ]
    return torch.cat(parts, -1).to(grad.dtype)


def _shard(
    placements: Any, x: Any, weight: Any, weight_scale: Any, *bias_and_options: object
) -> list[Sharding]:
    """Shards of the weight must consist of whole scale groups.

    bias_and_options: the dispatcher omits arguments that have their default values.
    """
    shard, partial, whole = placements.Shard, placements.Partial(), placements.Replicate()
    last = x.ndim - 1
    (n, k), (*_, scale_rows, scale_groups) = weight.shape, weight_scale.shape
    ranks = weight.mesh.size()

    def sharding(output: Any, x: Any, weight: Any, scale: Any, of_bias: Any) -> Sharding:
        rest: list[Any] = [None for _ in bias_and_options]
        if rest and bias_and_options[0] is not None:
            rest[0] = of_bias
        return [output], [x, weight, scale, *rest]

    found = [
        sharding(whole, whole, whole, whole, whole),
        # sequence and data parallel: each rank has some of the rows
        *(sharding(shard(dim), shard(dim), whole, whole, whole) for dim in range(last)),
    ]
    if scale_rows in (1, n) or n % (GROUP * ranks) == 0:
        # column-wise: each rank has some of the output features
        scale = whole if scale_rows == 1 else shard(0)
        found.append(sharding(shard(last), whole, shard(0), scale, shard(0)))
    if scale_groups == 1 or k % (GROUP * ranks) == 0:
        # row-wise: each rank has some of the input features; the bias must be added once
        scale = whole if scale_groups == 1 else shard(1)
        found.append(sharding(partial, shard(last), shard(1), scale, partial))
    return found


_fp8_linear, _fp8_linear_alias, _ = declare(
    "fp8_linear",
    fake=_fake,
    flops=linear_flops,
    batching=multiply_wide_rows,
    gradient=[
        Gradient("x", gradient_of_x, saved=("weight", "weight_scale")),
        Gradient("bias", gradient_of_bias),
    ],
    sharding=_shard,
)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    num_sms: int = 0,
) -> Tensor:
    """x @ dequantized weight.T (+ bias) for an x that is not quantized.

    Use it where FP8 weights save memory and bandwidth but activations must keep their precision:
    in serving with few tokens, and under LoRA. The shape of weight_scale determines the
    granularity:

        [ceil(N / 128), ceil(K / 128)]  128x128 blocks
        [N, ceil(K / 128)]              1x128
        [N, 1]                          row-wise
        [1, 1]                          tensor-wise

    Weights are exact in the arithmetic that multiplies them: BF16 or FP16 with FP32 sums for an x
    of these dtypes; for a float32 x, FP32 or three BF16 parts that hold all of its bits. Sums over
    at most 128 elements of K are added, and scales and bias are applied, in FP32; the result is
    rounded once. A row of the result does not depend on the other rows of x, nor on their number.
    Error bounds: docs/numerics.md.

    The op has gradients with respect to x and `bias`, and they can be differentiated again; it has
    none with respect to the weight and its scales. The gradient of x is a product with the
    transposed weight, which backward makes (one byte for each element). With scales for each row of
    the weight, that product is computed in FP32.

    Args:
        x: [..., K], bfloat16, float16 or float32, with any strides. It is read in place if its rows
            are contiguous and fold into one row stride and, on a GPU, start at multiples of 16
            bytes. Otherwise it is copied, as torch.nn.functional.linear does.
        weight: [N, K], torch.float8_e4m3fn or torch.float8_e5m2; any K. Its rows are contiguous. On
            a GPU they are a multiple of 16 bytes apart, and it starts at a 16-byte aligned address,
            as the quantizers return it; the CPU reads rows of any pitch at any address.
        weight_scale: float32. For 1x128 groups it must be M-major and 16-byte aligned, as the
            quantizers return it: stride 1 between rows, and between scale groups a multiple of four
            elements. Other dtypes and shapes: as b_scale of `fp8_gemm_nt`.
        bias: [N], bfloat16, float16 or float32, contiguous.
        num_sms: the number of SMs that the CUDA kernel may occupy, so that other work can run on
            the rest; 0 for all.

    Returns:
        A contiguous [..., N] tensor of x's dtype.

    Raises:
        ValueError: the shapes do not fit together; the weight or its scale is not laid out as the
            quantizers return it; the tensors are on different devices; num_sms < 0.
        TypeError: x, weight, weight_scale or bias has another dtype.
        RuntimeError: this build has no kernels for the GPU.
    """
    if type(x) not in (Tensor, torch.nn.Parameter):
        is_distributed(x)  # registers the sharding rules if it is the first DTensor
    if is_compiling():
        (weight_scale,) = float32_in_graph((weight, weight_scale))
    num_sms = num_sms or gemm_sms(x)
    try:
        if not (asks_gradient(x) or asks_gradient(bias)):
            return _fp8_linear_alias(x, weight, weight_scale, bias, num_sms)
        return _fp8_linear(x, weight, weight_scale, bias, num_sms=num_sms)
    except RuntimeError as error:
        return call_with_float32_scales(
            error,
            fp8_linear,
            *(x, weight, weight_scale, bias),
            pairs=((1, 2),),
            num_sms=num_sms,
        )
