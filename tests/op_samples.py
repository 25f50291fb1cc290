"""Inputs that the tests of the ops share."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves

from torchext import ops

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FOLDING = (
    "quantize_1x128",
    "quantize_1x128_t",
    "quantize_1x128_dual",
    "quantize_rowwise",
    "quantize_tensorwise",
)
BLOCKS = ("quantize_128x128", "quantize_128x128_dual")
QUANTIZERS = FOLDING + BLOCKS
MATRICES = [(130, 300), (5, 48), (1, 129), (2, 1), (0, 40), (7, 0)]
TENSORS = [(3, 7, 129), (2, 3, 1, 16), (64,), (2, 0, 24), (0,)]
CASES = [(name, shape) for name in FOLDING for shape in MATRICES + TENSORS] + [
    (name, shape) for name in BLOCKS for shape in MATRICES
]


def overload(name, which="default"):
    return getattr(getattr(torch.ops.torchext, name), which)


def metadata(outputs):
    """Everything that a fake kernel promises."""
    return [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in tree_leaves(outputs)]


def random(*shape, device, dtype=torch.bfloat16):
    return torch.randn(shape, device=device).to(dtype)


def quantized(granularity, m, n, k, *, device, leading=None):
    """a, a_scale, b, b_scale for fp8_gemm_nt; a's rows have the shape `leading` if it is given."""
    x = random(*((m,) if leading is None else leading), k, device=device)
    w = random(n, k, device=device)
    quantize_a, quantize_b = {
        "1d2d": (ops.quantize_1x128, ops.quantize_128x128),
        "1d1d": (ops.quantize_1x128, ops.quantize_1x128),
        "rowwise": (ops.quantize_rowwise, ops.quantize_rowwise),
        "tensorwise": (ops.quantize_tensorwise, ops.quantize_tensorwise),
    }[granularity]
    return (*quantize_a(x), *quantize_b(w))


GRANULARITIES = ["1d2d", "1d1d", "rowwise", "tensorwise"]


def assert_same(first, second):
    """Asserts that two results agree in everything that fakes promise, and to the bit."""
    assert metadata(first) == metadata(second)
    for x, y in zip(tree_leaves(first), tree_leaves(second), strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=0, atol=0, equal_nan=True)


def opcheck(op, args, kwargs=None):
    """torch.library.opcheck for ops of FP8 tensors: its schema test compares a tensor before and
    after with torch.allclose, which torch has not got for FP8."""
    allclose = torch.allclose

    def allclose_fp8(x, y, **options):
        return allclose(x.float(), y.float(), **options)

    with patch("torch.allclose", allclose_fp8):
        torch.library.opcheck(op, args, kwargs)
