"""Inputs and comparisons for tests of the ops."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves

from torchext import ops
from torchext._catalog import CATALOG
from torchext._catalog.entry import GRANULARITIES as OPERAND_QUANTIZERS

QUANTIZERS = tuple(name for name in CATALOG if name.startswith("quantize_"))
FOLDING = tuple(name for name in QUANTIZERS if "vector" in CATALOG[name].samples)
BLOCKS = tuple(name for name in QUANTIZERS if name not in FOLDING)
STACKS = [(3, 130, 300), (2, 1, 5, 48), (2, 128, 70), (0, 3, 4), (2, 0, 40), (2, 7, 0)]
MATRICES: list[tuple[int, ...]] = [(130, 300), (5, 48), (1, 129), (2, 1), (0, 40), (7, 0)]
TENSORS: list[tuple[int, ...]] = [(3, 7, 129), (2, 3, 1, 16), (64,), (2, 0, 24), (0,)]
CASES = [(name, shape) for name in FOLDING for shape in MATRICES + TENSORS] + [
    (name, shape) for name in BLOCKS for shape in MATRICES + STACKS
]


def overload(name, which="default"):
    return getattr(getattr(torch.ops.torchext, name), which)


def metadata(outputs):
    """Everything that a fake kernel promises: shape, strides, dtype and device of each output."""
    return [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in tree_leaves(outputs)]


def random(*shape, device, dtype=torch.bfloat16):
    return torch.randn(shape, device=device).to(dtype)


def quantized(granularity, m, n, k, *, device, leading=None, groups=None):
    """a, a_scale, b, b_scale for fp8_gemm_nt.

    a is [*leading, k], or [m, k] without `leading`; b is [n, k], or [groups, n, k] with `groups`.
    """
    x = random(*((m,) if leading is None else leading), k, device=device)
    w = random(*(() if groups is None else (groups,)), n, k, device=device)
    quantize_a, quantize_b = (getattr(ops, q.__name__) for q in OPERAND_QUANTIZERS[granularity])
    return (*quantize_a(x), *quantize_b(w))


GRANULARITIES = list(OPERAND_QUANTIZERS)


def grouped(case, m, n, k, *, device, granularity="1d2d"):
    """(name of a grouped op, its tensors by position, its tensors by keyword).

    Three groups share the m rows (case "masked": each has m rows) or the k columns ("along k").
    """

    def index(*values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    if case == "along k":
        operands = quantized("1d1d", m, n, k, device=device)
        return "k_grouped_fp8_gemm_nt", (*operands, index(k // 3, k // 3, k)), {}
    leading = (3, m) if case == "masked" else None
    operands = quantized(granularity, m, n, k, device=device, leading=leading, groups=3)
    if case == "masked":
        return "m_grouped_fp8_gemm_nt_masked", (*operands, index(m, m, m)), {}
    name = "m_grouped_fp8_gemm_nt_contiguous"
    if case == "offsets":
        return name, (*operands, index(m // 3, m // 3, m)), {}
    return name, operands, {"group_ids": index(*((7 * row) % 3 for row in range(m)))}


GROUPINGS = ["offsets", "group ids", "masked", "along k"]
M_GROUPINGS = GROUPINGS[:3]
FUSED: list[tuple[str, dict[str, bool]]] = [
    (name, options)
    for name in CATALOG
    if name.startswith("fp8_gemm_nt_")
    for options in ([{}, {"tanh_approximation": True}] if "gelu" in name else [{}])
]


def assert_same(first, second):
    """Asserts that two results agree in everything that fake kernels promise, and in every bit."""
    assert metadata(first) == metadata(second)
    for x, y in zip(tree_leaves(first), tree_leaves(second), strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=0, atol=0, equal_nan=True)


def opcheck(op, args, kwargs=None):
    """torch.library.opcheck for ops with FP8 tensors.

    Its schema test compares tensors by torch.allclose, which torch lacks for FP8.
    """
    allclose = torch.allclose

    def allclose_fp8(x, y, **options):
        return allclose(x.float(), y.float(), **options)

    with patch("torch.allclose", allclose_fp8):
        torch.library.opcheck(op, args, kwargs)
