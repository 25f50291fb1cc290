"""`declare` registers with torch everything about an op except its schema and kernels.

Those are in csrc/ops.cpp. Beside each op's typed function in `torchext.ops`, one call of `declare`
gives the rest: fake kernel, gradient, `.out`, flop formula, batching rule, autocast and sharding
rule. `declare` registers them for the op, for its below-autograd alias (autograd.py) and for the
overload `.out`. sharding.py registers sharding rules later, with the first DTensor.
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

# Placements of the output, and of each argument; None for an argument that is no tensor.
Sharding = tuple[list[Any], list[Any]]


class Handles(NamedTuple):
    """The overloads that an op's typed function calls, resolved once.

    Attributes:
        op: torch.ops.torchext.NAME.default.
        alias: the below-autograd alias, for calls that need no gradient; None if the op has none.
        write: the overload `.out`, with its checks; None if the op has none.
    """

    op: Any
    alias: Any
    write: Any


class Declaration(NamedTuple):
    """An op that `declare` has registered.

    Attributes:
        handles: what its typed function calls.
        overloads: the names that csrc/ops.cpp defines for the op: itself, its alias, and each of
            both with `.out`.
        multiplies: whether it has a flop formula.
        sharding: its sharding rule.
    """

    handles: Handles
    overloads: tuple[str, ...]
    multiplies: bool
    sharding: Callable[..., Sequence[Sharding]]


DECLARATIONS: dict[str, Declaration] = {}  # by the op's name


def declare(
    name: str,
    *,
    fake: Callable[..., Any],
    flops: Callable[..., int] | None,
    batching: Rule,
    sharding: Callable[..., Sequence[Sharding]],
    gradient: Gradient | list[Gradient] | Callable[..., Any] | None = None,
    out: bool = False,
    autocast: Callable[..., Any] | None = None,
) -> Handles:
    """Registers the op `torchext::NAME` with torch.

    Args:
        name: the op's name in csrc/ops.cpp.
        fake: the fake kernel, whose arguments have the schema's names. It gives shape, dtype and
            strides of the outputs, and leaves checks to the kernels.
        flops: the op's flop formula, called with the shapes of its arguments; None for an op that
            multiplies nothing.
        batching: the batching rule of the op and its alias. `.out` runs once for each element.
        sharding: the sharding rule of the op and its alias, called with the module
            torch.distributed.tensor and the op's arguments; returns the possible Shardings, or
            raises ValueError for placements that the op refuses. DTensor refuses `.out`.
        gradient: None for an op whose outputs require no gradient; a Gradient for each argument
            that the op has a gradient for (such an op needs an alias); or a kernel for the Autograd
            key.
        out: whether the op and its alias have an overload `.out`.
        autocast: called as autocast(device type, *arguments) under torch.autocast.

    Raises RuntimeError if the op has been declared before, and AttributeError if csrc/ops.cpp does
    not define the op, its alias or its `.out`.
    """
    if name in DECLARATIONS:
        raise RuntimeError(
            f"torchext: {name} must have one declaration (got a second one); remove one of them"
        )
    op = getattr(_ops, name).default
    if isinstance(gradient, Gradient):
        gradient = [gradient]
    has_alias = isinstance(gradient, list)
    alias = getattr(_ops, f"_{name}").default if has_alias else None
    overloads = [name]
    _register_fake(name, fake)
    register_batching(name, "default", batching)
    if isinstance(gradient, list):
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
    """`fake` for an alias, which takes the op's keyword-only arguments by position."""
    names = [argument.name for argument in op._schema.arguments]

    def fake_of_alias(*arguments: Any, **options: Any) -> Any:
        return fake(**dict(zip(names, arguments, strict=False)), **options)

    return fake_of_alias


def _write_nothing(*arguments: Any, **options: Any) -> None:
    """The fake kernel of every `.out`."""


def _implement(name: str, kernel: Callable[..., Any], key: str) -> None:
    # Without this, Dynamo would trace Python kernels that run outside the code that it compiles.
    _IMPL.impl(name, torch._disable_dynamo(kernel), key)


def _register_autocast(name: str, device: str, autocast: Callable[..., Any]) -> None:
    key_name = f"Autocast{device.upper()}"
    key = getattr(torch._C.DispatchKey, key_name)

    def kernel(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return autocast(device, *arguments)

    _implement(name, kernel, key_name)
