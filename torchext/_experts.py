"""Finds experts that a model holds as 3-D parameters, and converts them in place.

A candidate is a module whose only parameters are two 3-D ones, with the shapes of the weights of E
MLPs, or of their transposes. A copy of it with small random parameters is called, in float64 or, as
some implementations of grouped products refuse that, in FP32. If the result is the weighted sum of
MLPs with one of the known activations, then the module computes it for all parameters: its class
does not matter, nor do the names of its parameters.

Experts that are called with x alone, as Llama 4's, are called with as many rows for each expert.

A module of three 3-D parameters (gate, up and down apart), called with rows that are sorted by
expert and the number of each expert's rows, is recognized likewise. torchtitan's rounds everything
to BF16. Then results are compared by their RMS error, which tells SiLU from other activations, but
not all of these from one another; so only SiLU counts.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ._probing import results_of
from .nn.experts import (
    ExpertsInFP8,
    ExpertsRoles,
    FP8EqualExperts,
    FP8Experts,
    FP8SortedExperts,
    Roles,
    SortedExpertsRoles,
)
from .nn.frozen_weights import FrozenWeights
from .ops.mlp_function import ACTIVATIONS, GATED, Save
from .recipe import Recipe


def recognize_experts(module: torch.nn.Module) -> Roles | None:
    """The roles of the module's parameters if it computes experts, else None."""
    with torch.device("cpu"):  # whatever the default device is
        found = _recognize(module)
    return None if isinstance(found, str) else found


def why_not_experts(module: torch.nn.Module) -> str | None:
    """In a few words, why recognize_experts does not know a module; None if it does."""
    with torch.device("cpu"):
        found = _recognize(module)
    return found if isinstance(found, str) else None


def _recognize(module: torch.nn.Module) -> Roles | str:
    parameters = module._parameters
    others = [n for n, p in parameters.items() if p is None or is_lazy(p) or p.dim() != 3]
    if others or len(list(module.parameters())) != len(parameters):
        others = others or [n for n, _ in module.named_parameters() if n not in parameters]
        return f"it has parameters besides the matrices of experts: {', '.join(others[:3])}"
    if len(parameters) not in (2, 3):
        return "its 3-D parameters are not up and down, or gate, up and down"
    if any(name in vars(module) for name in FP8Experts.added):
        return "it has attributes by the names of those of FP8 experts"
    if len(parameters) == 3:
        return _recognize_sorted(module)
    arguments = _arguments(module, 3, 1)
    if isinstance(arguments, str):
        return arguments
    first, second = parameters
    fits = False
    orders = ((first, second), (second, first))
    for names, transposed in itertools.product(orders, (False, True)):
        up, down = (module.get_parameter(name).detach() for name in names)
        if transposed:
            up, down = up.mT, down.mT
        experts, width, features = up.shape
        inner = down.shape[2]
        if down.shape[:2] != (experts, features) or width not in (inner, 2 * inner):
            continue
        fits = True
        probe = _Probe(
            module,
            names,
            (experts, features, inner),
            is_gated=width == 2 * inner,
            transposed=transposed,
            by_choice=len(arguments) == 3,
        )
        for (activation, tanh), function in ACTIVATIONS.items():
            if probe.is_gated and activation not in GATED:
                continue
            if probe.agrees(function):
                gated = "_mul" if probe.is_gated else ""
                return ExpertsRoles(names, f"{activation}{gated}", tanh, arguments, transposed)
    return _OTHER_RESULTS if fits else _OTHER_SHAPES


_OTHER_SHAPES = "its parameters do not have the shapes of experts"
_OTHER_RESULTS = (
    "it computes something else than gate, up, a known activation and down: it may clamp, "
    "interleave gate and up, or take other arguments"
)


def _recognize_sorted(module: torch.nn.Module) -> SortedExpertsRoles | str:
    arguments = _arguments(module, 2)
    if isinstance(arguments, str):
        return arguments
    fits = False
    parameters: dict[str, Any] = dict(module._parameters)
    for names in itertools.permutations(parameters):
        gate, up, down = (parameters[name] for name in names)
        if not gate.shape == up.shape == down.mT.shape:
            continue
        fits = True
        probe = _SortedProbe(module, names, gate.shape[0])
        for activation, tanh in probe.activations():
            if probe.agrees(ACTIVATIONS[activation, tanh]):
                return SortedExpertsRoles(
                    (names[0], names[1], names[2]), f"{activation}_mul", tanh, arguments
                )
    return _OTHER_RESULTS if fits else _OTHER_SHAPES


def _arguments(module: Any, *counts: int) -> tuple[str, ...] | str:
    """The names of forward's arguments if their number is one of `counts`; else that it is not."""
    try:
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    except (TypeError, ValueError):
        return "its forward has no signature"
    if len(names) in counts:
        return names
    expected = " or ".join(map(str, counts))
    return (
        f"its forward takes {', '.join(names) or 'nothing'}; those of experts, {expected} arguments"
    )


class _Probe:
    """A copy of a module with small random parameters, and the results of calling it."""

    _FEATURES, _INNER = 24, 16  # multiples of 16 bytes, which grouped products require
    _SCALES = (1, 30)  # of the input: a clamp shows only where values are large
    _TOLERANCES = ((torch.float64, 1e-5), (torch.float32, 1e-4))

    def __init__(
        self,
        module: torch.nn.Module,
        names: tuple[str, str],
        sizes: tuple[int, int, int],
        *,
        is_gated: bool,
        transposed: bool,
        by_choice: bool,
    ) -> None:
        """Calls the copy.

        Args:
            module: the module.
            names: of its parameters up and down.
            sizes: E, K and I.
            is_gated: whether up holds the gate, too.
            transposed: as in ExpertsRoles.
            by_choice: whether forward takes indices and weights, beside x.
        """
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.is_gated, self.transposed = is_gated, transposed
        experts, k, i = sizes
        features = self._FEATURES
        inner = features if i == k else self._INNER
        self.up = random(experts, inner * (2 if is_gated else 1), features) / features**0.5
        self.down = random(experts, features, inner) / inner**0.5
        self.by_choice = by_choice
        if by_choice:
            tokens, choices = 6, min(2, experts)
            self.ids = torch.rand(tokens, experts, generator=generator).topk(choices).indices
            self.weights = random(tokens, choices).abs()
        else:
            tokens = 2 * experts
            self.ids = torch.arange(tokens)[:, None] // 2
            self.weights = torch.ones(tokens, 1, dtype=torch.float64)
        self.inputs = [scale * random(tokens, features) for scale in self._SCALES]
        self.module = copy.copy(module)
        self.module._modules = {n: copy.deepcopy(m) for n, m in module._modules.items()}
        self.names = names
        self.module.train()  # so that dropout shows
        self.results = None
        state = vars(self.module)
        small = {k: features, i: inner, 2 * i: 2 * inner}
        resized = {n: small[v] for n, v in state.items() if type(v) is int and v in small}
        # Some forwards read sizes from attributes. Others have equal attributes of another meaning.
        for attributes, (dtype, tolerance) in itertools.product(({}, resized), self._TOLERANCES):
            state.update(attributes)
            self.results, self.tolerance = self._call(dtype), tolerance
            if self.results is not None:
                break

    def _call(self, dtype: torch.dtype) -> list[Tensor] | None:
        """Calls the module for each input, as results_of does."""
        values = (self.up, self.down)
        if self.transposed:
            values = (self.up.mT.contiguous(), self.down.mT.contiguous())
        self.module._parameters = {
            name: torch.nn.Parameter(value.to(dtype))
            for name, value in zip(self.names, values, strict=True)
        }
        calls: list[tuple[Tensor, ...]] = [
            (x.to(dtype), self.ids.clone(), self.weights.to(dtype)) for x in self.inputs
        ]
        if not self.by_choice:
            calls = [(x,) for x, *_ in calls]
        return results_of(self.module, calls, f"experts in {dtype}")

    def agrees(self, function: Callable[[Tensor], Tensor]) -> bool:
        """Whether the results are those of experts with this activation."""
        if self.results is None:
            return False
        up, down = self.up[self.ids], self.down[self.ids]  # [tokens, choices, ...]
        for x, y in zip(self.inputs, self.results, strict=True):
            wide = torch.einsum("tcwk,tk->tcw", up, x)
            if self.is_gated:
                gate, rest = wide.chunk(2, dim=-1)
                h = function(gate) * rest
            else:
                h = function(wide)
            expected = torch.einsum("tcki,tci,tc->tk", down, h, self.weights)
            limit = self.tolerance * expected.abs().max()
            if (y.double() - expected).abs().max() > limit:
                return False
        return True


class _SortedProbe:
    """_Probe for experts that are called with sorted rows."""

    _RMS_IN_BF16 = 0.01  # of three products, each rounded; another activation makes 0.1

    def __init__(self, module: torch.nn.Module, names: tuple[str, ...], experts: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.bfloat16().double()

        features, inner = _Probe._FEATURES, _Probe._INNER
        shapes = [(experts, inner, features)] * 2 + [(experts, features, inner)]
        self.weights = [random(*shape) / 4 for shape in shapes]
        self.counts = torch.tensor([(5, 0, 9)[expert % 3] for expert in range(experts)])
        rows = int(self.counts.sum())
        self.inputs = [scale * random(rows, features) for scale in _Probe._SCALES]
        self.module = copy.copy(module)
        self.module._modules = {n: copy.deepcopy(m) for n, m in module._modules.items()}
        self.module.train()  # so that dropout shows
        self.results = None
        for dtype, tolerance in _Probe._TOLERANCES:
            self.module._parameters = {
                name: torch.nn.Parameter(value.to(dtype))
                for name, value in zip(names, self.weights, strict=True)
            }
            calls = [(x.to(dtype), self.counts.clone()) for x in self.inputs]
            self.results = results_of(self.module, calls, f"experts in {dtype}")
            self.tolerance = tolerance
            if self.results is not None:
                break
        self.is_bf16 = self.results is not None and all(
            torch.equal(y.bfloat16().to(y), y) for y in self.results
        )

    def activations(self) -> list[tuple[str, bool | None]]:
        if self.results is None:
            return []
        return [key for key in ACTIVATIONS if key[0] in (("silu",) if self.is_bf16 else GATED)]

    def agrees(self, function: Callable[[Tensor], Tensor]) -> bool:
        """Whether the results are those of experts with this activation."""
        ids = torch.arange(len(self.counts)).repeat_interleave(self.counts)
        gate, up, down = (weight[ids] for weight in self.weights)
        for x, y in zip(self.inputs, self.results or (), strict=True):
            h = function(torch.einsum("tik,tk->ti", gate, x)) * torch.einsum("tik,tk->ti", up, x)
            expected = torch.einsum("tki,ti->tk", down, h)
            error = y.double() - expected
            if self.is_bf16:
                if error.square().mean() > self._RMS_IN_BF16**2 * expected.square().mean():
                    return False
            elif error.abs().max() > self.tolerance * expected.abs().max():
                return False
        return True


def find_experts(model: torch.nn.Module) -> dict[str, Roles]:
    """{fully qualified name: its roles} of every module of experts whose weights are wide, whether
    they train in FP8, as in torchext.nn.MoE, or not."""
    found = {}
    for fqn, module in model.named_modules():
        in_fp8 = isinstance(module, ExpertsInFP8) and not isinstance(module, FrozenWeights)
        roles = module.fused_roles if in_fp8 else recognize_experts(module)
        if roles is not None:
            found[fqn] = roles
    return found


def convert_experts_(module: Any, roles: Roles, recipe: Recipe, save: Save) -> None:
    """Makes a module that recognize_experts recognized train in FP8. `revert_` undoes it."""
    base: type[FP8Experts] = FP8EqualExperts if len(roles.arguments) == 1 else FP8Experts
    if isinstance(roles, SortedExpertsRoles):
        base = FP8SortedExperts
    module.__class__ = base.class_for(type(module))
    module._setup(roles, recipe, save)
