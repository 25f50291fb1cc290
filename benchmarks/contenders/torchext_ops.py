"""torchext: its quantizers, GEMMs and Linear."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import torch

from .. import cases
from ..moe_layer import MoELayerProblem, fp8_layer
from ..problems import (
    ActivationProblem,
    FusedProblem,
    GemmProblem,
    GroupedProblem,
    LinearProblem,
    Problem,
    QuantizeProblem,
    Run,
    TrainingProblem,
)
from . import SUBJECT, Contender


def require(device: str) -> str:
    import torchext

    return torchext.__version__


def quantize(problem: QuantizeProblem) -> Run:
    from torchext import ops

    if problem.case.op == "dequantize":
        data, scale = problem.quantized
        return Run(
            lambda: ops.dequantize(data, scale, out_dtype=torch.bfloat16), problem.check_bits
        )
    op = getattr(ops, problem.case.op)
    return Run(lambda: op(problem.x), problem.check_bits)


def fused_quantizer(problem: ActivationProblem) -> Run:
    from torchext import ops

    op = getattr(ops, problem.case.op)
    return Run(lambda: op(*problem.args, **problem.kwargs), problem.check_bits)


def moe(problem: Problem) -> Run:
    if isinstance(problem, MoELayerProblem):
        return fp8_layer(problem)
    assert isinstance(problem, ActivationProblem)
    return fused_quantizer(problem)


def gemm(problem: GemmProblem) -> Run:
    from torchext import ops

    if problem.case.op == cases.FPROP_BF16:
        x, weight = problem.left, problem.right_fp8
        return Run(
            lambda: ops.fp8_gemm_nt(*ops.quantize_1x128(x), *weight),
            problem.check_fp8,
        )
    operands = (*problem.left_fp8, *problem.right_fp8)
    if problem.case.op != cases.WGRAD_ACCUMULATE:
        return Run(lambda: ops.fp8_gemm_nt(*operands), problem.check_fp8)
    out = torch.empty(problem.rows, problem.cols, device=problem.device)

    return Run(
        lambda: ops.fp8_gemm_nt(*operands, out=out, accumulate=True),
        problem.check_fp8,
        before=out.zero_,
    )


def weights_only(problem: GemmProblem) -> Run:
    """fprop of rows that are not quantized, by an FP8 weight."""
    from torchext import ops

    x, weight = problem.left, problem.right_fp8
    return Run(lambda: ops.fp8_linear(x, *weight), problem.check_w8a16)


def grouped(problem: GroupedProblem) -> Run:
    from torchext import ops

    op, operands = problem.case.op, (*problem.left_fp8, *problem.right_fp8)
    if op in (cases.CONTIGUOUS, cases.RAGGED):
        offsets = problem.offsets
        return Run(
            lambda: ops.m_grouped_fp8_gemm_nt_contiguous(*operands, offsets), problem.check_fp8
        )
    if op == cases.MASKED:
        counts, expected = problem.counts, problem.expected
        return Run(
            lambda: ops.m_grouped_fp8_gemm_nt_masked(*operands, counts, expected_m=expected),
            problem.check_fp8,
        )
    offsets = problem.offsets
    out = torch.empty(problem.groups, problem.rows, problem.n, device=problem.device)
    return Run(
        lambda: ops.k_grouped_fp8_gemm_nt(*operands, offsets, out=out, accumulate=True),
        problem.check_fp8,
        before=out.zero_,
    )


def fused(problem: FusedProblem) -> Run:
    from torchext import ops

    op, operands = getattr(ops, problem.op), problem.operands
    return Run(lambda: op(*operands), problem.check_fp8)


def unfused(problem: FusedProblem) -> Run:
    """The same work by three calls: GEMM with a BF16 result, PyTorch's activation, quantizer."""
    from torchext import ops

    operands = problem.operands
    return Run(
        lambda: ops.quantize_1x128(problem.activate(ops.fp8_gemm_nt(*operands))),
        problem.check_unfused,
    )


def linear(problem: LinearProblem) -> Run:
    import torchext

    n, k = problem.weight.shape
    plain = torch.nn.Linear(k, n, bias=False, device=problem.device, dtype=problem.dtype)
    model = torch.nn.Sequential(plain)
    torchext.convert_to_fp8_training(model, module_filter_fn=lambda module, fqn: True)
    converted = model[0]
    if not isinstance(converted, torchext.nn.Linear):
        raise RuntimeError(f"convert_to_fp8_training left a {type(converted).__name__} in place")
    with torch.no_grad():
        converted.weight.copy_(problem.weight)
    run = problem.run(model, converted.weight, problem.FP8_TOLERANCE)
    if not problem.backward:  # inference quantizes each weight once
        held = contextlib.ExitStack()
        held.enter_context(torchext.fixed_weights(model))
        vars(model)["held"] = held  # keeps the context open while the model lives
        return run

    def new_step() -> None:
        assert run.before is not None
        run.before()
        # new_step of LinearProblem.run changes no bits, so the layer would reuse the FP8 weight.
        converted.refresh_weight()

    return dataclasses.replace(run, before=new_step)


def training(problem: TrainingProblem) -> Run:
    import torchext

    model = copy.deepcopy(problem.model)
    torchext.convert_to_fp8_training(model)
    return problem.run(model)


DEVICES = ("cpu", "cuda")
CONTENDERS = [
    Contender(SUBJECT, "quantize", DEVICES, require, quantize),
    Contender(SUBJECT, "activation", DEVICES, require, fused_quantizer),
    Contender(SUBJECT, "norm", DEVICES, require, fused_quantizer),
    Contender(SUBJECT, "moe", DEVICES, require, moe),
    Contender(SUBJECT, "gemm", DEVICES, require, gemm),
    Contender("torchext_w8a16", "gemm", DEVICES, require, weights_only),
    Contender(SUBJECT, "grouped", DEVICES, require, grouped),
    Contender(SUBJECT, "fused", DEVICES, require, fused),
    Contender("torchext_unfused", "fused", DEVICES, require, unfused),
    Contender(SUBJECT, "linear", DEVICES, require, linear),
    Contender(SUBJECT, "training", DEVICES, require, training),
]
