"""RMSNorm and LayerNorm fused with quantization: bit for bit the quantizer's result for the normed
values of this file, which are within a stated bound of float64; hostile values, strides, and
independence of the machine's settings. tests/test_catalog.py has the ops' layouts, fakes and
torch.compile."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import torchext
from support.norm_testing import UNIT, in_pairs, random
from support.op_testing import assert_same
from torchext import ops
from torchext._catalog.entry import E4M3, E5M2

KINDS = ["rms_norm", "layer_norm"]
ROW: dict[str, Callable[..., Any]] = {
    "rms_norm": ops.rms_norm_quantize_1x128,
    "layer_norm": ops.layer_norm_quantize_1x128,
}
DUAL: dict[str, Callable[..., Any]] = {
    "rms_norm": ops.rms_norm_quantize_1x128_dual,
    "layer_norm": ops.layer_norm_quantize_1x128_dual,
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def row(kind, x, weight, eps=EPS, *, bias=None, **options):
    shift = () if kind == "rms_norm" else (bias,)
    return ROW[kind](x, weight, *shift, eps, **options)


def dual(kind, x, weight, eps=EPS, *, bias=None, **options):
    shift = () if kind == "rms_norm" else (bias,)
    return DUAL[kind](x, weight, *shift, eps, **options)


def normed(kind, h, weight, bias, *, eps, unit_offset):
    """y, and mean (LayerNorm) and rstd, of h [M, K] in FP32."""
    rows, factors = h.float().cpu().numpy(), weight.float().cpu().numpy()
    count = np.float32(rows.shape[1])
    if unit_offset:
        factors = np.float32(1) + factors
    with np.errstate(all="ignore"):
        statistics = []
        if kind == "layer_norm":
            mean = in_pairs(rows) / count
            rows = rows - mean[:, None]
            statistics.append(mean)
        rstd = np.float32(1) / np.sqrt(in_pairs(rows * rows) / count + np.float32(eps))
        y = (rows * rstd[:, None]) * factors
        if bias is not None:
            y = y + bias.float().cpu().numpy()
    return [torch.from_numpy(array).to(h.device) for array in (y, *statistics, rstd)]


def check(
    kind,
    x,
    weight,
    *,
    residual=None,
    bias=None,
    eps=EPS,
    unit_offset=False,
    return_normed=False,
    **options,
):
    """Asserts that both ops return the bits of the unfused composition."""
    h = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    y, *rows = normed(
        kind, h.reshape(-1, h.shape[-1]), weight, bias, eps=eps, unit_offset=unit_offset
    )
    new_residual = h.contiguous() if residual is not None else x.new_empty(0)
    normed_values = x.new_empty(0)
    if return_normed:
        y = y.to(x.dtype)
        normed_values = y.reshape(x.shape)
    quantized = ops.quantize_1x128(y.reshape(x.shape), **options)
    transposed = ops.quantize_1x128_t(y, **options)
    rest = (*(values.reshape(x.shape[:-1]) for values in rows), new_residual, normed_values)
    given = {"residual": residual, "unit_offset": unit_offset, "bias": bias, **options}
    given["return_normed"] = return_normed
    assert_same(row(kind, x, weight, eps, **given), (*quantized, *rest))
    assert_same(dual(kind, x, weight, eps, **given), (*quantized, *transposed, *rest))


# ---- bits ----


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_the_composition(kind, dtype, residual, unit_offset, device):
    x = random(130, 520, dtype=dtype, device=device)
    more = random(130, 520, dtype=dtype, device=device) if residual else None
    weight = torch.randn(520, device=device)
    bias = torch.randn(520, device=device) if kind == "layer_norm" else None
    given = {"residual": more, "unit_offset": unit_offset}
    check(kind, x, weight, bias=bias, **given)
    check(kind, x, weight.to(dtype), **given, dtype=E5M2, pow2_scale=True)


@pytest.mark.parametrize("columns", [272, 300])  # whole units of 16 bytes, and not
@pytest.mark.parametrize("dtype", DTYPES)
def test_normed_values_are_returned_and_quantized_as_rounded(kind, dtype, columns, device):
    x, residual = (random(130, columns, dtype=dtype, device=device) for _ in range(2))
    weight = torch.randn(columns, device=device)
    bias = torch.randn(columns, device=device) if kind == "layer_norm" else None
    check(kind, x, weight, bias=bias, return_normed=True, dtype=E5M2)
    check(kind, x, weight, bias=bias, residual=residual, unit_offset=True, return_normed=True)


@pytest.mark.large
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 127, 128, 129, 511, 512, 513, 1024, 2100, 4112])
@pytest.mark.parametrize("rows", [1, 5, 129])
def test_any_size(kind, rows, columns, device):
    if rows * columns > 100_000:
        rows = 9
    x, residual = (random(rows, columns, dtype=torch.bfloat16, device=device) for _ in range(2))
    check(kind, x, torch.randn(columns, device=device), residual=residual)


@pytest.mark.large
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [8200, 16384, 16400, 33000])
def test_rows_longer_than_a_cta_holds(kind, columns, dtype, device):
    x, residual = (random(2, columns, dtype=dtype, device=device) for _ in range(2))
    check(kind, x, torch.randn(columns, device=device), residual=residual)
    check(kind, x[:1], torch.randn(columns, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bits(kind, dtype, device):
    """Every exponent, subnormals included, with and without NaN and Inf."""
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    x = torch.randint(-(2**31), 2**31, (20, 260)).to(integers).view(dtype)
    finite = torch.where(x.isfinite(), x, torch.zeros((), dtype=dtype))
    weight = torch.randn(260, device=device)
    check(kind, finite.to(device), weight)
    check(kind, x.to(device), weight)
    check(kind, (finite / 2).to(device), weight, residual=finite.flip(0).to(device))


@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-149, 2.0**-130, 1e-20, 1e18, 3e38])
@pytest.mark.parametrize("eps", [0.0, 1e-45, 1e-5, 1e30])
def test_rows_of_extreme_values(kind, value, eps, device):
    """Squares that underflow or overflow. A row of zeros without eps is NaN: 0 * Inf."""
    x = torch.full((3, 200), value, device=device)
    x[1, ::3] *= -1
    check(kind, x, torch.linspace(-2, 2, 200, device=device), eps=eps)
    if value == 0 and eps == 0:
        assert row(kind, x, torch.ones(200, device=device), 0.0)[0].float().isnan().all()


def test_nan_and_inf_stay_in_their_row(kind, device):
    x = torch.randn(4, 300, device=device)
    x[1, 7], x[2, 299] = math.nan, math.inf
    _, scale, *_, rstd, _, _ = row(kind, x, torch.ones(300, device=device), EPS)
    centers = kind == "layer_norm"  # Inf less the mean, which is Inf, is NaN
    assert rstd.isnan().tolist() == [False, True, centers, False]
    assert centers or rstd[2] == 0
    third = [centers, centers, True]
    assert scale.isnan().tolist() == [[False] * 3, [True] * 3, third, [False] * 3]


def test_nan_in_the_weight_stays_in_its_columns(kind, device):
    weight = torch.ones(300, device=device)
    weight[130] = math.nan
    x = torch.randn(5, 300, device=device)
    check(kind, x, weight)
    _, scale, *_ = row(kind, x, weight, EPS)
    assert scale.isnan().any(0).tolist() == [False, True, False]


VIEWS = {
    "every other column": lambda x: x[:, ::2],
    "transposed": lambda x: x[:300, :140].t(),
    "rows at odd elements": lambda x: x[:, 1:301],
    "every third row": lambda x: x[::3],
    "one row for all": lambda x: x[:1].expand(140, 600),
    "backwards in a stack": lambda x: x[:24].unflatten(0, (4, 6)),
}


@pytest.mark.large
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(kind, view, dtype, device):
    x = view(random(400, 600, dtype=dtype, device=device))
    weight = torch.randn(2 * x.shape[-1], device=device)[::2]
    check(kind, x, weight)
    check(kind, x, weight, residual=view(random(400, 600, dtype=dtype, device=device)))
    check(kind, x, weight, residual=random(*x.shape, dtype=dtype, device=device))
    check(kind, x.contiguous(), weight, residual=x)


def test_empty(kind, device):
    for shape in ((0, 40), (7, 0), (0, 0), (2, 0, 40), (0,)):
        x, weight = torch.zeros(shape, device=device), torch.ones(shape[-1], device=device)
        for residual in (None, x):
            given = {"residual": residual, "return_normed": residual is not None}
            data, *_, rstd, h, y = dual(kind, x, weight, EPS, **given)
            assert data.shape == x.shape and rstd.shape == shape[:-1]
            assert h.shape == y.shape == ((0,) if residual is None else x.shape)
            assert rstd.isnan().all()  # 0 / 0, if there are rows


@pytest.mark.large
def test_chunks_of_rows(kind, device):
    """More rows than one chunk of the two-step kernels has."""
    x = random(1400, 1024, dtype=torch.float32, device=device)
    check(kind, x, torch.randn(1024, device=device))


@pytest.mark.slow
@pytest.mark.parametrize("residual", [False, True])
def test_waves_of_tiles(kind, residual):
    """A simulated GPU with two SMs takes rows in chunks of eight tiles."""
    available, reason = torchext.is_available("sim")
    if not available:
        pytest.skip(reason)
    x = random(400, 530, dtype=torch.bfloat16, device="cpu")
    more = random(400, 530, dtype=torch.bfloat16, device="cpu") if residual else None
    weight = torch.randn(530)
    expected = dual(kind, x, weight, EPS, residual=more)
    with torchext.sim.simulate(num_sms=2, completion="random") as simulation:
        assert_same(dual(kind, x, weight, EPS, residual=more), expected)
    assert len(simulation.reports) == 2 * 4  # both kernels for each 128 rows


def test_the_transpose_is_that_of_the_normed_values(kind, device):
    x, weight = torch.randn(3, 50, 200, device=device), torch.randn(200, device=device)
    data, scale, data_t, scale_t, *_ = dual(kind, x, weight, EPS)
    assert data_t.shape == (200, 150) and scale_t.shape == (200, 2)
    assert data.shape == x.shape and scale.shape == (3, 50, 2)


# ---- against float64 ----


@pytest.mark.large
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [100, 4096])
def test_error_against_float64(kind, columns, dtype, fp8, device):
    """The bounds of docs/numerics.md."""
    x, residual = (random(40, columns, dtype=dtype, device=device) for _ in range(2))
    x = x + 1  # a mean
    weight, bias = torch.randn(2, columns, device=device)
    bias = bias if kind == "layer_norm" else None
    data, scale, *_, rstd, h, _ = row(
        kind, x, weight, EPS, residual=residual, bias=bias, unit_offset=True, dtype=fp8
    )
    exact, factors = h.double(), 1 + weight.double()
    of_mean = 0 * exact[:, :1]
    if kind == "layer_norm":
        of_mean = (math.ceil(columns / 512) + 10) * UNIT * exact.abs().mean(1, keepdim=True)
        exact = exact - exact.mean(1, keepdim=True)
        of_mean = of_mean + UNIT * exact.abs().amax(1, keepdim=True)
    exact_rstd = (exact.square().mean(1, keepdim=True) + EPS).rsqrt()
    of_rstd = ((math.ceil(columns / 512) + 12) / 2 + 2) * UNIT + of_mean * exact_rstd
    assert ((rstd.double()[:, None] / exact_rstd - 1).abs() <= 1.01 * of_rstd).all()
    y = exact * exact_rstd * factors
    of_y = (of_rstd + 3 * UNIT) * y.abs() + of_mean * exact_rstd * factors.abs()
    if bias is not None:
        y = y + bias.double()
        of_y = of_y + UNIT * y.abs()
    step, least = (2.0**-4, 2.0**-10) if fp8 is E4M3 else (2.0**-3, 2.0**-17)
    spread = scale.double().repeat_interleave(128, 1)[:, :columns]
    error = (data.double() * spread - y).abs()
    assert (error <= 1.01 * (of_y + step * y.abs() + least * spread)).all()


# ---- settings ----


def test_flushing_of_subnormals_changes_nothing(kind):
    x, weight = torch.randn(20, 300) * 2.0**-70, torch.randn(300) * 2.0**-120
    expected = dual(kind, x, weight, 0.0)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        outputs = dual(kind, x, weight, 0.0)
    finally:
        torch.set_flush_denormal(False)
    assert_same(outputs, expected)


def test_any_number_of_threads_gives_the_same_bits(kind):
    x, residual = (random(700, 1000, dtype=torch.bfloat16, device="cpu") for _ in range(2))
    weight, threads = torch.randn(1000), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            both = (call(kind, x, weight, EPS, residual=residual) for call in (row, dual))
            results.append(tuple(both))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same(result, results[0])


# ---- errors ----


class TestErrors:
    @pytest.fixture(params=["", "_dual"])
    def call(self, kind, request, device):
        name = f"{kind}_quantize_1x128{request.param}"

        def call(error, message, **changes):
            x, weight = torch.zeros(4, 16, device=device), torch.zeros(16, device=device)
            given = {"x": x, "weight": weight, "eps": EPS, **changes}
            if kind == "layer_norm":
                given.setdefault("bias", None)
            with pytest.raises(error, match=f"^{name}: {message}"):
                getattr(ops, name)(**given)

        return call

    def test_x(self, call, device):
        x = torch.zeros(2, 3, 16, device=device)
        call(TypeError, r"x must be .*float32 \(got torch.float64\)", x=x.double())
        call(ValueError, r"x must have shape \[..., K\]", x=x[0, 0, 0])
        call(ValueError, r".*x must fold .*\[3, 2, 16\].*x.contiguous\(\)", x=x.transpose(0, 1))

    def test_weight(self, call, device):
        weight = torch.zeros(16, device=device)
        call(TypeError, r"weight must be .*got torch.int32", weight=weight.int())
        for wrong in (weight[:15], weight[None], weight[0]):
            shape = str(list(wrong.shape)).replace("[", r"\[")
            call(ValueError, rf"weight must have shape \[K\] = \[16\] \(got {shape}", weight=wrong)

    def test_residual(self, call, device):
        residual = torch.zeros(4, 16, device=device)
        call(TypeError, "residual must have the dtype of x, .*float32", residual=residual.half())
        call(ValueError, r"residual must have the shape of x, \[4, 16\]", residual=residual[:1])
        x = torch.zeros(3, 2, 16, device=device)
        folded = torch.zeros(2, 3, 16, device=device).transpose(0, 1)
        call(ValueError, r".*residual must fold.*residual.contiguous\(\)", x=x, residual=folded)

    def test_bias(self, kind, call, device):
        if kind == "rms_norm":
            return
        bias = torch.zeros(16, device=device)
        call(TypeError, r"bias must be .*got torch.float64", bias=bias.double())
        call(ValueError, r"bias must have shape \[K\] = \[16\] \(got \[15\]", bias=bias[:15])

    def test_options(self, call):
        for eps in (-1e-6, math.nan, math.inf, 1e39):
            call(ValueError, r"eps must be a finite FP32 number >= 0 \(got", eps=eps)
        call(TypeError, "dtype must be .*float8_e4m3fn", dtype=torch.float16)
