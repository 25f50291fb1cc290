"""Experts in 3-D parameters for `torchext.debug.numerics`: each expert is observed as an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import MoE
from ..nn.experts import routed
from ..ops.experts_function import Routing
from ..ops.gathered_weight import is_weight
from ..ops.mlp_function import activate


def parameters_of_experts(name: str, layer: Any) -> list[str]:
    """The names that the parameters of the experts have in a report."""
    return [f"{name}.{parameter}".lstrip(".") for parameter in layer.fused_roles.parameters]


def observable(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """The arguments of a forward, in the order of the layer's roles, with the tokens as a matrix.

    None if the forward cannot be observed: its tensors are of other types, or its tokens go to
    experts on other ranks.
    """
    given = layer._given(args, kwargs)
    if given is None or not isinstance(layer, MoE):
        return given if given is not None and layer._can_run(*given) else None
    if layer.dispatcher is not None and layer.dispatcher.num_ranks > 1:
        return None
    if any(type(t) is not Tensor for t in given) or not all(map(is_weight, layer._held())):
        return None
    x, *choices = given
    tokens = x.reshape(-1, x.shape[-1])
    return [tokens, *(t.reshape(tokens.shape[0], t.shape[-1]) for t in choices)]


class ObservedExperts:
    """One observed forward of experts, and its backward."""

    def __init__(self, name: str, layer: Any, given: list[Any], sample: Callable[..., Any]) -> None:
        """Takes the rows of each expert apart.

        Args:
            name: the module's name.
            layer: the module of experts.
            given: the arguments of the module's forward, from `observable`.
            sample: makes the sample of a linear layer; called as sample(name, recipe, x, weight,
                counts=...).
        """
        matrices = layer._matrices()
        count = matrices[0].shape[0]
        ids, of_choices = routed(given, count)
        self.routing = Routing.of(ids, of_choices, count)
        row_weights = self.routing.by_row(None if of_choices is None else of_choices.detach())
        self.needs_dw = [matrix.requires_grad for matrix in matrices]
        names = parameters_of_experts(name, layer)
        rows = self.routing.rows_of_tokens(given[0].detach())
        self.experts = []
        start = 0
        for end, *weights in zip(self.routing.offsets.tolist(), *matrices, strict=True):
            if end > start:
                run = slice(start, end)

                def make(
                    x: Tensor, index: int, weights: Any = weights, counts: bool = start == 0
                ) -> Any:
                    weight = weights[index].detach()
                    return sample(names[index], layer.recipe, x, weight, counts=counts)

                factors = None if row_weights is None else row_weights[run, None]
                roles = layer.fused_roles
                self.experts.append((run, _Expert(make, len(weights), roles, rows[run], factors)))
            start = end

    def fprop(self) -> None:
        for _, expert in self.experts:
            for linear in (*expert.before, expert.down):
                linear.fprop(None, None)

    def backward(self, dy: Tensor, needs_dx: bool) -> None:
        if type(dy) is not Tensor:  # batched gradients
            return
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            rows = self.routing.rows_of_tokens(dy)
            for run, expert in self.experts:
                expert.backward(rows[run], needs_dx, self.needs_dw)


class _Expert:
    """The rows of one expert, and the samples of its linear layers."""

    def __init__(
        self,
        sample: Callable[[Tensor, int], Any],
        count: int,
        roles: Any,
        x: Tensor,
        factors: Tensor | None,
    ) -> None:
        """Computes what down reads, in FP32.

        Args:
            sample: makes the sample of a layer from its input and its number; down is the last.
            count: the number of linear layers.
            roles: the roles of the experts' parameters.
            x: [rows, K], the expert's rows.
            factors: [rows, 1], the weights of the rows; None for ones.
        """
        self.roles, self.factors = roles, factors
        self.before = [sample(x, index) for index in range(count - 1)]
        self.wides = [F.linear(x.float(), linear.weight.float()) for linear in self.before]
        self.down = sample(self.activated(self.wides).to(x.dtype), count - 1)

    def activated(self, wides: list[Tensor]) -> Tensor:
        return activate(self.roles.activation, self.roles.tanh_approximation, wides)

    def backward(self, dy: Tensor, needs_dx: bool, needs_dw: list[bool]) -> None:
        weighted = dy if self.factors is None else (dy.float() * self.factors).to(dy.dtype)
        needs_dh = needs_dx or any(needs_dw[:-1])
        self.down.backward(dy, needs_dh, False)  # the weights multiply the result
        self.down.backward(weighted, False, needs_dw[-1])
        if not needs_dh:
            return
        dh = weighted.float() @ self.down.weight.float()
        wides = [wide.requires_grad_() for wide in self.wides]
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.activated(wides), wides, dh)
        for linear, gradient, needed in zip(self.before, gradients, needs_dw, strict=False):
            linear.backward(gradient.to(dy.dtype), needs_dx, needed)
