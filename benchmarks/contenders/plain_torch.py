"""Plain PyTorch: the same FP8 work op by op ("plain"), and without FP8 ("bf16", "fp32")."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cases
from ..moe_layer import loop_in
from ..problems import (
    BitsProblem,
    FusedProblem,
    GemmProblem,
    GroupedProblem,
    LinearProblem,
    QuantizeProblem,
    Run,
    TrainingProblem,
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


def copy_of_as_many_bytes(problem: BitsProblem) -> Run:
    """A copy that reads and writes as many bytes, together, as the op must."""
    assert problem.bytes
    source = torch.randint(0, 127, (int(problem.bytes) // 2,), dtype=torch.uint8)
    target = torch.empty_like(source)
    return Run(lambda: target.copy_(source), lambda result: {"relative": 0.0, "worst": 0.0})


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


def unquantized_gemm(dtype: torch.dtype) -> Callable[[GemmProblem], Run]:
    """Multiplies as nn.Linear does: by F.linear in `dtype`."""

    def prepare(problem: GemmProblem) -> Run:
        if problem.case.op == cases.WGRAD_ACCUMULATE and dtype == torch.bfloat16:
            raise UnsupportedError("nn.Linear has no BF16 GEMM that accumulates in FP32")
        left, right = problem.left.to(dtype), problem.right.to(dtype)
        return Run(
            lambda: F.linear(left, right),
            problem.check_unquantized,
            bytes=problem.traffic(operand=dtype.itemsize),
        )

    return prepare


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


def loop_over_groups(problem: GroupedProblem) -> Run:
    """F.linear in BF16, group by group. The result is a list: no copy into one tensor."""
    left, right = problem.left.bfloat16(), problem.right.bfloat16()
    if problem.along_k:
        raise UnsupportedError("nn.Linear has no BF16 GEMM that accumulates in FP32")
    weights = right.split(problem.n)
    pairs = [(left[part], weights[g]) for g, part in enumerate(problem.parts)]
    return Run(lambda: [F.linear(x, w) for x, w in pairs], problem.check_unquantized)


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


def unquantized_linear(dtype: torch.dtype) -> Callable[[LinearProblem], Run]:
    def prepare(problem: LinearProblem) -> Run:
        n, k = problem.weight.shape
        model = torch.nn.Linear(k, n, bias=False, device=problem.device, dtype=dtype)
        with torch.no_grad():
            model.weight.copy_(problem.weight)
        return problem.run(model, model.weight, problem.UNQUANTIZED_TOLERANCE)

    return prepare


def training(problem: TrainingProblem) -> Run:
    return problem.run(copy.deepcopy(problem.model))


CONTENDERS = [
    Contender("plain", "quantize", ("cpu", "cuda"), require, quantize),
    Contender("plain", "gemm", ("cpu",), require, fp8_gemm),
    Contender("plain", "grouped", ("cpu",), require, fp8_grouped),
    Contender("plain", "fused", ("cpu",), require, fp8_fused),
    Contender("plain", "linear", ("cpu",), require, fp8_linear),
    Contender("copy", "quantize", ("cpu",), require, copy_of_as_many_bytes),
    Contender("copy", "activation", ("cpu",), require, copy_of_as_many_bytes),
    Contender("copy", "norm", ("cpu",), require, copy_of_as_many_bytes),
    Contender("copy", "moe", ("cpu",), require, copy_of_as_many_bytes),
    Contender("bf16", "moe", ("cpu",), require, loop_in(torch.bfloat16)),
    Contender("fp32", "moe", ("cpu",), require, loop_in(torch.float32)),
    Contender("bf16", "gemm", ("cpu", "cuda"), require, unquantized_gemm(torch.bfloat16)),
    Contender("bf16", "grouped", ("cpu",), require, loop_over_groups),
    Contender("bf16", "grouped", ("cuda",), require, unquantized_grouped),
    Contender("bf16", "fused", ("cuda",), require, unquantized_fused),
    Contender("bf16", "linear", ("cpu", "cuda"), require, unquantized_linear(torch.bfloat16)),
    Contender("fp32", "gemm", ("cpu",), require, unquantized_gemm(torch.float32)),
    Contender("fp32", "fused", ("cpu",), require, unquantized_fused),
    Contender("fp32", "linear", ("cpu",), require, unquantized_linear(torch.float32)),
    Contender("fp32", "training", ("cpu",), require, training),
]
