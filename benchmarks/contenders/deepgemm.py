"""DeepGEMM's SM90 FP8 GEMMs (package deep_gemm). It compiles each kernel at its first call."""

from __future__ import annotations

import torch

from .. import cases
from ..problems import GemmProblem, Run, UnsupportedError
from . import Contender


def require(device: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    import deep_gemm  # noqa: F401  (raises where its library does not load)

    for distribution in ("sgl-deep-gemm", "deep-gemm", "deep_gemm"):
        try:
            return f"{distribution} {version(distribution)}"
        except PackageNotFoundError:
            continue
    return "unknown"


def gemm(problem: GemmProblem) -> Run:
    import deep_gemm

    # M-major padded scales are DeepGEMM's own layout too: the call transforms nothing.
    left, right = problem.left_fp8, problem.right_fp8
    shape, device = (problem.rows, problem.cols), problem.device
    if problem.case.op == cases.FPROP:
        out = torch.empty(shape, device=device, dtype=torch.bfloat16)

        def fprop() -> torch.Tensor:
            deep_gemm.fp8_gemm_nt(left, right, out, disable_ue8m0_cast=True)
            return out

        return Run(fprop, problem.check_fp8)
    if problem.case.op == cases.WGRAD_ACCUMULATE:
        total = torch.empty(shape, device=device)

        def wgrad() -> torch.Tensor:
            deep_gemm.fp8_gemm_nt(
                left, right, total, c=total, recipe=(1, 1, 128), disable_ue8m0_cast=True
            )
            return total

        return Run(wgrad, problem.check_fp8, before=total.zero_)
    raise UnsupportedError(
        f"DeepGEMM has no SM90 {problem.case.op}: 1D2D to BF16, 1D1D adding to FP32"
    )


CONTENDERS = [Contender("deepgemm", "gemm", ("cuda",), require, gemm, compiles=True)]
