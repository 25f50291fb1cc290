"""Gradients of ops, at little cost to calls that need none.

A Python kernel on an autograd key costs every call microseconds, whether the call needs a gradient
or not, and the stable ABI has no way to write such a kernel in C++. So each op with a gradient has
a below-autograd alias (csrc/ops.cpp): the same kernels, under the op's name with an underscore in
front, whose autograd keys fall through. The op's autograd kernel calls the alias in the end.
`torchext.ops` calls the alias directly if no gradient is needed. Graphs that were traced below
autograd contain the alias.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import library  # noqa: F401  (loads the ops that are registered on here)

_ops = torch.ops.torchext
_IMPL = torch.library.Library("torchext", "IMPL")


class Gradient(NamedTuple):
    """The gradient of an op with respect to one tensor argument.

    Attributes:
        argument: the argument's name.
        formula: called as formula(gradient of the output, shape of the argument, *saved arguments).
            It returns the argument's gradient, in any dtype.
        saved: names of the tensor arguments that the formula needs.
    """

    argument: str
    formula: Callable[..., Tensor]
    saved: tuple[str, ...] = ()


def fall_through(name: str, key: str) -> None:
    """Makes calls of an op skip `key`, at no cost. At the Autograd key, new outputs then require no
    gradient."""
    _IMPL.impl(name, torch.library.fallthrough_kernel, key)


def asks_gradient(tensor: Tensor | None) -> bool:
    """Whether a call must go through autograd to record that it used `tensor`.

    True whenever `tensor` alone does not tell: under forward-mode autograd it may have a tangent,
    and under torch.func's transforms another level may record it. Also true for an object that is
    no tensor, which the op then refuses.
    """
    if tensor is None:
        return False
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and getattr(tensor, "requires_grad", True)


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """Does what `function.apply` does, without the two microseconds that it spends on functorch.

    Do not use it in code that Dynamo traces: Dynamo recognizes only the original. Under a
    functorch transform, use it only in kernels of autograd keys, which see one level of wrapped
    tensors at a time.
    """
    direct = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    if torch._C._are_functorch_transforms_active():
        with enable_single_level_autograd_function():
            return direct(*inputs)
    return direct(*inputs)


def recorded_outside(op: Any, *operands: Any, **options: Any) -> Any:
    """Calls `op` in the `forward` of an autograd function that records it at this level of
    torch.func's transforms. Outer levels, if any, record the call themselves."""
    with (
        torch.enable_grad(),  # autograd.Function has disabled it, also for outer levels
        forward_ad._set_fwd_grad_enabled(True),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        return op(*operands, **options)


def register_gradient(name: str, gradients: Sequence[Gradient]) -> None:
    """Gives an op its Gradients, and makes its alias fall through at the Autograd key.

    torch.library.register_autograd cannot be used: it takes no keyword-only tensors.
    """
    op, alias = getattr(_ops, name).default, getattr(_ops, f"_{name}").default
    names = _argument_names(name)
    arguments = [(names.index(gradient.argument), gradient.argument) for gradient in gradients]
    saved = [argument for gradient in gradients for argument in gradient.saved]

    def autograd(*operands: Any, **options: Any) -> Tensor:
        tensors = [
            operands[position] if position < len(operands) else options.get(argument)
            for position, argument in arguments
        ]
        if not any(map(asks_gradient, tensors)):
            return alias(*operands, **options)
        given = dict(zip(names, operands, strict=False)) | options
        transformed = torch._C._are_functorch_transforms_active()
        run = functools.partial(recorded_outside, op) if transformed else alias
        call = (run, operands, options, gradients, name)
        return apply(_Differentiable, call, *tensors, *map(given.get, saved))

    _IMPL.impl(name, autograd, "Autograd")
    fall_through(f"_{name}", "Autograd")


class _Differentiable(torch.autograd.Function):
    """An op as a function of the arguments that it has gradients for.

    The inputs are the call, the arguments of its gradients, and what their formulas need.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
        run, operands, options, ctx.gradients, ctx.op = call
        count = len(ctx.gradients)
        ctx.save_for_backward(*tensors[count:])
        ctx.arguments = [None if t is None else (t.shape, t.dtype) for t in tensors[:count]]
        return run(*operands, **options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, results = list(ctx.saved_tensors), []
        for index, (gradient, argument) in enumerate(
            zip(ctx.gradients, ctx.arguments, strict=True)
        ):
            needed = [saved.pop(0) for _ in gradient.saved]
            if ctx.needs_input_grad[1 + index]:
                shape, dtype = argument
                results.append(gradient.formula(grads[0], shape, *needed).to(dtype))
            else:
                results.append(None)
        return None, *results, *(None for _ in ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        arguments = " and ".join(gradient.argument for gradient in ctx.gradients)
        raise NotImplementedError(
            f"{ctx.op}: {arguments} must have no tangent (got one, from torch.func.jvp, jacfwd or "
            "torch.autograd.forward_ad): the op has no forward-mode derivative; use reverse mode"
        )


def register_out(name: str) -> Callable[..., None]:
    """Makes the overload `out` refuse gradients, as torch's out= functions do, and report its write
    to autograd.

    Returns the function that `torchext.ops` calls for it, which goes through the dispatcher once.
    """
    op, alias = getattr(_ops, name).out, getattr(_ops, f"_{name}").out

    def write(*operands: Any, out: Tensor, **options: Any) -> None:
        if torch.is_grad_enabled():
            for argument, tensor in (("out", out), ("bias", options.get("bias"))):
                if getattr(tensor, "requires_grad", False):
                    raise RuntimeError(
                        f"{name}: {argument} must not require a gradient when out= is given (got "
                        "requires_grad=True); detach it, call under torch.no_grad(), or omit out="
                    )
        torch.autograd.graph.increment_version(out)
        alias(*operands, out=out, **options)

    fall_through(f"{name}.out", "Autograd")
    _IMPL.impl(f"{name}.out", write, "ADInplaceOrView")
    for key in ("Autograd", "ADInplaceOrView"):
        fall_through(f"_{name}.out", key)

    def call(*operands: Any, **options: Any) -> None:
        # Dynamo cannot trace increment_version, and under torch.func's transforms each level must
        # handle it, which the op's dispatch does.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            op(*operands, **options)
        else:
            write(*operands, **options)

    return call


def _argument_names(name: str) -> list[str]:
    return [argument.name for argument in getattr(_ops, name).default._schema.arguments]
