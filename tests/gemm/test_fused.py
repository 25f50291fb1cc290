"""GEMMs with fused activation and quantization, compared with the float64 product, activation and
quantization rule, within the bound of docs/numerics.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

import torchext  # noqa: F401  (loads the ops)
from support.gemm_testing import E4M3, E5M2, QUANTIZERS, WIDE, operands, sum_error
from support.op_testing import GRANULARITIES, metadata

ops = torch.ops.torchext

OPS: dict[str, Callable[..., Any]] = {
    "swiglu": ops.fp8_gemm_nt_swiglu_quantize,
    "gelu": ops.fp8_gemm_nt_gelu_quantize,
    "gelu_tanh": partial(ops.fp8_gemm_nt_gelu_quantize, tanh_approximation=True),
    "relu2": ops.fp8_gemm_nt_relu2_quantize,
}
ACTIVATIONS = list(OPS)
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
SLACK = 2.0**-22  # FP32 rounding of a scale, of a quotient, and of the bound itself


class Quantized(NamedTuple):
    data: torch.Tensor
    scale: torch.Tensor

    @property
    def quantized(self):
        return self.data, self.scale


def run(activation, a, b, **options):
    return OPS[activation](*a.quantized, *b.quantized, **options)


def activate(activation, x, error):
    """The activation of a float64 product that is known to within `error`, and the bound of its
    error in FP32: the propagated error plus the error of the evaluation."""
    if activation == "swiglu":
        (gate, up), (gate_error, up_error) = x.chunk(2, 1), error.chunk(2, 1)
        silu = torch.nn.functional.silu(gate)
        passed_on = 1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error
        y = silu * up
        evaluation = (2 * gate.abs() + 2 * gate_error + 16) * 2.0**-24
        return y, passed_on + (y.abs() + passed_on) * evaluation
    if activation == "relu2":
        y = x.relu().square()
        passed_on = error * (2 * x.relu() + error) * (x > -error)
        return y, passed_on + (y + passed_on) * 2.0**-24
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    y = torch.nn.functional.gelu(x, approximate=approximate)
    return y, 1.13 * error + (x.abs() + error) * 2.0**-21


def groups_of(x):
    """x as [rows, groups, 128], padded with zeros after the last column."""
    rows, columns = x.shape
    groups = -(-columns // 128)
    return torch.nn.functional.pad(x, (0, groups * 128 - columns)).view(rows, groups, 128)


def scale_of(amax, dtype, pow2_scale):
    """The scale for `amax`, if that is not zero. A monotonic function."""
    scale = (amax / LARGEST[dtype]).clamp(min=2.0**-126)
    if pow2_scale:
        mantissa, exponent = scale.frexp()
        scale = 2.0 ** torch.where(mantissa == 0.5, exponent - 1, exponent).double()
    return scale


def check(activation, a, b, tensor_core, *, bias=None, dtype=E4M3, pow2_scale=False):
    """Asserts that the rule gives each scale and each value for some numbers within the error."""
    data, scale = run(activation, a, b, bias=bias, dtype=dtype, pow2_scale=pow2_scale)
    exact = a.dequantized @ b.dequantized.t()
    addends = [] if bias is None else [bias.double().cpu().expand_as(exact)]
    for addend in addends:
        exact = exact + addend
    error = sum_error(a, b, tensor_core=tensor_core, addends=addends)
    y, error = activate(activation, exact, error)
    expected = ops.quantize_1x128(torch.empty(y.shape, device=data.device), dtype=dtype)
    assert metadata((data, scale)) == metadata(expected)
    scale = scale.double().cpu()

    magnitudes, errors = groups_of(y.abs()), groups_of(error)
    least = ((magnitudes - errors).amax(2) * (1 - SLACK)).clamp(min=0)
    most = (magnitudes + errors).amax(2) * (1 + SLACK)
    fits = (scale >= scale_of(least, dtype, pow2_scale) * (1 - SLACK)) & (
        scale <= scale_of(most, dtype, pow2_scale) * (1 + SLACK)
    )
    may_be_zero = (magnitudes - errors).amax(2) <= 0
    must_be_zero = (magnitudes + errors).amax(2) == 0
    assert torch.where(must_be_zero, scale == 1, fits | (may_be_zero & (scale == 1))).all()

    scales = scale.repeat_interleave(128, 1)[:, : y.shape[1]]

    def quantized(x):
        return (x / scales).clamp(-LARGEST[dtype], LARGEST[dtype]).float().to(dtype).double()

    slack = y.abs() * SLACK
    values = data.double().cpu()
    assert (values >= quantized(y - error - slack)).all()
    assert (values <= quantized(y + error + slack)).all()
    if not pow2_scale:  # the largest element of a group becomes the largest FP8 value
        largest = groups_of(values.abs()).amax(2)
        exempt = (scale == 1) | (scale == 2.0**-126)  # zeros, or the smallest scale
        assert (exempt | (largest == LARGEST[dtype])).all()
    return data, scale


SHAPES = [(1, 2, 1), (3, 6, 7), (16, 16, 130), (2, 600, 33), (130, 258, 200), (40, 256, 640)]


@pytest.mark.every_architecture
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shapes(activation, granularity, shape, device, tensor_core):
    check(activation, *operands(granularity, *shape, device), tensor_core)


@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dtypes(activation, dtype, dtypes, device, tensor_core):
    a, b = operands("1d2d", 20, 140, 200, device, dtypes=dtypes)
    for pow2_scale in (False, True):
        check(activation, a, b, tensor_core, dtype=dtype, pow2_scale=pow2_scale)


@pytest.mark.parametrize("bias_dtype", WIDE)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias(activation, granularity, bias_dtype, device, tensor_core):
    a, b = operands(granularity, 20, 140, 200, device)
    bias = (torch.randn(140) * 3).to(bias_dtype).to(device)
    check(activation, a, b, tensor_core, bias=bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_arguments_far_from_zero(activation, device, tensor_core):
    """Arguments at which exponentials overflow and underflow, for either sign of either half."""
    a, b = operands("rowwise", 20, 24, 16, device, scaled=False)
    for size in (3.0, 10.0, 40.0, 80.0):
        bias = (size * torch.tensor([1.0, -1.0, 1.0, -1.0, 0.5, -0.5])).repeat(4).to(device)
        check(activation, a, b, tensor_core, bias=bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saturated_activations_are_zero_or_linear(activation, device):
    zeros = torch.zeros(4, 128, device=device)
    a = Quantized(*ops.quantize_1x128(zeros))
    b = Quantized(*ops.quantize_128x128(torch.zeros(256, 128, device=device)))
    bias = torch.tensor([-1000.0] * 3 + [200.0] * 125).repeat(2).to(device)
    if activation == "swiglu":
        bias[128:] = 3.0
    data, scale = run(activation, a, b, bias=bias)
    y = data[:, :128].float() * scale[:, :1]
    expected = {"swiglu": 600.0, "relu2": 40000.0}.get(activation, 200.0)
    assert (y[:, :3] == 0).all()
    torch.testing.assert_close(y[:, 3:], torch.full_like(y[:, 3:], expected))


@pytest.mark.parametrize("num_sms", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_num_sms_changes_no_bit(activation, num_sms, device):
    a, b = operands("1d2d", 150, 300, 200, device)
    for limited, result in zip(
        run(activation, a, b, num_sms=num_sms), run(activation, a, b), strict=True
    ):
        assert torch.equal(limited.float(), result.float())


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 4), (0,), (2, 0)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_leading_dimensions(activation, leading, device):
    _, b = operands("1d2d", 8, 24, 200, device)
    x = torch.randn(*leading, 200, device=device)

    a, flat = (Quantized(*ops.quantize_1x128(y)) for y in (x, x.reshape(-1, 200)))
    (data, scale), (flat_data, flat_scale) = run(activation, a, b), run(activation, flat, b)
    assert torch.equal(data.float().reshape(flat_data.shape), flat_data.float())
    assert torch.equal(scale.reshape(flat_scale.shape), flat_scale)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 6, 200), (4, 0, 200), (0, 0, 0), (4, 6, 0)])
def test_sizes_of_zero(activation, granularity, shape, device):
    a, b = operands(granularity, *shape, device, scaled=False)
    m, n, _ = shape
    columns = n // 2 if activation == "swiglu" else n
    data, scale = run(activation, a, b)
    assert data.shape == (m, columns) and scale.shape == (m, -(-columns // 128))
    assert (data.float() == 0).all() and (scale == 1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_poisons_its_groups_and_no_other(activation, bad, device):
    """A NaN in a row of a makes all of the row's scale groups NaN. A NaN in a row of b makes the
    column's scale group NaN in every row. Activations that are 0 for negative numbers keep it."""
    x, w = torch.randn(20, 300), torch.randn(600, 300)
    x[3, 290] = bad
    w[130, 5] = bad
    quantize_a, quantize_b = QUANTIZERS["1d1d"]
    a, b = Quantized(*quantize_a(x.to(device))), Quantized(*quantize_b(w.to(device)))
    data, scale = run(activation, a, b)
    expected = torch.zeros(scale.shape, dtype=torch.bool)
    expected[3] = True
    expected[:, 1] = True
    assert torch.equal(scale.isnan().cpu(), expected)
    columns = expected.repeat_interleave(128, 1)[:, : data.shape[1]]
    assert torch.equal(data.float().isnan().cpu(), columns)


def test_the_rule_is_that_of_quantize_1x128():
    """On the CPU the result has the bits of fp8_gemm_nt, the activation and quantize_1x128."""
    a, b = operands("1d2d", 40, 300, 200, torch.device("cpu"))
    bias = torch.randn(300)
    x = ops.fp8_gemm_nt(*a.quantized, *b.quantized, bias=bias, out_dtype=torch.float32)
    for options in ({}, {"dtype": E5M2}, {"pow2_scale": True}):
        expected = ops.quantize_1x128(x.relu().square(), **options)
        data, scale = run("relu2", a, b, bias=bias, **options)
        assert torch.equal(data.float(), expected[0].float())
        assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_activations_in_fp32_are_as_close_as_documented(activation, device):
    """Checks activations over their whole range. The product is zero and a bias gives the argument,
    alone in its scale group, whose scale is then the result divided by 448."""
    x = torch.cat([torch.linspace(-80, 80, 300), torch.linspace(-3, 3, 300)])
    bias = torch.zeros(len(x), 128)
    bias[:, 5] = x
    bias = bias.flatten()
    if activation == "swiglu":
        bias = torch.cat([bias, torch.ones(len(bias))])
    one = torch.ones(1, 1, device=device)
    a, b = (Quantized(torch.zeros(n, 16, device=device).to(E4M3), one) for n in (1, len(bias)))
    _, scale = run(activation, a, b, bias=bias.to(device))
    no_error = torch.zeros(1, len(bias), dtype=torch.float64)
    exact, error = (y[0, 5::128] for y in activate(activation, bias.double()[None], no_error))
    amax = scale[0].double().cpu() * 448
    amax = torch.where(amax == 448, 0, amax)  # the scale of a group of zeros is 1
    least = 448 * 2.0**-126  # the amax of the smallest scale
    assert ((amax - exact.abs()).abs() <= error + exact.abs() * 2.0**-23 + least).all()
