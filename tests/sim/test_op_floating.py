"""Floating-point opcodes: rounding modes, NaNs, ftz, sat, halves, approximate functions."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from support.opcodes import lanes

RNG = np.random.default_rng(0)
SPECIAL = np.array(
    [0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.17549435e-38, 3.4028235e38, 0.5],
    np.float32,
)


def floats(seed, count=96):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(count) * 2.0 ** rng.integers(-20, 20, count)).astype(np.float32)
    values[: len(SPECIAL)] = rng.permutation(SPECIAL)
    return values


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


def canonical(x):
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), bits(x))


A, B, C = floats(1), floats(2), floats(3)


@pytest.mark.parametrize(
    "op,f", [("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div", np.divide)]
)
def test_round_to_nearest(op, f):
    with np.errstate(all="ignore"):
        want = canonical(f(A, B))
        np.testing.assert_array_equal(lanes(f"{op}.rn.f32 %z, %a, %b;", np.uint32, A, B), want)
        a64, b64 = A.astype(np.float64) / 3, B.astype(np.float64) / 7
        got = lanes(f"{op}.rn.f64 %z, %a, %b;", np.float64, a64, b64)
        np.testing.assert_array_equal(got, f(a64, b64))


def round_exactly(value: Fraction, mode: str) -> np.float32:
    """Rounds a rational to f32 by a PTX rounding mode; the result must be finite and normal."""
    near = np.float32(float(value))
    below = near if Fraction(float(near)) <= value else np.nextafter(near, np.float32(-np.inf))
    above = near if Fraction(float(near)) >= value else np.nextafter(near, np.float32(np.inf))
    if mode == "rm":
        return below
    if mode == "rp":
        return above
    if mode == "rz":
        return below if value >= 0 else above
    low, high = value - Fraction(float(below)), Fraction(float(above)) - value
    if low == high:
        return below if bits(np.array([below], np.float32))[0] % 2 == 0 else above
    return below if low < high else above


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_rounding_modes_against_rationals(mode):
    rng = np.random.default_rng(5)
    a, b, c = (
        (rng.standard_normal(64) * 2.0 ** rng.integers(-9, 9, 64)).astype(np.float32)
        for _ in range(3)
    )
    exact = [tuple(Fraction(float(v)) for v in row) for row in zip(a, b, c, strict=True)]
    for code, f in (
        (f"add.{mode}.f32 %z, %a, %b;", lambda x, y, z: x + y),
        (f"sub.{mode}.f32 %z, %a, %b;", lambda x, y, z: x - y),
        (f"mul.{mode}.f32 %z, %a, %b;", lambda x, y, z: x * y),
        (f"fma.{mode}.f32 %z, %a, %b, %c;", lambda x, y, z: x * y + z),
        (f"div.{mode}.f32 %z, %a, %b;", lambda x, y, z: x / y),
        (f"rcp.{mode}.f32 %z, %a;", lambda x, y, z: 1 / x),
    ):
        inputs = (a, b, c)[: code.count("%") - 1]
        want = np.array([round_exactly(f(*row), mode) for row in exact], np.float32)
        np.testing.assert_array_equal(lanes(code, np.float32, *inputs), want, err_msg=code)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_sqrt_rounding(mode):
    a = np.abs(np.random.default_rng(6).standard_normal(64)).astype(np.float32)
    got = lanes(f"sqrt.{mode}.f32 %z, %a;", np.float32, a)
    for x, r in zip(a, got, strict=True):
        square, value = Fraction(float(r)) ** 2, Fraction(float(x))
        if mode in ("rz", "rm"):
            assert square <= value < Fraction(float(np.nextafter(r, np.float32(np.inf)))) ** 2
        elif mode == "rp":
            assert Fraction(float(np.nextafter(r, np.float32(0)))) ** 2 < value <= square
        else:
            assert r == np.sqrt(x)


def test_fused_and_mad():
    with np.errstate(all="ignore"):
        one = np.float32(1) + np.float32(2**-12)
        a = np.full(32, one)
        c = np.full(32, -(one * one), np.float32)
        want = np.float32(float(one) * float(one) + float(c[0]))
        assert want != 0
        np.testing.assert_array_equal(
            lanes("fma.rn.f32 %z, %a, %a, %b;", np.float32, a, c), np.full(32, want)
        )
        np.testing.assert_array_equal(
            lanes("mad.rn.f32 %z, %a, %a, %b;", np.float32, a, c), np.full(32, want)
        )
        got = lanes(
            "fma.rn.f64 %z, %a, %a, %b;", np.float64, a.astype(np.float64), c.astype(np.float64)
        )
        np.testing.assert_array_equal(got, np.float64(one) * np.float64(one) + np.float64(c))


def test_ftz_and_sat():
    tiny = np.array([1e-40, -1e-40, 1e-38, 2e-38], np.float32).repeat(8)
    got = lanes("add.ftz.f32 %z, %a, %b;", np.uint32, tiny, np.zeros(32, np.float32))
    want = np.where(np.abs(tiny) < 1.17549435e-38, 0, bits(tiny))
    want = np.where(np.abs(tiny) < 1.17549435e-38, bits(tiny * 0 + 0), want)
    np.testing.assert_array_equal(got & 0x7FFFFFFF, want & 0x7FFFFFFF)
    got = lanes("mul.sat.f32 %z, %a, %b;", np.float32, A, np.ones_like(A))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got, np.where(np.isnan(A), 0, np.clip(A, 0, 1)))
    zeros = np.array([0.0, -0.0] * 16, np.float32)  # -0 gives +0: an H200, 2026-11-26
    for code in ("mul.sat.f32 %z, %a, %b;", "cvt.sat.f32.f32 %z, %a;"):
        assert not lanes(code, np.uint32, zeros, np.ones_like(zeros)).any()


def test_min_max():
    nan = np.isnan(A) | np.isnan(B)
    both = np.isnan(A) & np.isnan(B)
    for op, f in (("min", np.fmin), ("max", np.fmax)):
        got = lanes(f"{op}.f32 %z, %a, %b;", np.float32, A, B)
        np.testing.assert_array_equal(got, f(A, B))
        assert (bits(got)[both] == 0x7FFFFFFF).all()
        got = lanes(f"{op}.NaN.f32 %z, %a, %b;", np.float32, A, B)
        np.testing.assert_array_equal(np.isnan(got), nan)
        got = lanes(f"{op}.f64 %z, %a, %b;", np.float64, A.astype(np.float64), B.astype(np.float64))
        np.testing.assert_array_equal(got, f(A, B).astype(np.float64))
    zeros = np.array([0.0, -0.0] * 16, np.float32)
    got = lanes("min.f32 %z, %a, %b;", np.uint32, zeros, -zeros)
    assert (got == 0x80000000).all()
    got = lanes(
        "max.xorsign.abs.f32 %z, %a, %b;",
        np.float32,
        np.array([-3, 2, -1, -5] * 8, np.float32),
        np.array([2, 3, -4, 1] * 8, np.float32),
    )
    np.testing.assert_array_equal(got, np.array([-3, 3, 4, -5] * 8, np.float32))
    got = lanes("max.f32 %z, %a, %b, %c;", np.float32, A, B, C, target="sm_100")
    np.testing.assert_array_equal(got, np.fmax(np.fmax(A, B), C))


def test_neg_abs_copysign():
    np.testing.assert_array_equal(lanes("neg.f32 %z, %a;", np.uint32, A), bits(A) ^ 0x80000000)
    np.testing.assert_array_equal(lanes("abs.f32 %z, %a;", np.uint32, A), bits(A) & 0x7FFFFFFF)
    d = A.astype(np.float64)
    np.testing.assert_array_equal(lanes("neg.f64 %z, %a;", np.float64, d), -d)
    np.testing.assert_array_equal(lanes("abs.f64 %z, %a;", np.float64, d), np.abs(d))
    want = np.copysign(B, A)
    np.testing.assert_array_equal(lanes("copysign.f32 %z, %a, %b;", np.uint32, A, B), bits(want))


APPROXIMATE: dict[
    str, tuple[Callable[..., Any], float, float, float]
] = {  # the largest relative error that the PTX ISA documents, or a little more
    "ex2.approx.f32": (np.exp2, 2.0**-21, -10, 10),
    "lg2.approx.f32": (np.log2, 2.0**-20, 2, 1000),
    "rcp.approx.f32": (lambda x: 1 / x, 2.0**-22, 0.01, 100),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), 2.0**-21, 0.01, 100),
    "sqrt.approx.f32": (np.sqrt, 2.0**-22, 0.01, 100),
    "sin.approx.f32": (np.sin, 2.0**-18, 0.1, 3),
    "cos.approx.f32": (np.cos, 2.0**-18, -1.5, 1.5),
    "tanh.approx.f32": (np.tanh, 2.0**-10, -4, 4),
}


@pytest.mark.parametrize("op", APPROXIMATE)
def test_approximate(op):
    f, bound, low, high = APPROXIMATE[op]
    x = np.random.default_rng(1).uniform(low, high, 64).astype(np.float32)
    got = lanes(f"{op} %z, %a;", np.float32, x)
    np.testing.assert_allclose(got, f(x.astype(np.float64)), rtol=bound)


def test_special_values_of_roots():
    x = np.array([0, -0.0, np.inf, -np.inf, -1, np.nan, 4, 1e-40] * 4, np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(
            lanes("rsqrt.approx.f32 %z, %a;", np.float32, x)[:7],
            np.array([np.inf, -np.inf, 0, np.nan, np.nan, np.nan, 0.5], np.float32),
        )
        assert lanes("rcp.approx.ftz.f32 %z, %a;", np.float32, x)[7] == np.inf
        d = x.astype(np.float64)
        np.testing.assert_array_equal(lanes("rcp.rn.f64 %z, %a;", np.float64, d), 1 / d)
        np.testing.assert_array_equal(lanes("sqrt.rn.f64 %z, %a;", np.float64, d), np.sqrt(d))
        np.testing.assert_array_equal(
            lanes("rsqrt.approx.f64 %z, %a;", np.float64, d), 1 / np.sqrt(d)
        )


HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("type_", HALVES)
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma", "min", "max", "neg", "abs"])
def test_halves(type_, op):
    torch.manual_seed(1)
    dtype = HALVES[type_]
    a, b, c = ((torch.randn(128) * 2.0 ** torch.randint(-6, 6, (128,))).to(dtype) for _ in range(3))
    x, y, z = a.double(), b.double(), c.double()
    exact = {
        "add": x + y, "sub": x - y, "mul": x * y, "fma": x * y + z, "min": x.minimum(y),
        "max": x.maximum(y), "neg": -x, "abs": x.abs(),
    }[op]  # fmt: skip
    want = exact.to(dtype).view(torch.int16).numpy().view(np.uint16)
    operands = {"fma": 3, "neg": 1, "abs": 1}.get(op, 2)
    rounding = ".rn" if op in ("add", "sub", "mul", "fma") else ""
    inputs = [t.view(torch.int16).numpy().view(np.uint16) for t in (a, b, c)[:operands]]
    names = "".join(f", %{n}" for n in "abc"[:operands])
    got = lanes(f"{op}{rounding}.{type_} %z{names};", np.uint16, *inputs)
    np.testing.assert_array_equal(got, want)
    packed = [v.view(np.uint32) for v in inputs]
    got = lanes(f"{op}{rounding}.{type_}x2 %z{names};", np.uint32, *packed)
    np.testing.assert_array_equal(got, want.view(np.uint32))


def test_half_relu_sat_and_functions():
    x = np.array([-2, -0.5, 0.25, 3], np.float16).repeat(8)
    one = np.ones(32, np.float16)
    got = lanes("fma.rn.relu.f16 %z, %a, %b, %c;", np.float16, x, one, one * 0)
    np.testing.assert_array_equal(got, np.maximum(x, 0))
    got = lanes("mul.rn.sat.f16 %z, %a, %b;", np.float16, x, one)
    np.testing.assert_array_equal(got, np.clip(x, 0, 1))
    np.testing.assert_allclose(
        lanes("ex2.approx.f16 %z, %a;", np.float16, x), np.exp2(x), rtol=2e-3
    )
    np.testing.assert_allclose(
        lanes("tanh.approx.f16 %z, %a;", np.float16, x), np.tanh(x), rtol=2e-3
    )


def test_half_fma_rounds_once():
    # Rounded to f32 first, the sum would be a tie in f16, which rounds to even; the exact sum is
    # just above the tie.
    a, b, c = np.float16(1.001), np.float16(1.001), np.float16(2.0**-24)
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = [np.float16(float(exact)), np.nextafter(np.float16(float(exact)), np.float16(9))]
    want = min(near, key=lambda v: abs(Fraction(float(v)) - exact))
    full = lambda v: np.full(32, v)  # noqa: E731
    assert (
        lanes("fma.rn.f16 %z, %a, %b, %c;", np.float16, full(a), full(b), full(c)) == want
    ).all()


@pytest.mark.parametrize("test,f", [
    ("finite", np.isfinite), ("infinite", np.isinf), ("notanumber", np.isnan),
    ("number", lambda x: ~np.isnan(x)),
    ("subnormal", lambda x: (np.abs(x) < 1.17549435e-38) & (x != 0)),
])  # fmt: skip
def test_testp(test, f):
    got = lanes(f"testp.{test}.f32 %p, %a;\nselp.u32 %z, 1, 0, %p;", np.uint32, A)
    np.testing.assert_array_equal(got, f(A).astype(np.uint32))


def test_division_in_f32():
    a, b = np.abs(A) + 1, np.minimum(np.abs(B) + 1, np.float32(2.0**100))
    with np.errstate(all="ignore"):
        for form in ("approx", "full", "approx.ftz", "full.ftz"):
            got = lanes(f"div.{form}.f32 %z, %a, %b;", np.float32, a, b)
            np.testing.assert_allclose(got, a / b, rtol=2.0**-21, atol=1e-37, err_msg=form)
    # .approx gives 0 (for Inf / x a NaN) where the reciprocal of the divisor is subnormal.
    large = np.array([2.0**127, -(2.0**127), 2.0**127, 2.0**126] * 8, np.float32)
    x = np.array([2.0**127, 2.0**127, np.inf, 2.0**126] * 8, np.float32)
    got = lanes("div.approx.f32 %z, %a, %b;", np.float32, x, large)[:4]
    np.testing.assert_array_equal(got, np.array([0, -0.0, np.nan, 1], np.float32))
    with pytest.raises(ValueError, match=r"must include one of \.approx, \.full, \.rn"):
        lanes("div.f32 %z, %a, %a;", np.float32, A)


def test_halves_flush_subnormals():
    x = np.array([1, 0x8001, 0x03FF, 0x0400, 0x8400, 0x3C00, 0xBC00, 0] * 4, np.uint16)
    flushed = np.where(x & 0x7C00 == 0, x & 0x8000, x).astype(np.uint16)
    np.testing.assert_array_equal(lanes("neg.ftz.f16 %z, %a;", np.uint16, x), flushed ^ 0x8000)
    np.testing.assert_array_equal(lanes("abs.ftz.f16 %z, %a;", np.uint16, x), flushed & 0x7FFF)
    np.testing.assert_array_equal(
        lanes("neg.ftz.f16x2 %z, %a;", np.uint32, x.view(np.uint32)),
        (flushed ^ 0x8000).view(np.uint32),
    )
