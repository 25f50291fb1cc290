"""The experts of a mixture as one autograd function: grouped FP8 GEMMs, forward and backward.

Each of T tokens chooses k of E experts. Each of the S = T k choices gets a row, its slot, so that
an expert's rows are a run, whose end is in `offsets` (moe.py):

    rows [S, K]   x of each choice's token
    wide [S, W] = rows @ up[e].T       gate and up side by side (W = 2 I), or up alone (W = I)
    h    [S, I] = activation(wide)     quantized as it is computed
    y    [S, K] = h @ down[e].T        times the choice's weight, which multiplies the scales of h
    out  [T, K] = the sum of y over the choices of a token, in FP32, in their order

fprop and dgrad are grouped along their rows, wgrad along K. Backward needs no y for the gradients
of the weights: dweight = <dy, y> = <dy @ down[e], h>, and dgrad computes the product on the left.

Bytes kept for backward, for each choice: those of mlp_function.py, and 8 for its row and weight.
Nothing here waits for the device, and every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch.declaration import DECLARATIONS
from .._dispatch.layout import laid_out, pitched
from ..recipe import Recipe
from .grouped import k_grouped_fp8_gemm_nt, m_grouped_fp8_gemm_nt_contiguous
from .linear_function import (
    Operand,
    differentiable_once,
    quantize_activation,
    quantize_weight,
    quantizer_options,
)
from .mlp_function import MLP, activated
from .moe import moe_combine, moe_permute, moe_permute_quantize_1x128, moe_route

_dequantize = DECLARATIONS["dequantize"].handles.alias
_quantize_1x128 = DECLARATIONS["quantize_1x128"].handles.op


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

    def rows_of_tokens(self, x: Tensor) -> Tensor:
        """x [T, K] as rows [S, K]."""
        return x if self.slots is None else moe_permute(x, self.slots)

    def quantized_rows_of_tokens(self, x: Tensor, recipe: Recipe, *, transposed: bool) -> Operand:
        """x [T, K] as rows [S, K], quantized."""
        dtype = recipe.input_dtype
        if self.slots is None or transposed or recipe.granularity != "blockwise":
            rows = self.rows_of_tokens(x)
            return quantize_activation(rows, dtype, recipe, plain=True, transposed=transposed)
        options = quantizer_options(dtype, recipe)
        return Operand(*moe_permute_quantize_1x128(x, self.slots, **options), None, None)

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

    def sum_of_choices(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, K], the FP32 sum of each token's rows, rounded to `dtype`."""
        if self.slots is None:
            return rows.to(dtype)
        return moe_combine(rows, self.slots, out_dtype=dtype)


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
    routing = Routing.of(ids, weights, operands[0].data.shape[0])  # type: ignore[union-attr]
    q_rows = routing.quantized_rows_of_tokens(x, config.recipe, transposed=False)
    y, _ = experts(config, routing, operands, q_rows, routing.by_row(weights))
    return routing.sum_of_choices(y, x.dtype)


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
        routing = Routing.of(ids, weights, parameters[0].shape[0])
        q_rows = routing.quantized_rows_of_tokens(x, recipe, transposed=needs_up)
        row_weights = routing.by_row(weights)
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
        ctx.config = config
        weights_dtype = None if weights is None else weights.dtype
        ctx.dtypes = [x.dtype, weights_dtype, *(p.dtype for p in parameters)]
        return routing.sum_of_choices(y, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return differentiable_once(grads[0], lambda: _gradients(ctx, grads[0]))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    config: MLP = ctx.config
    recipe = config.recipe
    needs_x, _, needs_weights, _, _, needs_up, needs_down = ctx.needs_input_grad
    x_dtype, weights_dtype, up_dtype, down_dtype = ctx.dtypes
    slots, offsets, row_weights, *saved = ctx.saved_tensors
    routing = Routing(slots, offsets)
    rows_t, up_t, down_t = saved[0:2], saved[2:4], saved[4:6]
    dx = dweights = dup = ddown = None

    dy = routing.rows_of_tokens(grad.to(config.out_dtype))  # without the weights
    if ctx.needs_dh or needs_down:
        wide, wide_scale = _saved_wide(config, routing, saved[6:])
    if ctx.needs_dh:
        q_dy = quantize_activation(dy, recipe.grad_dtype, recipe, plain=True, transposed=False)
        down_t = _transposed(down_t, ctx.transposes[1])
        dh = _by_rows(q_dy.data, q_dy.scale, down_t, routing, config.out_dtype)
        if needs_weights:
            h = _dequantize(*activated(config, "", wide, wide_scale), torch.float32)
            sums = h.mul_(dh).sum(1)
            dweights = routing.by_choice(sums).to(weights_dtype)
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
            dx = routing.sum_of_choices(drows, x_dtype)
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
