"""Finds MLPs whose projections are in two modules, as in BERT, and runs them fused, in place.

A candidate is a module with two children that hold one linear layer each: the first child has up
and the activation, the second has down and what follows it (dropout, a residual, a norm). A method
of the module calls both. A copy with small random layers is called in float64, and called again
with the whole MLP in place of the first child and its result in place of down's. If the results are
equal, both ways compute the same for all weights, whatever the names of the children are.

A fused module gets a subclass of its class with the same name, whose method calls the fused MLP and
then its own code, in the second way. The children stay as they are.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ._fusion import LINEARS, NAMES, MLPRoles
from ._probing import results_of_function
from .nn.converted import Rerouted
from .nn.mlp import as_out_in, can_fuse_class, can_fuse_recipe, fused_mlp, has_hooks
from .ops.mlp_function import ACTIVATIONS, Save


class SplitRoles(NamedTuple):
    """Where a module has the projections of an MLP.

    Attributes:
        children: the names of the child with up and of the child with down.
        mlp: the activation, and the names of up and down in these children.
    """

    children: tuple[str, str]
    mlp: MLPRoles


class FusedSplitMLP(Rerouted):
    """Base of the subclasses that fused modules get.

    Attributes:
        fused_roles: the roles of its children.
        fused_save: as `save` of torchext.nn.SwiGLU.
    """

    fused_roles: SplitRoles
    fused_save: Save
    added = ("fused_roles", "fused_save")

    def run(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(self.plain_class, self.method)
        if len(args) == 1 and not kwargs:
            roles = self.fused_roles
            before, after = (self._modules[name] for name in roles.children)
            assert before is not None and after is not None
            if not has_hooks(after) and not any(map(has_hooks, before.modules())):
                names, activation, tanh_approximation = roles.mlp
                layers: list[Any] = [before._modules[names[0]], after._modules[names[1]]]
                y = fused_mlp(layers, activation, tanh_approximation, self.fused_save, args[0])
                if y is not None:
                    return _rest(self, method, (*roles.children, names[1]), args[0], y)
        return method(self, *args, **kwargs)


class _Forward(FusedSplitMLP):
    """For a module whose forward calls the children."""


class _FeedForwardChunk(FusedSplitMLP):
    """For a layer of BERT and its relatives in transformers. Its forward splits long inputs, and
    calls `feed_forward_chunk` with each part."""

    method: ClassVar[str] = "feed_forward_chunk"


_BASES = (_FeedForwardChunk, _Forward)


class _View:
    """A module as its own methods see it, with other functions in place of some children."""

    def __init__(self, module: torch.nn.Module, replaced: dict[str, Callable[..., Any]]) -> None:
        self._module = module
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._module).forward(self, *args, **kwargs)  # type: ignore[arg-type]


def _rest(
    module: torch.nn.Module,
    method: Callable[..., Any],
    names: tuple[str, ...],
    x: Tensor,
    y: Tensor,
) -> Any:
    """Returns method(module, x), with y in place of the output of down.

    names: the names of the first child, of the second child, and of down in the second.
    """
    first, second, down = names
    after: Any = module._modules[second]

    def output(*_: Any) -> Tensor:
        return y

    return method(_View(module, {first: output, second: _View(after, {down: output})}), x)


def recognize_split_mlp(module: torch.nn.Module) -> tuple[type[FusedSplitMLP], SplitRoles] | None:
    """The base for the module's subclass, and the roles of its children, if a method of it computes
    an MLP and what follows, else None."""
    holders = dict(_holders(module))
    if len(holders) < 2:
        return None
    for base in _BASES:
        method = getattr(type(module), base.method, None)
        if method in (None, torch.nn.Module.forward) or base.method in vars(module):
            continue
        for first, second in itertools.permutations(holders, 2):
            up, down = (_linear(module, name, holders[name]) for name in (first, second))
            if as_out_in(up).shape != as_out_in(down).shape[::-1]:
                continue
            before = module.get_submodule(first)
            if len(list(before.parameters())) != len(list(up.parameters())):
                continue
            names = (holders[first], holders[second])
            with torch.device("cpu"):  # whatever the default device is
                roles = _Probe(module, (first, second), names).roles(method)
            if roles is not None:
                return base, roles
    return None


def _holders(module: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """The names of children that hold one linear layer each, and of these layers."""
    for name, child in module.named_children():
        linears = [n for n, m in child.named_children() if isinstance(m, LINEARS)]
        if len(linears) == 1 and "forward" not in vars(child):
            own = {id(p) for p in child.get_submodule(linears[0]).parameters()}
            rest = [p for p in child.parameters() if id(p) not in own]
            # The rest is copied, and replaced by random values: at most norms and biases.
            if not any(is_lazy(p) for p in child.parameters()) and all(p.dim() < 2 for p in rest):
                yield name, linears[0]


def _linear(module: torch.nn.Module, child: str, name: str) -> Any:
    return module.get_submodule(child).get_submodule(name)


class _Probe:
    """A copy of a module with small random linear layers in two children, in float64."""

    _INNER = 6  # the number of activated features; norms fix the number of the input's
    _SCALES = (1, 30)  # factors of the input: a clamp shows only where values are large

    def __init__(
        self, module: torch.nn.Module, children: tuple[str, str], names: tuple[str, str]
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.nn.Parameter:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return torch.nn.Parameter(values)

        def copied(child: torch.nn.Module) -> torch.nn.Module:
            """A copy of the child, in which all parameters are random."""
            twin = copy.deepcopy(child, {id(p): p for p in child.parameters()})
            for part in twin.modules():
                part._parameters = {
                    name: None if p is None else random(*p.shape)
                    for name, p in part._parameters.items()
                }
            return twin

        self.children, self.names = children, names
        width = as_out_in(_linear(module, children[0], names[0])).shape[1]
        shapes = ((self._INNER, width), (width, self._INNER))
        self.layers = []
        self.module = copy.copy(module)
        self.module._parameters, self.module._buffers = {}, {}
        self.module._modules = {}
        for child, name, shape in zip(children, names, shapes, strict=True):
            linear = _linear(module, child, name)
            layer = torch.nn.Linear(1, 1, linear.bias is not None, "meta")  # initializes nothing
            layer.weight = torch.nn.Parameter(random(*shape).detach() / shape[1] ** 0.5)
            if linear.bias is not None:
                layer.bias = random(shape[0])
            self.layers.append(layer)
            holder = copy.copy(module.get_submodule(child))
            holder._modules = {
                n: layer if n == name else None if m is None else copied(m)
                for n, m in holder._modules.items()
            }
            holder._parameters = {
                n: None if p is None else random(*p.shape) for n, p in holder._parameters.items()
            }
            self.module._modules[child] = holder
        self.module.train()  # so that dropout between the layers shows
        self.inputs = [scale * random(2, 3, width).detach() for scale in self._SCALES]

    def roles(self, method: Callable[..., Any]) -> SplitRoles | None:
        """The children's roles if `method` computes an MLP and what follows, else None."""
        failure = f"{type(self.module).__name__}: no MLP in {' and '.join(self.children)}"
        calls = [(x,) for x in self.inputs]
        results = results_of_function(lambda x: method(self.module, x), calls, failure)
        if results is None:
            return None
        up, down = self.layers

        def agrees(mlp: Callable[[Tensor], Tensor]) -> bool:
            """Whether the results are those with this MLP."""
            again = results_of_function(
                lambda x: _rest(self.module, method, (*self.children, self.names[1]), x, mlp(x)),
                calls,
                failure,
            )
            return again is not None and all(
                (y - z).abs().max() <= 1e-5 * y.abs().max()
                for y, z in zip(results, again, strict=True)
            )

        if agrees(torch.zeros_like):  # the method calls the children in another way, or not at all
            return None
        for (activation, tanh), function in ACTIVATIONS.items():
            if agrees(lambda x, function=function: down(function(up(x)))):  # type: ignore[misc]
                return SplitRoles(self.children, MLPRoles(self.names, activation, tanh))
        return None


def fuse_split_mlps(model: torch.nn.Module, save: Save) -> dict[str, str]:
    """Fuses the MLPs of `model` whose two layers are FP8 layers of one blockwise recipe in two
    children of a module.

    Returns {fully qualified name of the module: the MLP's kind}.
    """
    fused = {}
    for fqn, module in model.named_modules():
        if isinstance(module, (FusedSplitMLP, torch.nn.Linear)):
            continue
        found = recognize_split_mlp(module)
        if found is None:
            continue
        base, roles = found
        pairs = zip(roles.children, roles.mlp.layers, strict=True)
        up, down = (_linear(module, child, name) for child, name in pairs)
        if not (can_fuse_class(up) and can_fuse_class(down) and up.recipe == down.recipe):
            continue
        if not can_fuse_recipe(up.recipe):
            continue
        fuse_(module, base, roles, save)
        fused[fqn] = NAMES[roles.mlp.activation]
    return fused


def fuse_(module: Any, base: type[FusedSplitMLP], roles: SplitRoles, save: Save) -> None:
    """Makes a recognized module run fused; `module.revert_()` undoes it."""
    plain: Any = type(module)
    module.__class__ = base.class_for(plain)
    module.fused_roles = roles
    module.fused_save = save


def unfuse_split_mlps(model: torch.nn.Module) -> None:
    """Undoes `fuse_split_mlps`."""
    for module in model.modules():
        if isinstance(module, FusedSplitMLP):
            module.revert_()
