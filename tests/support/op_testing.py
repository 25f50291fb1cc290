"""The ops by kind, the catalog's calls at sizes that a test chooses, and comparisons of results."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves

from torchext._catalog import CATALOG
from torchext._catalog.entry import GRANULARITIES as OPERAND_QUANTIZERS
from torchext._catalog.entry import operands, sample

QUANTIZERS = tuple(name for name in CATALOG if name.startswith("quantize_"))
FOLDING = tuple(name for name in QUANTIZERS if "vector" in CATALOG[name].samples)
BLOCKS = tuple(name for name in QUANTIZERS if name not in FOLDING)
FUSED: list[tuple[str, dict[str, bool]]] = [
    (name, options)
    for name in CATALOG
    if name.startswith("fp8_gemm_nt_")
    for options in ([{}, {"tanh_approximation": True}] if "gelu" in name else [{}])
]
GRANULARITIES = list(OPERAND_QUANTIZERS)
# Case of a grouped GEMM -> its op and the label of its calls, for a granularity.
_GROUPED = {
    "offsets": ("m_grouped_fp8_gemm_nt_contiguous", "offsets, {}"),
    "group ids": ("m_grouped_fp8_gemm_nt_contiguous", "ids, {}"),
    "masked": ("m_grouped_fp8_gemm_nt_masked", "{}"),
    "along k": ("k_grouped_fp8_gemm_nt", "offsets"),
}
GROUPINGS = list(_GROUPED)
M_GROUPINGS = GROUPINGS[:3]


def overload(name, which="default"):
    return getattr(getattr(torch.ops.torchext, name), which)


def random(*shape, device, dtype=torch.bfloat16):
    return torch.randn(shape, device=device).to(dtype)


def quantized(granularity, m, n, k, *, device, leading=None, groups=None):
    """a, a_scale, b, b_scale for a GEMM.

    a is [*leading, k], or [m, k] without `leading`; b is [n, k], or [groups, n, k] with `groups`.
    """
    rows = m if leading is None else leading
    return sample(*operands(granularity, rows, n, k, groups=groups)).to(device).args


def grouped(case, m, n, k, *, device, granularity="1d2d"):
    """The name of a grouped op, its tensors by position and its tensors by keyword, for m rows of
    all groups together (of each group, if masked) or k columns of all groups together."""
    name, label = _GROUPED[case]
    given = CATALOG[name].sized[label.format(granularity)](m, n, k).to(device)
    return name, given.args, given.kwargs


def metadata(outputs):
    """Everything that a fake kernel promises: shape, strides, dtype and device of each output."""
    return [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in tree_leaves(outputs)]


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
