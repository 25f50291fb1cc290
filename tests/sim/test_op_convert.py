"""cvt: integers, floats, rounding to integer, saturation, packed FP8, f16x2 and bf16x2."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from support.opcodes import lanes, random_bits
from torchext import sim

INTS: dict[str, Any] = {
    "u8": np.uint8, "s8": np.int8, "u16": np.uint16, "s16": np.int16, "u32": np.uint32,
    "s32": np.int32, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip


def through(source: str, destination: str, values, modifiers=""):
    """Converts with cvt between integers of any width; 8-bit values are in 16-bit registers."""
    return lanes(f"cvt{modifiers}.{destination}.{source} %z, %a;", INTS.get(destination), values)


@pytest.mark.parametrize("source", INTS)
@pytest.mark.parametrize("destination", INTS)
def test_integers(source, destination):
    a = random_bits(INTS[source])
    np.testing.assert_array_equal(through(source, destination, a), a.astype(INTS[destination]))
    info = np.iinfo(INTS[destination])
    if info.min <= np.iinfo(INTS[source]).min and info.max >= np.iinfo(INTS[source]).max:
        with pytest.raises(sim.PtxError, match="must lack values of the source type"):  # as ptxas
            through(source, destination, a, ".sat")
        return
    want = [min(max(int(v), info.min), info.max) for v in a]
    got = through(source, destination, a, ".sat")
    np.testing.assert_array_equal(got, np.array(want, INTS[destination]))


def test_sign_extends_into_wider_register():
    a = np.array([0x80, 0x7F, 0xFF, 1] * 8, np.uint16)
    got = lanes("cvt.s32.s8 %z, %a;", np.int32, a)
    np.testing.assert_array_equal(got, a.astype(np.uint8).view(np.int8).astype(np.int32))


@pytest.mark.parametrize(
    "mode,f", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
@pytest.mark.parametrize("destination", ["u16", "s32", "u32", "s64", "u64"])
def test_float_to_integer(mode, f, destination):
    a = np.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, 1e3 + 0.25, -7.75, 1e30, -1e30, np.inf, 65535.5, 3] * 4,
        np.float32,
    )
    info = np.iinfo(INTS[destination])
    want = [
        info.max if v >= info.max else info.min if v <= info.min else int(v)
        for v in f(a.astype(np.float64))
    ]
    got = lanes(f"cvt.{mode}.{destination}.f32 %z, %a;", INTS[destination], a)
    np.testing.assert_array_equal(got, np.array(want, INTS[destination]))
    got = lanes(f"cvt.{mode}.f32.f32 %z, %a;", np.float32, a)
    np.testing.assert_array_equal(got, f(a))
    nan = np.full(32, np.nan, np.float32)
    if destination in ("s32", "u32"):
        assert (lanes(f"cvt.{mode}.{destination}.f32 %z, %a;", INTS[destination], nan) == 0).all()


@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64", "s16"])
def test_integer_to_float(source):
    a = random_bits(INTS[source])
    np.testing.assert_array_equal(
        lanes(f"cvt.rn.f32.{source} %z, %a;", np.float32, a), a.astype(np.float32)
    )
    np.testing.assert_array_equal(
        lanes(f"cvt.rn.f64.{source} %z, %a;", np.float64, a), a.astype(np.float64)
    )
    near = a.astype(np.float32)
    got = lanes(f"cvt.rz.f32.{source} %z, %a;", np.float32, a)
    for value, r, n in zip(a, got, near, strict=True):
        assert abs(int(r)) <= abs(int(value)) and (
            int(r) == int(value) or r in (n, np.nextafter(n, np.float32(0)))
        )


def test_float_to_float():
    rng = np.random.default_rng(0)
    a = (rng.standard_normal(96) * 2.0 ** rng.integers(-30, 20, 96)).astype(np.float32)
    a[:6] = [np.nan, np.inf, -np.inf, 65520, 0, -0.0]
    with np.errstate(all="ignore"):
        want = a.astype(np.float16)
        got = lanes("cvt.rn.f16.f32 %z, %a;", np.float16, a)
        np.testing.assert_array_equal(got, want)
        assert got.view(np.uint16)[0] == 0x7FFF
        np.testing.assert_array_equal(
            lanes("cvt.f32.f16 %z, %a;", np.float32, want), want.astype(np.float32)
        )
        np.testing.assert_array_equal(
            lanes("cvt.f64.f32 %z, %a;", np.float64, a), a.astype(np.float64)
        )
        d = a.astype(np.float64) * (1 + 2.0**-30)
        np.testing.assert_array_equal(
            lanes("cvt.rn.f32.f64 %z, %a;", np.float32, d), d.astype(np.float32)
        )
    bf = torch.from_numpy(a).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    got = lanes("cvt.rn.bf16.f32 %z, %a;", np.uint16, a)
    np.testing.assert_array_equal(got[1:], bf[1:])
    got = lanes("cvt.rna.tf32.f32 %z, %a;", np.uint32, a)[1:]
    tf32 = (a.view(np.uint32)[1:] + 0x1000) & 0xFFFFE000
    finite = np.isfinite(a[1:])
    np.testing.assert_array_equal(got[finite], tf32[finite])
    sat = lanes("cvt.sat.f32.f32 %z, %a;", np.float32, a)
    np.testing.assert_array_equal(sat, np.where(np.isnan(a), 0, np.clip(a, 0, 1)))


@pytest.mark.parametrize(
    "name,dtype", [("e4m3x2", torch.float8_e4m3fn), ("e5m2x2", torch.float8_e5m2)]
)
def test_fp8_pairs(name, dtype):
    torch.manual_seed(0)
    x, y = torch.randn(64) * 100, torch.randn(64)
    limit = torch.finfo(dtype).max
    low, high = (
        t.clamp(-limit, limit).to(dtype).view(torch.uint8).numpy().astype(np.uint16) for t in (x, y)
    )
    got = lanes(f"cvt.rn.satfinite.{name}.f32 %z, %a, %b;", np.uint16, y.numpy(), x.numpy())
    np.testing.assert_array_equal(got, high << 8 | low)
    halves = lanes(f"cvt.rn.f16x2.{name} %z, %a;", np.uint32, got).view(np.float16).reshape(-1, 2)
    want = torch.stack([x, y], 1).clamp(-limit, limit).to(dtype).float().numpy()
    np.testing.assert_array_equal(halves.astype(np.float32), want)
    back = lanes(
        f"cvt.rn.satfinite.{name}.f16x2 %z, %a;",
        np.uint16,
        halves.reshape(-1).view(np.uint32).copy(),
    )
    np.testing.assert_array_equal(back, got)


def test_sixteen_bit_pairs_and_relu():
    torch.manual_seed(0)
    x, y = torch.randn(64), torch.randn(64)
    for name, dtype in (("f16x2", torch.float16), ("bf16x2", torch.bfloat16)):
        got = lanes(f"cvt.rn.{name}.f32 %z, %a, %b;", np.uint32, y.numpy(), x.numpy())
        want = (
            torch.stack([x, y], 1).to(dtype).view(torch.int16).numpy().view(np.uint32).reshape(-1)
        )
        np.testing.assert_array_equal(got, want)
        got = lanes(f"cvt.rn.relu.{name}.f32 %z, %a, %b;", np.uint32, y.numpy(), x.numpy())
        want = torch.stack([x, y], 1).relu().to(dtype).view(torch.int16).numpy().view(np.uint32)
        np.testing.assert_array_equal(got, want.reshape(-1))


def test_ue8m0_pairs():
    x = np.array([1, 2, 3, 0.75] * 8, np.float32)
    got = lanes("cvt.rp.satfinite.ue8m0x2.f32 %z, %a, %b;", np.uint16, x, x, target="sm_100a")
    np.testing.assert_array_equal(got & 0xFF, [127, 128, 129, 127] * 8)
    back = lanes("cvt.rn.bf16x2.ue8m0x2 %z, %a;", np.uint32, got, target="sm_100a")
    np.testing.assert_array_equal(back & 0xFFFF, np.array([0x3F80, 0x4000, 0x4080, 0x3F80] * 8))


def test_cvt_pack():
    a, b, c = (random_bits(np.int32, seed=s) for s in (1, 2, 3))
    clip = lambda v: np.clip(v, -128, 127).astype(np.int8).view(np.uint8).astype(np.uint32)  # noqa: E731
    got = lanes("cvt.pack.sat.s8.s32.b32 %z, %a, %b, %c;", np.uint32, a, b, c)
    want = c.view(np.uint32) << np.uint32(16) | clip(a) << np.uint32(8) | clip(b)
    np.testing.assert_array_equal(got, want)
    clip = lambda v: np.clip(v, 0, 65535).astype(np.uint32)  # noqa: E731
    got = lanes("cvt.pack.sat.u16.s32 %z, %a, %b;", np.uint32, a, b)
    np.testing.assert_array_equal(got, clip(a) << np.uint32(16) | clip(b))
    a, b = a >> 28, b >> 28
    for type_, low, high in (("u4", 0, 15), ("s4", -8, 7), ("u2", 0, 3), ("s2", -2, 1)):
        bits = int(type_[1])
        field = lambda v: (np.clip(v, low, high) & ((1 << bits) - 1)).astype(np.uint32)  # noqa: B023, E731
        got = lanes(f"cvt.pack.sat.{type_}.s32.b32 %z, %a, %b, %c;", np.uint32, a, b, c)
        above = c.view(np.uint32) << np.uint32(2 * bits) | field(a) << np.uint32(bits)
        np.testing.assert_array_equal(got, above | field(b))
    with pytest.raises(ValueError, match="a third source"):
        lanes("cvt.pack.sat.u4.s32 %z, %a, %b;", np.uint32, a, b)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("source", ["s64", "u64"])
@pytest.mark.parametrize("destination", ["f64", "f32"])
def test_64_bit_integers_round_as_told(destination, source, mode):
    a = np.concatenate([random_bits(INTS[source]), random_bits(INTS[source], seed=1) >> 7])
    a[:4] = np.array([2**53 + 1, 2**54 + 3, 2**62 + 1, 2**63 - 1]).astype(INTS[source])
    dtype: Any = {"f64": np.float64, "f32": np.float32}[destination]
    got = lanes(f"cvt.{mode}.{destination}.{source} %z, %a;", dtype, a)
    below, above = np.nextafter(got, dtype(-np.inf)), np.nextafter(got, dtype(np.inf))
    for value, *neighbors in zip(a.tolist(), got, below, above, strict=True):
        r, low, high = (Fraction(float(v)) for v in neighbors)
        assert {
            "rn": abs(value - r) <= min(value - low, high - value),
            "rz": low < value <= r if value < 0 else r <= value < high,
            "rm": r <= value < high,
            "rp": low < value <= r,
        }[mode]


@pytest.mark.parametrize("destination", INTS)
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_nan_to_integer(source, destination):
    nan = np.full(32, np.nan, {"f32": np.float32, "f64": np.float64}[source])
    got = lanes(f"cvt.rzi.{destination}.{source} %z, %a;", INTS[destination], nan)
    bits = 8 * got.itemsize
    want = 1 << (bits - 1) if source == "f64" or bits == 64 else 0
    assert (got.view(f"u{got.itemsize}") == want).all()
