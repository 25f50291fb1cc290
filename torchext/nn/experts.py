"""Experts that hold their weights as 3-D parameters, in FP8.

A conversion makes FP8Experts in place; torchext/_experts.py tells which modules are such experts.
torchext.nn.MoE (moe.py) is one by itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..ops.experts_function import ExpertsFunction, forward_only
from ..ops.gathered_weight import is_weight
from ..ops.linear_function import Operand, quantize_weight
from ..ops.linear_operands import fit
from ..ops.mlp_function import MLP, Save
from ..recipe import Recipe
from .composition import is_composed, is_composed_in_graph
from .converted import Rerouted, is_fp8
from .frozen_weights import FrozenWeights
from .linear import output_dtype
from .weight_cache import WeightCache


class ExpertsRoles(NamedTuple):
    """What the experts of a module compute.

    Attributes:
        parameters: the names of `up` [E, W, K] and `down` [E, K, I]. The rows of `up` are those of
            the gate and then of up, W = 2 I, or of up alone, W = I.
        activation, tanh_approximation: as in torchext.ops.mlp_function.MLP.
        arguments: the names of forward's arguments: x, the experts' indices, their weights; or x
            alone, whose rows stand by expert, as many for each, as in Llama 4.
        transposed: the module holds `up` as [E, K, W] and `down` as [E, I, K].
    """

    parameters: tuple[str, str]
    activation: str
    tanh_approximation: bool | None
    arguments: tuple[str, ...]
    transposed: bool = False


class SortedExpertsRoles(NamedTuple):
    """What the experts of a module compute whose tokens are sorted by expert.

    Attributes:
        parameters: the names of the gate [E, I, K], up [E, I, K] and down [E, K, I].
        activation, tanh_approximation: as in torchext.ops.mlp_function.MLP.
        arguments: the names of forward's arguments: x, and how many rows each expert has.
    """

    parameters: tuple[str, str, str]
    activation: str
    tanh_approximation: bool | None
    arguments: tuple[str, ...]


Roles = ExpertsRoles | SortedExpertsRoles


def routed(given: list[Any], experts: int) -> tuple[Tensor, Tensor | None]:
    """What Routing.of takes: the choices' indices and weights, or where each expert's rows end and
    None.

    Args:
        given: the arguments of forward, in the order of the roles.
        experts: E.

    Raises:
        ValueError: x is the only argument, and its rows are no multiple of E.
    """
    x, *rest = given
    if len(rest) == 2:
        return rest[0], rest[1]
    if rest:
        return rest[0].cumsum(0, dtype=torch.int32), None
    if x.shape[0] % experts:
        raise ValueError(
            f"torchext: x must have as many rows for each of {experts} experts (got {x.shape[0]} "
            "rows); pass a multiple"
        )
    ends = torch.arange(1, experts + 1, dtype=torch.int32, device=x.device)
    return ends * (x.shape[0] // experts), None


class ExpertsInFP8(torch.nn.Module):
    """Base of modules that hold experts and run them in FP8.

    Attributes:
        recipe: how rows, weights and gradients are quantized.
        fused_roles: what it computes.
        fused_save: as `save` of torchext.nn.SwiGLU.
    """

    recipe: Recipe
    fused_roles: Roles
    fused_save: Save
    _weight_cache: WeightCache

    def _setup(self, roles: Roles, recipe: Recipe, save: Save) -> None:
        self.recipe, self.fused_roles, self.fused_save = recipe, roles, save
        self._weight_cache = WeightCache()

    def refresh_weight(self) -> None:
        """Drops the FP8 weights, as torchext.nn.Linear.refresh_weight does."""
        self._weight_cache.clear()

    def train(self, mode: bool = True) -> Any:
        if mode != self.training and not self._weight_cache.fixed:
            self.refresh_weight()  # evaluation needs only half of the bytes that training keeps
        return super().train(mode)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return f"{text}{', ' if text else ''}fp8={self.recipe}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.refresh_weight()  # the parameters will be replaced
        return super()._apply(fn, recurse)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The arguments of forward in the order of the roles; None if there are others."""
        names = self.fused_roles.arguments
        given = dict(zip(names, args, strict=False)) | kwargs
        if not len(args) + len(kwargs) == len(given) == len(names) or given.keys() != set(names):
            return None
        return [given[name] for name in names]

    def _config(self, x: Tensor) -> MLP:
        roles = self.fused_roles
        dtype = output_dtype(x)
        return MLP(roles.activation, roles.tanh_approximation, self.recipe, dtype, self.fused_save)

    def _held(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.fused_roles.parameters]

    def _matrices(self) -> list[Tensor]:
        """up [E, W, K] and down [E, K, I]."""
        return [p.mT for p in self._held()] if self._is_transposed else self._held()

    @property
    def _is_transposed(self) -> bool:
        return isinstance(self.fused_roles, ExpertsRoles) and self.fused_roles.transposed

    @property
    def _is_gated(self) -> bool:
        return self.fused_roles.activation.endswith("_mul")

    def _run(
        self, x: Tensor, ids: Tensor, weights: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        """The experts' sums; ids and weights are what `routed` returns."""
        config, parameters = self._config(x), self._matrices()
        differentiable = [t for t in (x, weights, residual, *parameters) if t is not None]
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
        operands = self._operands(x.requires_grad, graph)
        if graph:
            return ExpertsFunction.apply(x, ids, weights, config, operands, *parameters, residual)
        quantized = [
            operand or quantize_weight(parameter, self.recipe, transposed=False)
            for operand, parameter in zip(operands, parameters, strict=True)
        ]
        return forward_only(config, quantized, x, ids, weights, residual=residual)

    def _operands(self, for_x: bool, for_dh: bool) -> list[Operand | None]:
        """The FP8 weights that are kept of up and down; None where the caller is to quantize them.

        Args:
            for_x: whether x, or for_dh, whether anything needs a gradient.
        """
        if torch.compiler.is_compiling():
            return [None, None]
        # Re-entrant checkpointing runs forward without gradients first, and later with them.
        needs = (for_x, for_dh) if torch.is_grad_enabled() else (self.training,) * 2
        names = self.fused_roles.parameters
        return list(map(self._kept_operand, self._held(), needs, names))

    def _kept_operand(self, parameter: Tensor, needed: bool, name: str) -> Operand | None:
        """The FP8 weights that are kept, with those for dgrad if `needed`."""
        swapped = self._is_transposed  # then fprop reads the parameter's transpose
        kept = self._weight_cache.operand(
            parameter, self.recipe, transposed=needed or swapped, role=name
        )
        if kept is None or not swapped:
            return kept
        return Operand(kept.data_t, kept.scale_t, kept.data, kept.scale)


class FP8Experts(ExpertsInFP8, Rerouted):
    """Base of the classes that experts get.

    forward(x [T, K], ids [T, k], weights [T, k]) returns [T, K]: for each token, the sum over its
    choices of weight * down[id] @ activation(up[id] @ x). Under torch.export, other tracers,
    transforms and tensor subclasses, the forward of the class runs, in the dtypes of its
    parameters.
    """

    added = ("recipe", "fused_roles", "fused_save", "_weight_cache")

    def run(self, *args: Any, **kwargs: Any) -> Any:
        given = self._given(args, kwargs)
        if given is not None and self._can_run(*given):
            return self._run(given[0], *routed(given, self._matrices()[0].shape[0]))
        return super().run(*args, **kwargs)

    def _can_run(self, x: Any, ids: Any, weights: Any) -> bool:
        return (
            self._can_multiply(x)
            and all(type(t) is Tensor and not t.is_nested for t in (ids, weights))
            and ids.dim() == 2
            and x.shape[0] == ids.shape[0]
            and ids.shape == weights.shape
            and ids.dtype in (torch.int64, torch.int32)
            and weights.is_floating_point()
            and ids.device == weights.device == x.device
        )

    def _can_multiply(self, x: Any) -> bool:
        """Whether x and the parameters are plain, and fit together."""
        if _is_transformed():
            return False
        if not all(is_weight(p) and p.dim() == 3 for p in self._held()):
            return False
        up, down = self._matrices()
        return (
            type(x) is Tensor
            and not x.is_nested
            and x.dim() == 2
            and down.shape[0] == up.shape[0]
            and down.shape[1] == up.shape[2]
            and up.shape[1] == down.shape[2] * (2 if self._is_gated else 1)
            and fit(x, up[0], None)
            and fit(x, down[0].t(), None)
        )


def _is_transformed() -> bool:
    if torch.compiler.is_compiling():
        return is_composed_in_graph()
    return is_composed() or bool(torch._C._len_torch_function_stack())


class FP8EqualExperts(FP8Experts):
    """Base of the classes that experts get whose rows stand by expert, as many for each.

    forward(x [E * M, K]) returns [E * M, K]: expert e computes rows e M to (e + 1) M. Where
    FP8Experts cannot run, the forward of the class does.
    """

    def _can_run(self, x: Any) -> bool:  # type: ignore[override]
        return (
            self._can_multiply(x) and x.numel() > 0 and x.shape[0] % self._held()[0].shape[0] == 0
        )


class FP8SortedExperts(FP8Experts):
    """Base of the classes that experts get whose tokens are sorted by expert.

    forward(x [S, K], counts [E]) returns [S, K]: down[e] @ (activation(gate[e] @ x) * (up[e] @ x))
    for the rows of each expert e, one expert after another; zeros for rows beyond sum(counts).
    Gate and up are copied side by side in every forward. DTensors are used as their local shards.
    Where FP8Experts cannot run, the forward of the class does.
    """

    def _can_run(self, x: Any, counts: Any) -> bool:  # type: ignore[override]
        if _is_transformed():
            return False
        gate, up, down = self._matrices()
        return (
            all(type(t) is Tensor and not t.is_nested for t in (x, counts))
            and x.dim() == 2
            and x.numel() > 0
            and counts.dim() == 1
            and counts.dtype in (torch.int64, torch.int32)
            and counts.device == x.device
            and all(type(p) in (Tensor, Parameter) and p.dim() == 3 for p in (gate, up, down))
            and gate.shape == up.shape == down.mT.shape
            and gate.shape[0] == counts.shape[0]
            and gate.dtype == up.dtype
            and fit(x, gate[0], None)
            and fit(x, down[0].t(), None)
        )

    def _matrices(self) -> list[Any]:
        """Gate, up and down; of a DTensor the shard of this rank, as the forward of the class has
        it."""
        parameters: list[Any] = self._held()
        return [p if type(p) in (Tensor, Parameter) else p.to_local() for p in parameters]

    def _run(self, x: Tensor, ends: Tensor, _: None) -> Tensor:  # type: ignore[override]
        config, (gate, up, down) = self._config(x), self._matrices()
        both = torch.cat([gate, up], 1)
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in (x, both, down))
        if graph:
            return ExpertsFunction.apply(x, ends, None, config, [None, None], both, down, None)
        operands = [quantize_weight(p, self.recipe, transposed=False) for p in (both, down)]
        return forward_only(config, operands, x, ends, None)


def trains_in_fp8(module: torch.nn.Module) -> bool:
    """Whether `module` is a linear layer, or experts, whose wide weights train in FP8."""
    if isinstance(module, FrozenWeights):
        return False
    return is_fp8(module) or isinstance(module, ExpertsInFP8)
