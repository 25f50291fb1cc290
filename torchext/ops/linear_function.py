"""The three FP8 GEMMs of a linear layer as one autograd function, for every recipe.

Every operand is quantized along the dimension that its GEMM sums over. x is summed over K in fprop
and over M in wgrad, so it is needed as [M, K] and as [K, M]; likewise w and dy:

    fprop  y  [M, N] = x    [M, K] @ (w   [N, K]).T
    dgrad  dx [M, K] = dy   [M, N] @ (w_t [K, N]).T
    wgrad  dw [N, K] = dy_t [N, M] @ (x_t [K, M]).T

Backward keeps x_t and w_t, one byte for each element, and does not keep x. For a GEMM that the
recipe calls wide, which multiplies operands as they are, backward keeps w or x instead. It also
keeps x, and makes x_t of it, where another op keeps x anyway (`keep_input`).

x_t and w_t may be copied between forward and backward (CPU offloading, saved-tensor hooks). A copy
can lose the layout that GEMMs require, so backward restores it. A compiled backward graph, whose
strides are fixed when it is compiled, gets dense tensors instead (csrc/linear/kept.h).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import profiler

from .._dispatch.declaration import DECLARATIONS
from .._dispatch.dtensor import is_distributed
from .._dispatch.layout import laid_out, pitched
from .._dispatch.sm_budget import gemm_sms
from .._float32 import column_sums
from ..recipe import GRANULARITIES, Recipe
from . import gemm, quantize  # noqa: F401  (declare the ops)
from . import kept as _kept  # noqa: F401  (likewise)
from .delayed import at_once, leaf, weight_gradient
from .gathered_weight import GatheredWeight
from .linear_operands import named_after_layer
from .linear_ranges import open_range
from .shared_input import quantized_once


def _op(name: str) -> Any:
    return DECLARATIONS[name].handles.op


# Overloads, resolved once. Their errors name the op; named_after_layer makes them name the layer.
_quantize_1x128 = _op("quantize_1x128")
_quantize_1x128_t = _op("quantize_1x128_t")
_quantize_1x128_dual = _op("quantize_1x128_dual")
_quantize_1x128_dual_bias_grad = _op("quantize_1x128_dual_bias_grad")
_quantize_128x128 = _op("quantize_128x128")
_quantize_128x128_dual = _op("quantize_128x128_dual")
_quantize_rowwise = _op("quantize_rowwise")
_quantize_tensorwise = _op("quantize_tensorwise")
_fp8_gemm_nt = DECLARATIONS["fp8_gemm_nt"].handles.alias  # this file computes the gradients
_quantize_kept = _op("_quantize_kept")
_quantize_128x128_kept = _op("_quantize_128x128_kept")
_fp8_gemm_nt_kept = _op("_fp8_gemm_nt_kept")


class Operand(NamedTuple):
    """A quantized matrix (`data`, `scale`), its transpose (`data_t`, `scale_t`), or both.

    Backward keeps the transpose. In a compiled graph it has the layout that _fp8_gemm_nt_kept
    reads.
    """

    data: Tensor | None
    scale: Tensor | None
    data_t: Tensor | None
    scale_t: Tensor | None


_NOTHING = Operand(None, None, None, None)


def quantize_activation(
    x: Tensor,
    dtype: torch.dtype,
    recipe: Recipe,
    *,
    plain: bool,
    transposed: bool,
    kept: bool = False,
) -> Operand:
    """Quantizes x [..., K], an input or a gradient.

    Args:
        x: its rows must fold.
        plain: make `data`, with the shape of x.
        transposed: make `data_t` [K, M].
        kept: `data_t` is kept by a compiled graph.
    """
    if kept and transposed:
        return _quantize_and_keep(x, dtype, recipe)
    if recipe.granularity != "blockwise":
        return _quantize_coarsely(x, dtype, recipe, plain=plain, transposed=transposed)
    options = quantizer_options(dtype, recipe)
    if plain and transposed:
        return Operand(*_quantize_1x128_dual(x, **options))
    data, scale = _quantize_1x128(x, **options) if plain else (None, None)
    data_t, scale_t = _quantize_1x128_t(x, **options) if transposed else (None, None)
    return Operand(data, scale, data_t, scale_t)


def quantize_gradient(
    dy: Tensor, recipe: Recipe, *, plain: bool, transposed: bool, bias_dtype: torch.dtype | None
) -> tuple[Operand, Tensor | None]:
    """dy quantized, and the gradient of the bias, rounded to `bias_dtype`; None for None.

    The kernel that quantizes dy both ways also sums its rows. That costs fewer bytes than a second
    read of dy, even if only one of the results is needed.
    """
    quantized = plain or transposed
    if bias_dtype is not None and recipe.granularity == "blockwise":
        if quantized:
            options = quantizer_options(recipe.grad_dtype, recipe)
            *parts, sums = _quantize_1x128_dual_bias_grad(dy, **options)
            return Operand(*parts), sums.to(bias_dtype)
        if not torch.compiler.is_compiling():  # its loop would depend on the number of rows
            return _NOTHING, column_sums(as_matrix(dy).float()).to(bias_dtype)
    q_dy = _NOTHING
    if quantized:
        q_dy = quantize_activation(
            dy, recipe.grad_dtype, recipe, plain=plain, transposed=transposed
        )
    return q_dy, None if bias_dtype is None else gradient_of_bias(dy, bias_dtype, recipe)


def quantize_weight(
    weight: Tensor, recipe: Recipe, *, transposed: bool, kept: bool = False
) -> Operand:
    """Quantizes weight [..., N, K]: `data` and, if `transposed`, `data_t` [..., K, N].

    `kept` as in quantize_activation. A weight that was gathered in FP8 is not quantized again, and
    gets no `data_t`: backward transposes it (`kept_for_dgrad`), because FSDP2 frees it in between.
    """
    if isinstance(weight, GatheredWeight):
        return Operand(pitched(weight.data_fp8), weight.scale, None, None)
    dtype = recipe.weight_dtype
    if recipe.granularity != "blockwise":
        if kept and transposed:
            return _quantize_and_keep(weight, dtype, recipe)
        return _quantize_coarsely(weight, dtype, recipe, plain=True, transposed=transposed)
    options = quantizer_options(dtype, recipe)
    if kept and transposed:
        data, scale, data_t = _quantize_128x128_kept(weight, **options)
        return Operand(data, scale, data_t, scale)
    if transposed:
        data, scale, data_t = _quantize_128x128_dual(weight, **options)
        return Operand(data, scale, data_t, scale.mT)
    data, scale = _quantize_128x128(weight, **options)
    return Operand(data, scale, None, None)


def kept_for_dgrad(operand: Operand) -> tuple[Tensor | None, Tensor | None]:
    """What dgrad needs of a weight: its transpose or, if there is none, the weight itself."""
    if operand.data_t is None:
        return operand.data, operand.scale
    return operand.data_t, operand.scale_t


def read_for_dgrad(kept: Any, *, transposes: bool) -> tuple[Tensor, Tensor]:
    """The transpose of a weight [..., N, K], from what `kept_for_dgrad` returned.

    `transposes`: whether that was the weight itself.
    """
    data, scale = kept
    return (pitched(data.mT), scale.mT) if transposes else laid_out(data, scale)


def _quantize_and_keep(x: Tensor, dtype: torch.dtype, recipe: Recipe) -> Operand:
    options = quantizer_options(dtype, recipe)
    return Operand(*_quantize_kept(x, GRANULARITIES.index(recipe.granularity), **options))


def _quantize_coarsely(
    x: Tensor, dtype: torch.dtype, recipe: Recipe, *, plain: bool, transposed: bool
) -> Operand:
    # The transpose is quantized from x tensor-wise, too. That gives the values of `data`, in the
    # layout that GEMMs read.
    op = _quantize_rowwise if recipe.granularity == "rowwise" else _quantize_tensorwise
    options = quantizer_options(dtype, recipe)
    data, scale = op(x, **options) if plain else (None, None)
    data_t, scale_t = op(as_matrix(x).t(), **options) if transposed else (None, None)
    return Operand(data, scale, data_t, scale_t)


def quantizer_options(dtype: torch.dtype, recipe: Recipe) -> dict[str, Any]:
    # Defaults are omitted: the dispatcher takes up to a microsecond for each keyword argument.
    options: dict[str, Any] = {}
    if dtype is not torch.float8_e4m3fn:
        options["dtype"] = dtype
    if recipe.pow2_scale:
        options["pow2_scale"] = True
    return options


def _product(*operands: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The GEMM of a, a_scale, b, b_scale and, unless it is omitted or None, bias."""
    num_sms = gemm_sms(operands[0])  # type: ignore[arg-type]
    if num_sms:
        return _fp8_gemm_nt(*operands, out_dtype=out_dtype, num_sms=num_sms)
    if out_dtype is torch.bfloat16:  # the default, see quantizer_options
        return _fp8_gemm_nt(*operands)
    return _fp8_gemm_nt(*operands, out_dtype=out_dtype)


def gemm_of_operands(a: Operand, b: Operand, out_dtype: torch.dtype) -> Tensor:
    """a @ b.T from the `data` of both."""
    return _product(a.data, a.scale, b.data, b.scale, None, out_dtype=out_dtype)


def _product_with_saved(
    a: Tensor | None, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype
) -> Tensor:
    """The GEMM with an operand b that was saved for backward, and may have been copied since."""
    return _product(a, a_scale, *laid_out(b, b_scale), out_dtype=out_dtype)


def as_matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K]."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def foldable(x: Tensor) -> Tensor:
    """x if its rows are known to fold, as the ops require, else x as a matrix."""
    return x if x.dim() == 2 or x.is_contiguous() else as_matrix(x)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    recipe: Recipe,
    out_dtype: torch.dtype,
    quantized_weight: Operand | None,
    needs_dx: bool = False,
    needs_dw: bool = False,
) -> tuple[Tensor, Operand, Operand]:
    """y = x @ weight.T + bias, and the quantized x and weight, which backward needs.

    Only what the recipe's FP8 GEMMs need is quantized.

    Args:
        x: [..., K].
        weight, bias: [N, K] and [N].
        recipe: how the operands are quantized.
        out_dtype: the dtype of y.
        quantized_weight: quantize_weight's result, or None to quantize the weight here.
        needs_dx: backward may compute dx: make w_t for it.
        needs_dw: backward may compute dw: make x_t for it.
    """
    rows = foldable(x)
    kept = torch.compiler.is_compiling()
    fprop = recipe.fprop == "fp8"
    needs_x_t = needs_dw and recipe.wgrad == "fp8"
    needs_w_t = needs_dx and recipe.dgrad == "fp8"
    q_w = _NOTHING

    def quantize_input() -> Operand:
        return quantize_activation(
            rows, recipe.input_dtype, recipe, plain=fprop, transposed=needs_x_t, kept=kept
        )

    if kept or not fprop:  # the shared operand always has `data`
        q_x = quantize_input() if fprop or needs_x_t else _NOTHING
    else:
        q_x = quantized_once(x, recipe, transposed=needs_x_t, quantize=quantize_input)
    if fprop or needs_w_t:
        q_w = quantized_weight or quantize_weight(weight, recipe, transposed=needs_w_t, kept=kept)
    if not fprop:
        return wide_linear(x, weight, bias, out_dtype), q_x, q_w
    y = _product(q_x.data, q_x.scale, q_w.data, q_w.scale, bias, out_dtype=out_dtype)
    return y if rows is x else y.view(*x.shape[:-1], weight.shape[0]), q_x, q_w


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x @ weight.T + bias, computed in `dtype`."""
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def wide_dgrad(dy: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """dy [..., N] @ weight [N, K], computed in the dtype of dy and rounded to `dtype`."""
    return (dy @ weight.to(dy.dtype)).to(dtype)


def wide_wgrad(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy.T @ x over all rows of dy [..., N] and x [..., K], in the dtype of dy, as `dtype`."""
    return (as_matrix(dy).t() @ as_matrix(x).to(dy.dtype)).to(dtype)


class LinearFunction(torch.autograd.Function):
    """`linear` with gradients for x, weight and bias.

    apply(x, weight, bias, recipe, out_dtype, quantized_weight, keep_input=False). dx has x's dtype,
    dw the weight's, and the bias's gradient is summed in FP32.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, recipe, out_dtype, quantized_weight, *rest = inputs
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        ctx.compiled = torch.compiler.is_compiling()
        ctx.keeps_input = rest == [True] and recipe.wgrad == "fp8" and not ctx.compiled
        y, q_x, q_w = linear(
            x,
            weight,
            bias,
            recipe=recipe,
            out_dtype=out_dtype,
            quantized_weight=quantized_weight,
            needs_dx=needs_dx,
            needs_dw=needs_dw and not ctx.keeps_input,
        )
        w_t: tuple[Tensor | None, Tensor | None] = (None, None)
        x_t: tuple[Tensor | None, Tensor | None] = (None, None)
        if needs_dx:
            w_t = kept_for_dgrad(q_w) if recipe.dgrad == "fp8" else (weight, None)
        if needs_dw and ctx.keeps_input:
            x_t = (x, None)
        elif needs_dw:
            x_t = (q_x.data_t, q_x.scale_t) if recipe.wgrad == "fp8" else (x.to(out_dtype), None)
        ctx.save_for_backward(*w_t, *x_t)
        ctx.transposes = q_w.data_t is None
        ctx.weight = None if ctx.compiled else leaf(weight)
        ctx.recipe = recipe
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        compiling = torch.compiler.is_compiling()
        opened = None
        if not compiling and profiler._is_profiler_enabled:
            opened = open_range("backward", ctx.recipe)
        try:
            if compiling:
                return _gradients(ctx, grad)
            return differentiable_once(grad, lambda: _gradients(ctx, grad))
        except RuntimeError as error:
            raise named_after_layer(error) from None
        finally:
            if opened is not None:
                opened.__exit__(None, None, None)


# LinearFunction.apply is a Python function that handles torch.func's transforms. This skips it:
# under transforms a layer calls its op instead. Dynamo must call LinearFunction.apply, which it
# recognizes.
apply_eagerly = super(torch.autograd.Function, LinearFunction).apply  # type: ignore[misc]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """(dx, dw, db), each None unless it is needed, then None for each other argument of forward."""
    needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
    w_t, w_t_scale, x_t, x_t_scale = ctx.saved_tensors  # w and x themselves for wide GEMMs
    x_dtype, weight_dtype, bias_dtype = ctx.dtypes
    recipe = ctx.recipe
    dy = foldable(grad)
    dx = dw = None
    fp8_dx = needs_dx and recipe.dgrad == "fp8"
    fp8_dw = needs_dw and recipe.wgrad == "fp8"
    q_dy, db = quantize_gradient(
        dy,
        recipe,
        plain=fp8_dx,
        transposed=fp8_dw,
        bias_dtype=bias_dtype if needs_db else None,
    )
    product = _fp8_gemm_nt_kept if ctx.compiled else _product_with_saved
    if needs_dx:
        if fp8_dx and ctx.transposes:
            w_t, w_t_scale = read_for_dgrad((w_t, w_t_scale), transposes=True)
            dx = _product(q_dy.data, q_dy.scale, w_t, w_t_scale, out_dtype=x_dtype)
        elif fp8_dx:
            dx = product(q_dy.data, q_dy.scale, w_t, w_t_scale, out_dtype=x_dtype)
        else:
            dx = wide_dgrad(dy, w_t, x_dtype)
        if dy is not grad:
            dx = dx.view(*grad.shape[:-1], dx.shape[-1])
    if fp8_dw:
        if ctx.keeps_input:
            _, _, x_t, x_t_scale = quantize_activation(
                foldable(x_t), recipe.input_dtype, recipe, plain=False, transposed=True
            )

        def wgrad() -> Tensor:
            return product(q_dy.data_t, q_dy.scale_t, x_t, x_t_scale, out_dtype=weight_dtype)

        dw = wgrad() if ctx.compiled else weight_gradient(ctx.weight, wgrad)
    elif needs_dw and ctx.compiled:
        dw = wide_wgrad(dy, x_t, weight_dtype)
    elif needs_dw:
        dw = weight_gradient(ctx.weight, lambda: wide_wgrad(dy, x_t, weight_dtype))
    return dx, dw, db, *[None] * (len(ctx.needs_input_grad) - 3)


def gradient_of_bias(dy: Tensor, dtype: torch.dtype, recipe: Recipe | None = None) -> Tensor:
    """The sum over all rows of dy [..., N], computed in FP32 and rounded to `dtype`.

    With a recipe it has the bits that quantize_gradient returns, for a backward whose ops quantize
    dy themselves. A DTensor's shards are summed separately anyway.
    """
    rows = as_matrix(dy)
    if recipe is None or recipe.granularity != "blockwise" or is_distributed(dy):
        return rows.sum(0, dtype=torch.float32).to(dtype)
    *_, sums = _quantize_1x128_dual_bias_grad(rows)
    return sums.to(dtype)


def refuse_second_gradient(layer: str = "Linear") -> NoReturn:
    why = "FP8 GEMMs have" if layer == "Linear" else "its kernels have"
    raise RuntimeError(
        f"torchext.nn.{layer}: backward must be differentiated once (got a second derivative, of "
        f"create_graph=True): {why} no second gradient; use torch.nn.{layer} for layers under a "
        "gradient penalty or a Hessian"
    )


class _SecondGradient(torch.autograd.Function):
    """Returns the number one as a tensor that refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, dy: Tensor, layer: str) -> Tensor:
        ctx.layer = layer
        return torch.ones((), device=dy.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        refuse_second_gradient(ctx.layer)


def differentiable_once(
    dy: Tensor, gradients: Callable[[], tuple[Tensor | None, ...]], layer: str = "Linear"
) -> tuple[Tensor | None, ...]:
    """Returns what `gradients` computes from dy. Under create_graph=True, a second backward then
    raises an error that names `layer`."""
    if not torch.is_grad_enabled():
        return gradients()
    with torch.no_grad(), at_once():
        grads = gradients()
    # Without an autograd graph the gradients would count as constants, and a penalty on them would
    # silently train nothing. The anchor gives them a graph even if dy is constant. Multiplying each
    # by `one`, unlike one function of all of them, also works for batched gradients.
    with torch.enable_grad():
        one = _SecondGradient.apply(torch.empty(0, requires_grad=True), dy, layer)
        return tuple(None if grad is None else grad * one for grad in grads)
