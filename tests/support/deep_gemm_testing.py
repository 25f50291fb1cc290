"""Operands made by the casts of torchext.compat.deep_gemm."""

from __future__ import annotations

import torch

from support.gemm_testing import Operand, unquantized
from torchext.compat import deep_gemm


def matrix(rows, k, device):
    return unquantized("1d1d", (rows, k)).to(device)


def by_token(rows, k, device, use_ue8m0=False):
    """A random matrix with one scale for each row and 128 columns."""
    return Operand.of(*deep_gemm.per_token_cast_to_fp8(matrix(rows, k, device), use_ue8m0), 1)


def by_block(rows, k, device):
    """A random matrix with one scale for each block of 128 rows and 128 columns."""
    return Operand.of(*deep_gemm.per_block_cast_to_fp8(matrix(rows, k, device), False), 128)


def stacked(operands):
    """The 3-D tensors (data, scale) that a grouped GEMM takes, from one operand per group."""
    return torch.stack([x.data for x in operands]), torch.stack([x.scale for x in operands])
