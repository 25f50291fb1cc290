"""Plain PyTorch: the same FP8 work op by op ("plain"), and without FP8 ("bf16", "fp32")."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cases
from ..problems import (
    FusedProblem,
    GemmProblem,
    GroupedProblem,
    LinearProblem,
    QuantizeProblem,
    Run,
    UnsupportedError,
)
from . import Contender
from . import plain_fp8 as plain


def require(device: str) -> str:
    return torch.__version__


def quantize(problem: QuantizeProblem) -> Run:
    if problem.case.op == "dequantize":
        data, scale = problem.quantized
        return Run(lambda: plain.dequantize(data, scale, torch.bfloat16), problem.check_bits)
    op = getattr(plain, problem.case.op)
    return Run(lambda: op(problem.x), problem.check_bits)


Quantized = tuple[Tensor, Tensor]


def _product(left: Quantized, right: Quantized, dtype: torch.dtype) -> Tensor:
    return F.linear(plain.dequantize(*left), plain.dequantize(*right)).to(dtype)


def fp8_gemm(problem: GemmProblem) -> Run:
    """Dequantizes the operands to FP32, then runs one FP32 GEMM."""
    if problem.case.op == cases.WGRAD_ACCUMULATE:
        out = torch.empty(problem.rows, problem.cols, device=problem.device)
        return Run(
            lambda: out.add_(_product(problem.left_fp8, problem.right_fp8, torch.float32)),
            problem.check_fp8,
            before=out.zero_,
        )
    return Run(
        lambda: _product(problem.left_fp8, problem.right_fp8, torch.bfloat16), problem.check_fp8
    )


def unquantized_gemm(problem: GemmProblem) -> Run:
    """What nn.Linear does: F.linear in the problem's dtype."""
    if problem.case.op == cases.WGRAD_ACCUMULATE and problem.device == "cuda":
        raise UnsupportedError("nn.Linear has no BF16 GEMM that accumulates in FP32")
    return Run(
        lambda: F.linear(problem.left, problem.right),
        problem.check_unquantized,
        bytes=problem.traffic(operand=problem.left.element_size()),
    )


def fp8_grouped(problem: GroupedProblem) -> Run:
    """Dequantizes the operands to FP32, then runs an FP32 GEMM for each group."""

    def call() -> Tensor:
        products = problem.product(*problem.dequantized(torch.float32))
        if problem.along_k:
            return torch.stack(products)
        out = torch.empty(problem.rows, problem.n, dtype=torch.bfloat16, device=problem.device)
        for part, product in zip(problem.parts, products, strict=True):
            out[part] = product
        return out

    return Run(call, problem.check_fp8)


def unquantized_grouped(problem: GroupedProblem) -> Run:
    """torch's grouped GEMM in BF16."""
    if problem.case.op != cases.CONTIGUOUS or not hasattr(F, "grouped_mm"):
        raise UnsupportedError("torch's grouped BF16 GEMM takes contiguous groups only")
    right = problem.right.unflatten(0, (problem.groups, problem.n)).transpose(1, 2)
    offsets = problem.offsets
    return Run(lambda: F.grouped_mm(problem.left, right, offs=offsets), problem.check_unquantized)


def fp8_fused(problem: FusedProblem) -> Run:
    """Dequantizes the operands to FP32, then runs an FP32 GEMM, the activation and a quantizer."""
    a, b = problem.operands[:2], problem.operands[2:]
    return Run(
        lambda: plain.quantize_1x128(problem.activate(_product(a, b, torch.float32))),
        problem.check_fp8,
    )


def unquantized_fused(problem: FusedProblem) -> Run:
    """F.linear and the activation in the problem's dtype; the result is not quantized."""
    (m, n, k), size = problem.case.shape, problem.left.element_size()
    return Run(
        lambda: problem.activate(F.linear(problem.left, problem.right)),
        problem.check_unquantized,
        bytes=float(size * ((m + n) * k + m * problem.columns)),
    )


class _Fp8Linear(torch.autograd.Function):
    """fprop, dgrad and wgrad on FP8 operands, with the granularities of torchext.nn.Linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        data, scale, *transposed = plain.quantize_1x128_dual(x)
        quantized_weight = plain.quantize_128x128(weight)
        ctx.save_for_backward(*transposed, *quantized_weight)
        ctx.dtype = x.dtype
        return _product((data, scale), quantized_weight, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_data_t, x_scale_t, weight_data, weight_scale = ctx.saved_tensors
        data, scale, data_t, scale_t = plain.quantize_1x128_dual(grad)
        grad_x = _product((data, scale), (weight_data.t(), weight_scale.t()), ctx.dtype)
        return grad_x, _product((data_t, scale_t), (x_data_t, x_scale_t), ctx.dtype)


class Fp8Linear(torch.nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return _Fp8Linear.apply(x, self.weight)


def fp8_linear(problem: LinearProblem) -> Run:
    model = Fp8Linear(problem.weight)
    return problem.run(model, model.weight, problem.FP8_TOLERANCE)


def unquantized_linear(problem: LinearProblem) -> Run:
    n, k = problem.weight.shape
    model = torch.nn.Linear(k, n, bias=False, device=problem.device, dtype=problem.dtype)
    with torch.no_grad():
        model.weight.copy_(problem.weight)
    return problem.run(model, model.weight, problem.UNQUANTIZED_TOLERANCE)


CONTENDERS = [
    Contender("plain", "quantize", ("cpu", "cuda"), require, quantize),
    Contender("plain", "gemm", ("cpu",), require, fp8_gemm),
    Contender("plain", "grouped", ("cpu",), require, fp8_grouped),
    Contender("plain", "fused", ("cpu",), require, fp8_fused),
    Contender("plain", "linear", ("cpu",), require, fp8_linear),
    Contender("bf16", "gemm", ("cuda",), require, unquantized_gemm),
    Contender("bf16", "grouped", ("cuda",), require, unquantized_grouped),
    Contender("bf16", "fused", ("cuda",), require, unquantized_fused),
    Contender("bf16", "linear", ("cuda",), require, unquantized_linear),
    Contender("fp32", "gemm", ("cpu",), require, unquantized_gemm),
    Contender("fp32", "fused", ("cpu",), require, unquantized_fused),
    Contender("fp32", "linear", ("cpu",), require, unquantized_linear),
]
