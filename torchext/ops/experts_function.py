"""The experts of a mixture as one autograd function: tokens in, tokens out, in one process.

Each of T tokens chooses k of E experts. Each of the S = T k choices gets a row, its slot, so that
an expert's rows are a run, whose end is in `offsets` (moe.py):

    rows [S, K]   x of each choice's token
    y    [S, K]   what the choice's expert makes of it, times the choice's weight (experts_rows.py)
    out  [T, K]   the sum of y over the choices of a token, in FP32, in their order

Bytes kept for backward, for each choice: those of experts_rows.py, K for the row in FP8, and 8 for
its number and weight. If a token's rows take more bytes than x itself (k > 2 in BF16), x is kept
instead, and backward makes the rows again, with the same bits: 2 K for each token, not k K.

Nothing here waits for the device, and every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dispatch.declaration import DECLARATIONS
from ..recipe import Recipe
from . import experts_rows
from .delayed import leaf
from .experts_rows import Needs, Pair, Rows
from .linear_function import Operand, differentiable_once, quantize_activation, quantizer_options
from .mlp_function import MLP
from .moe import moe_combine, moe_permute, moe_permute_quantize_1x128, moe_route

_quantize_1x128 = DECLARATIONS["quantize_1x128"].handles.op
_quantize_1x128_t = DECLARATIONS["quantize_1x128_t"].handles.op


class Routing(NamedTuple):
    """Which rows belong to which choice and expert.

    Attributes:
        slots: [T, k], int32: the row of each choice; None if the tokens are the rows, which the
            caller sorted.
        offsets: [E], int32: where each expert's rows end. Rows from offsets[-1] on have no expert.
    """

    slots: Tensor | None
    offsets: Tensor

    @classmethod
    def of(cls, ids: Tensor, weights: Tensor | None, experts: int) -> Routing:
        """ids: [T, k], the expert of each choice; or, if weights is None, the offsets [E] of tokens
        that the caller sorted."""
        return cls(None, ids) if weights is None else cls(*moe_route(ids, experts))

    def rows_of_tokens(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """x [T, K] as rows [S, K], times the choices' weights [T, k] unless tokens are rows."""
        return x if self.slots is None else moe_permute(x, self.slots, weights)

    def quantized(self, x: Tensor, recipe: Recipe, *, transposed: bool) -> Operand:
        """x [T, K] as rows [S, K], quantized. `transposed`: both ways, from one copy in BF16."""
        dtype = recipe.input_dtype
        if self.slots is not None and not transposed:
            return Operand(*self.quantized_rows(x, dtype, recipe), None, None)
        rows = self.rows_of_tokens(x)
        return quantize_activation(rows, dtype, recipe, plain=True, transposed=transposed)

    def quantized_rows(self, x: Tensor, dtype: torch.dtype, recipe: Recipe) -> Pair:
        """x [T, K] as rows [S, K], each token quantized once."""
        options = quantizer_options(dtype, recipe)
        if self.slots is None:
            data, scale = _quantize_1x128(x, **options)
        else:
            data, scale = moe_permute_quantize_1x128(x, self.slots, **options)
        return data, scale

    def transposed_rows(
        self, x: Tensor, weights: Tensor | None, dtype: torch.dtype, recipe: Recipe
    ) -> Pair:
        """x [T, K] times the choices' weights [T, k], quantized along the rows: [K, S]."""
        rows = self.rows_of_tokens(x, weights)
        data, scale = _quantize_1x128_t(rows, **quantizer_options(dtype, recipe))
        return data, scale

    def keeps_tokens(self, x: Tensor) -> bool:
        """Whether backward keeps x [T, K] rather than its rows in FP8, whichever is smaller."""
        return self.slots is not None and self.slots.shape[1] > x.element_size()

    def by_row(self, values: Tensor | None) -> Tensor | None:
        """values [T, k] of choices as [S], in FP32. None without values, or if tokens are rows."""
        if values is None or self.slots is None:
            return None
        rows = torch.empty(values.numel(), dtype=torch.float32, device=values.device)
        return rows.index_copy(0, self.slots.reshape(-1).long(), values.reshape(-1).float())

    def by_choice(self, values: Tensor) -> Tensor:
        """values [S] of rows as [T, k]."""
        assert self.slots is not None
        return values[self.slots.long()]

    def sum_of_choices(
        self, rows: Tensor, dtype: torch.dtype, residual: Tensor | None = None
    ) -> Tensor:
        """[T, K], the FP32 sum of each token's rows and its residual, rounded to `dtype`."""
        if self.slots is None:
            return rows.to(dtype)
        return moe_combine(rows, self.slots, residual=residual, out_dtype=dtype)


def forward_only(
    config: MLP,
    operands: list[Operand],
    x: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """`ExpertsFunction` without gradients. Every operand is quantized."""
    routing = Routing.of(ids, weights, operands[0].data.shape[0])  # type: ignore[union-attr]
    pair = routing.quantized_rows(x, config.recipe.input_dtype, config.recipe)
    rows = Rows(*pair, routing.offsets, routing.by_row(weights))
    y, _ = experts_rows.forward(config, operands, rows)
    return routing.sum_of_choices(y, x.dtype, residual)


class ExpertsFunction(torch.autograd.Function):
    """The experts for tokens, with gradients for x, the weights of choices, both parameters and the
    residual.

    apply(x [T, K], ids [T, k], weights [T, k], config, operands, up, down, residual). An operand is
    None where the parameter is to be quantized here. residual [T, K], of config.out_dtype, is added
    to the sums before they are rounded; None for none. Returns [T, K] in x's dtype. Gradients have
    the dtypes of what they belong to. If the rows of x are sorted by expert, `weights` and
    `residual` are None and `ids` is [E], int32: where each expert's rows end.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, ids, weights, config, given, *parameters, residual = inputs
        recipe = config.recipe
        needs_x, _, needs_weights, _, _, needs_up, needs_down, _ = ctx.needs_input_grad
        needs = Needs(needs_x, needs_weights, needs_up, needs_down)
        operands = experts_rows.quantize_weights(given, parameters, recipe, needs)
        routing = Routing.of(ids, weights, parameters[0].shape[0])
        keeps_tokens = needs_up and routing.keeps_tokens(x)
        q_rows = routing.quantized(x, recipe, transposed=needs_up and not keeps_tokens)
        rows = Rows(q_rows.data, q_rows.scale, routing.offsets, routing.by_row(weights))  # type: ignore[arg-type]
        y, kept = experts_rows.forward(config, operands, rows, needs)
        kept_rows = [x, None] if keeps_tokens else [q_rows.data_t, q_rows.scale_t]
        kept_weights = weights if needs_down else None
        ctx.save_for_backward(routing.slots, kept_weights, *kept_rows, *kept.tensors)
        ctx.config, ctx.kept = config, kept._replace(tensors=())
        compiled = torch.compiler.is_compiling()
        ctx.parameters = [None if compiled else leaf(p) for p in parameters]
        optional = [None if t is None else t.dtype for t in (weights, residual)]
        ctx.dtypes = [x.dtype, *optional, *(p.dtype for p in parameters)]
        return routing.sum_of_choices(y, x.dtype, residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return differentiable_once(grads[0], lambda: _gradients(ctx, grads[0]))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    config: MLP = ctx.config
    recipe, needs = config.recipe, ctx.kept.needs
    x_dtype, weights_dtype, residual_dtype, *dtypes = ctx.dtypes
    slots, weights, x_or_rows, rows_scale, *tensors = ctx.saved_tensors
    kept = ctx.kept._replace(tensors=tuple(tensors))
    dx = dweights = dresidual = None
    if ctx.needs_input_grad[7]:
        dresidual = grad.to(residual_dtype)
    if needs == experts_rows.NOTHING:
        return None, None, None, None, None, None, None, dresidual

    routing = Routing(slots, kept.tensors[0])
    dy, dtype = grad.to(config.out_dtype), recipe.grad_dtype
    plain = routing.quantized_rows(dy, dtype, recipe) if needs.h else (None, None)
    along_rows: Any = (None, None)
    if needs.down:
        factors = None if weights is None else weights.float()
        along_rows = routing.transposed_rows(dy, factors, dtype, recipe)
    gradient = Operand(*plain, *along_rows)
    rows_t: Any = (x_or_rows, rows_scale)
    if needs.up and rows_scale is None:  # x itself was kept
        rows_t = routing.transposed_rows(x_or_rows, None, recipe.input_dtype, recipe)
    grads = experts_rows.backward(config, kept, gradient, rows_t, dtypes, parameters=ctx.parameters)
    if grads.rows is not None:
        dx = routing.sum_of_choices(grads.rows, x_dtype)
    if grads.weights is not None:
        dweights = routing.by_choice(grads.weights).to(weights_dtype)
    return dx, None, dweights, None, None, grads.up, grads.down, dresidual
