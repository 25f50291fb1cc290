"""A whole MLP as one autograd function, with FP8 between its GEMMs, forward and backward.

    wide  [M, W] = x @ w.T + b        what the activation reads: the results of gate and up side by
                                      side (W = 2 I), or of up alone (W = I)
    h     [M, I] = activation(wide)   quantized as it is computed
    y     [M, N] = h @ down.T + b

Backward goes through these steps from last to first. It stores neither h nor the gradient of
`wide`: one kernel computes both from the gradient of h, and quantizes them as the GEMMs for the
gradients of weights and of x read them.

Bytes kept for backward, for each row of x with K elements (three FP8 layers with SwiGLU in BF16
between them keep K + 7 I):

    save="bf16"       K + 2 W   `wide` as it was computed, in BF16 (FP32 takes 4 W)
    save="fp8"        K + W     `wide` with 1x128 scales, as DeepSeek-V3 does
    save="recompute"  2 K       x, from which backward computes `wide` again, to the same bits
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch.declaration import DECLARATIONS
from .._dispatch.layout import GROUP, ceil_div, laid_out
from ..recipe import Recipe
from . import activation as _activation  # noqa: F401  (declares the ops)
from .delayed import leaf, weight_gradient
from .gate_up import gate_up, gate_up_in_graph
from .gemm import product, write_product
from .linear_function import (
    Operand,
    as_matrix,
    differentiable_once,
    foldable,
    kept_for_dgrad,
    quantize_activation,
    quantize_gradient,
    quantize_weight,
    quantizer_options,
    read_for_dgrad,
)
from .shared_input import quantized_once

Save = Literal["bf16", "fp8", "recompute"]

# The activations that FP8 MLPs and experts have, by name and by the approximation of GELU.
ACTIVATIONS: dict[tuple[str, bool | None], Callable[[Tensor], Tensor]] = {
    ("silu", None): F.silu,
    ("gelu", False): F.gelu,
    ("gelu", True): functools.partial(F.gelu, approximate="tanh"),
    ("relu2", None): lambda x: F.relu(x).square(),
}
GATED = ("silu", "gelu")


def activate(activation: str, tanh_approximation: bool | None, wides: Sequence[Tensor]) -> Tensor:
    """The activated features of an MLP by PyTorch's functions, in the dtype of `wides`.

    Args:
        activation, tanh_approximation: as in `MLP`.
        wides: gate [..., I] and up [..., I], or both side by side in one tensor [..., 2 I]; up
            alone for an activation that has no gate.
    """
    function = ACTIVATIONS[activation.removesuffix("_mul"), tanh_approximation]
    if not activation.endswith("_mul"):
        return function(wides[0])
    gate, up = wides if len(wides) == 2 else wides[0].chunk(2, dim=-1)
    return function(gate) * up


def _op(name: str) -> Any:
    return DECLARATIONS[name].handles.op


_dequantize = DECLARATIONS["dequantize"].handles.alias
_quantize_1x128 = _op("quantize_1x128")


class MLP(NamedTuple):
    """What an MLP computes, without its tensors.

    Attributes:
        activation: "silu_mul", "gelu_mul", "gelu" or "relu2"; `_mul`: of the gate, times up.
        tanh_approximation: of GELU; None for other activations.
        recipe: a blockwise recipe.
        out_dtype: of `wide` and y.
        save: what is kept for backward.
    """

    activation: str
    tanh_approximation: bool | None
    recipe: Recipe
    out_dtype: torch.dtype
    save: Save

    @property
    def is_gated(self) -> bool:
        return self.activation.endswith("_mul")

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of the activation's ops."""
        options = quantizer_options(dtype, self.recipe)
        if self.tanh_approximation is not None:
            options["tanh_approximation"] = self.tanh_approximation
        return options


def mlp(
    config: MLP, operands: list[Operand], biases: list[Tensor | None], q_x: Operand
) -> tuple[Tensor, Tensor]:
    """y [M, N], and `wide` [M, W].

    Args:
        config: what to compute. If it is gated, I is a multiple of 128.
        operands: the quantized weights of gate and up, or of up, and then of down.
        biases: their biases.
        q_x: x [M, K], quantized.
    """
    wide = _wide(config, operands[:-1], biases[:-1], q_x)
    h, h_scale = activated(config, "", wide)
    down = operands[-1]
    y = product(h, h_scale, down.data, down.scale, biases[-1], config.out_dtype)
    return y, wide


def _wide(
    config: MLP, operands: list[Operand], biases: Sequence[Tensor | None], q_x: Operand
) -> Tensor:
    products = [
        part
        for operand, bias in zip(operands, biases, strict=True)
        for part in (operand.data, operand.scale, bias)
    ]
    if not config.is_gated:
        return product(q_x.data, q_x.scale, *products, config.out_dtype)
    both: Any = gate_up_in_graph if torch.compiler.is_compiling() else gate_up
    return both(q_x.data, q_x.scale, *products, config.out_dtype)


def activated(config: MLP, layout: str, wide: Tensor, scale: Tensor | None = None) -> Any:
    """activation(wide), quantized; `layout` as in the names of the quantizers."""
    if scale is not None:
        wide = _dequantize(wide, scale, torch.float32)
    op = _op(f"{config.activation}_quantize_1x128{layout}")
    return op(wide, **config.options(config.recipe.input_dtype))


def quantized_input(x: Tensor, recipe: Recipe, *, transposed: bool) -> Operand:
    """x [..., K], quantized as a matrix, unless another layer that read it did so before."""
    rows = foldable(x) if x.dim() > 1 else as_matrix(x)

    def quantize() -> Operand:
        return quantize_activation(
            rows, recipe.input_dtype, recipe, plain=True, transposed=transposed
        )

    # Other layers keep the shape of x for `data`. That of a vector is no matrix.
    if x.dim() == 1 or torch.compiler.is_compiling():
        q_x = quantize()
    else:
        q_x = quantized_once(x, recipe, transposed=transposed, quantize=quantize)
    if x.dim() == 2 or q_x.data is None or q_x.scale is None:
        return q_x
    return q_x._replace(data=as_matrix(q_x.data), scale=as_matrix(q_x.scale))


class MLPFunction(torch.autograd.Function):
    """`mlp` with gradients for x and all parameters.

    apply(x [..., K], config, operands, weight, bias, weight, bias, ...), with the parameters in the
    order of the operands. An operand is None where the weight is to be quantized here.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, config, given, *parameters = inputs
        weights, biases = parameters[::2], parameters[1::2]
        needs_x, _, _, *needs = ctx.needs_input_grad
        needs_weights, needs_biases = needs[::2], needs[1::2]
        ctx.needs_wide = needs_x or any(needs_weights[:-1]) or any(needs_biases[:-1])
        transposed = [*(needs_x for _ in weights[:-1]), ctx.needs_wide]
        operands = [
            operand or quantize_weight(weight, config.recipe, transposed=needed)
            for operand, weight, needed in zip(given, weights, transposed, strict=True)
        ]
        needs_x_t = any(needs_weights[:-1])
        q_x = quantized_input(x, config.recipe, transposed=needs_x_t)
        y, wide = mlp(config, operands, biases, q_x)
        keeps_wide = ctx.needs_wide or needs_weights[-1]
        kept_wide: list[Tensor | None] = []
        if keeps_wide and config.save == "bf16":
            kept_wide = [wide]
        elif keeps_wide and config.save == "fp8":
            options = quantizer_options(config.recipe.input_dtype, config.recipe)
            kept_wide = [*_quantize_1x128(wide, **options)]
        elif keeps_wide:
            kept_wide = [q_x.data, q_x.scale]
            for operand, bias in zip(operands[:-1], biases[:-1], strict=True):
                kept_wide += [operand.data, operand.scale, bias]
        kept_x = [q_x.data_t, q_x.scale_t] if needs_x_t else [None, None]
        kept_weights = [
            part
            for operand, needed in zip(operands, transposed, strict=True)
            for part in (kept_for_dgrad(operand) if needed else (None, None))
        ]
        ctx.save_for_backward(*kept_x, *kept_weights, *kept_wide)
        ctx.transposes = [operand.data_t is None for operand in operands]
        compiled = torch.compiler.is_compiling()
        ctx.weights = [None if compiled else leaf(weight) for weight in weights]
        ctx.config = config
        ctx.dtypes = [x.dtype, *(None if p is None else p.dtype for p in parameters)]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return differentiable_once(grads[0], lambda: _gradients(ctx, grads[0]))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dy = as_matrix(grad)
    config: MLP = ctx.config
    recipe = config.recipe
    needs_x, _, _, *needs = ctx.needs_input_grad
    x_dtype, *dtypes = ctx.dtypes
    projections = len(needs) // 2 - 1  # before the activation
    needs_weight, needs_bias = needs[::2], needs[1::2]
    gradients: list[Tensor | None] = [None] * len(needs)  # of the parameters
    dx = None

    x_t_data, x_t_scale, *saved = ctx.saved_tensors
    x_t = x_t_data, x_t_scale
    weights_t = [saved[2 * i : 2 * i + 2] for i in range(projections + 1)]
    q_dy, gradients[-1] = quantize_gradient(
        dy,
        recipe,
        plain=ctx.needs_wide,
        transposed=needs_weight[-1],
        bias_dtype=dtypes[-1] if needs_bias[-1] else None,
    )
    if ctx.needs_wide or needs_weight[-1]:
        wide, wide_scale = _saved_wide(config, saved[2 * len(weights_t) :])
    if ctx.needs_wide:
        options = config.options(recipe.grad_dtype)
        options["gate_up_scale" if config.is_gated else "x_scale"] = wide_scale
        options["bias_grad"] = any(needs_bias[:-1])
        if needs_weight[-1]:
            options["activation_dtype"] = recipe.input_dtype
        weights_t[-1] = [*read_for_dgrad(weights_t[-1], transposes=ctx.transposes[-1])]
        dh = _product(q_dy.data, q_dy.scale, weights_t[-1], config.out_dtype)
        op = _op(f"{config.activation}_backward_quantize_1x128_dual")
        data, scale, data_t, scale_t, bias_grad, *h_t = op(dh, wide, **options)
        width = data.shape[1] // projections
        parts = [slice(i * width, (i + 1) * width) for i in range(projections)]
        if needs_x:
            for i, part in enumerate(parts):
                groups = slice(part.start // GROUP, ceil_div(part.stop, GROUP))
                weight_t = read_for_dgrad(weights_t[i], transposes=ctx.transposes[i])
                operands = (data[:, part], scale[:, groups], *weight_t)
                if dx is None:
                    dx = product(*operands, None, x_dtype)
                else:
                    write_product(*operands, out=dx, accumulate=True)
        for i, part in enumerate(parts):
            if needs_weight[i]:
                dy_t = data_t[part], scale_t[part]
                gradients[2 * i] = _wgrad(ctx.weights[i], *dy_t, x_t, dtypes[2 * i])
            if needs_bias[i]:
                gradients[2 * i + 1] = bias_grad[part].to(dtypes[2 * i + 1])
    elif needs_weight[-1]:
        h_t = activated(config, "_t", wide, wide_scale)
    if needs_weight[-1]:
        gradients[-2] = _wgrad(ctx.weights[-1], q_dy.data_t, q_dy.scale_t, h_t, dtypes[-2])
    if dx is not None and dy is not grad:
        dx = dx.view(*grad.shape[:-1], dx.shape[1])
    return dx, None, None, *gradients


def _product(
    a: Tensor | None, a_scale: Tensor | None, b: Sequence[Tensor], out_dtype: torch.dtype
) -> Tensor:
    """The GEMM with an operand b, which may have been copied since it was saved."""
    return product(a, a_scale, *laid_out(*b), None, out_dtype)


def _wgrad(weight: Tensor | None, *operands: Any) -> Tensor | None:
    """The gradient of a weight, `_product` of the operands; None if a queue computes it later."""
    if torch.compiler.is_compiling():
        return _product(*operands)
    return weight_gradient(weight, lambda: _product(*operands))


def _saved_wide(config: MLP, saved: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """`wide` from what forward kept, and its scales if it was kept in FP8."""
    if config.save == "bf16":
        return saved[0], None
    if config.save == "fp8":
        return laid_out(*saved)
    x = Operand(*laid_out(*saved[:2]), None, None)
    projections = [saved[i : i + 3] for i in range(2, len(saved), 3)]
    operands = [Operand(*laid_out(*weight), None, None) for *weight, _ in projections]
    biases = [bias for *_, bias in projections]
    return _wide(config, operands, biases, x), None
