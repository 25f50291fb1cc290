"""mov, bitwise, shifts, lop3, shf, prmt, bit fields and counts, setp, set, selp, slct."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.opcodes import lanes, random_bits

A, B, C = (random_bits(np.uint32, seed=s) for s in (1, 2, 3))
A64, B64 = (random_bits(np.uint64, seed=s) for s in (4, 5))


def check(code, want, *inputs):
    np.testing.assert_array_equal(lanes(code, want.dtype, *inputs), want)


def test_bitwise():
    check("and.b32 %z, %a, %b;", A & B, A, B)
    check("or.b64 %z, %a, %b;", A64 | B64, A64, B64)
    check("xor.b32 %z, %a, %b;", A ^ B, A, B)
    check("not.b64 %z, %a;", ~A64, A64)
    check("cnot.b32 %z, %a;", (A == 0).astype(np.uint32), A)
    a16, b16 = random_bits(np.uint16, seed=1), random_bits(np.uint16, seed=2)
    check("and.b16 %z, %a, %b;", a16 & b16, a16, b16)


def test_predicates():
    want = ((A > B) & ~(A > C)).astype(np.uint32)
    code = "setp.gt.u32 %p, %a, %b;\nsetp.gt.u32 %q, %a, %c;\nnot.pred %q, %q;\n"
    check(code + "and.pred %p, %p, %q;\nselp.u32 %z, 1, 0, %p;", want, A, B, C)
    check("setp.gt.u32 %p, %a, %b;\nmov.pred %q, %p;\nselp.b32 %z, %b, %a, %q;",
          np.where(A > B, B, A), A, B)  # fmt: skip
    check("mov.pred %p, -1;\nselp.u32 %z, 1, 0, %p;", np.ones(64, np.uint32), A)
    check("setp.eq.u32 %p, %a, %a;\nxor.pred %q, %p, %p;\nor.pred %q, %q, %p;\n"
          "selp.u32 %z, 1, 0, %q;", np.ones(64, np.uint32), A)  # fmt: skip


@pytest.mark.parametrize("amount", [0, 1, 7, 31, 32, 40])
def test_shifts(amount):
    n = np.full(64, amount, np.uint32)
    zero = np.uint32(0)
    check("shl.b32 %z, %a, %b;", A << n if amount < 32 else A * zero, A, n)
    check("shr.u32 %z, %a, %b;", A >> n if amount < 32 else A * zero, A, n)
    s = A.view(np.int32)
    check("shr.s32 %z, %a, %b;", s >> np.int32(min(amount, 31)), s, n)
    check("shl.b64 %z, %a, %b;", A64 << n.astype(np.uint64), A64, n)


def test_lop3_every_function():
    for table in range(256):
        bits = [(table >> k) & 1 for k in range(8)]
        want = np.zeros_like(A)
        for k in range(8):
            if bits[k]:
                term = (A if k & 4 else ~A) & (B if k & 2 else ~B) & (C if k & 1 else ~C)
                want |= term
        check(f"lop3.b32 %z, %a, %b, %c, {table};", want, A, B, C)


@pytest.mark.parametrize("amount", [0, 5, 31, 32, 33])
def test_funnel_shift(amount):
    both = A.astype(np.uint64) | B.astype(np.uint64) << np.uint64(32)
    for mode, n in (("wrap", amount & 31), ("clamp", min(amount, 32))):
        left = ((both << np.uint64(n)) >> np.uint64(32)).astype(np.uint32)
        right = (both >> np.uint64(n)).astype(np.uint32)
        check(f"shf.l.{mode}.b32 %z, %a, %b, {amount};", left, A, B)
        check(f"shf.r.{mode}.b32 %z, %a, %b, {amount};", right, A, B)


def test_prmt():
    selectors = random_bits(np.uint32, seed=6) & np.uint32(0xFFFF)
    want = []
    for a, b, s in zip(A, B, selectors, strict=True):
        source = int(a).to_bytes(4, "little") + int(b).to_bytes(4, "little")
        out = bytearray()
        for k in range(4):
            nibble = int(s) >> (4 * k) & 15
            byte = source[nibble & 7]
            out.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
        want.append(int.from_bytes(out, "little"))
    check("prmt.b32 %z, %a, %b, %c;", np.array(want, np.uint32), A, B, selectors)


MODES = {  # byte indices for selector values 0 to 3, from the PTX ISA's tables
    "f4e": [(0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)],
    "b4e": [(0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)],
    "rc8": [(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)],
    "ecl": [(0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)],
    "ecr": [(0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)],
    "rc16": [(0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)],
}


@pytest.mark.parametrize("mode", MODES)
def test_prmt_modes(mode):
    selectors = (np.arange(64) % 4).astype(np.uint32)
    source = np.stack([A, B], 1).view(np.uint8).reshape(64, 8)
    want = np.array([source[i, list(MODES[mode][i % 4])] for i in range(64)], np.uint8)
    check(f"prmt.b32.{mode} %z, %a, %b, %c;", want.view(np.uint32).reshape(-1), A, B, selectors)


@pytest.mark.parametrize(
    "at,length", [(0, 8), (5, 11), (31, 1), (28, 10), (0, 32), (3, 0), (40, 4)]
)
def test_bit_fields(at, length):
    def extract(value, bits, signed):
        field = (value >> at) & ((1 << length) - 1) if at < bits else 0
        sign = value >> min(at + length - 1, bits - 1) & 1 if length else 0
        if signed and sign and length < bits:
            present = max(0, min(length, bits - at))
            field |= (1 << bits) - (1 << present)
        return field % (1 << bits)

    check(f"bfe.u32 %z, %a, {at}, {length};",
          np.array([extract(int(v), 32, False) for v in A], np.uint32), A)  # fmt: skip
    check(f"bfe.s32 %z, %a, {at}, {length};",
          np.array([extract(int(v), 32, True) for v in A], np.uint32), A)  # fmt: skip
    check(f"bfe.u64 %z, %a, {at}, {length};",
          np.array([extract(int(v), 64, False) for v in A64], np.uint64), A64)  # fmt: skip
    mask = ((1 << length) - 1) << at & 0xFFFFFFFF
    want = (B & ~np.uint32(mask)) | (
        (A.astype(np.uint64) << np.uint64(at)).astype(np.uint32) & np.uint32(mask)
    )
    check(f"bfi.b32 %z, %a, %b, {at}, {length};", want, A, B)
    check(f"bmsk.clamp.b32 %z, {at}, {length};", np.full(32, mask, np.uint32))


def test_counts():
    ints = [int(v) for v in A]
    check("popc.b32 %z, %a;", np.array([v.bit_count() for v in ints], np.uint32), A)
    check("clz.b32 %z, %a;", np.array([32 - v.bit_length() for v in ints], np.uint32), A)
    check("bfind.u32 %z, %a;", np.array([v.bit_length() - 1 for v in ints]).astype(np.uint32), A)
    shift = np.array([32 - v.bit_length() if v else -1 for v in ints]).astype(np.uint32)
    check("bfind.shiftamt.u32 %z, %a;", shift, A)
    check("brev.b32 %z, %a;", np.array([int(f"{v:032b}"[::-1], 2) for v in ints], np.uint32), A)
    longs = [int(v) for v in A64]
    check("popc.b64 %z, %a;", np.array([v.bit_count() for v in longs], np.uint32), A64)
    check("clz.b64 %z, %a;", np.array([64 - v.bit_length() for v in longs], np.uint32), A64)
    signed = [int(v) for v in A.view(np.int32)]
    want = np.array([(v if v >= 0 else ~v).bit_length() - 1 for v in signed]).astype(np.uint32)
    check("bfind.s32 %z, %a;", want, A)


def test_fns_finds_the_nth_set_bit():
    mask, base, n = np.uint32(0b1011_0010), np.uint32(1), np.arange(-3, 5, dtype=np.int32)
    got = lanes("fns.b32 %z, %a, %b, %c;", np.int32, np.full(8, mask), np.full(8, base), n)
    # bits set: 1, 4, 5, 7. From bit 1 down: 1; up: 1, 4, 5, 7.
    np.testing.assert_array_equal(got, [-1, -1, 1, 1, 1, 4, 5, 7])


def test_szext():
    n = np.arange(64, dtype=np.uint32) % 40
    want = [
        (int(v) & ((1 << k) - 1)) - ((1 << k) if k and k < 32 and int(v) >> (k - 1) & 1 else 0)
        for v, k in zip(A, np.minimum(n, 32).tolist(), strict=True)
    ]
    check("szext.clamp.s32 %z, %a, %b;", np.array(want).astype(np.uint32), A, n)


def test_pack_and_unpack():
    check("mov.b64 {%t0, %t1}, %a;\nmov.b64 %z, {%t1, %t0};",
          A64 >> np.uint64(32) | A64 << np.uint64(32), A64)  # fmt: skip
    check("mov.b32 {%h0, %h1}, %a;\nmov.b32 %z, {%h1, %h0};",
          A >> np.uint32(16) | A << np.uint32(16), A)  # fmt: skip


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


@pytest.mark.parametrize("op", COMPARISONS)
@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_setp_integers(op, type_):
    dtype = np.dtype(
        type_.replace("s", "i").replace("16", "2").replace("32", "4").replace("64", "8")
    )
    a, b = random_bits(dtype, seed=1), random_bits(dtype, seed=2)[::-1].copy()
    b[::5] = a[::5]
    want = COMPARISONS[op](a, b).astype(np.uint32)
    check(f"setp.{op}.{type_} %p, %a, %b;\nselp.u32 %z, 1, 0, %p;", want, a, b)


@pytest.mark.parametrize("op", COMPARISONS)
@pytest.mark.parametrize("unordered", ["", "u"])
@pytest.mark.parametrize("type_", ["f32", "f64", "f16"])
def test_setp_floats(op, unordered, type_):
    dtype = {"f32": np.float32, "f64": np.float64, "f16": np.float16}[type_]
    a = np.array([0, -0.0, 1, 2, np.nan, np.inf, np.nan, -1] * 4, dtype)
    b = np.array([-0.0, 0, 2, 1, 1, np.inf, np.nan, -1] * 4, dtype)
    nan = np.isnan(a) | np.isnan(b)
    ordered = COMPARISONS[op](a, b) & ~nan
    want = (ordered | nan if unordered else ordered).astype(np.uint32)
    check(f"setp.{op}{unordered}.{type_} %p, %a, %b;\nselp.u32 %z, 1, 0, %p;", want, a, b)


def test_setp_pair_and_combination():
    q = A > C
    code = "setp.gt.u32 %r0, %a, %c;\nsetp.lt.or.u32 %p|%q, %a, %b, !%r0;\n"
    p_want, q_want = (A < B) | ~q, ~(A < B) | ~q
    check(code + "selp.u32 %z, 1, 0, %p;", p_want.astype(np.uint32), A, B, C)
    check(code + "selp.u32 %z, 1, 0, %q;", q_want.astype(np.uint32), A, B, C)


def test_setp_packed_halves():
    a = np.array([1, 2, 3, 4] * 16, np.float16)
    b = np.array([2, 1, 3, 5] * 16, np.float16)
    p = (a < b)[::2].astype(np.uint32)
    q = (a < b)[1::2].astype(np.uint32)
    code = "setp.lt.f16x2 %p|%q, %a, %b;\n"
    check(code + "selp.u32 %z, 1, 0, %p;", p, a.view(np.uint32), b.view(np.uint32))
    check(code + "selp.u32 %z, 1, 0, %q;", q, a.view(np.uint32), b.view(np.uint32))


def test_set_and_slct():
    check("set.lt.u32.u32 %z, %a, %b;", np.where(A < B, ~np.uint32(0), np.uint32(0)), A, B)
    check("set.lt.f32.u32 %z, %a, %b;", np.where(A < B, 1, 0).astype(np.float32), A, B)
    check("slct.u32.s32 %z, %a, %b, %c;", np.where(C.view(np.int32) >= 0, A, B), A, B, C)
    f = np.array([1.0, -0.0, -1.0, np.nan] * 16, np.float32)
    check("slct.u32.f32 %z, %a, %b, %c;", np.where(f >= 0, A, B), A, B, f)


def test_special_registers():
    np.testing.assert_array_equal(
        lanes("mov.u32 %z, %laneid;", np.uint32, block=64), np.arange(64) % 32
    )
    np.testing.assert_array_equal(
        lanes("mov.u32 %z, %warpid;", np.uint32, block=64), np.arange(64) // 32
    )
    np.testing.assert_array_equal(
        lanes("mov.u32 %z, %ntid.x;", np.uint32, block=64), np.full(64, 64)
    )
    got = lanes("mov.u32 %z, %lanemask_lt;", np.uint32, block=32)
    np.testing.assert_array_equal(got, (1 << np.arange(32, dtype=np.uint64)) - 1)
    got = lanes("mov.u64 %u0, %clock64;\nmov.u64 %u1, %clock64;\nsub.s64 %z, %u1, %u0;", np.int64)
    assert (got > 0).all()


@pytest.mark.parametrize("test,f", [("or", np.logical_or), ("and", np.logical_and)])
def test_lop3_with_a_test(test, f):
    q = A > C
    for table, keep in ((0x80, "%t0"), (0x96, "_"), (0x00, "%t0")):
        lut = np.zeros_like(A)
        for k in range(8):
            term = (A if k & 4 else ~A) & (B if k & 2 else ~B) & (C if k & 1 else ~C)
            lut |= term if table >> k & 1 else 0
        code = f"""
            setp.gt.u32 %q, %a, %c;
            mov.b32 %t0, 0;
            lop3.{test}.b32 {keep}|%p, %a, %b, %c, {table}, !%q;
            selp.b32 %z, 1, 0, %p;
            mov.b32 %y, %t0;"""
        got, kept = lanes(code, [np.uint32] * 2, A, B, C)
        np.testing.assert_array_equal(got, f(lut != 0, ~q))
        np.testing.assert_array_equal(kept, lut if keep == "%t0" else 0 * A)


HALVES = np.array(
    [0.0, -0.0, 1.0, -1.0, np.nan, np.inf, 6e-8, -6e-8, 65504, 6.1e-5, 2.0, 0.5], np.float16
)
HALF_COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "lt": np.less, "ge": np.greater_equal,
    "ne": lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b),
    "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}  # fmt: skip


@pytest.mark.parametrize("op", HALF_COMPARISONS)
@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_comparisons_of_halves(op, ftz):
    a, b = (v.reshape(-1) for v in np.meshgrid(HALVES, HALVES))
    x, y = a.view(np.uint32), b.view(np.uint32)
    with np.errstate(invalid="ignore", over="ignore"):
        flush = lambda v: np.where(np.abs(v) < 6.1035e-05, v * 0, v) if ftz else v  # noqa: E731
        yes = HALF_COMPARISONS[op](flush(a), flush(b))
    ones = np.where(yes, np.uint16(0xFFFF), np.uint16(0)).view(np.uint32)
    floats = yes.astype(np.float16).view(np.uint32)
    check(f"set.{op}{ftz}.f16x2.f16x2 %z, %a, %b;", floats, x, y)
    check(f"set.{op}{ftz}.u32.f16x2 %z, %a, %b;", ones, x, y)
    check(f"set.{op}{ftz}.f16.f16 %z, %a, %b;", floats.view(np.uint16), a, b)
    check(f"set.{op}{ftz}.u16.f16 %z, %a, %b;", ones.view(np.uint16), a, b)
    code = f"setp.{op}{ftz}.f16x2 %p|%q, %a, %b;\nselp.u32 %z, 1, 0, %p;\n@%q add.u32 %z, %z, 2;"
    check(code, yes[::2] + 2 * yes[1::2].astype(np.uint32), x, y)
    with_predicate = f"setp.eq.u32 %p, %tid_, 1;\nset.{op}.or{ftz}.u32.f16x2 %z, %a, %b, %p;"
    forced = ones.copy()
    forced[1] = 0xFFFFFFFF
    check(with_predicate, forced, x, y)


def test_comparisons_of_bf16_pairs():
    a, b = (v.reshape(-1) for v in np.meshgrid(*[HALVES.astype(np.float32)] * 2))
    x, y = ((v.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32) for v in (a, b))
    as_bf16 = lambda v: (v.view(np.uint32) & 0xFFFF0000).view(np.float32)  # noqa: E731
    truth = as_bf16(a) < as_bf16(b)
    want = np.where(truth, np.uint16(0x3F80), np.uint16(0)).view(np.uint32)
    check("set.lt.bf16x2.bf16x2 %z, %a, %b;", want, x, y)
