"""PTX number formats against torch, and against a search in the table of each format's codes."""

import numpy as np
import pytest
import torch

from torchext import _sim

NAN_CODE = {"f16": 0x7FFF, "bf16": 0x7FFF, "e4m3": 0x7F, "e5m2": 0x7F}
TORCH = {
    "f16": (torch.float16, torch.uint16),
    "bf16": (torch.bfloat16, torch.uint16),
    "e4m3": (torch.float8_e4m3fn, torch.uint8),
    "e5m2": (torch.float8_e5m2, torch.uint8),
}
FORMATS = list(TORCH)


def all_codes(name: str) -> np.ndarray:
    return np.arange(1 << (8 * TORCH[name][1].itemsize), dtype=np.uint32)


def table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(values, codes) of the non-negative finite values of a format, in ascending order."""
    codes = all_codes(name)
    codes = codes[: len(codes) // 2]
    values = _sim.decode(name, codes)
    finite = np.isfinite(values)
    return values[finite].astype(np.float64), codes[finite]


def samples(name: str) -> np.ndarray:
    """Every value of the format, every midpoint, and the float32 neighbors of both."""
    values, _ = table(name)
    top = values[-1]
    points = np.concatenate(
        [values, (values[1:] + values[:-1]) / 2, [values[1] / 2, top * 1.01, top * 1.5, top * 3]]
    )
    with np.errstate(over="ignore"):
        points = points.astype(np.float32)
        points = np.concatenate(
            [points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))]
        )
    points = points[np.isfinite(points)]
    return np.unique(np.concatenate([points, -points])).astype(np.float64)


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_agrees_with_torch(name):
    dtype, codes_dtype = TORCH[name]
    codes = all_codes(name)
    expected = torch.from_numpy(codes.astype(np.int64)).to(codes_dtype).view(dtype).float().numpy()
    got = _sim.decode(name, codes)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(got[number].view(np.uint32), expected[number].view(np.uint32))


@pytest.mark.parametrize("name", FORMATS)
def test_nearest_even_agrees_with_torch(name):
    dtype, codes_dtype = TORCH[name]
    x = samples(name)
    saturate = name == "e4m3"  # the only format that torch saturates
    expected = torch.from_numpy(x).float().to(dtype).view(codes_dtype).numpy()
    np.testing.assert_array_equal(_sim.encode(name, x, satfinite=saturate), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_encoding_inverts_decoding(name):
    codes = all_codes(name)
    values = _sim.decode(name, codes)
    with np.errstate(invalid="ignore"):  # a signaling NaN of bf16
        back = _sim.encode(name, values.astype(np.float64))
    expected = np.where(np.isnan(values), NAN_CODE[name], codes)
    np.testing.assert_array_equal(back, expected)


@pytest.mark.parametrize("rounding", ["rn", "rz", "rm", "rp", "rna"])
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_modes_choose_the_right_neighbor(name, rounding):
    values, codes = table(name)
    x = samples(name)
    x = x[np.abs(x) <= values[-1]]
    magnitude = np.abs(x)
    below = np.searchsorted(values, magnitude, side="right") - 1
    above = np.searchsorted(values, magnitude, side="left")
    to_below = magnitude - values[below]
    to_above = values[above] - magnitude
    away = {
        "rz": np.zeros(len(x), bool),
        "rm": x < 0,
        "rp": x > 0,
        "rna": to_above <= to_below,
        "rn": (to_above < to_below) | ((to_above == to_below) & (codes[below] % 2 == 1)),
    }[rounding]
    sign = np.signbit(x).astype(np.uint32) << (8 * TORCH[name][1].itemsize - 1)
    expected = np.where(away, codes[above], codes[below]) | sign
    np.testing.assert_array_equal(_sim.encode(name, x, rounding), expected)


def test_f64_narrows_to_f32_as_numpy_does():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20000) * 2.0 ** rng.integers(-160, 140, 20000)
    with np.errstate(over="ignore", under="ignore"):
        expected = x.astype(np.float32)
    np.testing.assert_array_equal(_sim.encode("f32", x), expected.view(np.uint32))
    down = _sim.encode("f32", x, "rm").view(np.float32).astype(np.float64)
    up = _sim.encode("f32", x, "rp").view(np.float32).astype(np.float64)
    assert np.all(down <= x) and np.all(x <= up)
    inexact = expected.astype(np.float64) != x
    finite = inexact & np.isfinite(down) & np.isfinite(up)
    neighbors = np.nextafter(down[finite].astype(np.float32), np.float32(np.inf))
    np.testing.assert_array_equal(neighbors, up[finite])


def test_tf32_clears_the_low_bits_and_ties_away():
    x = np.array([1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-20, -(1 + 2.0**-11), 1 + 3 * 2.0**-11])
    one, next_, third = 0x3F800000, 0x3F802000, 0x3F804000
    sign = 0x80000000
    assert list(_sim.encode("tf32", x, "rna")) == [next_, next_, next_ | sign, third]
    assert list(_sim.encode("tf32", x, "rn")) == [one, next_, one | sign, third]
    assert list(_sim.encode("tf32", x, "rz")) == [one, one, one | sign, next_]
    assert list(_sim.encode("tf32", [np.nan])) == [0x7FFFFFFF]


@pytest.mark.parametrize(
    "name, largest, infinity",
    [("f16", 0x7BFF, 0x7C00), ("bf16", 0x7F7F, 0x7F80), ("e4m3", 0x7E, 0x7F), ("e5m2", 0x7B, 0x7C)],
)
def test_overflow(name, largest, infinity):
    sign = 1 << (8 * TORCH[name][1].itemsize - 1)
    negative = infinity if name == "e4m3" else infinity | sign  # a NaN has no sign
    huge = [1e300, -1e300, np.inf, -np.inf]
    assert list(_sim.encode(name, huge)) == [infinity, negative] * 2
    assert list(_sim.encode(name, huge, satfinite=True)) == [largest, largest | sign] * 2
    assert list(_sim.encode(name, huge[:2], "rz")) == [largest, largest | sign]
    assert list(_sim.encode(name, huge[:2], "rp")) == [infinity, largest | sign]
    assert list(_sim.encode(name, huge[:2], "rm")) == [largest, negative]


@pytest.mark.parametrize("name", FORMATS)
def test_relu_and_nan(name):
    assert list(_sim.encode(name, [-1.0, -0.0, -np.inf], relu=True)) == [0, 0, 0]
    for satfinite in (False, True):
        got = _sim.encode(name, [np.nan, -np.nan], satfinite=satfinite, relu=True)
        assert list(got) == [NAN_CODE[name]] * 2


def test_ue8m0():
    x = [1.0, 1.5, -3.0, 2.0**-127, 2.0**-127 * 1.5, 0.0, 2.0**127, 1.5 * 2.0**127, np.inf, np.nan]
    assert list(_sim.encode("ue8m0", x, "rz")) == [127, 127, 128, 0, 0, 0, 254, 254, 255, 255]
    assert list(_sim.encode("ue8m0", x, "rp")) == [127, 128, 129, 0, 1, 0, 254, 255, 255, 255]
    assert list(_sim.encode("ue8m0", x[7:], "rp", satfinite=True)) == [254, 254, 255]
    values = _sim.decode("ue8m0", np.arange(255, dtype=np.uint32))
    np.testing.assert_array_equal(values, 2.0 ** (np.arange(255) - 127.0))
    assert np.isnan(_sim.decode("ue8m0", [255])[0])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"format must be one of .* \(got 'e3m4'\)"):
        _sim.encode("e3m4", [1.0])
    with pytest.raises(ValueError, match=r"rounding must be one of .* \(got 'up'\)"):
        _sim.encode("f16", [1.0], "up")
