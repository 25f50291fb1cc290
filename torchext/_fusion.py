"""Finds MLPs in a model by what they compute, and runs them fused, in place.

A candidate is a module whose only parameters are those of two or three linear layers with the
shapes of an MLP. A copy of it with small random layers is called in float64. If the result is that
of an MLP with one of the known activations, then the module computes it for all weights: its class
does not matter, nor do the names of its layers. Dropout, a residual, a clamp or another factor give
another result, and the module is left alone.

A fused module gets a subclass of its class with the same name. Its forward calls the fused MLP or,
where that cannot run (hooks, torch.export, ...), the forward of its class. Parameters and
`state_dict` do not change.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ._probing import results_of
from .nn.converted import Rerouted, TransposedLinear
from .nn.mlp import _MLP, as_out_in, can_fuse_class, can_fuse_recipe, fused_mlp, has_hooks
from .ops.mlp_function import ACTIVATIONS, GATED, Save

LINEARS = (torch.nn.Linear, TransposedLinear)


class MLPRoles(NamedTuple):
    """Which children of a module are the projections of an MLP, and its activation.

    Attributes:
        layers: the children's names: the gate's (if there is a gate), up's, down's.
        activation, tanh_approximation: as in torchext.ops.mlp_function.MLP.
    """

    layers: tuple[str, ...]
    activation: str
    tanh_approximation: bool | None


def recognize_mlp(module: torch.nn.Module) -> MLPRoles | None:
    """The roles of the module's linear layers if it computes an MLP, else None."""
    linears = {n: m for n, m in module.named_children() if isinstance(m, LINEARS)}
    if not 2 <= len(linears) <= 3 or "forward" in vars(module):
        return None
    if type(module).forward is torch.nn.Module.forward:  # a container
        return None
    if any(is_lazy(parameter) for parameter in module.parameters()):
        return None
    theirs = {id(p) for linear in linears.values() for p in linear.parameters()}
    if any(id(p) not in theirs for p in module.parameters()):
        return None
    orders = [
        names
        for names in itertools.permutations(linears)
        if _has_shapes_of_mlp([as_out_in(linears[name]) for name in names])
    ]
    if not orders:
        return None
    with torch.device("cpu"):  # whatever the default device is
        return _roles_by_results(_Probe(module, linears), orders)


def _roles_by_results(probe: _Probe, orders: list[tuple[str, ...]]) -> MLPRoles | None:
    results = results_of(probe.module, [(x,) for x in probe.inputs], "MLP")
    if results is None:
        return None
    for names in orders:
        for (activation, tanh), function in ACTIVATIONS.items():
            gated = len(names) == 3
            if (not gated or activation in GATED) and probe.agrees(names, function, results):
                return MLPRoles(names, f"{activation}_mul" if gated else activation, tanh)
    return None


def _has_shapes_of_mlp(weights: list[Tensor]) -> bool:
    *before, down = weights
    return all(
        weight.shape == before[0].shape and weight.shape[0] == down.shape[1] for weight in before
    )


class _Probe:
    """A copy of a module with small random linear layers, all of one size, in float64."""

    _SIZE = 6
    _SCALES = (1, 30)  # of the input: a clamp shows only where values are large

    def __init__(self, module: torch.nn.Module, linears: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.layers = {}
        for name, linear in linears.items():
            layer = torch.nn.Linear(1, 1, linear.bias is not None, "meta")  # initializes nothing
            layer.weight = torch.nn.Parameter(random(self._SIZE, self._SIZE) / self._SIZE**0.5)
            if linear.bias is not None:
                layer.bias = torch.nn.Parameter(random(self._SIZE))
            self.layers[name] = layer
        self.module = copy.copy(module)
        self.module._modules = {
            name: self.layers.get(name) or copy.deepcopy(child)
            for name, child in module._modules.items()
        }
        self.module.train()  # so that dropout shows
        self.inputs = [scale * random(2, 3, self._SIZE) for scale in self._SCALES]

    def agrees(
        self, names: tuple[str, ...], function: Callable[[Tensor], Tensor], results: list[Tensor]
    ) -> bool:
        """Whether the results are those of an MLP with the layers in this order."""
        *before, down = (self.layers[name] for name in names)
        with torch.no_grad():
            for x, y in zip(self.inputs, results, strict=True):
                activated = function(before[0](x))
                if len(before) == 2:
                    activated = activated * before[1](x)
                expected = down(activated)
                if (y.to(expected) - expected).abs().max() > 1e-5 * expected.abs().max():
                    return False
        return True


class FusedMLP(Rerouted):
    """Base of the subclasses that fused modules get.

    Attributes:
        fused_roles: the roles of its children.
        fused_save: as `save` of torchext.nn.SwiGLU.
    """

    fused_roles: MLPRoles
    fused_save: Save
    added = ("fused_roles", "fused_save")

    def run(self, *args: Any, **kwargs: Any) -> Any:
        names, activation, tanh_approximation = self.fused_roles
        if len(args) == 1 and not kwargs and not self._others_have_hooks(names):
            layers: list[Any] = [self._modules[name] for name in names]
            y = fused_mlp(layers, activation, tanh_approximation, self.fused_save, args[0])
            if y is not None:
                return y
        return super().run(*args, **kwargs)

    def _others_have_hooks(self, projections: tuple[str, ...]) -> bool:
        """Whether a child besides the projections, such as the activation, must be called."""
        return any(
            has_hooks(module)
            for name, child in self._modules.items()
            if child is not None and name not in projections
            for module in child.modules()
        )


def fuse_(module: Any, roles: MLPRoles, save: Save) -> None:
    """Makes a module that recognize_mlp recognized run fused; `module.revert_()` undoes it."""
    plain: Any = type(module)
    module.__class__ = FusedMLP.class_for(plain)
    module.fused_roles = roles
    module.fused_save = save


NAMES = {"silu_mul": "SwiGLU", "gelu_mul": "GEGLU", "gelu": "GELU", "relu2": "squared ReLU"}


def fuse_mlps(model: torch.nn.Module, save: Save) -> dict[str, str]:
    """Fuses the MLPs of `model` whose layers are FP8 layers of one blockwise recipe.

    Returns {fully qualified name: the MLP's kind}.
    """
    fused = {}
    for fqn, module in model.named_modules():
        if isinstance(module, (FusedMLP, _MLP, torch.nn.Linear)):
            continue
        layers: list[Any] = [m for m in module.children() if isinstance(m, LINEARS)]
        recipes = {layer.recipe for layer in layers if can_fuse_class(layer)}
        if len(recipes) != 1 or not can_fuse_recipe(next(iter(recipes))):
            continue
        roles = recognize_mlp(module)
        if roles is None or not all(can_fuse_class(module._modules[name]) for name in roles.layers):
            continue
        fuse_(module, roles, save)
        fused[fqn] = NAMES[roles.activation]
    return fused


def unfuse_mlps(model: torch.nn.Module) -> None:
    """Undoes `fuse_mlps`."""
    for module in model.modules():
        if isinstance(module, FusedMLP):
            module.revert_()
