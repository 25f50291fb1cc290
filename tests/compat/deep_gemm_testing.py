"""Operands as DeepGEMM's own casts make them, with what the tests of products know of them."""

from __future__ import annotations

import torch
from gemm_testing import Operand, error_bound

import torchext.compat.deep_gemm as deep_gemm


def matrix(rows, k, device):
    """N(0, 1), the rows and the groups of K scaled by powers of two: a scale applied in the wrong
    place cannot go unseen."""
    x = torch.randn(rows, k) * 2.0 ** torch.randint(-3, 2, (rows, 1))
    groups = 2.0 ** torch.randint(-3, 2, (-(-k // 128),))
    return (x * groups.repeat_interleave(128)[:k]).to(device)


def by_token(rows, k, device, use_ue8m0=False):
    """A matrix with a scale for each row and 128 columns."""
    return Operand.of(*deep_gemm.per_token_cast_to_fp8(matrix(rows, k, device), use_ue8m0), 1)


def by_block(rows, k, device):
    """A matrix with a scale for each 128 rows and 128 columns."""
    return Operand.of(*deep_gemm.per_block_cast_to_fp8(matrix(rows, k, device), False), 128)


def assert_product(result, a, b, tensor_core, addend=None):
    """`result` is a @ b.T (+ addend), within the bound that docs/numerics.md derives."""
    exact = a.dequantized @ b.dequantized.t()
    addends = [] if addend is None else [addend.double().cpu()]
    for term in addends:
        exact = exact + term
    bound = error_bound(a, b, exact, result.dtype, tensor_core=tensor_core, addends=addends)
    error = (result.double().cpu() - exact).abs()
    assert result.shape == exact.shape
    assert (error <= bound).all(), f"{(error / bound).max():.3f} times the bound"
