"""Gradients of norms: bit for bit the formulas of this file in FP32, and within stated bounds of
float64's autograd; hostile values, strides, errors, and independence of the machine's settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import torchext
from support.norm_testing import UNIT, down_columns, in_pairs, random
from support.op_testing import assert_same
from torchext import ops
from torchext._catalog.entry import E5M2

KINDS = ["rms_norm", "layer_norm"]
BACKWARD: dict[str, Callable[..., Any]] = {
    "rms_norm": ops.rms_norm_backward,
    "layer_norm": ops.layer_norm_backward,
}
QUANTIZED: dict[str, Callable[..., Any]] = {
    "rms_norm": ops.rms_norm_backward_quantize_1x128_dual,
    "layer_norm": ops.layer_norm_backward_quantize_1x128_dual,
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def backward(kind, grad, x, weight, statistics, *, quantized=False, **options):
    op = (QUANTIZED if quantized else BACKWARD)[kind]
    return op(grad, x, weight, *statistics, **options)


def statistics_of(kind, x, eps=1e-6):
    """(mean and) rstd as the forward op computes them."""
    ones = torch.ones(x.shape[-1], device=x.device)
    if kind == "rms_norm":
        return ops.rms_norm_quantize_1x128(x, ones, eps)[2:3]
    return ops.layer_norm_quantize_1x128(x, ones, None, eps)[2:4]


def expected(kind, grad, x, weight, statistics, *, residual_grad=None, unit_offset=False):
    """dx, dweight (and dbias) in FP32, rounded once."""

    def matrix(tensor):
        return tensor.reshape(-1, tensor.shape[-1]).float().cpu().numpy()

    columns = x.shape[-1]
    g, h, factors = matrix(grad), matrix(x), weight.float().cpu().numpy()
    *mean, rstd = (values.reshape(-1, 1).cpu().numpy() for values in statistics)
    count = np.float32(columns)
    with np.errstate(all="ignore"):
        if unit_offset:
            factors = np.float32(1) + factors
        h = ((h - mean[0]) if mean else h) * rstd
        weighted = g * factors
        second = in_pairs(weighted * h) / count
        if mean:
            first = in_pairs(weighted) / count
            dx = rstd * ((weighted - first[:, None]) - h * second[:, None])
        else:
            dx = rstd * (weighted - h * second[:, None])
        if residual_grad is not None:
            dx = dx + matrix(residual_grad)
        sums = [down_columns(g * h), down_columns(g)][: len(statistics)]
    dx = torch.from_numpy(np.ascontiguousarray(dx)).to(x.dtype).reshape(x.shape)
    return [tensor.to(x.device) for tensor in (dx, *map(torch.from_numpy, sums))]


def check(kind, grad, x, weight, *, residual_grad=None, unit_offset=False, **options):
    statistics = statistics_of(kind, x)
    given = {"residual_grad": residual_grad, "unit_offset": unit_offset}
    want = expected(kind, grad, x, weight, statistics, **given)
    assert_same(backward(kind, grad, x, weight, statistics, **given), tuple(want))
    got = backward(kind, grad, x, weight, statistics, quantized=True, **given, **options)
    assert_same(got, (*want, *ops.quantize_1x128_dual(want[0], **options)))


# ---- bits ----


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_the_formulas(kind, dtype, residual, unit_offset, device):
    grad, x, more = (random(270, 520, dtype=dtype, device=device) for _ in range(3))
    weight = torch.randn(520, device=device)
    given = {"residual_grad": more if residual else None, "unit_offset": unit_offset}
    check(kind, grad, x, weight, **given)
    check(kind, grad, x, weight.to(dtype), **given, dtype=E5M2, pow2_scale=True)


@pytest.mark.large
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 128, 129, 512, 513, 1024, 2100])
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 129])
def test_any_size(kind, rows, columns, device):
    if rows * columns > 100_000:
        rows = 9
    grad, x, more = (random(rows, columns, dtype=torch.bfloat16, device=device) for _ in range(3))
    check(kind, grad, x, torch.randn(columns, device=device), residual_grad=more)


@pytest.mark.large
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [8200, 16400])
def test_rows_longer_than_a_cta_holds(kind, columns, dtype, device):
    grad, x, more = (random(2, columns, dtype=dtype, device=device) for _ in range(3))
    check(kind, grad, x, torch.randn(columns, device=device), residual_grad=more)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bits(kind, dtype, device):
    """Every exponent, subnormals included, with and without NaN and Inf."""
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    grad, x = torch.randint(-(2**31), 2**31, (2, 20, 260)).to(integers).view(dtype).to(device)
    weight = torch.randn(260, device=device)
    finite = [t.where(t.isfinite(), torch.zeros((), dtype=dtype, device=device)) for t in (grad, x)]
    check(kind, *finite, weight)
    check(kind, grad, x, weight)


def test_nan_stays_in_its_row_and_reaches_the_sums(kind, device):
    grad, x = torch.randn(2, 5, 300, device=device)
    grad[1, 7] = math.nan
    dx, dweight, *rest = backward(
        kind, grad, x, torch.ones(300, device=device), statistics_of(kind, x)
    )
    assert dx.isnan().all(1).tolist() == [False, True, False, False, False]
    assert dx.isnan().any(1).tolist() == [False, True, False, False, False]
    for sums in (dweight, *rest):
        assert sums.isnan().nonzero().flatten().tolist() == [7]


VIEWS = {
    "every other column": lambda x: x[:, ::2],
    "transposed": lambda x: x[:300, :140].t(),
    "rows at odd elements": lambda x: x[:, 1:301],
    "one row for all": lambda x: x[:1].expand(140, 600),
    "a stack": lambda x: x[:24].unflatten(0, (4, 6)),
}


@pytest.mark.large
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(kind, view, dtype, device):
    grad, x, more = (view(random(400, 600, dtype=dtype, device=device)) for _ in range(3))
    weight = torch.randn(2 * x.shape[-1], device=device)[::2]
    check(kind, grad, x, weight, residual_grad=more)
    check(kind, grad.contiguous(), x, weight, residual_grad=more.contiguous())


def test_statistics_of_any_stride(kind, device):
    grad, x = torch.randn(2, 20, 300, device=device)
    weight, statistics = torch.randn(300, device=device), statistics_of(kind, x)
    strided = [values.repeat_interleave(3)[::3] for values in statistics]
    assert_same(
        backward(kind, grad, x, weight, strided), backward(kind, grad, x, weight, statistics)
    )


def test_empty(kind, device):
    for shape in ((0, 40), (7, 0), (0, 0), (2, 0, 40), (0,)):
        x, weight = torch.zeros(shape, device=device), torch.ones(shape[-1], device=device)
        dx, *sums = backward(kind, x, x, weight, statistics_of(kind, x), residual_grad=x)
        assert dx.shape == x.shape
        assert all(values.tolist() == [0.0] * shape[-1] for values in sums)


@pytest.mark.slow
def test_waves_of_tiles(kind):
    """A simulated GPU with two SMs takes rows in chunks of eight tiles."""
    available, reason = torchext.is_available("sim")
    if not available:
        pytest.skip(reason)
    grad, x, more = (random(400, 530, dtype=torch.bfloat16, device="cpu") for _ in range(3))
    weight, statistics = torch.randn(530), statistics_of(kind, x)
    given = {"residual_grad": more, "quantized": True}
    want = backward(kind, grad, x, weight, statistics, **given)
    with torchext.sim.simulate(num_sms=2, completion="random") as simulation:
        assert_same(backward(kind, grad, x, weight, statistics, **given), want)
    sums = len(statistics)
    assert len(simulation.reports) == 3 * 4 + sums  # three kernels for each 128 rows


# ---- against float64 ----


@pytest.mark.large
@pytest.mark.parametrize("columns", [100, 2048])
def test_gradients_against_autograd_in_float64(kind, columns, device):
    """dx, dweight and dbias are the norm's derivatives, within the bounds of docs/numerics.md."""
    grad, x, more = (random(300, columns, dtype=torch.float32, device=device) for _ in range(3))
    weight, bias = torch.randn(2, columns, device=device)
    statistics = statistics_of(kind, x)
    dx, *sums = backward(kind, grad, x, weight, statistics, residual_grad=more, unit_offset=True)

    leaves = [t.double().requires_grad_() for t in (x, weight, bias)[: 1 + len(statistics)]]
    h, factors, *shift = leaves
    if kind == "rms_norm":
        y = torch.nn.functional.rms_norm(h, (columns,), 1 + factors, 1e-6)
    else:
        y = torch.nn.functional.layer_norm(h, (columns,), 1 + factors, shift[0], 1e-6)
    want = torch.autograd.grad(y, leaves, grad.double())
    exact = want[0] + more.double()

    # Every term of dx has an error of a few roundings and of its sum's.
    steps = math.ceil(columns / 512) + 24
    mean = x.double().mean(1, keepdim=True) if kind == "layer_norm" else 0
    rstd = ((x.double() - mean).square().mean(1, keepdim=True) + 1e-6).rsqrt()
    x_hat = x.double().abs() * rstd
    weighted = (grad * (1 + weight)).double().abs()
    size = weighted + weighted.mean(1, keepdim=True)
    size = rstd * (size + x_hat * (weighted * x_hat).mean(1, keepdim=True))
    bound = steps * UNIT * (size * x_hat.amax(1, keepdim=True).clamp(min=1) + more.double().abs())
    assert ((dx.double() - exact).abs() <= bound).all()
    terms = grad.double().abs() * x_hat.clamp(min=1)
    for got, right in zip(sums, want[1:], strict=True):
        bound = 4 * (steps + 16) * UNIT * terms.sum(0)
        assert ((got.double() - right).abs() <= bound).all()


# ---- settings ----


def test_flushing_of_subnormals_changes_nothing(kind):
    grad, x = torch.randn(2, 20, 300) * 2.0**-70
    weight, statistics = torch.randn(300) * 2.0**-70, statistics_of(kind, x, 0.0)
    want = backward(kind, grad, x, weight, statistics, quantized=True)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        got = backward(kind, grad, x, weight, statistics, quantized=True)
    finally:
        torch.set_flush_denormal(False)
    assert_same(got, want)


def test_any_number_of_threads_gives_the_same_bits(kind):
    grad, x, more = (random(700, 1000, dtype=torch.bfloat16, device="cpu") for _ in range(3))
    weight, statistics, threads = torch.randn(1000), statistics_of(kind, x), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(
                backward(kind, grad, x, weight, statistics, residual_grad=more, quantized=True)
            )
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same(result, results[0])


# ---- errors ----


class TestErrors:
    @pytest.fixture(params=["", "_quantize_1x128_dual"])
    def call(self, kind, request, device):
        name = f"{kind}_backward{request.param}"

        def call(error, message, **changes):
            x, weight = torch.zeros(4, 16, device=device), torch.zeros(16, device=device)
            given = {"grad": x, "x": x, "weight": weight, "rstd": x[:, 0].contiguous()}
            if kind == "layer_norm":
                given["mean"] = given["rstd"]
            with pytest.raises(error, match=f"^{name}: {message}"):
                getattr(ops, name)(**{**given, **changes})

        return call

    def test_matrices(self, call, device):
        x = torch.zeros(4, 16, device=device)
        call(TypeError, r"x must be .*float32 \(got torch.float64\)", x=x.double())
        for name in ("grad", "residual_grad"):
            call(TypeError, f"{name} must have the dtype of x, .*float32", **{name: x.half()})
            call(ValueError, rf"{name} must have the shape of x, \[4, 16\]", **{name: x[:1]})
        stack, rstd = torch.zeros(3, 2, 16, device=device), torch.zeros(3, 2, device=device)
        folded = torch.zeros(2, 3, 16, device=device).transpose(0, 1)
        given = {"x": stack, "grad": folded, "rstd": rstd}
        call(ValueError, r".*grad must fold.*grad.contiguous\(\)", **given)

    def test_weight(self, call, device):
        weight = torch.zeros(16, device=device)
        call(TypeError, r"weight must be .*got torch.int32", weight=weight.int())
        call(ValueError, r"weight must have shape \[K\] = \[16\]", weight=weight[:15])

    def test_rstd(self, kind, call, device):
        rstd = torch.zeros(4, device=device)
        call(TypeError, r"rstd must be torch.float32 \(got torch.float64\)", rstd=rstd.double())
        call(ValueError, r"rstd must have the shape of x without.*\(got \[3\]", rstd=rstd[:3])
        x = torch.zeros(3, 2, 16, device=device)
        values = torch.zeros(2, 3, device=device)
        if kind == "rms_norm":
            call(ValueError, r"rstd must have dimensions that fold", x=x, grad=x, rstd=values.t())

    def test_mean(self, kind, call, device):
        if kind == "rms_norm":
            return
        call(TypeError, "mean must be torch.float32", mean=torch.zeros(4, device=device).half())
