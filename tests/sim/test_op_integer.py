"""Integer arithmetic against Python: products, quotients, carries, dot products."""

from collections.abc import Callable

import numpy as np
import pytest

from support.opcodes import lanes, random_bits

TYPES = {
    "u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32,
    "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
BITS = {name: 8 * np.dtype(t).itemsize for name, t in TYPES.items()}


def wrap(values, dtype):
    bits = 8 * np.dtype(dtype).itemsize
    unsigned = [int(v) & ((1 << bits) - 1) for v in values]
    return np.array(unsigned, f"u{bits // 8}").view(dtype)


def trunc_div(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": lambda a, b: trunc_div(a, b) if b else -1,
    "rem": lambda a, b: a - b * trunc_div(a, b) if b else -1,  # by 0: as an H200, 2026-11-26
}


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("op", BINARY)
def test_binary(op, type_):
    a, b = random_bits(TYPES[type_], seed=1), random_bits(TYPES[type_], seed=2)[::-1]
    got = lanes(f"{op}.{type_} %z, %a, %b;", TYPES[type_], a, b)
    want = wrap([BINARY[op](int(x), int(y)) for x, y in zip(a, b, strict=True)], TYPES[type_])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("type_", TYPES)
def test_mul_hi_and_mad(type_):
    dtype = TYPES[type_]
    a, b, c = (random_bits(dtype, seed=s) for s in (1, 2, 3))
    b = b[::-1]
    rows = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    high = [x * y >> BITS[type_] for x, y, _ in rows]
    np.testing.assert_array_equal(
        lanes(f"mul.hi.{type_} %z, %a, %b;", dtype, a, b), wrap(high, dtype)
    )
    np.testing.assert_array_equal(
        lanes(f"mad.lo.{type_} %z, %a, %b, %c;", dtype, a, b, c),
        wrap([x * y + z for x, y, z in rows], dtype),
    )
    np.testing.assert_array_equal(
        lanes(f"mad.hi.{type_} %z, %a, %b, %c;", dtype, a, b, c),
        wrap([h + z for h, (_, _, z) in zip(high, rows, strict=True)], dtype),
    )
    np.testing.assert_array_equal(
        lanes(f"sad.{type_} %z, %a, %b, %c;", dtype, a, b, c),
        wrap([abs(x - y) + z for x, y, z in rows], dtype),
    )


@pytest.mark.parametrize(
    "type_,wide", [("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")]
)
def test_wide(type_, wide):
    a, b = random_bits(TYPES[type_], seed=1), random_bits(TYPES[type_], seed=2)[::-1]
    c = random_bits(TYPES[wide], seed=3)
    product = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(
        lanes(f"mul.wide.{type_} %z, %a, %b;", TYPES[wide], a, b), wrap(product, TYPES[wide])
    )
    np.testing.assert_array_equal(
        lanes(f"mad.wide.{type_} %z, %a, %b, %c;", TYPES[wide], a, b, c),
        wrap([p + int(z) for p, z in zip(product, c, strict=True)], TYPES[wide]),
    )


@pytest.mark.parametrize("type_", ["s16", "s32", "s64"])
def test_abs_neg(type_):
    a = random_bits(TYPES[type_])
    want_abs = wrap([abs(int(x)) for x in a], TYPES[type_])
    want_neg = wrap([-int(x) for x in a], TYPES[type_])
    np.testing.assert_array_equal(lanes(f"abs.{type_} %z, %a;", TYPES[type_], a), want_abs)
    np.testing.assert_array_equal(lanes(f"neg.{type_} %z, %a;", TYPES[type_], a), want_neg)


def test_saturating_add_and_relu():
    a, b = random_bits(np.int32, seed=1), random_bits(np.int32, seed=2)[::-1]
    clamp = lambda v: np.clip(v, -(2**31), 2**31 - 1).astype(np.int32)  # noqa: E731
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    np.testing.assert_array_equal(
        lanes("add.sat.s32 %z, %a, %b;", np.int32, a, b), clamp(wide_a + wide_b)
    )
    np.testing.assert_array_equal(
        lanes("sub.sat.s32 %z, %a, %b;", np.int32, a, b), clamp(wide_a - wide_b)
    )
    np.testing.assert_array_equal(
        lanes("max.relu.s32 %z, %a, %b;", np.int32, a, b), np.maximum(0, np.maximum(a, b))
    )


@pytest.mark.parametrize("subtract", [False, True])
def test_carries_make_a_128_bit_sum(subtract):
    op, carry = ("sub", "subc") if subtract else ("add", "addc")
    a0, a1, b0, b1 = (random_bits(np.uint64, seed=s) for s in range(4))
    low, high = lanes(
        f"{op}.cc.u64 %z, %a, %c;\n{carry}.u64 %y, %b, %d;",
        [np.uint64, np.uint64], a0, a1, b0[::-1], b1[::-1],
    )  # fmt: skip
    for x0, x1, y0, y1, z0, z1 in zip(a0, a1, b0[::-1], b1[::-1], low, high, strict=True):
        x, y = int(x0) | int(x1) << 64, int(y0) | int(y1) << 64
        want = (x - y if subtract else x + y) % (1 << 128)
        assert int(z0) | int(z1) << 64 == want


def test_madc_makes_a_64_bit_product():
    a, b = random_bits(np.uint32, seed=1), random_bits(np.uint32, seed=2)[::-1]
    c, d = random_bits(np.uint32, seed=3), random_bits(np.uint32, seed=4)
    low, high = lanes(
        "mad.lo.cc.u32 %z, %a, %b, %c;\nmadc.hi.u32 %y, %a, %b, %d;",
        [np.uint32, np.uint32], a, b, c, d,
    )  # fmt: skip
    want = [
        (int(x) * int(y) + int(z) + (int(w) << 32)) % (1 << 64)
        for x, y, z, w in zip(a, b, c, d, strict=True)
    ]
    got = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    np.testing.assert_array_equal(got, np.array(want, np.uint64))


def test_24_bit_products():
    a, b = random_bits(np.int32, seed=1), random_bits(np.int32, seed=2)[::-1]
    c = random_bits(np.int32, seed=3)
    sign = lambda v: (int(v) & 0xFFFFFF) - ((int(v) & 0x800000) << 1)  # noqa: E731
    product = [sign(x) * sign(y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(
        lanes("mul24.lo.s32 %z, %a, %b;", np.int32, a, b), wrap(product, np.int32)
    )
    np.testing.assert_array_equal(
        lanes("mad24.lo.s32 %z, %a, %b, %c;", np.int32, a, b, c),
        wrap([p + int(z) for p, z in zip(product, c, strict=True)], np.int32),
    )


@pytest.mark.parametrize("a_type,b_type", [("u32", "u32"), ("s32", "s32"), ("s32", "u32")])
def test_dot_products(a_type, b_type):
    a, b, c = (random_bits(np.uint32, seed=s) for s in (1, 2, 3))
    signed = {"u32": "u", "s32": "i"}
    a8 = a.view(f"{signed[a_type]}1").reshape(-1, 4).astype(np.int64)
    a16 = a.view(f"{signed[a_type]}2").reshape(-1, 2).astype(np.int64)
    b8 = b.view(f"{signed[b_type]}1").reshape(-1, 4).astype(np.int64)
    wide = c.view(np.int32).astype(np.int64)
    got = lanes(f"dp4a.{a_type}.{b_type} %z, %a, %b, %c;", np.int32, a, b, c)
    np.testing.assert_array_equal(got, wrap(wide + (a8 * b8).sum(1), np.int32))
    for mode, part in (("lo", b8[:, :2]), ("hi", b8[:, 2:])):
        got = lanes(f"dp2a.{mode}.{a_type}.{b_type} %z, %a, %b, %c;", np.int32, a, b, c)
        np.testing.assert_array_equal(got, wrap(wide + (a16 * part).sum(1), np.int32))


def test_packed_halves():
    a, b = random_bits(np.uint32, seed=1), random_bits(np.uint32, seed=2)
    for op, f in (("add", np.add), ("min", np.minimum), ("max", np.maximum)):
        want = f(a.view(np.int16), b.view(np.int16)).view(np.uint32)
        np.testing.assert_array_equal(lanes(f"{op}.s16x2 %z, %a, %b;", np.uint32, a, b), want)


def low24(value, signed):
    value &= 0xFFFFFF
    return value - (1 << 24) if signed and value >> 23 else value


@pytest.mark.parametrize("type_", ["u32", "s32"])
def test_products_of_24_bits(type_):
    dtype, signed = TYPES[type_], type_ == "s32"
    a, b, c = (random_bits(dtype, seed=s) for s in (4, 5, 6))
    rows = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    product = [low24(x, signed) * low24(y, signed) for x, y, _ in rows]
    for part, shift in (("lo", 0), ("hi", 16)):
        np.testing.assert_array_equal(
            lanes(f"mul24.{part}.{type_} %z, %a, %b;", dtype, a, b),
            wrap([p >> shift for p in product], dtype),
        )
        np.testing.assert_array_equal(
            lanes(f"mad24.{part}.{type_} %z, %a, %b, %c;", dtype, a, b, c),
            wrap([(p >> shift) + z for p, (_, _, z) in zip(product, rows, strict=True)], dtype),
        )
    with pytest.raises(ValueError, match=r"must include \.lo or \.hi"):
        lanes(f"mul24.{type_} %z, %a, %b;", dtype, a, b)


def test_saturating_sums_of_products():
    a, b, c = (random_bits(np.int32, seed=s) for s in (7, 8, 9))
    a[:8], b[:8], c[:8] = 2**31 - 1, 2**31 - 1, [2**31 - 1, 2**30, 0, 5, -5, -(2**31), 7, 2**31 - 1]
    rows = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    clamp = lambda v: max(min(v, 2**31 - 1), -(2**31))  # noqa: E731
    high = [clamp((x * y >> 32) + z) for x, y, z in rows]
    np.testing.assert_array_equal(lanes("mad.hi.sat.s32 %z, %a, %b, %c;", np.int32, a, b, c), high)
    high24 = [
        clamp(int(wrap([low24(x, True) * low24(y, True) >> 16], np.int32)[0]) + z)
        for x, y, z in rows
    ]
    np.testing.assert_array_equal(
        lanes("mad24.hi.sat.s32 %z, %a, %b, %c;", np.int32, a, b, c), high24
    )
    sums = [clamp(x + z) for x, _, z in rows]
    for code in ("add.sat.s32 %z, %a, %b;", "add.s32.sat %z, %a, %b;"):
        np.testing.assert_array_equal(lanes(code, np.int32, a, c), sums)
    for code in ("mad.hi.sat.u32 %z, %a, %b, %c;", "mad24.hi.sat.u32 %z, %a, %b, %c;"):
        with pytest.raises(ValueError, match=r"got \.u32"):
            lanes(code, np.int32, a, b, c)
