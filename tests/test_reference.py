"""References are compared with values computed by hand, and ops with references: bit for bit for
quantizers and dequantize, within the tensor core's rounding for GEMMs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from support.cuda_division import CudaDivision
from support.op_testing import (
    BLOCKS,
    FOLDING,
    FUSED,
    GRANULARITIES,
    GROUPINGS,
    QUANTIZERS,
    assert_same,
    grouped,
    metadata,
    quantized,
    random,
)
from torchext import ops, reference
from torchext._catalog.entry import E4M3, E5M2

# ---- references, by hand ----


def test_scale_is_amax_over_the_largest_value():
    data, scale = reference.quantize_1x128(torch.tensor([[896.0, -2.0, 0.0, 3.1]]))
    assert scale.tolist() == [[2.0]]
    assert data.float().tolist() == [[448.0, -1.0, 0.0, 1.5]]  # 1.55 lies nearer 1.5 than 1.625
    _, scale = reference.quantize_1x128(torch.tensor([[-57344.0]]), dtype=E5M2)
    assert scale.tolist() == [[1.0]]


def test_groups_and_blocks_are_of_128():
    x = torch.zeros(130, 129)
    x[0, 127], x[0, 128], x[129, 128] = 448.0, 896.0, 1792.0
    assert reference.quantize_1x128(x)[1][0].tolist() == [1.0, 2.0]
    assert reference.quantize_1x128_t(x)[1][128].tolist() == [2.0, 4.0]
    assert reference.quantize_128x128(x)[1].tolist() == [[1.0, 2.0], [1.0, 4.0]]
    assert reference.quantize_rowwise(x)[1].flatten()[[0, 1, 129]].tolist() == [2.0, 1.0, 4.0]
    assert reference.quantize_tensorwise(x)[1].tolist() == [[4.0]]


@pytest.mark.parametrize(
    "amax, expected", [(448.0, 1.0), (449.0, 2.0), (1344.0, 4.0), (3.5, 2**-7), (0.0, 1.0)]
)
def test_pow2_scale_rounds_up(amax, expected):
    _, scale = reference.quantize_1x128(torch.tensor([[amax]]), pow2_scale=True)
    assert scale.item() == expected


def test_tiny_groups_have_the_smallest_normal_scale():
    data, scale = reference.quantize_1x128(torch.tensor([[2.0**-126, 2.0**-127, 2.0**-149]]))
    assert scale.item() == 2.0**-126
    assert data.float().tolist() == [[1.0, 0.5, 0.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_poison_their_group_and_no_other(bad):
    x = torch.ones(2, 256)
    x[0, 3] = bad
    data, scale = reference.quantize_1x128(x)
    assert scale.isnan().tolist() == [[True, False], [False, False]]
    assert data.float().isnan().sum() == 128
    product = reference.fp8_gemm_nt(data, scale, *reference.quantize_128x128(torch.ones(5, 256)))
    assert product.isnan().all(dim=1).tolist() == [True, False]


def test_gemm_of_small_integers_is_exact():
    x = torch.tensor([[448.0, 2.0], [0.0, -448.0]])
    w = torch.tensor([[448.0, 1.0], [3.0, 0.0], [448.0, -448.0]])
    bias = torch.tensor([1.0, 2.0, 3.0])
    out = torch.full((2, 3), 0.5)
    a, b = reference.quantize_1x128(x), reference.quantize_rowwise(w)
    product = reference.fp8_gemm_nt(*a, *b, bias=bias)
    b64 = b[0].double() * b[1].double()
    assert product.dtype == torch.float64
    torch.testing.assert_close(product, x.double() @ b64.t() + bias)
    reference.fp8_gemm_nt(*a, *b, bias=bias, out=out, accumulate=True)
    torch.testing.assert_close(out.double(), product + 0.5)


# ---- ops against references ----


def ordinary(device):
    return random(150, 300, device=device, dtype=torch.float32)


def wide_range(device):
    return ordinary(device) * torch.exp2(torch.randint(-60, 60, (150, 300), device=device).float())


def with_zeros(device):
    x = ordinary(device)
    x[3:140] = 0
    x[:, 100:270] = 0
    return x


def with_nan_and_inf(device):
    x = ordinary(device)
    x[2, 5], x[7, 140], x[140, 290] = math.nan, math.inf, -math.inf
    return x


def subnormal(device):
    return ordinary(device) * 2.0**-135


def near_the_smallest_scale(device):
    return ordinary(device) * 448 * 2.0**-126


def largest(device):
    return torch.finfo(torch.bfloat16).max * torch.sign(ordinary(device))


def midpoints(device):
    """Every FP8 value and every midpoint between neighbors, as x / scale with a scale of 1."""
    values = torch.arange(256, dtype=torch.uint8, device=device).view(E4M3).float()
    values = values[values.isfinite()].sort().values
    between = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, between])
    return torch.cat([x.new_full((x.numel(), 1), 448.0), x[:, None]], dim=1)


HOSTILE = [
    ordinary,
    wide_range,
    with_zeros,
    with_nan_and_inf,
    subnormal,
    near_the_smallest_scale,
    largest,
    midpoints,
]


@pytest.mark.parametrize("pow2_scale", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("make", HOSTILE)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_equal_their_references(name, make, dtype, pow2_scale, device):
    x = make(device)
    for wide in (torch.float32, torch.bfloat16, torch.float16):
        options = {"dtype": dtype, "pow2_scale": pow2_scale}
        converted = x.to(wide)
        assert_same(
            getattr(ops, name)(converted, **options), getattr(reference, name)(converted, **options)
        )


@pytest.mark.parametrize("pow2_scale", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("make", HOSTILE)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_references_have_the_same_bits_on_cuda(name, make, dtype, pow2_scale):
    x = make(torch.device("cpu"))
    for wide in (x, x.bfloat16()):  # quotients of bfloat16 values are often ties of FP8
        with CudaDivision():
            emulated = getattr(reference, name)(wide, dtype=dtype, pow2_scale=pow2_scale)
        assert_same(emulated, getattr(reference, name)(wide, dtype=dtype, pow2_scale=pow2_scale))


@pytest.mark.parametrize("divisor", [448.0, 57344.0])
def test_emulated_cuda_division(divisor):
    x = torch.arange(1.0, 1000.0)
    with CudaDivision():
        quotients = [x / divisor, x / torch.tensor(divisor), x.clone().div_(divisor)]
        by_tensor = x / x.new_full((), divisor)
    reciprocal = torch.full_like(x, 1 / divisor)
    assert all(torch.equal(quotient, x * reciprocal) for quotient in quotients)
    assert torch.equal(by_tensor, x / divisor) and not torch.equal(by_tensor, quotients[0])


@pytest.mark.parametrize("shape", [(3, 5, 200), (1, 1, 1), (129,), (2, 0, 3), (0,)])
@pytest.mark.parametrize("name", FOLDING)
def test_quantizers_of_other_ranks_equal_their_references(name, shape, device):
    x = random(*shape, device=device)
    assert_same(getattr(ops, name)(x), getattr(reference, name)(x))


STACKS = [(3, 130, 300), (2, 1, 5, 48), (2, 128, 70), (0, 3, 4), (2, 0, 40), (2, 7, 0)]


@pytest.mark.parametrize("shape", STACKS)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_stacks_equal_their_references(name, shape, device):
    """Matrices may have any strides, and each has the bits of a separate call."""
    x = random(*shape, device=device, dtype=torch.float32) * 3
    wide = random(*shape[:-1], 2 * shape[-1] + 1, device=device)
    for y in (x, x.mT, x.transpose(0, -1), wide[..., 1::2], x[:1].expand(shape)):
        assert_same(getattr(ops, name)(y), getattr(reference, name)(y))
    if x.numel() > 0:
        alone = getattr(ops, name)(x.flatten(0, -3)[-1])
        for output, matrix in zip(getattr(ops, name)(x), alone, strict=True):
            last = output.flatten(0, -3)[-1]
            torch.testing.assert_close(last.float(), matrix.float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "stride",
    [
        lambda x: x.t(),
        lambda x: x[::2, ::3],
        lambda x: x[1:, 1:],
        lambda x: x[:1].expand(40, -1),
        lambda x: x[:, :1].expand(-1, 40),
    ],
    ids=["transposed", "strided", "misaligned", "repeated row", "repeated column"],
)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_of_other_strides_equal_their_references(name, stride, device):
    x = stride(random(150, 300, device=device))
    assert_same(getattr(ops, name)(x), getattr(reference, name)(x))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [ordinary, with_nan_and_inf, wide_range])
@pytest.mark.parametrize("name", [n for n in QUANTIZERS if n != "quantize_1x128_t"])
def test_dequantize_equals_its_reference(name, make, out_dtype, device):
    data, scale = getattr(ops, name)(make(device))[:2]
    assert_same(
        ops.dequantize(data, scale, out_dtype=out_dtype),
        reference.dequantize(data, scale, out_dtype=out_dtype),
    )


def test_dequantize_of_the_transpose(device):
    x = random(150, 300, device=device)
    data_t, scale_t = ops.quantize_1x128_t(x)
    assert_same(
        ops.dequantize(data_t, scale_t, out_dtype=torch.float32),
        reference.dequantize(data_t, scale_t, out_dtype=torch.float32),
    )
    # dequantize also takes views in column-major order.
    y = ops.dequantize(data_t.t(), torch.ones(1, 1, device=device), out_dtype=torch.float32)
    torch.testing.assert_close(y, data_t.float().t(), rtol=0, atol=0)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(20, 40, 300), (130, 129, 257), (1, 1, 1), (7, 16, 0)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gemm_is_near_its_reference(granularity, size, out_dtype, device):
    m, n, k = size
    a, a_scale, b, b_scale = quantized(granularity, m, n, k, device=device)
    bias = random(n, device=device)
    start = random(m, n, device=device, dtype=out_dtype)
    exact = reference.fp8_gemm_nt(a, a_scale, b, b_scale, bias=bias)
    # Rounding errors are relative to the sum of the magnitudes of all addends.
    magnitude = reference.fp8_gemm_nt(
        a.float().abs().to(a.dtype), a_scale, b.float().abs().to(b.dtype), b_scale
    )
    rounding = torch.finfo(out_dtype).eps / 2

    def check(result, expected):
        error = (result.double() - expected).abs()
        assert (error <= 1e-3 * magnitude + 1.01 * rounding * expected.abs() + 1e-12).all()

    check(ops.fp8_gemm_nt(a, a_scale, b, b_scale, bias=bias, out_dtype=out_dtype), exact)
    out = start.clone()
    ops.fp8_gemm_nt(a, a_scale, b, b_scale, bias=bias, out=out)
    check(out, exact)
    out = start.clone()
    ops.fp8_gemm_nt(a, a_scale, b, b_scale, bias=bias, out=out, accumulate=True)
    check(out, exact + start.double())


# ---- grouped and fused GEMMs ----


@pytest.mark.parametrize("case", GROUPINGS)
def test_grouped_references_by_hand(case):
    """Each group's matrix is a multiple of the identity, so rows show their group and place."""
    eye = torch.eye(4)
    x, x_scale = reference.quantize_rowwise(torch.arange(1.0, 25).reshape(6, 4))
    x_scale = x_scale.double()
    values = x.double() * x_scale
    experts = torch.stack([eye * (g + 1) for g in range(3)])
    one = torch.ones(1, 1, 1)
    b = (experts.to(E4M3), one)
    if case == "along k":
        a, scale = reference.quantize_1x128(torch.arange(1.0, 13).reshape(2, 6))
        ends = torch.tensor([1, 1, 5])
        result = reference.k_grouped_fp8_gemm_nt(a, scale, a, scale, ends)
        values = a.double() * scale.double()
        products = [values[:, i:j] @ values[:, i:j].t() for i, j in ((0, 1), (1, 1), (1, 5))]
        assert torch.equal(result, torch.stack(products))
    elif case == "masked":
        a, scale = x.view(3, 2, 4), x_scale.view(3, 2, 1)
        result = reference.m_grouped_fp8_gemm_nt_masked(a, scale, *b, torch.tensor([2, 0, 1]))
        masks = torch.tensor([[1.0, 1], [torch.nan, torch.nan], [3, torch.nan]])
        expected = values.view(3, 2, 4) * masks[:, :, None]
        assert torch.equal(result.nan_to_num(-1), expected.nan_to_num(-1))
    else:
        cases: dict[str, tuple[dict[str, Any], list[float]]] = {
            "offsets": ({"offsets": torch.tensor([2, 2, 5])}, [1, 1, 3, 3, 3, torch.nan]),
            "group ids": (
                {"group_ids": torch.tensor([2, -1, 0, 2, 1, -5])},
                [3, torch.nan, 1, 3, 2, torch.nan],
            ),
        }
        index, factors = cases[case]
        result = reference.m_grouped_fp8_gemm_nt_contiguous(x, x_scale, *b, **index)
        expected = values * torch.tensor(factors)[:, None]
        assert torch.equal(result.nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("case", GROUPINGS)
def test_grouped_gemms_are_near_their_references(case, granularity, device):
    name, tensors, options = grouped(case, 20, 40, 300, device=device, granularity=granularity)
    exact = getattr(reference, name)(*tensors, **options)
    result = getattr(ops, name)(*tensors, out_dtype=torch.float32, **options)
    tolerance = 1e-3 * exact.abs().max().item()
    torch.testing.assert_close(result.double(), exact, rtol=1e-3, atol=tolerance)
    out = torch.randn_like(result)
    expected = getattr(reference, name)(*tensors, out=out.clone(), accumulate=True, **options)
    getattr(ops, name)(*tensors, out=out, accumulate=True, **options)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name, options", FUSED)
def test_fused_gemms_are_near_their_references(name, options, granularity, device):
    operands = quantized(granularity, 20, 300, 200, device=device)
    bias = random(300, device=device)
    for more in ({}, {"bias": bias, "dtype": E5M2}, {"pow2_scale": True}):
        data, scale = getattr(ops, name)(*operands, **options, **more)
        expected = getattr(reference, name)(*operands, **options, **more)
        assert metadata((data, scale)) == metadata(expected)
        y = ops.dequantize(data, scale, out_dtype=torch.float32)
        exact = reference.dequantize(*expected, out_dtype=torch.float32)
        # A value may round to the next FP8 value, 1/4 away in E5M2.
        torch.testing.assert_close(y, exact, rtol=0.26, atol=2e-3 * exact.abs().max().item())
