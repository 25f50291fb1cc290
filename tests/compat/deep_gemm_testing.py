"""Operands as DeepGEMM's own casts make them, with what the tests of products know of them."""

from __future__ import annotations

import torch
from gemm_testing import Operand, error_bound

from torchext.compat import deep_gemm


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


def stacked(operands):
    """The operands of groups, as the pair of 3-D tensors that a grouped product takes."""
    return torch.stack([x.data for x in operands]), torch.stack([x.scale for x in operands])


def rows_of(operand, rows):
    return Operand(operand.data[rows], None, operand.values[rows], operand.scales[rows])


def assert_product(result, a, b, tensor_core, addend=None):
    """`result` is a @ b.T (+ addend), within the bound that docs/numerics.md derives."""
    rows, columns = a.values.shape[0], b.values.shape[0]
    assert result.shape == (rows, columns)
    most = max(1, 2**25 // (128 * max(columns, 1)))  # of rows at a time: the bound needs memory
    for start in range(0, rows, most):
        part = slice(start, start + most)
        some = rows_of(a, part)
        exact = some.dequantized @ b.dequantized.t()
        addends = [] if addend is None else [addend[part].double().cpu()]
        for term in addends:
            exact = exact + term
        bound = error_bound(some, b, exact, result.dtype, tensor_core=tensor_core, addends=addends)
        error = (result[part].double().cpu() - exact).abs()
        assert (error <= bound).all(), f"{(error / bound).max():.3f} times the bound"
