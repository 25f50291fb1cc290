"""The layer of a mixture of experts, forward and backward: its data, and a loop over experts.

A case's shape is (tokens, hidden, intermediate, experts, choices). Each expert is a SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case
from .problems import Problem, Run, UnsupportedError, difference, require


class MoELayerProblem(Problem):
    """Tokens in BF16, the experts that each chose at random, their weights, and dy."""

    FP8_TOLERANCE = 0.12  # an SQNR of 18 dB, after two GEMMs
    UNQUANTIZED_TOLERANCE = 2e-2

    def __init__(self, case: Case, device: str):
        super().__init__(case, device)
        tokens, hidden, inner, experts, choices = case.shape
        self.experts = experts
        self.flops = 18.0 * tokens * choices * hidden * inner  # three matrices, three GEMMs each
        factory: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.x, self.grad = (torch.randn(tokens, hidden, **factory) for _ in range(2))
        self.ids = torch.rand(tokens, experts, device=device).topk(choices).indices
        self.weights = torch.rand(tokens, choices, **factory)
        self.up = torch.randn(experts, 2 * inner, hidden, **factory) * hidden**-0.5
        self.down = torch.randn(experts, hidden, inner, **factory) * inner**-0.5

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """The output and the gradients of x, of the weights and of both parameters, in float64."""
        x, weights, up, down = (
            t.double().requires_grad_() for t in (self.x, self.weights, self.up, self.down)
        )
        y = loop_over_experts(x, self.ids, weights, up, down)
        y.backward(self.grad.double())
        return tuple(
            t for t in (y.detach(), x.grad, weights.grad, up.grad, down.grad) if t is not None
        )

    def run(
        self,
        layer: Callable[[Tensor, Tensor, Tensor], Tensor],
        parameters: tuple[Tensor, Tensor],
        tolerance: float,
    ) -> Run:
        """A Run of `layer`, whose parameters are written with equal values before every call, as
        by an optimizer."""
        dtype = parameters[0].dtype
        x, weights = (t.to(dtype, copy=True).requires_grad_() for t in (self.x, self.weights))
        leaves, grad = (x, weights, *parameters), self.grad.to(dtype)

        def call() -> tuple[Tensor | None, ...]:
            y = layer(x, self.ids, weights)
            y.backward(grad)
            return y, *(leaf.grad for leaf in leaves)

        def new_step() -> None:
            for leaf in leaves:
                leaf.grad = None
            with torch.no_grad():
                for parameter in parameters:
                    parameter.add_(0)

        def check(result: object) -> dict:
            assert isinstance(result, tuple)
            names = ("output", "of x", "of the weights", "of gate and up", "of down")
            errors = [
                require(difference(got, want), tolerance, what=what)
                for what, got, want in zip(names, result, self.expected, strict=True)
            ]
            return max(errors, key=lambda error: error["relative"])

        return Run(call, check, before=new_step)


def loop_over_experts(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The loop of models without grouped GEMMs: the tokens of each expert are gathered, pass two
    linear layers, are weighted and added into the result."""
    y = torch.zeros_like(x)
    for expert in range(up.shape[0]):
        token, choice = torch.where(ids == expert)
        if token.numel() == 0:
            continue
        gate, rest = F.linear(x[token], up[expert]).chunk(2, dim=-1)
        part = F.linear(F.silu(gate) * rest, down[expert]) * weights[token, choice, None]
        y = y.index_add(0, token, part)
    return y


def loop_in(dtype: torch.dtype) -> Callable[[Problem], Run]:
    """The contender that loops over experts in `dtype`."""

    def prepare(problem: Problem) -> Run:
        if not isinstance(problem, MoELayerProblem):
            raise UnsupportedError("only the layer has a counterpart without FP8")
        up, down = (t.to(dtype, copy=True).requires_grad_() for t in (problem.up, problem.down))
        return problem.run(
            lambda x, ids, weights: loop_over_experts(x, ids, weights, up, down),
            (up, down),
            problem.UNQUANTIZED_TOLERANCE,
        )

    return prepare


def fp8_layer(problem: MoELayerProblem) -> Run:
    """torchext.nn.MoE, which quantizes its weights in each call."""
    import torchext

    _, hidden, inner, experts, _ = problem.case.shape
    layer: Any = torchext.nn.MoE(
        hidden, inner, experts, device=problem.device, dtype=torch.bfloat16
    )
    with torch.no_grad():
        layer.gate_up_proj.copy_(problem.up)
        layer.down_proj.copy_(problem.down)
    run = problem.run(layer, (layer.gate_up_proj, layer.down_proj), problem.FP8_TOLERANCE)
    new_step = run.before

    def before() -> None:
        assert new_step is not None
        new_step()
        layer.refresh_weight()  # the values are equal, so that it would reuse the FP8 weights

    return Run(run.call, run.check, before=before)
