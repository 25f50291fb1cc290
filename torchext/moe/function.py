"""Dispatch, experts and combine as one autograd function, which keeps FP8 rows for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import experts_rows
from ..ops.delayed import leaf
from ..ops.experts_rows import NOTHING, Needs
from ..ops.experts_rows import Rows as WeightedRows
from ..ops.linear_function import Operand, differentiable_once
from ..ops.mlp_function import MLP
from .dispatcher import Dispatcher
from .routing import Routing


@torch._disable_dynamo
def experts(
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    dispatcher: Dispatcher,
    routing: Routing,
    config: MLP,
    residual: Tensor | None = None,
    operands: tuple[Operand | None, Operand | None] = (None, None),
    exact: bool = True,
) -> Tensor:
    """For each token, the sum over its choices of weight * down[id] @ activation(up[id] @ x).

    Rows and their gradients travel in FP8, results and the gradient of x in BF16. With exact=True
    the result and the gradients of x and weights have the same bits for any number of ranks. The
    gradients of up and down have not: wgrad quantizes runs of 128 rows, which begin elsewhere.
    Backward is collective, too: what requires a gradient must be the same on all ranks.

    Args:
        x: [T, K], this rank's tokens.
        weights: [T, k], of the choices. The routing has their values; this is for their gradient.
        up: [E / R, W, K], of this rank's experts: the gate's rows and then up's, W = 2 I, or those
            of up alone, W = I.
        down: [E / R, K, I].
        dispatcher: where the experts are.
        routing: from dispatcher.create_routing, for these tokens.
        config: what an expert computes; its recipe is the dispatcher's.
        residual: [T, K], of config.out_dtype: added before the sum is rounded.
        operands: up and down quantized already, or None.
        exact: see Dispatcher.combine; for the gradient of x too.

    Returns:
        [T, K], in x's dtype. Under torch.compile this is a break in the graph: the collectives and
        the exchange of counts run between graphs.

    Raises:
        ValueError, TypeError, RuntimeError: as Dispatcher.dispatch and Dispatcher.combine do.
    """
    settings = dispatcher, routing, config, operands, exact, torch.is_grad_enabled()
    return _Experts.apply(x, weights, up, down, residual, settings)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weights, up, down, residual, settings = inputs
        dispatcher, routing, config, given, exact, graph = settings
        needs = Needs(*ctx.needs_input_grad[:4]) if graph else NOTHING
        recipe = config.recipe
        operands = experts_rows.quantize_weights(list(given), [up, down], recipe, needs)
        rows = dispatcher.dispatch(x.to(config.out_dtype), routing)
        weighted = WeightedRows(rows.data, rows.scale, rows.offsets, rows.weight)
        y, kept = experts_rows.forward(config, operands, weighted, needs)
        rows_t: Any = (None, None)
        if needs.up:
            rows_t = experts_rows.transposed((rows.data, rows.scale), recipe, None, gradient=False)
        ctx.save_for_backward(rows.weight if needs.down else None, *rows_t, *kept.tensors)
        ctx.settings = dispatcher, routing, config, exact, kept._replace(tensors=())
        ctx.parameters = [leaf(up), leaf(down)]
        optional = [None if t is None else t.dtype for t in (weights, residual)]
        ctx.dtypes = [x.dtype, *optional, up.dtype, down.dtype]
        return dispatcher.combine(y, routing, residual=residual, exact=exact, out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return differentiable_once(grads[0], lambda: _gradients(ctx, grads[0]))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dispatcher, routing, config, exact, kept = ctx.settings
    recipe, needs = config.recipe, kept.needs
    x_dtype, weights_dtype, residual_dtype, *dtypes = ctx.dtypes
    weight, *rows_t_and_kept = ctx.saved_tensors
    rows_t, kept = rows_t_and_kept[:2], kept._replace(tensors=tuple(rows_t_and_kept[2:]))
    dx = dweights = None
    dresidual = grad.to(residual_dtype) if ctx.needs_input_grad[4] else None
    if needs == NOTHING:
        return None, None, None, None, dresidual, None
    dy = dispatcher.dispatch(grad.to(config.out_dtype), routing, dtype=recipe.grad_dtype)
    plain = (dy.data, dy.scale)
    along_rows: Any = (None, None)
    if needs.down:
        along_rows = experts_rows.transposed(plain, recipe, weight, gradient=True)
    gradient = Operand(*plain, *along_rows)
    found = experts_rows.backward(config, kept, gradient, rows_t, dtypes, parameters=ctx.parameters)
    rows = of_choices = None
    if found.rows is not None:
        rows = dispatcher.combine(
            found.rows, routing, exact=exact, out_dtype=x_dtype, async_op=True
        )
    if found.weights is not None:
        of_choices = dispatcher.to_choices(found.weights, routing)
    if rows is not None:
        dx = rows.wait()
    if of_choices is not None:
        dweights = of_choices.wait().to(weights_dtype)
    return dx, dweights, found.up, found.down, dresidual, None
