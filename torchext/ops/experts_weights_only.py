"""The experts of a mixture with FP8 weights that multiply wide activations (w8a16).

Each expert's rows are one product of `torchext.ops.fp8_linear`: nothing is padded, no weight is
dequantized into memory, and only experts with rows are read. The products are one private op,
`torchext::_fp8_linear_by_expert`, so that graphs need not know how many rows each expert has. Its
kernels are in Python, so a graph that contains it needs Python. On a GPU the host waits to learn
where each expert's rows end, so a CUDA graph cannot capture the op.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._dispatch.autograd import apply, recorded_outside
from .._dispatch.batching import each
from .._dispatch.declaration import DECLARATIONS, declare
from .._dispatch.layout import pitched
from .._dispatch.sharding_rules import replicated
from . import weights_only as _weights_only  # noqa: F401  (declares fp8_linear)
from .mlp_function import activate
from .moe import moe_combine, moe_permute, moe_route

_DEF = torch.library.Library("torchext", "FRAGMENT")
_DEF.define(
    "_fp8_linear_by_expert(Tensor x, Tensor weight, Tensor weight_scale, Tensor offsets, "
    "bool transposed=False) -> Tensor"
)
_by_expert = torch.ops.torchext._fp8_linear_by_expert.default
_fp8_linear = DECLARATIONS["fp8_linear"].handles.alias


def fp8_linear_by_expert(x: Tensor, weight: Tensor, scale: Tensor, offsets: Tensor) -> Tensor:
    """Each expert's rows of x times its own dequantized weight, transposed. x has a gradient.

    Args:
        x: [S, K], FP32, BF16 or FP16. Its rows are sorted by expert.
        weight: [E, N, K], FP8.
        scale: FP32 [E, ceil(N / 128), ceil(K / 128)] or, with one element, [1, 1, 1].
        offsets: [E], int32: where each expert's rows end.

    Returns:
        [S, N], x's dtype. Rows from offsets[-1] on are 0.
    """
    result: Tensor = _by_expert(x, weight, scale, offsets)
    return result


def _features(weight: Tensor, transposed: bool) -> int:
    return weight.shape[-1 if transposed else -2]


def _kernel(
    x: Tensor, weight: Tensor, scale: Tensor, offsets: Tensor, transposed: bool = False
) -> Tensor:
    y = x.new_zeros((x.shape[0], _features(weight, transposed)))
    scale = scale.expand(weight.shape[0], *scale.shape[1:])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            matrix, of_matrix = weight[expert], scale[expert]
            if transposed:
                matrix, of_matrix = matrix.t(), of_matrix.t()
            y[start:end] = _fp8_linear(x[start:end], pitched(matrix), of_matrix)
            start = end
    return y


for _device in ("CPU", "CUDA"):
    _DEF.impl("_fp8_linear_by_expert", _kernel, _device)


def _fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, transposed: bool = False
) -> Tensor:
    return x.new_empty((x.shape[0], _features(weight, transposed)))


def _flops(x_shape: Any, weight_shape: Any, *_: Any, **options: Any) -> int:
    return 2 * x_shape[0] * math.prod(weight_shape[1:])


def _autograd(x: Tensor, *operands: Any) -> Tensor:
    if forward_ad._current_level < 0 and not (torch.is_grad_enabled() and x.requires_grad):
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = _by_expert(x, *operands)
            return result
    return apply(_ByExpert, x, *operands)


class _ByExpert(torch.autograd.Function):
    """The op with the gradient of x: the product with the transposed weights, one expert after
    another, so that one transposed matrix lives at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *operands: Any) -> Tensor:
        *tensors, ctx.transposed = operands if len(operands) == 4 else (*operands, False)
        ctx.save_for_backward(*tensors)
        ctx.inputs = 1 + len(operands)
        result: Tensor = recorded_outside(_by_expert, x, *operands)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx = _by_expert(grads[0], *ctx.saved_tensors, not ctx.transposed)
        return dx, *(None for _ in range(ctx.inputs - 1))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise NotImplementedError(
            "torchext: x of experts with FP8 weights must have no tangent (got one, from "
            "torch.func.jvp, jacfwd or torch.autograd.forward_ad); use reverse mode"
        )


declare(
    "_fp8_linear_by_expert",
    fake=_fake,
    flops=_flops,
    batching=each,
    gradient=_autograd,
    sharding=replicated("_fp8_linear_by_expert", "experts call it with plain tensors"),
)


def weights_only_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    operands: list[tuple[Tensor, Tensor]],
    *,
    activation: str,
    tanh_approximation: bool | None,
    residual: Tensor | None = None,
) -> Tensor:
    """For each token, the sum over its choices of weight * down[id] @ activation(up[id] @ x).

    x, `weights` and `residual` have gradients. The activation is computed in x's dtype, as in
    the wide model; the choices of a token are added in FP32.

    Args:
        x: [T, K], FP32, BF16 or FP16.
        ids: [T, k], int64 or int32; a choice whose id is not from 0 to E - 1 counts as zero.
        weights: [T, k], of any floating-point dtype. If None, the rows of x are sorted by expert,
            and ids [E], int32, says where each expert's end.
        operands: the FP8 data and the scales of `up` [E, W, K] and `down` [E, K, I]; or of gate,
            up and down, where gate and up are two.
        activation, tanh_approximation: as in torchext.ops.mlp_function.MLP.
        residual: [T, K]: added to the sums before they are rounded.

    Returns:
        [T, K], x's dtype.
    """
    *before, down = operands
    slots, rows, offsets = None, x, ids
    if weights is not None:
        slots, offsets = moe_route(ids, down[0].shape[0])
        rows = moe_permute(x, slots)
    wides = [fp8_linear_by_expert(rows, *pair, offsets) for pair in before]
    h = activate(activation, tanh_approximation, wides)
    y = fp8_linear_by_expert(h, *down, offsets)
    if slots is None or weights is None:
        return y
    return moe_combine(y, slots, weights.float(), residual=residual, out_dtype=x.dtype)
