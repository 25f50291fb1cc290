"""torchao's FP8 training: Float8Linear under torch.compile, for which it is made, the blockwise
prototype, and the prototype's Triton quantizers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import cases
from ..problems import LinearProblem, QuantizeProblem, Run, UnsupportedError
from . import Contender


def require(device: str) -> str:
    import torchao
    import torchao.float8

    return torchao.__version__


def require_blockwise(device: str) -> str:
    import torchao.prototype.blockwise_fp8_training.linear  # noqa: F401

    return require(device)


def quantize(problem: QuantizeProblem) -> Run:
    from torchao.prototype.blockwise_fp8_training import kernels

    x = problem.x
    if problem.case.op == "quantize_1x128":
        return Run(
            lambda: kernels.triton_fp8_blockwise_act_quant_lhs(x, 128),
            lambda result: problem.check_close(*result),  # type: ignore[misc]
        )
    if problem.case.op == "quantize_1x128_t":
        return Run(
            lambda: kernels.triton_fp8_blockwise_act_quant_transposed_lhs(x, 128),
            lambda result: problem.check_close(*result, transposed=True),  # type: ignore[misc]
        )
    raise UnsupportedError(f"torchao has no kernel of its own for {problem.case.op}")


def float8_linear(recipe: str) -> Callable[[LinearProblem], Run]:
    def prepare(problem: LinearProblem) -> Run:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(recipe)
        model = convert_to_float8_training(_linear(problem), config=config)
        # Each case compiles a graph. Beyond its default limit of 8, Dynamo would run the remaining
        # cases uncompiled.
        torch._dynamo.config.recompile_limit = 1000
        compiled = torch.compile(model, dynamic=False)
        return problem.run(compiled, model.weight, problem.E5M2_TOLERANCE)

    return prepare


def blockwise_linear(problem: LinearProblem) -> Run:
    from torchao.prototype.blockwise_fp8_training.linear import Float8BlockwiseLinear

    if problem.case.op == cases.FORWARD:
        raise UnsupportedError("the prototype is for training: it always prepares backward")
    model = Float8BlockwiseLinear.from_float(_linear(problem))
    return problem.run(model, model.weight, problem.FP8_TOLERANCE)


def _linear(problem: LinearProblem) -> torch.nn.Linear:
    n, k = problem.weight.shape
    linear = torch.nn.Linear(k, n, bias=False, device=problem.device, dtype=problem.dtype)
    with torch.no_grad():
        linear.weight.copy_(problem.weight)
    return linear


GPU = ("cuda",)
CONTENDERS = [
    Contender("torchao", "quantize", GPU, require_blockwise, quantize, compiles=True),
    Contender("torchao", "linear", GPU, require, float8_linear("tensorwise"), compiles=True),
    Contender("torchao_rowwise", "linear", GPU, require, float8_linear("rowwise"), compiles=True),
    Contender(
        "torchao_blockwise", "linear", GPU, require_blockwise, blockwise_linear, compiles=True
    ),
]
