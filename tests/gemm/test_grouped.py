"""Grouped GEMMs compared with the float64 product of each group, within the bound of
docs/numerics.md: groups of any length and order, rows of no group, NaN, epilogues.

Above 500 lines because the three ways to group share their inputs and checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchext  # noqa: F401  (loads the ops)
from support.gemm_testing import (
    E4M3,
    E5M2,
    QUANTIZERS,
    WIDE,
    Operand,
    assert_within_bound,
    operands,
    unquantized,
)
from support.op_testing import GRANULARITIES

ops = torch.ops.torchext


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32).to(device)


def ends(lengths, device):
    return ints(lengths, "cpu").cumsum(0, dtype=torch.int32).to(device)


class Experts:
    """Matrices b [G, N, K], quantized, and each as an Operand."""

    def __init__(self, granularity, groups, n, k, device, *, dtype=E4M3, scaled=True):
        w = unquantized(granularity, (groups, n, k), scaled=scaled).to(device)
        self.data, self.scale = QUANTIZERS[granularity][1](w, dtype=dtype)
        row_group = 128 if granularity == "1d2d" else 1
        one_in_all = granularity == "tensorwise"
        self.of = [
            Operand.of(self.data[g], self.scale if one_in_all else self.scale[g], row_group)
            for g in range(groups)
        ]

    @property
    def quantized(self):
        return self.data, self.scale


def grouped(granularity, shape, device, *, dtypes=(E4M3, E4M3), scaled=True):
    """`a` as an Operand of m rows, and Experts. shape: m, groups, n, k."""
    m, groups, n, k = shape
    x = unquantized(granularity, (m, k), scaled=scaled).to(device)
    a = Operand.of(*QUANTIZERS[granularity][0](x, dtype=dtypes[0]), 1)
    return a, Experts(granularity, groups, n, k, device, dtype=dtypes[1], scaled=scaled)


def rows_of(group, *, offsets=None, group_ids=None):
    """The indices of a group's rows."""
    if group_ids is not None:
        return (group_ids.cpu() == group).nonzero().flatten()
    bounds = [0, *offsets.tolist()]
    return torch.arange(bounds[group], bounds[group + 1])


def check_contiguous(
    a, b, tensor_core, *, out_dtype=torch.bfloat16, bias=None, out=None, accumulate=False, **index
):
    """Runs the op and compares each group; rows of no group must keep their former content."""
    old: Any = None if out is None else out.clone()
    if out is None:
        result = ops.m_grouped_fp8_gemm_nt_contiguous(
            *a.quantized, *b.quantized, bias=bias, out_dtype=out_dtype, **index
        )
        assert result.is_contiguous()
        assert result.shape == (a.values.shape[0], b.of[0].values.shape[0])
    else:
        ops.m_grouped_fp8_gemm_nt_contiguous.out(
            *a.quantized, *b.quantized, out=out, accumulate=accumulate, bias=bias, **index
        )
        result, out_dtype = out, out.dtype
    untouched = torch.ones(result.shape[0], dtype=torch.bool)
    for group, b_group in enumerate(b.of):
        rows = rows_of(group, **index)
        untouched[rows] = False
        assert_within_bound(
            result[rows.to(result.device)],
            a.rows(rows),
            b_group,
            tensor_core=tensor_core,
            bias=None if bias is None else bias[group],
            old=old[rows.to(result.device)] if accumulate else None,
            out_dtype=out_dtype,
        )
    if old is not None:
        untouched = untouched.to(result.device)
        torch.testing.assert_close(
            result[untouched], old[untouched], rtol=0, atol=0, equal_nan=True
        )
    return result


# ---- contiguous: groups of rows ----

LENGTHS = [
    [150],
    [0, 150, 0],
    [1, 1, 1, 147],
    [40, 0, 88, 22],
    [127, 1, 22],
    [129, 21],
    [64, 64, 22],
    [5, 7, 1, 0, 3, 9],  # rows of no group follow
    [0, 0],
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_offsets(granularity, lengths, device, tensor_core):
    a, b = grouped(granularity, (150, len(lengths), 136, 200), device)
    offsets = ends(lengths, device)
    check_contiguous(a, b, tensor_core, offsets=offsets)
    out = torch.full((150, 136), torch.nan, device=device)
    check_contiguous(a, b, tensor_core, offsets=offsets, out=out)


IDS = {
    "sorted": lambda m: torch.arange(m) * 4 // m,
    "unsorted": lambda m: torch.randint(0, 4, (m,)),
    "unsorted, some of no group": lambda m: torch.randint(-1, 4, (m,)),
    "several runs": lambda m: torch.arange(m) // 9 % 4,
    "aligned to 128, as DeepGEMM asks": lambda m: torch.where(
        torch.arange(m) % 128 < 100, torch.arange(m) // 128, -1
    ),
    "groups that straddle tiles": lambda m: (torch.arange(m) + 70) // 128,
    "one row each": lambda m: torch.where(torch.arange(m) < 4, torch.arange(m), -7),
    "all in one": lambda m: torch.full((m,), 2),
    "none": lambda m: torch.full((m,), -1),
}


@pytest.mark.every_architecture
@pytest.mark.parametrize("case", IDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_group_ids(granularity, case, device, tensor_core):
    a, b = grouped(granularity, (150, 4, 40, 200), device)
    group_ids = IDS[case](150).int().to(device)
    check_contiguous(a, b, tensor_core, group_ids=group_ids)
    out = torch.full((150, 40), torch.nan, device=device)
    check_contiguous(a, b, tensor_core, group_ids=group_ids, out=out)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (33, 16, 130), (20, 768, 128)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_shapes(granularity, shape, device, tensor_core):
    m, n, k = shape
    a, b = grouped(granularity, (m, 3, n, k), device)
    check_contiguous(a, b, tensor_core, offsets=ends([m // 3, m - m // 3, 0], device))
    check_contiguous(a, b, tensor_core, group_ids=torch.randint(-1, 3, (m,)).int().to(device))


@pytest.mark.parametrize("dtypes", [(E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2)])
@pytest.mark.parametrize("out_dtype", WIDE)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dtypes(granularity, out_dtype, dtypes, device, tensor_core):
    a, b = grouped(granularity, (33, 2, 70, 300), device, dtypes=dtypes)
    offsets = ends([20, 13], device)
    check_contiguous(a, b, tensor_core, offsets=offsets, out_dtype=out_dtype)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_one_group_is_the_dense_product(granularity, device, tensor_core):
    """G = 1: the result is that of fp8_gemm_nt with the same matrix b, up to rounding."""
    a, b = grouped(granularity, (40, 1, 70, 300), device)
    result = check_contiguous(a, b, tensor_core, offsets=ints([40], device))
    dense = ops.fp8_gemm_nt(*a.quantized, *(x.view(x.shape[-2:]) for x in b.quantized))
    torch.testing.assert_close(result, dense, rtol=2**-7, atol=1e-2)


def test_one_scale_for_each_matrix(device, tensor_core):
    """Each expert's weight is quantized tensor-wise: scales [G, 1, 1]."""
    w = [torch.randn(70, 300, device=device) * 3**g for g in range(3)]
    data, scale = zip(*(ops.quantize_tensorwise(x) for x in w), strict=True)
    b = Experts("tensorwise", 3, 70, 300, device)
    b.of = [Operand.of(*pair, 1) for pair in zip(data, scale, strict=True)]
    b.data.copy_(torch.stack(data).view(b.data.shape))
    b.scale = torch.stack(scale)
    assert b.scale.shape == (3, 1, 1)
    for granularity in ("tensorwise", "rowwise"):
        a, _ = operands(granularity, 50, 1, 300, device)
        check_contiguous(a, b, tensor_core, offsets=ends([20, 9, 21], device))


@pytest.mark.parametrize("out_dtype", WIDE)
@pytest.mark.parametrize("bias_dtype", WIDE)
def test_bias(bias_dtype, out_dtype, device, tensor_core):
    for granularity in GRANULARITIES:
        a, b = grouped(granularity, (40, 3, 130, 200), device)
        bias = (torch.randn(3, 130) * 30).to(bias_dtype).to(device)
        index = {"offsets": ends([11, 0, 25], device)}
        check_contiguous(a, b, tensor_core, bias=bias, out_dtype=out_dtype, **index)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", WIDE)
@pytest.mark.parametrize("which", ["offsets", "group_ids"])
def test_out(which, out_dtype, accumulate, device, tensor_core):
    """out= may be columns of a wider tensor, aligned or not; other columns are not written."""
    index = {
        "offsets": {"offsets": ends([11, 0, 21], device)},
        "group_ids": {"group_ids": torch.randint(-1, 3, (37,)).int().to(device)},
    }[which]
    for granularity in GRANULARITIES:
        a, b = grouped(granularity, (37, 3, 133, 200), device)
        bias = torch.randn(3, 133, device=device)
        for before, after in ((0, 3), (8, 19), (5, 0)):
            wide = (torch.randn(37, before + 133 + after) * 50).to(out_dtype).to(device)
            old = wide.clone()
            out = wide[:, before : before + 133]
            check_contiguous(a, b, tensor_core, out=out, accumulate=accumulate, bias=bias, **index)
            assert torch.equal(wide[:, :before], old[:, :before])
            assert torch.equal(wide[:, before + 133 :], old[:, before + 133 :])


@pytest.mark.parametrize("num_sms", [1, 3])
def test_num_sms_changes_no_bit(num_sms, device):
    a, b = grouped("1d2d", (150, 3, 140, 200), device)
    offsets = ends([70, 30, 50], device)
    tensors = (*a.quantized, *b.quantized, offsets)
    limited = ops.m_grouped_fp8_gemm_nt_contiguous(*tensors, num_sms=num_sms)
    assert torch.equal(limited, ops.m_grouped_fp8_gemm_nt_contiguous(*tensors))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_sum_over_nothing_is_zero(granularity, device):
    a, b = grouped(granularity, (6, 2, 150, 0), device, scaled=False)
    out = torch.full((6, 150), torch.nan, device=device)
    bias = torch.randn(2, 150, device=device)
    index = ints([2, 5], device)
    ops.m_grouped_fp8_gemm_nt_contiguous.out(*a.quantized, *b.quantized, index, out=out, bias=bias)
    assert torch.equal(out[:5], bias[[0, 0, 1, 1, 1]])
    assert out[5].isnan().all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(0, 2, 5, 200), (4, 2, 0, 200), (4, 0, 5, 200)])
def test_nothing_to_compute(shape, granularity, device):
    m, groups, n, k = shape
    a, _ = operands(granularity, m, 1, k, device, scaled=False)
    w = torch.randn(groups, n, k, device=device)
    b = QUANTIZERS[granularity][1](w)
    lengths = [m, *[0] * (groups - 1)][:groups]
    for index in ({"offsets": ends(lengths, device)}, {"group_ids": ints([-1] * m, device)}):
        result = ops.m_grouped_fp8_gemm_nt_contiguous(*a.quantized, *b, **index)
        assert result.shape == (m, n)


@pytest.mark.parametrize("granularity", ["1d2d", "1d1d", "rowwise"])
def test_nan_stays_in_its_row_and_its_group(granularity, device):
    m, n, k = 40, 140, 300
    x, w = torch.randn(m, k), torch.randn(3, n, k)
    x[3, 290] = torch.nan  # in group 0
    x[39, 7] = torch.inf  # in no group
    w[1, 130, 5] = torch.nan
    quantize_a, quantize_b = QUANTIZERS[granularity]
    a, b = quantize_a(x.to(device)), quantize_b(w.to(device))
    expected = torch.zeros(m, n, dtype=torch.bool)
    expected[3] = True
    expected[10:20, slice(128, n) if granularity == "1d2d" else 130] = True
    offsets, group_ids = ends([10, 10, 15], device), ints([0] * 10 + [1] * 10 + [2] * 15, device)
    group_ids = torch.nn.functional.pad(group_ids, (0, 5), value=-1)
    for index in ({"offsets": offsets}, {"group_ids": group_ids}):
        out = torch.zeros(m, n, device=device)
        ops.m_grouped_fp8_gemm_nt_contiguous.out(*a, *b, out=out, **index)
        assert torch.equal(out.isnan().cpu(), expected)
        assert (out[35:] == 0).all()


def test_nan_in_the_data_alone_stays_in_its_row(device):
    a, b = grouped("1d2d", (40, 2, 70, 300), device)
    a.data.view(torch.uint8)[19, 131] = 0x7F
    result = ops.m_grouped_fp8_gemm_nt_contiguous(
        *a.quantized, *b.quantized, ints([20, 40], device)
    )
    assert result.isnan().any(1).nonzero().flatten().tolist() == [19]


@pytest.mark.large
def test_many_groups_of_few_rows(device, tensor_core):
    a, b = grouped("1d2d", (600, 64, 256, 512), device)
    lengths = torch.randint(0, 17, (64,)).tolist()
    check_contiguous(a, b, tensor_core, offsets=ends(lengths, device))
    check_contiguous(a, b, tensor_core, group_ids=torch.randint(-1, 64, (600,)).int().to(device))


@pytest.mark.large
def test_rows_beyond_a_block_of_scratch_memory(device):
    a, b = grouped("1d2d", (4500, 2, 40, 130), device)
    group_ids = (torch.arange(4500) % 2).int().to(device)
    result = ops.m_grouped_fp8_gemm_nt_contiguous(
        *a.quantized, *b.quantized, group_ids=group_ids, out_dtype=torch.float32
    )
    for group in range(2):
        exact = a.rows(slice(group, None, 2)).dequantized @ b.of[group].dequantized.t()
        error = (result[group::2].double().cpu() - exact).abs().max() / exact.abs().max()
        assert error < 1e-3


# ---- masked: the first rows of each group ----


def check_masked(
    granularity, counts, shape, device, *, tensor_core, accumulate=False, bias=False, **options
):
    """shape: the rows of each group, n, k."""
    rows, n, k = shape
    groups = len(counts)
    x = unquantized(granularity, (groups, rows, k)).to(device)
    data, scale = QUANTIZERS[granularity][0](x)
    b = Experts(granularity, groups, n, k, device)
    bias = torch.randn(groups, n, device=device) if bias else None
    old = torch.randn(groups, rows, n, device=device)
    out = old.clone()
    arguments = (data, scale, *b.quantized, ints(counts, device))
    ops.m_grouped_fp8_gemm_nt_masked.out(
        *arguments, out=out, accumulate=accumulate, bias=bias, **options
    )
    for g, count in enumerate(counts):
        a = Operand.of(data[g], scale if granularity == "tensorwise" else scale[g], 1)
        a = a.rows(slice(0, count))
        of_group = {"bias": None if bias is None else bias[g], "tensor_core": tensor_core}
        old_rows = old[g, :count] if accumulate else None
        assert_within_bound(out[g, :count], a, b.of[g], old=old_rows, **of_group)
        assert torch.equal(out[g, count:], old[g, count:])
        if not accumulate:
            result = ops.m_grouped_fp8_gemm_nt_masked(*arguments, bias=bias, **options)
            assert result.shape == (groups, rows, n) and result.is_contiguous()
            assert_within_bound(result[g, :count], a, b.of[g], **of_group)


@pytest.mark.parametrize(
    "counts, rows", [([0, 37, 5, 1], 37), ([130, 0], 130), ([3], 8), ([0, 0], 4), ([4, 4, 4], 4)]
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_masked(granularity, counts, rows, device, tensor_core):
    check_masked(granularity, counts, (rows, 136, 200), device, tensor_core=tensor_core)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_masked_epilogue(granularity, accumulate, device, tensor_core):
    options = {"accumulate": accumulate, "bias": True, "expected_m": 8, "tensor_core": tensor_core}
    check_masked(granularity, [3, 0, 20], (20, 70, 300), device, **options)


@pytest.mark.parametrize("shape", [(0, 3, 4, 130), (2, 0, 4, 130), (2, 3, 0, 130), (2, 3, 4, 0)])
def test_masked_sizes_of_zero(shape, device):
    groups, rows, n, k = shape
    a = ops.quantize_1x128(torch.randn(groups, rows, k, device=device))
    b = ops.quantize_128x128(torch.randn(groups, n, k, device=device))
    counts = torch.full((groups,), rows, dtype=torch.int32, device=device)
    result = ops.m_grouped_fp8_gemm_nt_masked(*a, *b, counts)
    assert result.shape == (groups, rows, n)
    assert (result == 0).all()


def test_masked_rows_may_hold_anything(device):
    x = torch.randn(2, 10, 300, device=device)
    x[0, 4:] = torch.nan
    a, b = ops.quantize_1x128(x), ops.quantize_128x128(torch.randn(2, 70, 300, device=device))
    result = ops.m_grouped_fp8_gemm_nt_masked(*a, *b, ints([4, 10], device))
    assert result[0, :4].isfinite().all() and result[1].isfinite().all()


def test_the_scales_of_deepgemm_are_accepted_for_one_group(device, tensor_core):
    """[1, M, K / 128] with strides (K / 128 * M4, 1, M4). With several groups and M4 != M, such
    scales would not fold."""
    a, b = grouped("1d2d", (10, 1, 40, 300), device)
    scale = a.scale.as_strided((1, 10, 3), (3 * 12, 1, 12))
    result = ops.m_grouped_fp8_gemm_nt_masked(a.data[None], scale, *b.quantized, ints([10], device))
    assert_within_bound(result[0], a, b.of[0], tensor_core=tensor_core)


# ---- along K ----


def check_along_k(
    shape,
    lengths,
    device,
    *,
    tensor_core,
    dtypes=(E4M3, E4M3),
    out=None,
    accumulate=False,
    out_dtype=torch.bfloat16,
):
    """shape: m, n, k."""
    m, n, k = shape
    a, b = operands("1d1d", m, n, k, device, dtypes=dtypes)
    offsets = ends(lengths, device)
    old: Any = None if out is None else out.clone()
    if out is None:
        result = ops.k_grouped_fp8_gemm_nt(*a.quantized, *b.quantized, offsets, out_dtype=out_dtype)
        assert result.is_contiguous()
    else:
        ops.k_grouped_fp8_gemm_nt.out(
            *a.quantized, *b.quantized, offsets, out=out, accumulate=accumulate
        )
        result, out_dtype = out, out.dtype
    assert result.shape == (len(lengths), m, n)
    begin = 0
    for group, length in enumerate(lengths):
        part = (begin, begin + length)
        begin += length
        assert_within_bound(
            result[group],
            a.columns(*part),
            b.columns(*part),
            tensor_core=tensor_core,
            old=old[group] if accumulate else None,
            terms=length,
            out_dtype=out_dtype,
        )
        if length == 0:
            expected = old[group] if accumulate else torch.zeros_like(result[group])
            assert torch.equal(result[group], expected)
    return result


K_LENGTHS = [
    [300],
    [128, 128, 44],
    [0, 100, 0, 30, 129, 41, 0],
    [1, 1, 298],
    [127, 2, 171],
    [5, 7, 3],  # all in one block of 128, and columns of no group
    [0, 0],
]


@pytest.mark.every_architecture
@pytest.mark.parametrize("lengths", K_LENGTHS, ids=str)
@pytest.mark.parametrize("out_dtype", WIDE)
def test_along_k(out_dtype, lengths, device, tensor_core):
    check_along_k((70, 136, 300), lengths, device, tensor_core=tensor_core, out_dtype=out_dtype)


@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (3, 130), (130, 5)])
def test_along_k_shapes(shape, device, tensor_core):
    for k in (1, 33, 257):
        lengths = [k // 2, k - k // 2]
        options = {"tensor_core": tensor_core, "out_dtype": torch.float32}
        check_along_k((*shape, k), lengths, device, **options)


@pytest.mark.parametrize("dtypes", [(E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2)])
def test_along_k_dtypes(dtypes, device, tensor_core):
    check_along_k((33, 40, 230), [100, 130], device, tensor_core=tensor_core, dtypes=dtypes)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", WIDE)
def test_along_k_out(out_dtype, accumulate, device, tensor_core):
    """out= may be part of a larger tensor: with a row pitch, matrices apart or interleaved."""
    lengths = [100, 0, 75, 33]
    options = {"accumulate": accumulate, "tensor_core": tensor_core}
    for m, n in ((37, 133), (24, 64)):
        shapes = {
            "apart": lambda x, m=m, n=n: x[:, 2 : 2 + m, 8 : 8 + n],
            "misaligned": lambda x, m=m, n=n: x[:, :m, 5 : 5 + n],
            "interleaved": lambda x, m=m, n=n: x.transpose(0, 1)[:4, :m, :n],
        }
        for name, part in shapes.items():
            size = (m + 5, 6, n + 11) if name == "interleaved" else (4, m + 5, n + 11)
            wide = torch.randn(size).to(out_dtype).to(device)
            old = wide.clone()
            check_along_k((m, n, 220), lengths, device, out=part(wide), **options)
            part(wide).copy_(part(old))
            assert torch.equal(wide, old)


def test_along_k_sums_over_nothing(device):
    a, b = operands("1d1d", 4, 150, 0, device, scaled=False)
    offsets = ints([0, 0], device)
    assert (ops.k_grouped_fp8_gemm_nt(*a.quantized, *b.quantized, offsets) == 0).all()
    out = torch.tensor([1.0, -0.0], device=device).view(2, 1, 1).repeat(1, 4, 150)
    old = out.clone()
    ops.k_grouped_fp8_gemm_nt.out(*a.quantized, *b.quantized, offsets, out=out, accumulate=True)
    assert torch.equal(out.view(torch.int32), old.view(torch.int32))


@pytest.mark.parametrize("shape", [(0, 5, 1), (5, 0, 1), (5, 5, 0)])
def test_along_k_of_nothing(shape, device):
    m, n, groups = shape
    a, b = operands("1d1d", m, n, 130, device, scaled=False)
    result = ops.k_grouped_fp8_gemm_nt(*a.quantized, *b.quantized, ints([130] * groups, device))
    assert result.shape == (groups, m, n)


def test_nan_in_the_data_of_a_group_along_k_stays_in_it(device):
    """The groups share a K block, and so its scale, but not the NaN."""
    a, b = operands("1d1d", 20, 40, 300, device)
    offsets = ends([50, 40, 110, 100], device)
    clean = ops.k_grouped_fp8_gemm_nt(*a.quantized, *b.quantized, offsets)
    a.data.view(torch.uint8)[7, 60] = 0x7F  # in group 1
    b.data.view(torch.uint8)[9, 199] = 0x7F  # in group 2
    result = ops.k_grouped_fp8_gemm_nt(*a.quantized, *b.quantized, offsets)
    expected = torch.zeros(4, 20, 40, dtype=torch.bool)
    expected[1, 7] = True
    expected[2, :, 9] = True
    assert torch.equal(result.isnan().cpu(), expected)
    assert torch.equal(result[~result.isnan()], clean[~result.isnan()])


def test_nan_in_a_scale_along_k_reaches_the_groups_that_share_it(device):
    x = torch.randn(300, 20, device=device)
    x[60, 7] = torch.nan
    a = ops.quantize_1x128_t(x)
    b = ops.quantize_1x128_t(torch.randn(300, 40, device=device))
    result = ops.k_grouped_fp8_gemm_nt(*a, *b, ends([50, 40, 38, 172], device))
    assert result.isnan().any(2).cpu().nonzero().tolist() == [[0, 7], [1, 7], [2, 7]]


@pytest.mark.large
def test_along_k_of_many_tokens(device):
    """Several blocks of scratch memory, with groups that begin anywhere in them."""
    a, b = operands("1d1d", 60, 2100, 4500, device)
    offsets = ints([2050, 2060, 4500], device)
    result = ops.k_grouped_fp8_gemm_nt(*a.quantized, *b.quantized, offsets, out_dtype=torch.float32)
    for group, part in enumerate([(0, 2050), (2050, 2060), (2060, 4500)]):
        exact = a.columns(*part).dequantized @ b.dequantized.t()
        error = (result[group].double().cpu() - exact).abs().max() / exact.abs().max()
        assert error < 1e-3


# ---- all three ways ----


def test_results_repeat_to_the_bit(device):
    a, b = grouped("1d2d", (130, 3, 150, 400), device)
    ids = torch.randint(0, 3, (130,)).int().to(device)
    first, second = (
        ops.m_grouped_fp8_gemm_nt_contiguous(*a.quantized, *b.quantized, group_ids=ids)
        for _ in range(2)
    )
    assert torch.equal(first, second)
