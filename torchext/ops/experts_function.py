"""The experts of a mixture as one autograd function: grouped FP8 GEMMs, forward and backward.

Each of T tokens chooses k of E experts. The S = T k choices are sorted by expert, so that an
expert's rows are a run, whose end is in `offsets`:

    rows [S, K]   x of each choice's token
    wide [S, W] = rows @ up[e].T       gate and up side by side (W = 2 I), or up alone (W = I)
    h    [S, I] = activation(wide)     quantized as it is computed
    y    [S, K] = h @ down[e].T        times the choice's weight, which multiplies the scales of h
    out  [T, K] = the sum of y over the choices of a token, in FP32, in their order

fprop and dgrad are grouped along their rows, wgrad along K. Backward needs no y for the gradients
of the weights: dweight = <dy, y> = <dy @ down[e], h>, and dgrad computes the product on the left.

Bytes kept for backward, for each choice: those of mlp_function.py, and 12 for its place and weight.
Nothing here waits for the device, and every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch.declaration import DECLARATIONS
from .._dispatch.layout import laid_out, pitched
from .grouped import k_grouped_fp8_gemm_nt, m_grouped_fp8_gemm_nt_contiguous
from .linear_function import (
    Operand,
    differentiable_once,
    quantize_activation,
    quantize_weight,
    quantizer_options,
)
from .mlp_function import MLP, activated

_dequantize = DECLARATIONS["dequantize"].handles.alias
_quantize_1x128 = DECLARATIONS["quantize_1x128"].handles.op


class Routing(NamedTuple):
    """Which rows belong to which choice, token and expert.

    Attributes:
        order: [S], int64: the choice that each row is of; choice t * k + j is the j-th of token t.
            None if the tokens are the rows, which the caller sorted.
        offsets: [E], int32: where each expert's rows end. Rows from offsets[-1] on have no expert.
    """

    order: Tensor | None
    offsets: Tensor

    @classmethod
    def of(cls, ids: Tensor, experts: int) -> Routing:
        """ids: [T, k], integers from 0; a choice whose id is `experts` or more has no expert."""
        sorted_ids, order = ids.reshape(-1).sort(stable=True)
        numbers = torch.arange(experts, dtype=ids.dtype, device=ids.device)
        return cls(order, torch.searchsorted(sorted_ids, numbers, right=True, out_int32=True))

    def rows_of_tokens(self, x: Tensor, choices: int) -> Tensor:
        """x [T, K] as rows [S, K]."""
        return x if self.order is None else x.index_select(0, self.order // choices)

    def by_choice(self, rows: Tensor) -> Tensor:
        """rows [S, ...] in the order of the choices."""
        if self.order is None:
            return rows
        rows_of_choices = torch.empty_like(self.order)
        rows_of_choices[self.order] = torch.arange(self.order.shape[0], device=rows.device)
        return rows.index_select(0, rows_of_choices)

    def sum_of_choices(self, rows: Tensor, choices: int, dtype: torch.dtype) -> Tensor:
        """[T, K], the FP32 sum of each token's rows, rounded to `dtype`."""
        tokens = rows.shape[0] // choices
        by_token = self.by_choice(rows).view(tokens, choices, rows.shape[1])
        return by_token.sum(1, dtype=torch.float32).to(dtype)


def experts(
    config: MLP,
    routing: Routing,
    operands: list[Operand],
    q_rows: Operand,
    row_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [S, K], weighted, and `wide` [S, W].

    Args:
        config: what an expert computes.
        routing: of the choices.
        operands: the quantized `up` [E, W, K] and `down` [E, K, I].
        q_rows: rows [S, K], quantized.
        row_weights: [S], FP32; None for ones.
    """
    up, down = operands
    wide = _by_rows(q_rows.data, q_rows.scale, (up.data, up.scale), routing, config.out_dtype)
    h, h_scale = activated(config, "", wide)
    y_scale = h_scale if row_weights is None else _weighted(h_scale, row_weights)
    return _by_rows(h, y_scale, (down.data, down.scale), routing, config.out_dtype), wide


def _weighted(scale: Tensor, row_weights: Tensor) -> Tensor:
    """M-major scales times a factor for each row. In place, a compiled graph would lose strides."""
    columns = scale.t() * row_weights
    return F.pad(columns, (0, -scale.shape[0] % 4))[:, : scale.shape[0]].t()


def _by_rows(
    a: Tensor | None, a_scale: Tensor | None, b: Any, routing: Routing, dtype: torch.dtype
) -> Tensor:
    """The product of each expert's rows of a with its own b; zero for rows of no expert."""
    assert a is not None and a_scale is not None
    data, scale = b
    out = a.new_zeros((a.shape[0], data.shape[1]), dtype=dtype)
    return m_grouped_fp8_gemm_nt_contiguous(a, a_scale, data, scale, routing.offsets, out=out)


def forward_only(
    config: MLP, operands: list[Operand], x: Tensor, ids: Tensor, weights: Tensor | None
) -> Tensor:
    """`ExpertsFunction` without gradients. Every operand is quantized."""
    recipe = config.recipe
    routing, choices = _routing(ids, weights, operands[0].data.shape[0])  # type: ignore[union-attr]
    rows = routing.rows_of_tokens(x, choices)
    q_rows = quantize_activation(rows, recipe.input_dtype, recipe, plain=True, transposed=False)
    row_weights = _by_row(weights, routing)
    y, _ = experts(config, routing, operands, q_rows, row_weights)
    return routing.sum_of_choices(y, choices, x.dtype)


def _routing(ids: Tensor, weights: Tensor | None, experts: int) -> tuple[Routing, int]:
    """The routing, and the number of choices of a token."""
    return (Routing(None, ids), 1) if weights is None else (Routing.of(ids, experts), ids.shape[1])


def _by_row(weights: Tensor | None, routing: Routing) -> Tensor | None:
    return None if weights is None else weights.reshape(-1)[routing.order].float()


class ExpertsFunction(torch.autograd.Function):
    """`experts` for tokens, with gradients for x, the weights of choices and both parameters.

    apply(x [T, K], ids [T, k], weights [T, k], config, operands, up, down). An operand is None
    where the parameter is to be quantized here. Returns [T, K] in x's dtype. Gradients have the
    dtypes of what they belong to. If the rows of x are sorted by expert, `weights` is None and
    `ids` is [E], int32: where each expert's rows end.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, ids, weights, config, given, *parameters = inputs
        recipe = config.recipe
        needs_x, _, needs_weights, _, _, needs_up, needs_down = ctx.needs_input_grad
        ctx.needs_wide = needs_x or needs_up
        ctx.needs_dh = ctx.needs_wide or needs_weights
        transposed = [needs_x, ctx.needs_dh]
        operands = [
            operand or quantize_weight(parameter, recipe, transposed=needed)
            for operand, parameter, needed in zip(given, parameters, transposed, strict=True)
        ]
        routing, choices = _routing(ids, weights, parameters[0].shape[0])
        rows = routing.rows_of_tokens(x, choices)
        q_rows = quantize_activation(
            rows, recipe.input_dtype, recipe, plain=True, transposed=needs_up
        )
        del rows
        row_weights = _by_row(weights, routing)
        y, wide = experts(config, routing, operands, q_rows, row_weights)
        kept_wide: list[Tensor | None] = []
        if ctx.needs_dh or needs_down:
            if config.save == "bf16":
                kept_wide = [wide]
            elif config.save == "fp8":
                options = quantizer_options(recipe.input_dtype, recipe)
                kept_wide = [*_quantize_1x128(wide, **options)]
            else:
                kept_wide = [q_rows.data, q_rows.scale, operands[0].data, operands[0].scale]
        kept_weights = [
            part
            for operand, needed in zip(operands, transposed, strict=True)
            for part in (_kept(operand) if needed else (None, None))
        ]
        # Backward transposes weights that do not train, so that no copy of them is kept.
        ctx.transposes = [operand.data_t is None for operand in operands]
        kept_rows = [q_rows.data_t, q_rows.scale_t] if needs_up else [None, None]
        ctx.save_for_backward(*routing, row_weights, *kept_rows, *kept_weights, *kept_wide)
        ctx.config, ctx.choices = config, choices
        weights_dtype = None if weights is None else weights.dtype
        ctx.dtypes = [x.dtype, weights_dtype, *(p.dtype for p in parameters)]
        return routing.sum_of_choices(y, choices, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return differentiable_once(grads[0], lambda: _gradients(ctx, grads[0]))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    config: MLP = ctx.config
    recipe, choices = config.recipe, ctx.choices
    needs_x, _, needs_weights, _, _, needs_up, needs_down = ctx.needs_input_grad
    x_dtype, weights_dtype, up_dtype, down_dtype = ctx.dtypes
    order, offsets, row_weights, *saved = ctx.saved_tensors
    routing = Routing(order, offsets)
    rows_t, up_t, down_t = saved[0:2], saved[2:4], saved[4:6]
    dx = dweights = dup = ddown = None

    dy = routing.rows_of_tokens(grad.to(config.out_dtype), choices)  # without the weights
    if ctx.needs_dh or needs_down:
        wide, wide_scale = _saved_wide(config, routing, saved[6:])
    if ctx.needs_dh:
        q_dy = quantize_activation(dy, recipe.grad_dtype, recipe, plain=True, transposed=False)
        down_t = _transposed(down_t, ctx.transposes[1])
        dh = _by_rows(q_dy.data, q_dy.scale, down_t, routing, config.out_dtype)
        if needs_weights:
            h = _dequantize(*activated(config, "", wide, wide_scale), torch.float32)
            sums = h.mul_(dh).sum(1)
            dweights = routing.by_choice(sums).view(-1, choices).to(weights_dtype)
    h_t: list[Tensor] = []
    if ctx.needs_wide:
        options = config.options(recipe.grad_dtype)
        options["gate_up_scale" if config.is_gated else "x_scale"] = wide_scale
        if needs_down:
            options["activation_dtype"] = recipe.input_dtype
        op = DECLARATIONS[f"{config.activation}_backward_quantize_1x128_dual"].handles.op
        weighted = dh if row_weights is None else dh.mul_(row_weights[:, None])
        data, scale, data_t, scale_t, _, *h_t = op(weighted, wide, **options)
        if needs_x:
            up_t = _transposed(up_t, ctx.transposes[0])
            drows = _by_rows(data, scale, up_t, routing, config.out_dtype)
            dx = routing.sum_of_choices(drows, choices, x_dtype)
        if needs_up:
            dup = _along_rows((data_t, scale_t), rows_t, offsets, up_dtype)
    elif needs_down:
        h_t = activated(config, "_t", wide, wide_scale)
    if needs_down:
        weighted = dy if row_weights is None else dy.mul_(row_weights[:, None])
        q_dy = quantize_activation(
            weighted, recipe.grad_dtype, recipe, plain=False, transposed=True
        )
        ddown = _along_rows((q_dy.data_t, q_dy.scale_t), h_t, offsets, down_dtype)
    return dx, None, dweights, None, None, dup, ddown


def _kept(operand: Operand) -> tuple[Tensor | None, Tensor | None]:
    """What dgrad needs of a weight: its transpose or, if there is none, the weight itself."""
    if operand.data_t is None:
        return operand.data, operand.scale
    return operand.data_t, operand.scale_t


def _transposed(kept: Any, transposes: bool) -> tuple[Tensor, Tensor]:
    data, scale = kept
    return (pitched(data.mT), scale.mT) if transposes else laid_out(data, scale)


def _along_rows(a: Any, b: Any, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """For each expert, the product of a and b over its rows; b may have been copied."""
    data, scale = a
    data_of_b, scale_of_b = laid_out(*b)
    return k_grouped_fp8_gemm_nt(data, scale, data_of_b, scale_of_b, offsets, out_dtype=dtype)


def _saved_wide(config: MLP, routing: Routing, saved: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """`wide` from what forward kept, and its scales if it was kept in FP8."""
    if config.save == "bf16":
        return saved[0], None
    if config.save == "fp8":
        return laid_out(*saved)
    rows, up = laid_out(*saved[:2]), laid_out(*saved[2:])
    return _by_rows(*rows, up, routing, config.out_dtype), None
