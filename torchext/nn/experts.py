"""Experts that hold their weights as two 3-D parameters, in FP8; a conversion makes them in place.

torchext/_experts.py tells which modules are such experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..ops.experts_function import ExpertsFunction, forward_only
from ..ops.linear_function import quantize_weight
from ..ops.linear_operands import fit
from ..ops.mlp_function import MLP, Save
from ..recipe import Recipe
from .composition import is_composed, is_composed_in_graph
from .converted import Rerouted, is_fp8
from .linear import output_dtype
from .weight_cache import WeightCache


class ExpertsRoles(NamedTuple):
    """What the experts of a module compute.

    Attributes:
        parameters: the names of `up` [E, W, K] and `down` [E, K, I]. The rows of `up` are those of
            the gate and then of up, W = 2 I, or of up alone, W = I.
        activation, tanh_approximation: as in torchext.ops.mlp_function.MLP.
        arguments: the names of forward's arguments: x, the experts' indices, their weights.
    """

    parameters: tuple[str, str]
    activation: str
    tanh_approximation: bool | None
    arguments: tuple[str, ...]


class FP8Experts(Rerouted):
    """Base of the classes that experts get.

    forward(x [T, K], ids [T, k], weights [T, k]) returns [T, K]: for each token, the sum over its
    choices of weight * down[id] @ activation(up[id] @ x). Under torch.export, other tracers,
    transforms and tensor subclasses, the forward of the class runs, in the dtypes of its
    parameters.

    Attributes:
        fused_roles: what it computes.
        fused_save: as `save` of torchext.nn.SwiGLU.
    """

    recipe: Recipe
    fused_roles: ExpertsRoles
    fused_save: Save
    _weight_cache: WeightCache
    added = ("recipe", "fused_roles", "fused_save", "_weight_cache")

    def run(self, *args: Any, **kwargs: Any) -> Any:
        names = self.fused_roles.arguments
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(args) + len(kwargs) == len(given) == 3 and given.keys() == set(names):
            x, ids, weights = (given[name] for name in names)
            if self._can_run(x, ids, weights):
                return self._run(x, ids, weights)
        return super().run(*args, **kwargs)

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

    def _can_run(self, x: Any, ids: Any, weights: Any) -> bool:
        if torch.compiler.is_compiling():
            if is_composed_in_graph():
                return False
        elif is_composed() or torch._C._len_torch_function_stack():
            return False
        up, down = self._matrices()
        return (
            all(type(t) is Tensor and not t.is_nested for t in (x, ids, weights))
            and all(type(p) is Parameter and p.dim() == 3 for p in (up, down))
            and x.dim() == ids.dim() == 2
            and x.shape[0] == ids.shape[0]
            and ids.shape == weights.shape
            and ids.dtype in (torch.int64, torch.int32)
            and weights.is_floating_point()
            and ids.device == weights.device == x.device
            and down.shape[0] == up.shape[0]
            and down.shape[1] == up.shape[2]
            and up.shape[1] == down.shape[2] * (2 if self._is_gated else 1)
            and fit(x, up[0], None)
            and fit(x, down[0].t(), None)
        )

    def _matrices(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.fused_roles.parameters]

    @property
    def _is_gated(self) -> bool:
        return self.fused_roles.activation.endswith("_mul")

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        roles, recipe = self.fused_roles, self.recipe
        config = MLP(
            roles.activation, roles.tanh_approximation, recipe, output_dtype(x), self.fused_save
        )
        parameters = self._matrices()
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, *parameters))
        # Re-entrant checkpointing runs forward without gradients first, and later with them.
        for_x, for_dh = x.requires_grad, graph
        if not torch.is_grad_enabled():
            for_x = for_dh = self.training
        operands: list[Any] = [None, None]
        if not torch.compiler.is_compiling():
            operands = [
                self._weight_cache.operand(parameter, recipe, transposed=needed, role=name)
                for parameter, needed, name in zip(
                    parameters, (for_x, for_dh), roles.parameters, strict=True
                )
            ]
        if graph:
            return ExpertsFunction.apply(x, ids, weights, config, operands, *parameters)
        quantized = [
            operand or quantize_weight(parameter, recipe, transposed=False)
            for operand, parameter in zip(operands, parameters, strict=True)
        ]
        return forward_only(config, quantized, x, ids, weights)


def trains_in_fp8(module: torch.nn.Module) -> bool:
    """Whether `module` is an FP8 linear layer, or experts in FP8."""
    return is_fp8(module) or isinstance(module, FP8Experts)
