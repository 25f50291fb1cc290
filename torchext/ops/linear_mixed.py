"""torchext.nn.Linear with a recipe that has wide GEMMs, as one op: `torchext::_linear_mixed`.

As `torchext::_linear` (linear.py) does for other recipes, it stands for a layer in graphs, in
transforms and for tensor subclasses. Its kernels are in Python, because they only choose an op of
torchext or of torch for each GEMM. So a graph that contains it needs Python.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._dispatch.autograd import apply, recorded_outside
from .._dispatch.declaration import declare
from .._dispatch.flops import linear_flops
from ..recipe import GEMMS, GRANULARITIES, Recipe
from .linear import (
    TRANSPARENT,
    asks_derivative,
    batch_rows,
    refuse_forward_derivative,
    shard_linear,
)
from .linear_function import (
    apply_eagerly,
    gradient_of_bias,
    wide_dgrad,
    wide_linear,
    wide_wgrad,
)
from .linear_operands import bias_fits, fit, misfit

_DEF = torch.library.Library("torchext", "FRAGMENT")
_DEF.define(
    "_linear_mixed(Tensor input, Tensor weight, Tensor? bias, int granularity, "
    "ScalarType input_dtype, ScalarType weight_dtype, ScalarType grad_dtype, bool pow2_scale, "
    "str wide, ScalarType? out_dtype=None) -> Tensor"  # wide: "fprop+wgrad", for example
)
_mixed = torch.ops.torchext._linear_mixed.default
_linear = torch.ops.torchext._linear.default
_dgrad = torch.ops.torchext._linear_dgrad.default
_wgrad = torch.ops.torchext._linear_wgrad.default


@functools.lru_cache
def _recipe(granularity: int, *options: Any) -> Recipe:
    *dtypes_and_scale, wide = options
    precisions = ("wide" if gemm in wide.split("+") else "fp8" for gemm in GEMMS)
    return Recipe(GRANULARITIES[granularity], *dtypes_and_scale, *precisions)


def _with_out_dtype(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's options with out_dtype, which the dispatcher omits if it is None."""
    return options if len(options) == 7 else (*options, None)


def _kernel(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    *fp8, wide, out_dtype = _with_out_dtype(options)
    dtype = out_dtype or input.dtype
    if "fprop" in wide:
        return wide_linear(input, weight, bias, dtype)
    return _linear(input, weight, bias, *fp8, dtype)


for _device in ("CPU", "CUDA"):
    _DEF.impl("_linear_mixed", _kernel, _device)


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    _check(input, weight, bias)
    *_, out_dtype = _with_out_dtype(options)
    return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=out_dtype or input.dtype)


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not (fit(input, weight, bias) and bias_fits(weight, bias)):
        raise misfit(input, weight, bias)


def _autograd(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    _check(input, weight, bias)
    if not asks_derivative(input, weight, bias):
        with torch._C._AutoDispatchBelowAutograd():
            return _mixed(input, weight, bias, *options)
    *recipe, out_dtype = _with_out_dtype(options)
    whole = all(t is None or type(t) in TRANSPARENT for t in (input, weight, bias))
    plain = torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0
    if whole and plain:
        dtype = out_dtype or input.dtype
        return apply_eagerly(input, weight, bias, _recipe(*recipe), dtype, None)
    return apply(_LinearMixed, input, weight, bias, *recipe, out_dtype)


class _LinearMixed(torch.autograd.Function):
    """The op with gradients that are ops, which transforms and tensor subclasses can interpret."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input, weight, bias, *options = inputs
        ctx.save_for_backward(input, weight)
        ctx.options = options
        ctx.bias_dtype = None if bias is None else bias.dtype
        return recorded_outside(_mixed, *inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        input, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        granularity, input_dtype, weight_dtype, grad_dtype, pow2_scale, wide, _ = ctx.options
        dx = dw = db = None
        if needs_dx and "dgrad" in wide:
            dx = wide_dgrad(dy, weight, input.dtype)
        elif needs_dx:
            options = granularity, weight_dtype, grad_dtype, pow2_scale, input.dtype
            dx = _dgrad(dy, weight, *options)
        if needs_dw and "wgrad" in wide:
            # As LinearFunction: x is rounded to the output's dtype, which dy has.
            dw = wide_wgrad(dy, input, weight.dtype)
        elif needs_dw:
            options = granularity, input_dtype, grad_dtype, pow2_scale, weight.dtype
            dw = _wgrad(dy, input, *options)
        if needs_db:
            db = gradient_of_bias(dy, ctx.bias_dtype, _recipe(*ctx.options[:-1]))
        return dx, dw, db, *(None for _ in ctx.options)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        refuse_forward_derivative()


def _autocast(device: str, *arguments: Any) -> Tensor:
    """Gives the result autocast's dtype, as torch.nn.functional.linear does under autocast."""
    *operands, out_dtype = *arguments[:3], *_with_out_dtype(arguments[3:])
    return _mixed(*operands, out_dtype or torch.get_autocast_dtype(device))


declare(
    "_linear_mixed",
    fake=_fake,
    flops=linear_flops,
    batching=batch_rows(granularity=3),
    gradient=_autograd,
    autocast=_autocast,
    sharding=shard_linear,
)
