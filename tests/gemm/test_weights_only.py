"""fp8_linear compared with the float64 product of x and the dequantized weight, within the bound of
docs/numerics.md (gemm_testing.py); its gradients, transforms and errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import jvp, vmap
from torch.utils._pytree import tree_map_only

from support.gemm_testing import (
    E4M3,
    E5M2,
    WIDE,
    WIDE_TENSOR_CORES,
    Operand,
    assert_within_bound,
)
from support.op_testing import assert_same, metadata, overload
from support.weights_only_testing import (
    BLOCKS,
    GRANULARITIES,
    GROUPS,
    ROWS,
    WHOLE,
    operands,
    quantize,
)
from torchext import ops, reference

KERNELS = ["gemm_*_fp8_linear.*", "gemm_plain_*"]  # plain: one kernel for all products
SHAPES = [
    (1, 1, 1), (1, 128, 128), (3, 5, 7), (16, 8, 16), (2, 300, 33), (130, 7, 640), (64, 48, 128),
    (129, 130, 257), (17, 200, 1000),
]  # fmt: skip


@pytest.fixture
def cores(gpu_path):
    """x's dtype -> the tensor core that sums its products; None if FP32 arithmetic does."""
    core = WIDE_TENSOR_CORES.get(gpu_path or "")
    thrice = core and replace(core, lost=3 * core.lost)
    return {torch.bfloat16: core, torch.float16: core, torch.float32: thrice}


def check(x, weight, cores, bias=None, **options):
    y = ops.fp8_linear(x, *weight.quantized, bias, **options)
    assert y.is_contiguous() and y.shape == (*x.shape[:-1], weight.data.shape[0])
    assert_within_bound(
        y.reshape(-1, y.shape[-1]), Operand.wide(x.reshape(-1, x.shape[-1])), weight,
        tensor_core=cores[x.dtype], bias=bias, out_dtype=x.dtype,
    )  # fmt: skip
    return y


# ---- results ----


@pytest.mark.every_architecture(kernels=KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_shapes(granularity, shape, device, cores):
    m, n, k = shape
    for dtype in WIDE:
        check(*operands(granularity, m, n, k, device, dtype=dtype), cores)


@pytest.mark.every_architecture(kernels=KERNELS)
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dtypes_bias_and_large_tiles(granularity, dtype, fp8, device, cores):
    x, weight = operands(granularity, 140, 72, 300, device, dtype=dtype, fp8=fp8)
    for bias_dtype in WIDE if granularity == BLOCKS else [dtype]:
        bias = (torch.randn(72, device=device) * 30).to(bias_dtype)
        check(x, weight, cores, bias, num_sms=2)


@pytest.mark.every_architecture(kernels=KERNELS)
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_every_code_is_exact(fp8, dtype, device):
    """Each finite value of the weight, subnormals included, times 1."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[codes.view(fp8).float().isfinite()]
    weight = finite.repeat(16, 1)  # each code in each column of K, since rows are rolled
    weight = torch.stack([row.roll(i) for i, row in enumerate(weight)])[:, :240].contiguous()
    eye = torch.eye(240, dtype=dtype, device=device)
    data = weight.view(fp8).to(device)
    y = ops.fp8_linear(eye, data, torch.ones(1, 1, device=device))
    assert torch.equal(y.cpu(), data.cpu().to(dtype).t())


@pytest.mark.every_architecture(kernels=KERNELS)
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("kind", ["outliers", "zeros", "tiny", "subnormal", "spread"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_inputs_that_hurt(granularity, kind, dtype, device, cores):
    m, n, k = 20, 140, 400
    x, w = torch.randn(m, k), torch.randn(n, k)
    if kind == "outliers":
        x[torch.rand(m, k) < 0.01] *= 100
        w[torch.rand(n, k) < 0.01] *= 100
    elif kind == "zeros":
        x[3:7], x[:, 128:300], w[:130] = 0, 0, 0
    elif kind == "tiny":  # sums of the smallest normal FP16
        x *= 2.0**-14
    elif kind == "subnormal":
        x *= 2.0**-22 if dtype == torch.float16 else 2.0**-100
    else:  # tiles of very different scales
        x *= 2.0 ** torch.randint(-6, 7, (m, 1))
        w *= 2.0 ** torch.randint(-20, 20, (-(-n // 64), 1)).repeat_interleave(64, 0)[:n] / 2**20
        w *= 2.0 ** torch.randint(-6, 7, (k // 100,)).repeat_interleave(100)
    check(x.to(dtype).to(device), quantize(granularity, w.to(device)), cores)


def test_error_of_normal_data_is_small(device, cores):
    """The bound is a worst case; normal data has less error, and a float32 x keeps FP32's."""
    w = quantize(BLOCKS, torch.randn(72, 1024, device=device))
    for dtype, limit in ((torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12), (None, 1e-6)):
        x = torch.randn(33, 1024, device=device).to(dtype or torch.float32)
        exact = x.double().cpu() @ w.dequantized.t()
        error = ops.fp8_linear(x, *w.quantized).double().cpu() - exact
        assert error.square().mean().sqrt() / exact.square().mean().sqrt() < limit


def test_no_bit_of_a_float32_x_is_dropped(device):
    """1 + 2**-12 is neither a BF16, an FP16 nor a TF32 number."""
    x = torch.full((3, 128), 1 + 2.0**-12, device=device)
    weight, one = torch.eye(128, device=device).to(E4M3), torch.ones(1, 1, device=device)
    assert torch.equal(ops.fp8_linear(x, weight, one), x)


@pytest.mark.every_architecture(kernels=KERNELS)
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_row_does_not_depend_on_its_neighbors(granularity, dtype, device):
    """Nor on their number, which selects the tile."""
    x, weight = operands(granularity, 140, 40, 272, device, dtype=dtype)
    whole = ops.fp8_linear(x, *weight.quantized, num_sms=2)
    for rows in (slice(0, 1), slice(37, 38), slice(100, 140)):
        assert torch.equal(ops.fp8_linear(x[rows], *weight.quantized), whole[rows])
    x[5], x[39] = torch.nan, 1e4
    again = ops.fp8_linear(x, *weight.quantized, num_sms=2)
    others = [row for row in range(140) if row not in (5, 39)]
    assert torch.equal(again[others], whole[others])


# ---- x: strides, leading dimensions, sizes of zero ----


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("k", [200, 129, 128])
def test_strides(k, dtype, device):
    """Rows in place at any stride, columns, transposes, broadcasts and odd addresses."""
    x, weight = operands(BLOCKS, 12, 40, k, device, dtype=dtype)
    expected = ops.fp8_linear(x, *weight.quantized)
    wide = torch.zeros(12, k + 24, dtype=dtype, device=device)
    for before in (0, 8, 3):  # aligned and unaligned
        wide[:, before : before + k] = x
        same = wide[:, before : before + k]
        assert torch.equal(ops.fp8_linear(same, *weight.quantized), expected)
    for same in (
        x.t().contiguous().t(),
        x.repeat_interleave(2, 1)[:, ::2],
        x.repeat_interleave(3, 0)[::3],
    ):
        assert not same.is_contiguous()
        assert torch.equal(ops.fp8_linear(same, *weight.quantized), expected)
    stacked = x.view(3, 4, k).transpose(0, 1)  # rows that do not fold
    assert torch.equal(
        ops.fp8_linear(stacked, *weight.quantized), expected.view(3, 4, 40).transpose(0, 1)
    )
    row = x[:1].expand(12, k)
    assert torch.equal(ops.fp8_linear(row, *weight.quantized), expected[:1].expand(12, 40))


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 4), (1,), (0,), (2, 0)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_leading_dimensions(granularity, leading, device):
    _, weight = operands(granularity, 1, 24, 200, device)
    x = torch.randn(*leading, 200, device=device).bfloat16()
    y = ops.fp8_linear(x, *weight.quantized)
    flat = ops.fp8_linear(x.reshape(math.prod(leading), 200), *weight.quantized)
    assert y.shape == (*leading, 24) and torch.equal(y.reshape(flat.shape), flat)
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, (x, *weight.quantized))
        assert metadata(overload("fp8_linear")(*fakes)) == metadata(y)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(0, 5, 200), (4, 0, 200), (0, 0, 0), (0, 5, 0), (4, 150, 0)])
def test_sizes_of_zero(granularity, shape, device):
    m, n, k = shape
    x, weight = torch.randn(m, k, device=device), quantize(granularity, torch.randn(n, k))
    pair = weight.data.to(device), weight.scale.to(device)
    bias = torch.randn(n, device=device)
    assert torch.equal(ops.fp8_linear(x, *pair, bias), bias.expand(m, n))
    assert torch.equal(ops.fp8_linear(x, *pair), torch.zeros(m, n, device=device))
    for x_dtype in (torch.bfloat16, torch.float16):
        assert ops.fp8_linear(x.to(x_dtype), *pair).dtype == x_dtype


def test_the_bias_is_added_before_the_one_rounding(device):
    """256 + 0.75 + 0.75: BF16 additions one after another would lose the small terms."""
    x = torch.full((3, 128), 0.0, device=device).bfloat16()
    x[:, 0], x[:, 1] = 256, 0.75
    weight = torch.ones(5, 128, device=device).to(E4M3)
    bias = torch.full((5,), 0.75, device=device)
    y = ops.fp8_linear(x, weight, torch.ones(1, 1, device=device), bias)
    assert torch.equal(y, torch.full_like(y, 258.0))


# ---- NaN and Inf ----


@pytest.mark.every_architecture(kernels=KERNELS)
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("granularity", [BLOCKS, ROWS])
def test_nan_of_x_stays_in_its_row(granularity, bad, dtype, device):
    x, weight = operands(granularity, 20, 140, 300, device, dtype=dtype)
    weight.data.view(torch.uint8)[:, [130, 290]] = 0x38  # 1
    for column in (130, 290):
        spoiled = x.clone()
        spoiled[3, column] = bad
        y = ops.fp8_linear(spoiled, *weight.quantized)
        assert (y[3].isinf() if abs(bad) == torch.inf else y[3].isnan()).all()
        assert torch.equal((~y.isfinite()).any(1).nonzero().flatten().cpu(), torch.tensor([3]))


@pytest.mark.every_architecture(kernels=KERNELS)
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(
    "special",
    [(E4M3, 0x7F), (E4M3, 0xFF), (E5M2, 0x7D), (E5M2, 0xFE), (E5M2, 0x7C), (E5M2, 0xFC)],
)
@pytest.mark.parametrize("granularity", [BLOCKS, ROWS])
def test_nan_of_the_weight_stays_in_its_feature(granularity, special, dtype, device, cores):
    fp8, code = special
    x, weight = operands(granularity, 20, 40, 300, device, dtype=dtype, fp8=fp8)
    x[:, 130:134] = 1
    codes = weight.data.view(torch.uint8)
    for column in range(130, 134):  # at each position among neighbors
        before = codes[7, column].clone()
        codes[7, column] = code
        y = ops.fp8_linear(x, *weight.quantized)
        infinite = fp8 == E5M2 and code & 0x7F == 0x7C
        split = dtype == torch.float32 and cores[dtype]  # parts of x that are 0, times Inf
        wrong = ~y.isfinite() if infinite and split else y.isinf() if infinite else y.isnan()
        assert wrong[:, 7].all()
        assert torch.equal((~y.isfinite()).any(0).nonzero().flatten().cpu(), torch.tensor([7]))
        codes[7, column] = before


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nan_of_a_scale_reaches_what_it_scales(granularity, device):
    x, weight = operands(granularity, 20, 140, 300, device)
    scale = weight.scale.clone()
    scale[-1, -1] = torch.nan
    if granularity == GROUPS:
        scale = weight.scale
        scale[-1, -1] = torch.nan
    wrong = ops.fp8_linear(x, weight.data, scale).isnan()
    first = {BLOCKS: 128, GROUPS: 139, ROWS: 139, WHOLE: 0}[granularity]
    assert wrong[:, first:].all() and not wrong[:, :first].any()


# ---- gradients ----


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients(granularity, dtype, device, cores):
    for m, n, k in ((20, 140, 300), (3, 129, 130)):
        x, weight = operands(granularity, m, n, k, device, dtype=dtype)
        x.requires_grad_()
        bias = torch.randn(n, device=device).to(dtype).requires_grad_()
        y = ops.fp8_linear(x, *weight.quantized, bias)
        assert_same(y.detach(), ops.fp8_linear(x.detach(), *weight.quantized, bias.detach()))
        dy = torch.randn(m, n, device=device).to(dtype)
        dx, db = torch.autograd.grad(y, (x, bias), dy)
        assert dx.dtype == dtype and db.dtype == dtype and dx.shape == x.shape
        terms, w, dx_core = n, weight.transposed, cores[dtype]
        if granularity in (GROUPS, ROWS):  # dy takes the scales in FP32: one more rounding
            w = replace(Operand.wide(weight.dequantized.t()), data=x.float())
            terms, dx_core = n + 1, cores[torch.float32]
        assert_within_bound(dx, Operand.wide(dy), w, tensor_core=dx_core, terms=terms)
        expected = dy.double().sum(0)
        torch.testing.assert_close(db.double(), expected, rtol=2.0**-8, atol=1e-4)


def test_only_what_needs_a_gradient_gets_one(device):
    x, weight = operands(BLOCKS, 20, 40, 300, device)
    scale = weight.scale.clone().requires_grad_()
    assert not ops.fp8_linear(x, weight.data, scale).requires_grad
    x.requires_grad_()
    y = ops.fp8_linear(x, weight.data, scale)
    dx, dscale = torch.autograd.grad(y.float().sum(), (x, scale), allow_unused=True)
    assert dx is not None and dscale is None
    with torch.no_grad():
        assert not ops.fp8_linear(x, weight.data, scale).requires_grad
    bias = torch.zeros(40, device=device, requires_grad=True)
    (db,) = torch.autograd.grad(ops.fp8_linear(x.detach(), weight.data, scale, bias).sum(), bias)
    assert torch.equal(db, torch.full_like(db, 20))
    assert_same(
        torch.autograd.grad(overload("fp8_linear")(x, weight.data, scale).float().sum(), x)[0], dx
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_second_gradient(granularity, device):
    x, weight = operands(granularity, 9, 140, 300, device, dtype=torch.float32)

    def second(linear, x):
        (first,) = torch.autograd.grad(linear(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    found = second(lambda x: ops.fp8_linear(x, *weight.quantized), x.clone().requires_grad_())
    w = weight.dequantized
    expected = second(lambda x: x @ w.t(), x.double().cpu().requires_grad_())
    torch.testing.assert_close(found.double().cpu() / expected.abs().max(),
                               expected / expected.abs().max(), rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 5, 200), (4, 0, 200), (4, 150, 0)])
def test_gradients_of_nothing_are_zero(shape, device):
    m, n, k = shape
    weight = quantize(BLOCKS, torch.randn(n, k, device=device))
    x = torch.randn(m, k, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.fp8_linear(x, *weight.quantized).sum(), x)
    assert torch.equal(dx, torch.zeros_like(x))


# ---- transforms ----


@pytest.mark.large
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compile_with_gradients(granularity, device):
    torch._dynamo.reset()
    x, weight = operands(granularity, 20, 144, 272, device)
    bias = torch.randn(144, device=device)

    def step(x, bias):
        return ops.fp8_linear(x, *weight.quantized, bias).float().sin()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = x.clone().requires_grad_(), bias.clone().requires_grad_()
        y = function(*inputs)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), inputs)))
    torch._dynamo.reset()
    for compiled, eager in zip(*reversed(results), strict=True):
        torch.testing.assert_close(compiled.float(), eager.float(), rtol=2.0**-7, atol=1e-4)


@pytest.mark.large
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_vmap(granularity, device):
    _, weight = operands(granularity, 1, 40, 200, device)
    x = torch.randn(3, 5, 200, device=device)

    def apart(results):
        return torch.stack(list(results))

    def product(x):
        return ops.fp8_linear(x, *weight.quantized)

    for dim in range(2):
        elements = x.unbind(dim)
        torch.testing.assert_close(vmap(product, in_dims=dim)(x), apart(map(product, elements)))
    vectors = apart(map(product, x[0]))
    torch.testing.assert_close(vmap(product)(x[0]), vectors)
    biases = torch.randn(3, 40, device=device)
    torch.testing.assert_close(
        vmap(lambda x, b: ops.fp8_linear(x, *weight.quantized, b))(x, biases),
        apart(map(lambda x, b: product(x) + b, x, biases)),
    )
    gradient = torch.func.grad(lambda x: product(x).square().sum())
    torch.testing.assert_close(vmap(gradient)(x), apart(map(gradient, x)))
    leaf = x[0].clone().requires_grad_()
    directions = torch.randn(4, 5, 40, device=device)
    batched = torch.autograd.grad(product(leaf), leaf, directions, is_grads_batched=True)[0]
    one_by_one = [torch.autograd.grad(product(leaf), leaf, d)[0] for d in directions]
    torch.testing.assert_close(batched, apart(one_by_one))


def test_forward_mode_is_refused(device):
    x, weight = operands(BLOCKS, 3, 40, 200, device, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="fp8_linear: x and bias must have no tangent"):
        jvp(lambda x: ops.fp8_linear(x, *weight.quantized), (x,), (x,))
    bias = torch.zeros(40, device=device)
    with pytest.raises(NotImplementedError, match="fp8_linear: x and bias must"):
        jvp(lambda b: ops.fp8_linear(x, *weight.quantized, b), (bias,), (bias,))


def test_autocast_changes_nothing():
    x, weight = operands(BLOCKS, 70, 300, 520, torch.device("cpu"), dtype=torch.float32)
    expected = ops.fp8_linear(x, *weight.quantized)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(ops.fp8_linear(x, *weight.quantized), expected)


# ---- errors ----


def test_errors(device):
    x, weight = operands(BLOCKS, 20, 140, 300, device)
    data, scale = weight.quantized

    def refuses(error, match, *arguments, **options):
        with pytest.raises(error, match=rf"^fp8_linear: {match}"):
            ops.fp8_linear(*arguments, **options)

    refuses(TypeError, r"x must be .*float8_e4m3fn.*fp8_gemm_nt", data, data, scale)
    refuses(TypeError, r"x must be .*torch\.float64", x.double(), data, scale)
    refuses(TypeError, r"weight must be .*torch\.bfloat16", x, data.bfloat16(), scale)
    refuses(TypeError, r"weight_scale must be torch\.float32 .*float16", x, data, scale.half())
    refuses(TypeError, r"bias must be .*torch\.float64", x, data, scale, torch.zeros(140).double())
    refuses(ValueError, r"x must have shape \[\.\.\., K\]", x[0, 0], data, scale)
    refuses(
        ValueError, r"weight must have shape \[N, K\] \(got \[1, 140, 300\]", x, data[None], scale
    )
    refuses(ValueError, r"x and weight must agree in K.*\[20, 299\]", x[:, :299], data, scale)
    refuses(ValueError, r"weight must have contiguous rows", x[:, :150], data[:, ::2], scale)
    refuses(
        ValueError,
        r"weight_scale must be \[2, 3\] .*\[140, 3\] .*\[140, 1\] .*\[1, 1\] .*got \[3, 2\]",
        x, data, scale.t().contiguous(),
    )  # fmt: skip
    rows = ops.quantize_1x128(torch.randn(140, 300, device=device))
    refuses(ValueError, "weight_scale .*M-major", x, rows[0], rows[1].contiguous())
    refuses(
        ValueError,
        r"bias must be contiguous of shape \[N\] = \[140\]",
        x,
        data,
        scale,
        torch.zeros(141),
    )
    refuses(ValueError, r"num_sms must be .*-1", x, data, scale, num_sms=-1)


def test_rows_need_a_pitch_of_16_bytes_on_a_gpu(device, gpu):
    x, weight = operands(BLOCKS, 20, 140, 300, device)
    data, scale = weight.quantized
    for wide, rows in ((x[:, :299], data[:, 1:]), (x, data.clone())):
        with pytest.raises(ValueError, match=r"^fp8_linear: weight must have contiguous rows"):
            ops.fp8_linear(wide, rows, scale)


def test_the_reference_agrees_with_fp8_gemm_nt():
    """On an x that FP8 holds exactly."""
    x = torch.randint(-8, 9, (20, 300)).float()
    weight = ops.quantize_128x128(torch.randn(140, 300))
    a = x.to(E4M3)
    y = reference.fp8_gemm_nt(a, torch.ones(1, 1), *weight)
    torch.testing.assert_close(reference.fp8_linear(x, *weight), y)
