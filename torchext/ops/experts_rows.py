"""The experts of a mixture on rows that already stand by expert: grouped FP8 GEMMs, both ways.

`forward` and `backward` are the middle of an autograd function, without the tokens: what makes
rows of them, and sums of rows, stands before and behind (experts_function.py in one process, a
dispatcher between ranks). Each of S rows is a choice of an expert:

    wide [S, W] = rows @ up[e].T       gate and up side by side (W = 2 I), or up alone (W = I)
    h    [S, I] = activation(wide)     quantized as it is computed
    y    [S, K] = (weight * h) @ down[e].T

The weight of a row multiplies h, before the second GEMM: y needs no further factor, and the
gradient of the weight is a product of length I, <dy @ down[e], h>, for which backward needs no y.
FP32 scales of h are multiplied; the FP8 values stay what they are. A recipe with scales that are
powers of two keeps them so: h is multiplied before it is quantized.

fprop and dgrad are grouped along their rows, wgrad along K, where it reads rows and gradients
quantized in runs of 128 rows (`transposed` quantizes them). Runs start at row 0 and may cross from
an expert to the next, which shares their scale, and a NaN in it.

Bytes kept for backward, for each row, besides the transposed rows: those of mlp_function.py's
`wide`, and 8 for the weight and the row. Nothing waits for the device; all sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch.declaration import DECLARATIONS
from .._dispatch.layout import laid_out
from ..recipe import Recipe
from .delayed import weight_gradient
from .grouped import k_grouped_fp8_gemm_nt, m_grouped_fp8_gemm_nt_contiguous
from .linear_function import (
    Operand,
    kept_for_dgrad,
    quantize_weight,
    quantizer_options,
    read_for_dgrad,
)
from .mlp_function import MLP, activate, activated

_dequantize = DECLARATIONS["dequantize"].handles.alias
_quantize_1x128 = DECLARATIONS["quantize_1x128"].handles.op
_quantize_1x128_t = DECLARATIONS["quantize_1x128_t"].handles.op

Pair = tuple[Tensor, Tensor]  # quantized: data and scale


class Rows(NamedTuple):
    """Rows of all experts, quantized with 1x128 scales as moe_permute_quantize_1x128 returns them.

    Attributes:
        data: [S, K], FP8.
        scale: [S, ceil(K / 128)], FP32, M-major.
        offsets: [E], int32: where the rows of each expert end. Rows from offsets[-1] on have no
            expert: they are not read, and their y and gradients are zeros.
        weights: [S], FP32, the factor of each row; None for ones.
    """

    data: Tensor
    scale: Tensor
    offsets: Tensor
    weights: Tensor | None


class Needs(NamedTuple):
    """The gradients that backward will be asked for: of rows, their weights, up and down."""

    rows: bool
    weights: bool
    up: bool
    down: bool

    @property
    def wide(self) -> bool:
        """Whether the gradient of `wide` is needed."""
        return self.rows or self.up

    @property
    def h(self) -> bool:
        """Whether the gradient of h is needed, and so that of y as rows."""
        return self.wide or self.weights


NOTHING = Needs(False, False, False, False)


class Kept(NamedTuple):
    """What forward keeps for backward.

    Attributes:
        tensors: for ctx.save_for_backward: the rows' offsets, their weights and eight more.
        needs: the gradients that backward computes.
        transposes: whether backward must transpose up and down, because no transpose is kept: they
            do not train, or were gathered in FP8.
    """

    tensors: tuple[Tensor | None, ...]
    needs: Needs
    transposes: tuple[bool, bool]


class Gradients(NamedTuple):
    """The gradients of rows [S, K] (in the config's out_dtype), weights [S] (FP32), up and down;
    None where Needs has False."""

    rows: Tensor | None
    weights: Tensor | None
    up: Tensor | None
    down: Tensor | None


def quantize_weights(
    given: list[Operand | None], parameters: list[Tensor], recipe: Recipe, needs: Needs
) -> list[Operand]:
    """up [E, W, K] and down [E, K, I], quantized where `given` has None."""
    transposed = (needs.rows, needs.h)
    return [
        operand or quantize_weight(parameter, recipe, transposed=needed)
        for operand, parameter, needed in zip(given, parameters, transposed, strict=True)
    ]


def transposed(rows: Pair, recipe: Recipe, weights: Tensor | None, *, gradient: bool) -> Pair:
    """Rows [S, K], times weights [S], as wgrad reads them: [K, S] with [K, ceil(S / 128)] scales.

    This quantizes for the second time what `rows` already are, so wgrad has two roundings. A caller
    that has the rows in BF16 quantizes those instead (quantize_1x128_t).
    """
    wide = _dequantize(*rows, torch.float32)
    if weights is not None:
        wide = wide * weights[:, None]
    dtype = recipe.grad_dtype if gradient else recipe.input_dtype
    data, scale = _quantize_1x128_t(wide, **quantizer_options(dtype, recipe))
    return data, scale


def forward(
    config: MLP, operands: list[Operand], rows: Rows, needs: Needs = NOTHING
) -> tuple[Tensor, Kept]:
    """y [S, K] in config.out_dtype, weighted, and what backward will need.

    Args:
        config: what an expert computes, by a blockwise recipe whose GEMMs are all FP8.
        operands: up [E, W, K] and down [E, K, I], as `quantize_weights` returns them.
        rows: of all experts; S may be 0.
        needs: which gradients backward will compute.
    """
    up, down = operands
    pair = rows.data, rows.scale
    wide = _by_rows(pair, (up.data, up.scale), rows.offsets, config.out_dtype)
    y = _by_rows(
        _weighted_h(config, wide, rows.weights),
        (down.data, down.scale),
        rows.offsets,
        config.out_dtype,
    )
    kept_wide: list[Any] = [None] * 6  # wide, and what recomputes it
    if not (needs.h or needs.down):
        pass
    elif config.save == "bf16":
        kept_wide[0] = wide
    elif config.save == "fp8":
        options = quantizer_options(config.recipe.input_dtype, config.recipe)
        kept_wide[:2] = _quantize_1x128(wide, **options)
    else:
        kept_wide[2:] = [*pair, up.data, up.scale]
    kept_up = kept_for_dgrad(up) if needs.rows else (None, None)
    kept_down = kept_for_dgrad(down) if needs.h else (None, None)
    tensors = (rows.offsets, rows.weights, *kept_up, *kept_down, *kept_wide)
    return y, Kept(tensors, needs, (up.data_t is None, down.data_t is None))


def backward(
    config: MLP,
    kept: Kept,
    gradient: Operand,
    rows_t: Pair | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    *,
    parameters: Sequence[Tensor | None] = (None, None),
) -> Gradients:
    """The gradients that forward's `needs` names.

    Args:
        config: as for forward.
        kept: what forward returned; its tensors may have been copied.
        gradient: of y, in recipe.grad_dtype. `data` [S, K] (if needs.h) is dy without the rows'
            weights, quantized as rows are; `data_t` [K, S] (if needs.down) is dy times the rows'
            weights, quantized as `transposed` does.
        rows_t: the rows of forward, quantized as `transposed` does; None unless needs.up.
        dtypes: of the gradients of up and down.
        parameters: up and down where a queue of delayed.py may take their gradients, which are then
            None here; None otherwise.
    """
    needs = kept.needs
    offsets, weights, *tensors = kept.tensors
    assert offsets is not None
    up, down, wide_parts = tensors[:2], tensors[2:4], tensors[4:]
    drows = dweights = dup = ddown = dh = None
    if needs.h or needs.down:
        wide, wide_scale = _kept_wide(config, offsets, wide_parts)
    if needs.h:
        dy: Any = gradient.data, gradient.scale
        dh = _by_rows(
            dy, read_for_dgrad(down, transposes=kept.transposes[1]), offsets, config.out_dtype
        )
        if needs.weights:
            h = _dequantize(*activated(config, "", wide, wide_scale), torch.float32)
            dweights = h.mul_(dh).sum(1)
    h_t: list[Tensor] = []
    if needs.wide:
        assert dh is not None
        options = config.options(config.recipe.grad_dtype)
        options["gate_up_scale" if config.is_gated else "x_scale"] = wide_scale
        if needs.down:
            options["activation_dtype"] = config.recipe.input_dtype
        op = DECLARATIONS[f"{config.activation}_backward_quantize_1x128_dual"].handles.op
        weighted = dh if weights is None else dh.mul_(weights[:, None])
        data, scale, data_t, scale_t, _, *h_t = op(weighted, wide, **options)
        if needs.rows:
            up_t = read_for_dgrad(up, transposes=kept.transposes[0])
            drows = _by_rows((data, scale), up_t, offsets, config.out_dtype)
        if needs.up:
            operands = (data_t, scale_t), rows_t, offsets, dtypes[0]
            dup = _wgrad(parameters[0], *operands)
    elif needs.down:
        h_t = activated(config, "_t", wide, wide_scale)
    if needs.down:
        pair = gradient.data_t, gradient.scale_t
        ddown = _wgrad(parameters[1], pair, h_t, offsets, dtypes[1])
    return Gradients(drows, dweights, dup, ddown)


def _weighted_h(config: MLP, wide: Tensor, weights: Tensor | None) -> Pair:
    """activation(wide), quantized, times the rows' weights."""
    if weights is not None and config.recipe.pow2_scale:
        name = config.activation
        h = activate(name, config.tanh_approximation, [wide.float()]) * weights[:, None]
        options = quantizer_options(config.recipe.input_dtype, config.recipe)
        data, scale = _quantize_1x128(h, **options)
        return data, scale
    data, scale = activated(config, "", wide)
    if weights is None:
        return data, scale
    # M-major, as scale is. In place, a compiled graph would lose its strides.
    columns = F.pad(scale.t() * weights, (0, -scale.shape[0] % 4))
    return data, columns[:, : scale.shape[0]].t()


def _by_rows(a: Pair, b: Any, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of each expert's rows of a with its own b; zeros for rows of no expert."""
    data, scale = b
    out = a[0].new_zeros((a[0].shape[0], data.shape[1]), dtype=dtype)
    return m_grouped_fp8_gemm_nt_contiguous(*a, data, scale, offsets, out=out)


def _along_rows(a: Any, b: Any, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """For each expert, the product of a and b over its rows; b may have been copied."""
    data, scale = a
    data_of_b, scale_of_b = laid_out(*b)
    return k_grouped_fp8_gemm_nt(data, scale, data_of_b, scale_of_b, offsets, out_dtype=dtype)


def _wgrad(parameter: Tensor | None, *operands: Any) -> Tensor | None:
    """The gradient of a parameter, by `_along_rows`; None if a queue computes it later."""
    if torch.compiler.is_compiling():
        return _along_rows(*operands)
    return weight_gradient(parameter, lambda: _along_rows(*operands))


def _kept_wide(config: MLP, offsets: Tensor, kept: list[Any]) -> tuple[Tensor, Tensor | None]:
    """`wide` from what forward kept, and its scales if it was kept in FP8."""
    wide, scale, *rows_and_up = kept
    if config.save == "bf16":
        return wide, None
    if config.save == "fp8":
        return laid_out(wide, scale)
    rows, up = laid_out(*rows_and_up[:2]), laid_out(*rows_and_up[2:])
    return _by_rows(rows, up, offsets, config.out_dtype), None
