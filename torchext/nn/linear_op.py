"""The layer as one op, `torchext::_linear`, and its gradients as two more (csrc/linear).

Whatever looks at a model as a list of ops sees a layer whole: graphs of torch.export, torch.fx and
TorchScript, the transforms of torch.func, and tensor subclasses such as DTensor. The op has the
bits of the layer's own path (linear_function.py), which caches the FP8 weight, and which
torch.compile inlines. Batching rules, flop formulas and shardings: ../_dispatch.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from .._dispatch import registrations  # noqa: F401  (loads the ops)
from .._dispatch.autograd import apply, recorded_outside
from .._dispatch.errors import python_error
from ..recipe import GRANULARITIES, Recipe
from .linear_function import apply_eagerly, gradient_of_bias, refuse_second_gradient
from .operands import fit, misfit

_IMPL = torch.library.Library("torchext", "IMPL")
_linear = torch.ops.torchext._linear.default
_dgrad = torch.ops.torchext._linear_dgrad.default
_wgrad = torch.ops.torchext._linear_wgrad.default
_DEF = torch.library.Library("torchext", "FRAGMENT")
_DEF.define("_second_gradient(Tensor grad, SymInt[] size, ScalarType dtype) -> Tensor")
_second_gradient = torch.ops.torchext._second_gradient.default

# Tensors whose values are one tensor's: what LinearFunction saves of them is what it is for them.
_TRANSPARENT = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def linear_op(input: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
    """y = x @ weight.T + bias by the op, of x's dtype or autocast's."""
    try:
        return _linear(input, weight, bias, *op_options(recipe))
    except RuntimeError as error:
        raise python_error(error) from None


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
    """The recipe that op_options has taken apart."""
    return Recipe(GRANULARITIES[granularity], *dtypes_and_scale)


# ---- fake kernels ----


@torch.library.register_fake("torchext::_linear")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    if not fit(input, weight, bias):  # a graph would find out only when it runs
        raise misfit(input, weight, bias)
    *_, out_dtype = _with_out_dtype(options)
    shape = (*input.shape[:-1], weight.shape[0])
    return input.new_empty(shape, dtype=out_dtype or input.dtype)


@torch.library.register_fake("torchext::_linear_dgrad")
def _(dy: Tensor, weight: Tensor, *options: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], weight.shape[1]), dtype=options[-1])


@torch.library.register_fake("torchext::_linear_wgrad")
def _(dy: Tensor, input: Tensor, *options: Any) -> Tensor:
    return dy.new_empty((dy.shape[-1], input.shape[-1]), dtype=options[-1])


def _with_out_dtype(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's options; the dispatcher leaves an out_dtype of None out."""
    return options if len(options) == 6 else (*options, None)


# ---- autograd ----


def _asks_derivative(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:  # jvp below refuses what has a tangent
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autograd(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    if input.is_nested:
        raise TypeError(
            "torchext.nn.Linear: input: expected a dense tensor in a graph that holds the layer's "
            "op; got a nested one; pass its values(), or call the layer itself"
        )
    if not _asks_derivative(input, weight, bias):
        with torch._C._AutoDispatchBelowAutograd():
            return _linear(input, weight, bias, *options)
    if not fit(input, weight, bias):
        raise misfit(input, weight, bias)
    *recipe, out_dtype = _with_out_dtype(options)
    whole = all(t is None or type(t) in _TRANSPARENT for t in (input, weight, bias))
    plain = torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0
    if whole and plain:
        dtype = out_dtype or input.dtype
        return apply_eagerly(input, weight, bias, _recipe(*recipe), dtype, None)
    return apply(_Linear, input, weight, bias, *recipe, out_dtype)


class _Linear(torch.autograd.Function):
    """The op with gradients that are ops: what transforms and subclasses can follow into backward.

    It keeps x and the weight as they are, not in FP8.
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
            db = gradient_of_bias(dy, ctx.bias_dtype)
        return dx, dw, db, *(None for _ in ctx.options)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _refuse_forward_derivative()


def _refuse_forward_derivative() -> NoReturn:
    raise NotImplementedError(
        "torchext.nn.Linear: forward: expected tensors without tangents; got a forward-mode "
        "derivative (torch.func.jvp, linearize, jacfwd, hessian or torch.autograd.forward_ad), and "
        "FP8 GEMMs have no jvp; use reverse mode (torch.func.grad, vjp, jacrev), or "
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
        # An op, so that a compiler may trace, and never run, what it makes of every graph.
        second = (_second_gradient(grads[0], *operand) for operand in ctx.operands)
        return None, *second, *(None for _ in ctx.needs_input_grad[3:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _refuse_forward_derivative()


@torch.library.register_fake("torchext::_second_gradient", lib=_DEF)
def _(grad: Tensor, size: Any, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(size, dtype=dtype)


def _refuse(grad: Tensor, size: Any, dtype: torch.dtype) -> Tensor:
    refuse_second_gradient()


_DEF.impl("_second_gradient", _refuse, "CompositeExplicitAutograd")


def _autograd_of_gradient(op: Any) -> Any:
    def autograd(left: Tensor, right: Tensor, *options: Any) -> Tensor:
        if _asks_derivative(left, right):
            return apply(_Gradient, op, left, right, *options)
        with torch._C._AutoDispatchBelowAutograd():
            return op(left, right, *options)

    return autograd


def _impl(name: str, kernel: Any, key: str) -> None:
    # Dynamo sees Python kernels where an op is called in code that it does not compile.
    _IMPL.impl(name, torch._disable_dynamo(kernel), key)


_impl("_linear", _autograd, "Autograd")
_impl("_linear_dgrad", _autograd_of_gradient(_dgrad), "Autograd")
_impl("_linear_wgrad", _autograd_of_gradient(_wgrad), "Autograd")


# ---- autocast ----


def _autocast(device: str, key: torch._C.DispatchKey) -> Any:
    """As under autocast torch.nn.functional.linear has, a result of autocast's dtype."""

    def kernel(*arguments: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            *operands, out_dtype = *arguments[:3], *_with_out_dtype(arguments[3:])
            return _linear(*operands, out_dtype or torch.get_autocast_dtype(device))

    return kernel


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _kernel = _autocast(_device, getattr(torch._C.DispatchKey, _key))
    _impl("_linear", _kernel, _key)
