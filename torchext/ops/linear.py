"""torchext.nn.Linear as one op, `torchext::_linear`, and its gradients as two more (csrc/linear).

Everything that treats a model as a list of ops sees one op for each layer: graphs of torch.export,
torch.fx and TorchScript, the transforms of torch.func, and tensor subclasses such as DTensor. The
op computes the same bits as the layer's own path (linear_function.py), which caches the FP8 weight
and which torch.compile inlines.

Every rank of a DTensor quantizes its own shard independently. If a scale spans a sharded dimension
(a tensor-wise scale, a row-wise scale with K sharded, or the scale of a block that a shard cuts),
then the scale, and with it the rounding, differs from that of the unsharded tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from .._dispatch.autograd import apply, recorded_outside
from .._dispatch.batching import BatchDims, Call, Rule, each
from .._dispatch.declaration import Sharding, declare
from .._dispatch.flops import linear_flops
from ..recipe import GRANULARITIES, Recipe
from .linear_function import apply_eagerly, gradient_of_bias, refuse_second_gradient
from .linear_operands import bias_fits, fit, layer_error, misfit

# The ops as kernels call them; `declare` below registers the kernels.
_linear = torch.ops.torchext._linear.default
_dgrad = torch.ops.torchext._linear_dgrad.default
_wgrad = torch.ops.torchext._linear_wgrad.default
_DEF = torch.library.Library("torchext", "FRAGMENT")
_DEF.define("_second_gradient(Tensor grad, SymInt[] size, ScalarType dtype) -> Tensor")
_second_gradient = torch.ops.torchext._second_gradient.default

# Classes for which LinearFunction saves what it would save for a plain tensor.
TRANSPARENT = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def linear_op(input: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
    """y = x @ weight.T + bias by the op. y has x's dtype or, under autocast, autocast's.

    A recipe with wide GEMMs has an op of its own (linear_mixed.py).
    """
    wide = recipe.wide_gemms
    try:
        if wide:
            return torch.ops.torchext._linear_mixed(
                input, weight, bias, *op_options(recipe), "+".join(wide)
            )
        return _linear(input, weight, bias, *op_options(recipe))
    except RuntimeError as error:
        raise layer_error(error, input, weight, bias) from None


def op_options(recipe: Recipe) -> tuple[Any, ...]:
    """The op's arguments from `granularity` on."""
    return (
        GRANULARITIES.index(recipe.granularity),
        recipe.input_dtype,
        recipe.weight_dtype,
        recipe.grad_dtype,
        recipe.pow2_scale,
    )


@functools.lru_cache
def _recipe(granularity: int, *dtypes_and_scale: Any) -> Recipe:
    """The recipe from the arguments that op_options made of it."""
    return Recipe(GRANULARITIES[granularity], *dtypes_and_scale)


# ---- fake kernels ----


def _fake_linear(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    if not (fit(input, weight, bias) and bias_fits(weight, bias)):
        # Otherwise a graph would fail only when it runs.
        raise misfit(input, weight, bias)
    *_, out_dtype = _with_out_dtype(options)
    shape = (*input.shape[:-1], weight.shape[0])
    return input.new_empty(shape, dtype=out_dtype or input.dtype)


def _fake_dgrad(dy: Tensor, weight: Tensor, *options: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], weight.shape[1]), dtype=options[-1])


def _fake_wgrad(dy: Tensor, input: Tensor, *options: Any) -> Tensor:
    return dy.new_empty((dy.shape[-1], input.shape[-1]), dtype=options[-1])


def _with_out_dtype(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's options with out_dtype, which the dispatcher omits if it is None."""
    return options if len(options) == 6 else (*options, None)


# ---- autograd ----


def asks_derivative(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:  # jvp below refuses inputs with a tangent
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autograd(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    if input.is_nested:
        raise TypeError(
            "torchext.nn.Linear: input must be a dense tensor in a graph that holds the layer's op "
            "(got a nested one); pass its values(), or call the layer itself"
        )
    if not asks_derivative(input, weight, bias):
        with torch._C._AutoDispatchBelowAutograd():
            return _linear(input, weight, bias, *options)
    if not (fit(input, weight, bias) and bias_fits(weight, bias)):
        raise misfit(input, weight, bias)
    *recipe, out_dtype = _with_out_dtype(options)
    whole = all(t is None or type(t) in TRANSPARENT for t in (input, weight, bias))
    plain = torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0
    if whole and plain:
        dtype = out_dtype or input.dtype
        return apply_eagerly(input, weight, bias, _recipe(*recipe), dtype, None)
    return apply(_Linear, input, weight, bias, *recipe, out_dtype)


class _Linear(torch.autograd.Function):
    """The op with gradients that are ops, which transforms and tensor subclasses can interpret.

    For backward it keeps x and the weight themselves, not FP8 copies.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input, weight, bias, *options = inputs
        ctx.save_for_backward(input, weight)
        ctx.options = options
        ctx.bias_dtype = None if bias is None else bias.dtype
        return recorded_outside(_linear, *inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        input, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        granularity, input_dtype, weight_dtype, grad_dtype, pow2_scale, _ = ctx.options
        dx = dw = db = None
        if needs_dx:
            options = granularity, weight_dtype, grad_dtype, pow2_scale, input.dtype
            dx = _dgrad(dy, weight, *options)
        if needs_dw:
            options = granularity, input_dtype, grad_dtype, pow2_scale, weight.dtype
            dw = _wgrad(dy, input, *options)
        if needs_db:
            db = gradient_of_bias(dy, ctx.bias_dtype, _recipe(*ctx.options[:-1]))
        return dx, dw, db, *(None for _ in ctx.options)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        refuse_forward_derivative()


def refuse_forward_derivative() -> NoReturn:
    raise NotImplementedError(
        "torchext.nn.Linear: input and parameters must have no tangent (got one, from "
        "torch.func.jvp, linearize, jacfwd, hessian or torch.autograd.forward_ad): FP8 GEMMs have "
        "no jvp; use reverse mode (torch.func.grad, vjp, jacrev), or "
        "torch.nn.Linear for this layer"
    )


class _Gradient(torch.autograd.Function):
    """A gradient's op, which has no gradient itself."""

    @staticmethod
    def forward(ctx: Any, op: Any, left: Tensor, right: Tensor, *options: Any) -> Tensor:
        ctx.operands = (left.shape, left.dtype), (right.shape, right.dtype)
        return recorded_outside(op, left, right, *options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # An op, so that a compiler can trace it; it raises only when it runs.
        second = (_second_gradient(grads[0], *operand) for operand in ctx.operands)
        return None, *second, *(None for _ in ctx.needs_input_grad[3:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        refuse_forward_derivative()


@torch.library.register_fake("torchext::_second_gradient", lib=_DEF)
def _(grad: Tensor, size: Any, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(size, dtype=dtype)


def _refuse(grad: Tensor, size: Any, dtype: torch.dtype) -> Tensor:
    refuse_second_gradient()


_DEF.impl("_second_gradient", _refuse, "CompositeExplicitAutograd")


def _autograd_of_gradient(op: Any) -> Any:
    def autograd(left: Tensor, right: Tensor, *options: Any) -> Tensor:
        if asks_derivative(left, right):
            return apply(_Gradient, op, left, right, *options)
        with torch._C._AutoDispatchBelowAutograd():
            return op(left, right, *options)

    return autograd


# ---- autocast ----


def _autocast(device: str, *arguments: Any) -> Tensor:
    """Gives the result autocast's dtype, as torch.nn.functional.linear does under autocast."""
    *operands, out_dtype = *arguments[:3], *_with_out_dtype(arguments[3:])
    return _linear(*operands, out_dtype or torch.get_autocast_dtype(device))


# ---- flop formulas ----


def _dgrad_flops(dy_shape: Any, weight_shape: Any, *_: Any, **options: Any) -> int:
    return 2 * math.prod(dy_shape) * weight_shape[1]


def _wgrad_flops(dy_shape: Any, input_shape: Any, *_: Any, **options: Any) -> int:
    return 2 * math.prod(dy_shape) * input_shape[-1]


# ---- batching ----


def batch_rows(granularity: int) -> Rule:
    """Rule for x @ w.T and dy @ w: if the weight is not batched, rows are independent.

    `granularity` is the position of the op's argument of that name.
    """

    def rule(call: Call, size: int, dims: BatchDims, *operands: Any) -> tuple[Any, Any]:
        rows = operands[0]
        alone = dims[0] is not None and all(dim is None for dim in dims[1:])
        if not alone or rows.dim() < 2 or GRANULARITIES[operands[granularity]] == "tensorwise":
            return each(call, size, dims, *operands)
        return call(rows.movedim(dims[0], 0), *operands[1:]), 0

    return rule


# ---- sharding rules: `placements` is the module torch.distributed.tensor ----


def _sharding(output: Any, inputs: Sequence[Any], options: Sequence[object]) -> Sharding:
    return [output], [*inputs, *(None for _ in options)]


def shard_linear(
    placements: Any, input: Any, weight: Any, bias: Any, *options: object
) -> list[Sharding]:
    shard, partial, whole = placements.Shard, placements.Partial(), placements.Replicate()
    last = input.ndim - 1

    def sharding(output: Any, input: Any, weight: Any, bias_placement: Any) -> Sharding:
        bias_or_none = None if bias is None else bias_placement
        return _sharding(output, (input, weight, bias_or_none), options)

    return [
        sharding(whole, whole, whole, whole),
        # column-wise: each rank has some of the output features
        sharding(shard(last), whole, shard(0), shard(0)),
        # row-wise: each rank has some of the input features; the bias must be added once
        sharding(partial, shard(last), shard(1), partial),
        # sequence and data parallel: each rank has some of the rows
        *(sharding(shard(dim), shard(dim), whole, whole) for dim in range(last)),
    ]


def _shard_dgrad(placements: Any, dy: Any, weight: Any, *options: object) -> list[Sharding]:
    shard, partial, whole = placements.Shard, placements.Partial(), placements.Replicate()
    last = dy.ndim - 1
    return [
        _sharding(whole, (whole, whole), options),
        _sharding(partial, (shard(last), shard(0)), options),
        _sharding(shard(last), (whole, shard(1)), options),
        *(_sharding(shard(dim), (shard(dim), whole), options) for dim in range(last)),
    ]


def _shard_wgrad(placements: Any, dy: Any, input: Any, *options: object) -> list[Sharding]:
    shard, partial, whole = placements.Shard, placements.Partial(), placements.Replicate()
    last = dy.ndim - 1
    return [
        _sharding(whole, (whole, whole), options),
        _sharding(shard(0), (shard(last), whole), options),
        _sharding(shard(1), (whole, shard(last)), options),
        *(_sharding(partial, (shard(dim), shard(dim)), options) for dim in range(last)),
    ]


# ---- declarations ----

declare(
    "_linear",
    fake=_fake_linear,
    flops=linear_flops,
    batching=batch_rows(granularity=3),
    gradient=_autograd,
    autocast=_autocast,
    sharding=shard_linear,
)
declare(
    "_linear_dgrad",
    fake=_fake_dgrad,
    flops=_dgrad_flops,
    batching=batch_rows(granularity=2),
    gradient=_autograd_of_gradient(_dgrad),
    sharding=_shard_dgrad,
)
declare(
    "_linear_wgrad",
    fake=_fake_wgrad,
    flops=_wgrad_flops,
    batching=each,
    gradient=_autograd_of_gradient(_wgrad),
    sharding=_shard_wgrad,
)
