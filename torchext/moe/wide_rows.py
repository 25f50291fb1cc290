"""Dispatch and combine with gradients, for experts of other libraries, whose rows are wide.

torchext.moe.experts keeps rows in FP8 between dispatch, experts and combine. Here experts may be
any function: rows are dequantized for it, and the weights of choices are applied to its result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.linear_function import differentiable_once
from ..ops.moe import moe_permute
from ..ops.quantize import dequantize
from .dispatcher import Dispatcher
from .routing import Routing


@torch._disable_dynamo
def dispatch_rows(
    x: Tensor, dispatcher: Dispatcher, routing: Routing, *, exact: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of this rank's experts, which travel in FP8. Backward combines their gradients.

    Args:
        x: [T, K], bfloat16, float16 or float32.
        dispatcher, routing: for these tokens.
        exact: of backward, as for Dispatcher.combine.

    Returns:
        rows: [S, K], of x's dtype, sorted by expert.
        offsets, weight: of `Rows`; `combine_rows` needs the weight.

    Raises what Dispatcher.dispatch raises.
    """
    return _Dispatch.apply(x, dispatcher, routing, exact)  # type: ignore[no-any-return]


@torch._disable_dynamo
def combine_rows(
    y: Tensor,
    weight: Tensor,
    topk_weights: Tensor,
    dispatcher: Dispatcher,
    routing: Routing,
    *,
    exact: bool = True,
) -> Tensor:
    """For each token the sum of its rows, times their weights. Backward sends gradients in FP8.

    A product is computed in FP32 and rounded to y's dtype, in which rows return; sums are FP32.

    Args:
        y: [S, K], one row for each that dispatch_rows returned.
        weight: [S], from dispatch_rows.
        topk_weights: [T, k], those of the routing, for their gradient.
        dispatcher, routing: those of dispatch_rows.
        exact: as for Dispatcher.combine.

    Returns:
        [T, K], of y's dtype.

    Raises what Dispatcher.combine raises.
    """
    return _Combine.apply(y, topk_weights, weight, dispatcher, routing, exact)  # type: ignore[no-any-return]


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, dispatcher, routing, exact = inputs
        ctx.settings = dispatcher, routing, exact, x.dtype
        rows = dispatcher.dispatch(x, routing)
        ctx.mark_non_differentiable(rows.offsets, rows.weight)
        return dequantize(rows.data, rows.scale, out_dtype=x.dtype), rows.offsets, rows.weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dispatcher, routing, exact, dtype = ctx.settings

        def gradients() -> tuple[Tensor | None, ...]:
            dx = dispatcher.combine(grads[0], routing, exact=exact, out_dtype=dtype)
            return dx, None, None, None

        return differentiable_once(grads[0], gradients)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, topk_weights, weight, dispatcher, routing, exact = inputs
        ctx.save_for_backward(y, weight)
        ctx.settings = dispatcher, routing, topk_weights.dtype
        each = torch.arange(len(y), dtype=torch.int32, device=y.device)[:, None]
        weighted = moe_permute(y, each, weight[:, None])
        return dispatcher.combine(weighted, routing, exact=exact)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return differentiable_once(grads[0], lambda: _gradients(ctx, grads[0]))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, weight = ctx.saved_tensors
    dispatcher, routing, dtype = ctx.settings
    sent = dispatcher.dispatch(grad, routing, dtype=dispatcher.recipe.grad_dtype)
    rows = dequantize(sent.data, sent.scale, out_dtype=torch.float32)
    dy = dweights = of_choices = None
    if ctx.needs_input_grad[1]:
        of_choices = dispatcher.to_choices((rows * y.float()).sum(-1), routing)
    if ctx.needs_input_grad[0]:
        dy = (rows * weight[:, None]).to(y.dtype)
    if of_choices is not None:
        dweights = of_choices.wait().to(dtype)
    return dy, dweights, None, None, None, None
