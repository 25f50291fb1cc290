"""f64 arithmetic in four rounding modes against rationals, and the approximations of f64 that
compilers refine."""

from fractions import Fraction
from math import inf, isqrt, nan, nextafter

import numpy as np
import pytest

from support.exact import LARGEST, rounded
from support.opcodes import lanes

MODES = ["rn", "rz", "rm", "rp"]
LEAST = 5e-324


def numbers(seed: int, count: int = 96) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(count) * 2.0 ** rng.integers(-60, 60, count)
    x[:10] = [1, -1, 1 + 2**-52, LEAST, -LEAST, 2.0**-1022, LARGEST, -LARGEST, 1 / 3, 2.0**-600]
    return rng.permutation(x)


A, B, C = numbers(1), numbers(2), numbers(3)
with np.errstate(over="ignore"):
    C[::4] = -A[::4] * B[::4]  # c cancels the product up to its rounding error
C[~np.isfinite(C)] = 1.0
EXACT = {
    "add": (2, lambda a, b, c: a + b),
    "sub": (2, lambda a, b, c: a - b),
    "mul": (2, lambda a, b, c: a * b),
    "div": (2, lambda a, b, c: a / b),
    "fma": (3, lambda a, b, c: a * b + c),
    "rcp": (1, lambda a, b, c: 1 / a),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", EXACT)
def test_rounding(op, mode):
    count, f = EXACT[op]
    inputs = [A, B, C][:count]
    got = lanes(f"{op}.{mode}.f64 %z{''.join(f', %{n}' for n in 'abc'[:count])};", float, *inputs)
    rows = [[Fraction(float(v)) for v in row] for row in zip(A, B, C, strict=True)]
    zero = -0.0 if mode == "rm" else 0.0  # the sign of x - x
    want = np.array([rounded(f(*row), mode, zero) for row in rows])
    np.testing.assert_array_equal(got.view(np.uint64), want.view(np.uint64))


@pytest.mark.parametrize("mode", MODES)
def test_square_roots(mode):
    x = np.abs(A)
    got = lanes(f"sqrt.{mode}.f64 %z, %a;", float, x)
    for square, r in zip(x, got, strict=True):
        value = Fraction(float(square))
        below, root, above = (Fraction(float(v)) for v in (nextafter(r, 0), r, nextafter(r, inf)))
        if mode == "rn":
            assert (root + below) ** 2 <= 4 * value <= (root + above) ** 2
        elif mode == "rp":
            assert below**2 < value <= root**2
        else:
            assert root**2 <= value < above**2
    exact = np.array([float(isqrt(n * n)) for n in range(32)])
    np.testing.assert_array_equal(lanes(f"sqrt.{mode}.f64 %z, %a;", float, exact**2), exact)


@pytest.mark.parametrize("mode", MODES)
def test_special_values(mode):
    a = np.array([inf, -inf, inf, nan, 0.0, -0.0, 0.0, 1.0] * 4)
    b = np.array([1.0, inf, -inf, 1.0, -0.0, 0.0, 0.0, 0.0] * 4)
    zero = -0.0 if mode == "rm" else 0.0
    with np.errstate(all="ignore"):
        got = lanes(f"add.{mode}.f64 %z, %a, %b;", float, a, b)
        want = np.where((a == 0) & (np.signbit(a) != np.signbit(b)), zero, a + b)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.signbit(got[4:8]), np.signbit(want[4:8]))
        np.testing.assert_array_equal(lanes(f"div.{mode}.f64 %z, %a, %b;", float, a, b), a / b)
        np.testing.assert_array_equal(lanes(f"mul.{mode}.f64 %z, %a, %b;", float, a, b), a * b)
    assert np.isnan(lanes(f"sqrt.{mode}.f64 %z, %a;", float, np.full(32, -1.0))).all()


def test_the_mode_ends_with_its_instruction():
    third = np.full(32, 1 / 3)
    code = "add.rp.f64 %u0, %a, %b;\nadd.rn.f64 %z, %a, %b;\nadd.f64 %y, %a, %b;\nmov.b64 %x, %u0;"
    near, plain, above = lanes(code, [float] * 3, third, np.full(32, 1e-20))
    assert (near == 1 / 3).all() and (plain == 1 / 3).all() and (above > 1 / 3).all()


def test_min_max():
    a = np.array([0.0, -0.0, nan, 1.0, nan, -2.0, inf, -inf] * 4)
    b = np.array([-0.0, 0.0, 2.0, nan, nan, 3.0, 1.0, 1.0] * 4)
    low = lanes("min.f64 %z, %a, %b;", float, a, b)
    high = lanes("max.f64 %z, %a, %b;", float, a, b)
    np.testing.assert_array_equal(low, np.fmin(a, b))
    np.testing.assert_array_equal(high, np.fmax(a, b))
    assert np.signbit(low[:2]).all() and not np.signbit(high[:2]).any()


def test_gross_reciprocals():
    """rcp and rsqrt.approx.ftz read and give 20 bits of fraction; subnormals count as zero."""
    x = np.concatenate([A[np.abs(A) >= 2.0**-1022], [0.0, -0.0, inf, -inf, LEAST, -LEAST, nan]])
    with np.errstate(all="ignore"):
        for op, f in (("rcp", lambda v: 1 / v), ("rsqrt", lambda v: 1 / np.sqrt(v))):
            got = lanes(f"{op}.approx.ftz.f64 %z, %a;", float, x)
            assert (got.view(np.uint64) & 0xFFFFFFFF == 0).all()
            want = f(x[:-7])
            normal = np.isfinite(want) & (np.abs(want) >= 2.0**-1022)
            np.testing.assert_allclose(got[:-7][normal], want[normal], rtol=2.0**-19)
    np.testing.assert_array_equal(
        lanes("rcp.approx.ftz.f64 %z, %a;", float, x)[-7:], [inf, -inf, 0, -0.0, inf, -inf, nan]
    )
    np.testing.assert_array_equal(
        lanes("rsqrt.approx.ftz.f64 %z, %a;", float, x)[-7:], [inf, -inf, 0, nan, inf, -inf, nan]
    )


@pytest.mark.parametrize("code,message", [
    ("rcp.f64 %z, %a;", "must include .rn, .rz, .rm or .rp"),
    ("sqrt.approx.f64 %z, %a;", "'.approx'"),
    ("rcp.approx.f64 %z, %a;", "must include .ftz"), ("add.sat.f64 %z, %a, %a;", "'.sat'"),
    ("add.rz.ftz.f64 %z, %a, %a;", "'.ftz'"), ("min.rz.f64 %z, %a, %a;", "'.rz'"),
    ("min.NaN.f64 %z, %a, %a;", "'.NaN'"),
])  # fmt: skip
def test_what_is_refused(code, message):
    with pytest.raises(ValueError, match=message):
        lanes(code, float, A)
