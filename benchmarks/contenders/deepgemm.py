"""DeepGEMM's SM90 FP8 GEMMs (package deep_gemm), which compiles each kernel at its first call."""

from __future__ import annotations

import torch

from .. import cases
from ..problems import GemmProblem, GroupedProblem, Run, UnsupportedError
from . import Contender


def require(device: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    import deep_gemm  # noqa: F401  (raises if its library does not load)

    for distribution in ("sgl-deep-gemm", "deep-gemm", "deep_gemm"):
        try:
            return f"{distribution} {version(distribution)}"
        except PackageNotFoundError:
            continue
    return "unknown"


def gemm(problem: GemmProblem) -> Run:
    import deep_gemm

    # torchext's M-major padded scales are DeepGEMM's layout too, so the call transforms nothing.
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


def grouped(problem: GroupedProblem) -> Run:
    import deep_gemm

    left, right = problem.left_fp8, problem.right_fp8
    if problem.along_k:
        return _along_k(problem)
    out = torch.empty(*left[0].shape[:-1], problem.n, device=problem.device, dtype=torch.bfloat16)
    if problem.case.op == cases.CONTIGUOUS:
        row_groups = problem.row_groups

        def contiguous() -> torch.Tensor:
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
                left, right, out, row_groups, disable_ue8m0_cast=True
            )
            return out

        return Run(contiguous, problem.check_fp8)
    counts, expected = problem.counts, problem.expected
    data, scale = left
    # M-major within each group; otherwise every call would transpose the scales first.
    left = data, scale.transpose(1, 2).contiguous().transpose(1, 2)

    def masked() -> torch.Tensor:
        deep_gemm.m_grouped_fp8_gemm_nt_masked(
            left, right, out, counts, expected, disable_ue8m0_cast=True
        )
        return out

    return Run(masked, problem.check_fp8)


def _along_k(problem: GroupedProblem) -> Run:
    """wgrad of experts. DeepGEMM takes one contiguous matrix of columns per group, concatenated."""
    import deep_gemm

    left, right = (
        (torch.cat([data[:, part].flatten() for part in problem.parts]), scale)
        for data, scale in (problem.left_fp8, problem.right_fp8)
    )
    total = torch.empty(problem.groups, problem.rows, problem.n, device=problem.device)
    lengths, counts = problem.lengths, problem.counts

    def along_k() -> torch.Tensor:
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(left, right, total, lengths, counts, c=total)
        return total

    return Run(along_k, problem.check_fp8, before=total.zero_)


CONTENDERS = [
    Contender("deepgemm", "gemm", ("cuda",), require, gemm, compiles=True),
    Contender("deepgemm", "grouped", ("cuda",), require, grouped, compiles=True),
]
