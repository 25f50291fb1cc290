"""`declare`: what torch must know of an op beyond its kernels, in one place for each op.

csrc/ops.cpp has an op's schema and kernels. One call of `declare`, beside the op's typed function
in `torchext.ops`, has the rest: fake kernel, gradient, `.out`, flop formula, batching rule,
autocast and sharding rule. It registers them for the op, for its below-autograd alias (autograd.py)
and for the overload `.out`. sharding.py registers sharding rules later, with the first DTensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.library import register_fake
from torch.utils.flop_counter import register_flop_formula

from . import library  # noqa: F401  (loads the ops)
from .autograd import Gradient, fall_through, register_gradient, register_out
from .batching import Rule, each_product, register_batching

_ops = torch.ops.torchext
_IMPL = torch.library.Library("torchext", "IMPL")

# Placements of the output, and of the arguments; None for an argument that is no tensor.
Sharding = tuple[list[Any], list[Any]]


class Handles(NamedTuple):
    """What a typed function calls: overloads, resolved once.

    Attributes:
        op: torch.ops.torchext.NAME.default.
        alias: the below-autograd alias, to be called where no gradient is asked; None without one.
        write: the overload `.out`, with its checks; None without one.
    """

    op: Any
    alias: Any
    write: Any


class Declaration(NamedTuple):
    """An op that `declare` has registered.

    Attributes:
        handles: what its typed function calls.
        overloads: the names that csrc/ops.cpp defines for it: the op, its alias, both with `.out`.
        multiplies: whether it has a flop formula.
        sharding: its sharding rule, or None.
    """

    handles: Handles
    overloads: tuple[str, ...]
    multiplies: bool
    sharding: Callable[..., Sequence[Sharding]] | None


DECLARATIONS: dict[str, Declaration] = {}  # by the op's name


def declare(
    name: str,
    *,
    fake: Callable[..., Any],
    flops: Callable[..., int] | None,
    batching: Rule,
    gradient: Gradient | Callable[..., Any] | None = None,
    out: bool = False,
    autocast: Callable[..., Any] | None = None,
    sharding: Callable[..., Sequence[Sharding]] | None = None,
) -> Handles:
    """Registers all of this with torch for the op `torchext::NAME`.

    Args:
        name: as csrc/ops.cpp defines it.
        fake: the fake kernel, whose arguments have the schema's names. It states shape, dtype and
            strides of the outputs and leaves checks to the kernels.
        flops: flop formula of the op, from the shapes of its arguments; None for an op that
            multiplies nothing.
        batching: batching rule of the op and its alias; `.out` takes element after element.
        gradient: None for an op whose outputs require no gradient; a Gradient for an op that has
            one with respect to one argument (it needs an alias); or a kernel for the Autograd key.
        out: the op has an overload `.out`, and an alias of that.
        autocast: called as autocast(device type, *arguments) under torch.autocast.
        sharding: sharding rule, called with the module torch.distributed.tensor and the op's
            arguments; returns the possible Shardings.

    Raises RuntimeError for an op that has been declared, AttributeError for an op, alias or `.out`
    that csrc/ops.cpp does not define.
    """
    if name in DECLARATIONS:
        raise RuntimeError(
            f"torchext: {name} must have one declaration (got a second one); remove one of them"
        )
    op = getattr(_ops, name).default
    has_alias = isinstance(gradient, Gradient)
    alias = getattr(_ops, f"_{name}").default if has_alias else None
    overloads = [name]
    _register_fake(name, fake)
    register_batching(name, "default", batching)
    if isinstance(gradient, Gradient):
        overloads.append(f"_{name}")
        _register_fake(f"_{name}", _by_name(fake, op))
        register_batching(f"_{name}", "default", batching)
        register_gradient(name, gradient)
    elif gradient is None:
        fall_through(name, "Autograd")
    else:
        _implement(name, gradient, "Autograd")
    write = None
    if out:
        for target in (name, f"_{name}"):
            overloads.append(f"{target}.out")
            _register_fake(f"{target}.out", _write_nothing)
            register_batching(target, "out", each_product)
        write = register_out(name)
    if flops is not None:
        packets = [getattr(_ops, name)]
        if has_alias or out:
            packets.append(getattr(_ops, f"_{name}"))
        register_flop_formula(packets)(flops)
    if autocast is not None:
        for device in ("cpu", "cuda"):
            _register_autocast(name, device, autocast)
    handles = Handles(op, alias, write)
    DECLARATIONS[name] = Declaration(handles, tuple(overloads), flops is not None, sharding)
    return handles


def _register_fake(name: str, fake: Callable[..., Any]) -> None:
    register_fake(f"torchext::{name}", fake)


def _by_name(fake: Callable[..., Any], op: Any) -> Callable[..., Any]:
    """`fake` for an alias, which takes by position what the op takes by keyword."""
    names = [argument.name for argument in op._schema.arguments]

    def fake_of_alias(*arguments: Any, **options: Any) -> Any:
        return fake(**dict(zip(names, arguments, strict=False)), **options)

    return fake_of_alias


def _write_nothing(*arguments: Any, **options: Any) -> None:
    """The fake kernel of every `.out`."""


def _implement(name: str, kernel: Callable[..., Any], key: str) -> None:
    # Dynamo sees Python kernels where an op is called in code that it does not compile.
    _IMPL.impl(name, torch._disable_dynamo(kernel), key)


def _register_autocast(name: str, device: str, autocast: Callable[..., Any]) -> None:
    key_name = f"Autocast{device.upper()}"
    key = getattr(torch._C.DispatchKey, key_name)

    def kernel(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return autocast(device, *arguments)

    _implement(name, kernel, key_name)
