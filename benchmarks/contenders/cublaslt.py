"""cuBLASLt's FP8 GEMMs through torch.nn.functional.scaled_mm, with scales in its layouts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cases
from ..problems import GemmProblem, Run, UnsupportedError, round_up
from . import Contender


def require(device: str) -> str:
    if not hasattr(F, "scaled_mm"):
        raise RuntimeError(f"torch {torch.__version__} has no torch.nn.functional.scaled_mm")
    return torch.__version__


def dense_columns(scale: Tensor) -> Tensor:
    """1x128 scales [rows, groups] with strides (1, rows): torchext's layout without its padding."""
    return scale.t().contiguous().t()


def padded_blocks(scale: Tensor) -> Tensor:
    """128x128 scales [N/128, K/128] as [L4, N/128], strides (1, L4); L4 = round_up(K/128, 4)."""
    n_blocks, k_blocks = scale.shape
    padded = scale.new_ones(n_blocks, round_up(k_blocks, 4))
    padded[:, :k_blocks] = scale
    return padded.t()


def gemm(problem: GemmProblem) -> Run:
    from torch.nn.functional import ScalingType

    op = problem.case.op
    (left, left_scale), (right, right_scale) = problem.left_fp8, problem.right_fp8
    if op in (cases.FPROP, cases.WGRAD):
        recipes = (ScalingType.BlockWise1x128, ScalingType.BlockWise1x128)
        left_scale = dense_columns(left_scale)
        if op == cases.FPROP:
            recipes = (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
            right_scale = padded_blocks(right_scale)
        else:
            right_scale = dense_columns(right_scale)
    elif op == cases.FPROP_ROWWISE:
        recipes = (ScalingType.RowWise, ScalingType.RowWise)
        right_scale = right_scale.t()
    elif op == cases.FPROP_TENSORWISE:
        recipes = (ScalingType.TensorWise, ScalingType.TensorWise)
    else:
        raise UnsupportedError("scaled_mm stores its result and cannot accumulate")
    # Blockwise GEMMs promote to FP32 in any case. For the others, torchao and vLLM use fast
    # accumulation too.
    fast = op in (cases.FPROP_ROWWISE, cases.FPROP_TENSORWISE)
    return Run(
        lambda: F.scaled_mm(
            left,
            right.t(),
            left_scale,
            recipes[0],
            right_scale,
            recipes[1],
            output_dtype=torch.bfloat16,
            use_fast_accum=fast,
        ),
        lambda result: problem.check_fp8(result, promoted=not fast),
    )


CONTENDERS = [Contender("cublaslt", "gemm", ("cuda",), require, gemm)]
