"""RMSNorm and LayerNorm as one autograd function that also quantizes what it returns.

Forward saves x and one or two FP32 values for each row, not the normed values, which layers that
multiply in FP8 save quantized (shared_input.py).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._dispatch.declaration import DECLARATIONS
from . import norm as _norm  # noqa: F401  (declares the ops)
from . import norm_backward as _norm_backward  # noqa: F401  (likewise)
from .linear_function import Operand, differentiable_once
from .shared_input import Form

Kind = Literal["rms_norm", "layer_norm"]


def _op(name: str) -> Any:
    return DECLARATIONS[name].handles.op


class Norm(NamedTuple):
    """What a norm computes, without its tensors.

    Attributes:
        kind: "rms_norm" or "layer_norm".
        eps: added to the mean of squares, or to the variance.
        unit_offset: multiply by 1 + weight.
    """

    kind: Kind
    eps: float
    unit_offset: bool


def normed(
    config: Norm, x: Tensor, weight: Tensor, bias: Tensor | None, form: Form
) -> tuple[Tensor, list[Tensor], Operand]:
    """The normed x, rounded to its dtype; (mean and) rstd; and the first quantized.

    The normed x has the same bits for every form.

    Args:
        config: what to compute.
        x: [..., K], contiguous, not empty.
        weight, bias: [K]. The bias is None for an RMSNorm.
        form: how to quantize the result.
    """
    options: dict[str, Any] = {"dtype": form.dtype, "pow2_scale": form.pow2_scale}
    if config.unit_offset:
        options["unit_offset"] = True
    parameters = (weight,) if config.kind == "rms_norm" else (weight, bias)
    op = _op(f"{config.kind}_quantize_1x128{'_dual' if form.transposed else ''}")
    data, scale, *outputs = op(x, *parameters, config.eps, return_normed=True, **options)
    transposed = (outputs.pop(0), outputs.pop(0)) if form.transposed else (None, None)
    *statistics, _, y = outputs
    return y, statistics, Operand(data, scale, *transposed)


class NormFunction(torch.autograd.Function):
    """`normed` with gradients for x, weight and bias.

    apply(x, weight, bias, config, form, keep) returns the normed x and passes its quantization to
    the function `keep`, unless it is None.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, config, form, keep = inputs
        y, statistics, operand = normed(config, x, weight, bias, form)
        if keep is not None:
            keep(operand)
        ctx.save_for_backward(x, weight, *statistics)
        ctx.config = config
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer = "RMSNorm" if ctx.config.kind == "rms_norm" else "LayerNorm"
        return differentiable_once(grads[0], lambda: _gradients(ctx, grads[0]), layer)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias), each None unless it is needed, then None for the other arguments."""
    x, weight, *statistics = ctx.saved_tensors
    needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
    op = _op(f"{ctx.config.kind}_backward")
    dx, dweight, *dbias = op(
        grad.contiguous(), x, weight, *statistics, unit_offset=ctx.config.unit_offset
    )
    return (
        dx if needs_dx else None,
        dweight.to(weight.dtype) if needs_dw else None,
        dbias[0].to(ctx.bias_dtype) if needs_db else None,
        None,
        None,
        None,
    )
