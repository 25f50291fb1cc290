"""fp8_gemm_nt compared with the float64 product of the dequantized operands, within the bound of
docs/numerics.md (gemm_testing.py): granularities, dtypes, ragged shapes, epilogues, NaN."""

from __future__ import annotations

import pytest
import torch

import torchext  # noqa: F401  (loads the ops)
from support.gemm_testing import E4M3, E5M2, WIDE, Operand, check, operands
from support.op_testing import GRANULARITIES

ops = torch.ops.torchext


# ---- results ----

SHAPES = [
    (1, 1, 1), (1, 128, 128), (3, 5, 7), (16, 8, 16), (2, 300, 33), (130, 7, 640), (64, 48, 128),
    (128, 128, 256), (129, 130, 257), (17, 200, 1000),
]  # fmt: skip


@pytest.mark.every_architecture
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_shapes(granularity, shape, device, tensor_core):
    a, b = operands(granularity, *shape, device)
    check(a, b, tensor_core)
    check(a, b, tensor_core, out_dtype=torch.float32)


@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2)])
@pytest.mark.parametrize("out_dtype", WIDE)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dtypes(granularity, out_dtype, dtypes, device, tensor_core):
    a, b = operands(granularity, 33, 70, 300, device, dtypes=dtypes)
    check(a, b, tensor_core, out_dtype=out_dtype)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_error_of_normal_data_is_small(granularity, device, tensor_core):
    """The bound is a worst case; normal data has less error. A tensor core's relative error is
    1.3e-4 with promotion and 5.5e-4 without."""
    a, b = operands(granularity, 64, 72, 1024, device, scaled=False)
    exact = a.dequantized @ b.dequantized.t()
    result = ops.fp8_gemm_nt(a.data, a.scale, b.data, b.scale, out_dtype=torch.float32)
    error = (result.double().cpu() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    limit = 1e-6 if not tensor_core else 3e-6 if tensor_core.lost < 2.0**-20 else 2e-4
    assert error < limit


@pytest.mark.every_architecture
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_code_is_decoded_exactly(dtype, granularity, device):
    """Each finite value, subnormals included, alone in a row of a, then of b, times ones."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[codes.view(dtype).float().isfinite()]
    data = torch.zeros(len(finite), 144, dtype=torch.uint8)
    data[torch.arange(len(finite)), torch.arange(len(finite)) % 144] = finite
    x, ones = data.view(dtype).to(device), torch.ones(3, 144).to(dtype).to(device)

    def scale(rows, per_group):
        groups = 2 if per_group else 1
        return torch.ones(groups, -(-rows // 4) * 4, device=device)[:, :rows].t()

    for a, b in ((x, ones), (ones, x)):
        per_group = granularity in ("1d2d", "1d1d")
        a_rows, b_rows = {
            "1d2d": (a.shape[0], -(-b.shape[0] // 128)),
            "1d1d": (a.shape[0], b.shape[0]),
            "rowwise": (a.shape[0], b.shape[0]),
            "tensorwise": (1, 1),
        }[granularity]
        a_scale, b_scale = scale(a_rows, per_group), scale(b_rows, per_group)
        result = ops.fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype=torch.float32)
        assert torch.equal(result, a.float() @ b.float().t())


def test_b_may_be_a_transpose_that_shares_blocks(device, tensor_core):
    """dgrad: b is a weight's transpose, and its block scales are the weight's, transposed."""
    weight = torch.randn(130, 200, device=device)
    _, scale, data_t = ops.quantize_128x128_dual(weight)
    b = Operand.of(data_t, scale.t(), 128)
    a, _ = operands("1d2d", 40, 8, 130, device)
    check(a, b, tensor_core)


def test_rowwise_with_tensorwise(device, tensor_core):
    for first, second in (("rowwise", "tensorwise"), ("tensorwise", "rowwise")):
        a, _ = operands(first, 20, 8, 200, device)
        _, b = operands(second, 8, 30, 200, device)
        check(a, b, tensor_core, out_dtype=torch.float32)


def test_results_repeat_to_the_bit(device, tensor_core):
    a, b = operands("1d2d", 130, 150, 400, device)
    first, second = check(a, b, tensor_core), check(a, b, tensor_core)
    assert torch.equal(first, second)


@pytest.mark.parametrize("num_sms", [1, 3, 20])
def test_num_sms_changes_no_bit(num_sms, device, simulated_gpu):
    if num_sms > simulated_gpu.num_sms:
        pytest.skip("the simulated GPU has fewer SMs")
    a, b = operands("1d2d", 300, 140, 200, device)
    tensors = (a.data, a.scale, b.data, b.scale)
    limited = ops.fp8_gemm_nt(*tensors, num_sms=num_sms)
    assert torch.equal(limited, ops.fp8_gemm_nt(*tensors))


@pytest.mark.large
@pytest.mark.parametrize("shape", [(2100, 2200, 2300), (20, 700, 4200), (2100, 20, 130)])
def test_large(shape, device):
    """Uses several blocks of scratch memory on the CPU. Checks only the largest error, relative to
    the largest element, since a bound for each element would take too long."""
    a, b = operands("1d2d", *shape, device)
    exact = a.dequantized @ b.dequantized.t()
    result = ops.fp8_gemm_nt(a.data, a.scale, b.data, b.scale, out_dtype=torch.float32)
    error = (result.double().cpu() - exact).abs().max() / exact.abs().max()
    assert error < 1e-3


@pytest.mark.parametrize("shape", [(8, 16, 256), (70, 768, 256), (768, 1536, 256), (128, 16, 300)])
def test_shapes_that_broke_deepgemm(shape, device):
    """Checks only the largest error, as test_large does."""
    a, b = operands("1d2d", *shape, device)
    exact = a.dequantized @ b.dequantized.t()
    for num_sms in (0, 3):
        result = ops.fp8_gemm_nt(
            *a.quantized, *b.quantized, out_dtype=torch.float32, num_sms=num_sms
        )
        error = (result.double().cpu() - exact).abs().max() / exact.abs().max()
        assert error < 1e-3


# ---- epilogue ----


@pytest.mark.parametrize("bias_dtype", WIDE)
@pytest.mark.parametrize("out_dtype", WIDE)
def test_bias(out_dtype, bias_dtype, device, tensor_core):
    for granularity in GRANULARITIES:
        a, b = operands(granularity, 20, 130, 200, device)
        bias = (torch.randn(130) * 30).to(bias_dtype).to(device)
        check(a, b, tensor_core, out_dtype=out_dtype, bias=bias)


@pytest.mark.every_architecture
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", WIDE)
def test_out(out_dtype, accumulate, device, tensor_core):
    """out= may be columns of a wider tensor, aligned or not; other columns are not written."""
    for granularity in GRANULARITIES:
        a, b = operands(granularity, 37, 133, 200, device)
        bias = torch.randn(133, device=device)
        for before, after in ((0, 3), (8, 19), (5, 0)):
            wide = (torch.randn(37, before + 133 + after) * 50).to(out_dtype).to(device)
            old = wide.clone()
            out = wide[:, before : before + 133]
            check(a, b, tensor_core, out=out, accumulate=accumulate, bias=bias)
            assert torch.equal(wide[:, :before], old[:, :before])
            assert torch.equal(wide[:, before + 133 :], old[:, before + 133 :])


def test_out_need_not_be_initialized(device, tensor_core):
    a, b = operands("1d2d", 20, 40, 200, device)
    out = torch.full((20, 40), torch.nan, device=device)
    assert check(a, b, tensor_core, out=out).isfinite().all()


def test_sums_are_rounded_once(device):
    """256 + 0.75 + 0.75: BF16 additions one after another would lose the small terms."""
    eye = torch.eye(16, device=device)
    a, b = ops.quantize_1x128(eye), ops.quantize_128x128(eye * 0.75)
    for bias_dtype in WIDE:
        out = torch.full((16, 16), 256.0, device=device, dtype=torch.bfloat16)
        bias = torch.full((16,), 0.75, device=device, dtype=bias_dtype)
        ops.fp8_gemm_nt.out(*a, *b, out=out, accumulate=True, bias=bias)
        assert torch.equal(out.diagonal(), torch.full_like(out.diagonal(), 258.0))


def test_results_beyond_float16_are_infinite(device):
    x = torch.full((3, 128), 448.0, device=device)
    x[1] *= -1
    a, b = ops.quantize_1x128(x), ops.quantize_128x128(torch.ones(5, 128, device=device))
    result = ops.fp8_gemm_nt(*a, *b, out_dtype=torch.float16)
    assert result[:, 0].tolist() == [57344.0, -57344.0, 57344.0]
    doubled = torch.full((3, 5), 9000.0, device=device, dtype=torch.float16)
    ops.fp8_gemm_nt.out(*a, *b, out=doubled, accumulate=True)
    assert doubled[:, 0].tolist() == [torch.inf, -48352.0, torch.inf]


# ---- leading dimensions, and sizes of zero ----


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 4), (1,)])
def test_leading_dimensions(leading, granularity, device):
    k, n = 200, 24
    _, b = operands(granularity, 8, n, k, device)
    x = torch.randn(*leading, k, device=device)
    name = {"rowwise": "quantize_rowwise", "tensorwise": "quantize_tensorwise"}.get(
        granularity, "quantize_1x128"
    )
    result = ops.fp8_gemm_nt(*getattr(ops, name)(x), b.data, b.scale)
    flat = ops.fp8_gemm_nt(*getattr(ops, name)(x.reshape(-1, k)), b.data, b.scale)
    assert result.shape == (*leading, n)
    assert torch.equal(result.reshape(-1, n), flat)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(0, 5, 200), (4, 0, 200), (0, 0, 0), (0, 5, 0)])
def test_nothing_to_compute(shape, granularity, device):
    a, b = operands(granularity, *shape, device, scaled=False)
    m, n, _ = shape
    bias = torch.ones(n, device=device)
    result = ops.fp8_gemm_nt(a.data, a.scale, b.data, b.scale, bias=bias)
    assert result.shape == (m, n)
    out = torch.empty(m, n, device=device)
    ops.fp8_gemm_nt.out(a.data, a.scale, b.data, b.scale, out=out, accumulate=True)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("out_dtype", WIDE)
def test_a_sum_over_nothing_is_zero(out_dtype, granularity, device):
    a, b = operands(granularity, 4, 150, 0, device, scaled=False)
    tensors = (a.data, a.scale, b.data, b.scale)
    assert (ops.fp8_gemm_nt(*tensors, out_dtype=out_dtype) == 0).all()
    bias = torch.randn(150, device=device).to(out_dtype)
    result = ops.fp8_gemm_nt(*tensors, bias=bias, out_dtype=out_dtype)
    assert torch.equal(result, bias.expand(4, 150))
    out = torch.ones(4, 150, device=device, dtype=out_dtype)
    ops.fp8_gemm_nt.out(*tensors, out=out, accumulate=True)
    assert (out == 1).all()
    ops.fp8_gemm_nt.out(*tensors, out=out)
    assert (out == 0).all()


# ---- NaN ----


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("granularity", ["1d2d", "1d1d", "rowwise"])
def test_nan_goes_where_its_operand_goes_and_no_further(granularity, bad, device):
    m, n, k = 20, 140, 300
    x, w = torch.randn(m, k), torch.randn(n, k)
    x[3, 290] = bad
    w[130, 5] = bad
    quantize_a = ops.quantize_rowwise if granularity == "rowwise" else ops.quantize_1x128
    quantize_b = ops.quantize_128x128 if granularity == "1d2d" else quantize_a
    a, b = quantize_a(x.to(device)), quantize_b(w.to(device))
    result = ops.fp8_gemm_nt(*a, *b, bias=torch.ones(n, device=device))
    expected = torch.zeros(m, n, dtype=torch.bool)
    expected[3] = True
    expected[:, slice(128, n) if granularity == "1d2d" else 130] = True
    assert torch.equal(result.isnan().cpu(), expected)


@pytest.mark.every_architecture
@pytest.mark.parametrize(
    ("dtype", "code"),
    [(E4M3, 0x7F), (E4M3, 0xFF), (E5M2, 0x7D), (E5M2, 0xFE), (E5M2, 0x7C), (E5M2, 0xFC)],
)  # fmt: skip
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nan_in_the_data_alone(granularity, dtype, code, device):
    """e5m2 also has Inf, whose product with a finite number other than 0 is Inf."""
    a, b = operands(granularity, 20, 40, 300, device, dtypes=(dtype, dtype))
    codes = a.data.view(torch.uint8)
    b.data.view(torch.uint8)[:, [130, 131, 132]] |= 1  # so that b is not zero there
    for column in (130, 131, 132):  # at different positions among neighbors
        before = codes[7, column].clone()
        codes[7, column] = code
        result = ops.fp8_gemm_nt(a.data, a.scale, b.data, b.scale)
        wrong = result.isinf() if dtype == E5M2 and code & 0x7F == 0x7C else result.isnan()
        assert wrong[7].all()
        assert torch.equal((~result.isfinite()).any(1).nonzero().flatten().cpu(), torch.tensor([7]))
        if granularity != "1d2d":
            swapped = ops.fp8_gemm_nt(b.data, b.scale, a.data, a.scale)
            assert torch.equal(swapped.t().isnan(), result.isnan())
        codes[7, column] = before


# ---- settings of torch (CPU) ----


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_matmul_precision_changes_nothing(precision):
    before = torch.get_float32_matmul_precision()
    a, b = operands("1d2d", 70, 300, 520, torch.device("cpu"))
    try:
        torch.set_float32_matmul_precision(precision)
        check(a, b, False, out_dtype=torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


def test_autocast_changes_nothing():
    a, b = operands("1d2d", 70, 300, 520, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(a, b, False, out_dtype=torch.float32)
