"""Video instructions against Python's integers: selectors, saturation, second operations, lanes."""

import itertools
import operator
from collections.abc import Callable

import numpy as np
import pytest

from support.exact import extract, saturate
from support.opcodes import lanes, random_bits

A, B, C = (random_bits(np.uint32, 96, seed) for seed in (1, 2, 3))
B = B[::-1].copy()
A[:8] = [0x7F80FF00, 0x80007FFF, 0xFF017F80, 0, 0xFFFFFFFF, 0x80808080, 0x00FF00FF, 1]
B[:8] = [0x80FF7F01, 0x7FFF8000, 0x00FF8001, 0xFFFFFFFF, 0, 0x7F7F7F7F, 0xFF00FF00, 33]

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "vadd": operator.add,
    "vsub": operator.sub,
    "vabsdiff": lambda a, b: abs(a - b),
    "vmin": min,
    "vmax": max,
    "vavrg": lambda a, b: (a + b + 1) >> 1 if a + b >= 0 else (a + b) >> 1,
}
COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
PARTS = {
    "": (0, 32),
    ".b0": (0, 8),
    ".b2": (16, 8),
    ".b3": (24, 8),
    ".h0": (0, 16),
    ".h1": (16, 16),
}


def second(name, value, c, signed):
    c = extract(c, 0, 32, signed)
    return {"": value, ".add": value + c, ".min": min(value, c), ".max": max(value, c)}[name]


def check(code, want, inputs=(A, B, C), **options):
    got = lanes(code, np.uint32, *inputs, **options)
    rows = zip(*(x.tolist() for x in inputs), strict=True)
    expected = np.array([want(*row) & 0xFFFFFFFF for row in rows], np.uint32)
    np.testing.assert_array_equal(got, expected, err_msg=code)


TYPES = list(itertools.product(("u32", "s32"), repeat=3))


@pytest.mark.parametrize("op", ["vadd", "vsub", "vabsdiff", "vmin", "vmax"])
@pytest.mark.parametrize("sat", ["", ".sat"])
def test_scalar(op, sat):
    parts = itertools.cycle(itertools.product(PARTS, PARTS))
    for d, a, b in TYPES:
        for then in ("", ".add", ".min", ".max"):
            x, y = next(parts)

            def want(p, q, r, *, d=d, a=a, b=b, x=x, y=y, then=then):
                value = OPERATIONS[op](
                    extract(p, *PARTS[x], a == "s32"), extract(q, *PARTS[y], b == "s32")
                )
                value = saturate(value, d == "s32", 32) if sat else value
                return second(then, value, r, d == "s32")

            operands = f"%z, %a{x}, %b{y}" + (", %c" if then else "")
            check(f"{op}.{d}.{a}.{b}{sat}{then} {operands};", want)


@pytest.mark.parametrize("sat", ["", ".sat"])
@pytest.mark.parametrize("part", [".b0", ".b3", ".h0", ".h1"])
def test_merge(part, sat):
    at, bits = PARTS[part]
    for d, a, b in TYPES:

        def want(p, q, r, *, d=d, a=a, b=b):
            value = extract(p, 0, 16, a == "s32") - extract(q, 8, 8, b == "s32")
            value = saturate(value, d == "s32", bits) if sat else value
            mask = (1 << bits) - 1 << at
            return (value << at & mask) | (r & ~mask)

        check(f"vsub.{d}.{a}.{b}{sat} %z{part}, %a.h0, %b.b1, %c;", want)


@pytest.mark.parametrize("op,f", [("vshl", operator.lshift), ("vshr", operator.rshift)])
@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_shifts(op, f, mode):
    amount = np.arange(96, dtype=np.uint32) % 48
    for (d, a), sat in itertools.product(itertools.product(("u32", "s32"), repeat=2), ("", ".sat")):

        def want(p, q, r, *, d=d, a=a, sat=sat):
            by = q & 31 if mode == "wrap" else min(q, 32)
            value = f(extract(p, 0, 32, a == "s32"), by)
            value = saturate(value, d == "s32", 32) if sat else value
            return value + extract(r, 0, 32, d == "s32")

        check(f"{op}.{d}.{a}.u32{sat}.{mode}.add %z, %a, %b, %c;", want, (A, amount, C))


@pytest.mark.parametrize("scale", ["", ".shr7", ".shr15"])
def test_vmad(scale):
    by = int(scale[4:] or 0)
    for signs, sat in itertools.product(("", "a", "b", "ab", "c", "po"), ("", ".sat")):
        for d, a, b in TYPES:
            minus = {n: "-" if n in signs and signs != "po" else "" for n in "abc"}

            def want(p, q, r, *, a=a, b=b, signs=signs, sat=sat):
                product = extract(p, 0, 16, a == "s32") * extract(q, 0, 32, b == "s32")
                negative = signs in ("a", "b")
                signed = a == "s32" or b == "s32" or negative or signs == "c"
                r = extract(r, 0, 32, signed)
                total = (-product if negative else product) + (-r if signs == "c" else r)
                total = total + (signs == "po") >> by
                return saturate(total, signed, 32) if sat else total

            po = ".po" if signs == "po" else ""
            operands = f"{minus['a']}%a.h0, {minus['b']}%b, {minus['c']}%c"
            check(f"vmad.{d}.{a}.{b}{po}{sat}{scale} %z, {operands};", want)


@pytest.mark.parametrize("how", COMPARISONS)
def test_vset(how):
    for a, b in itertools.product(("u32", "s32"), repeat=2):
        for then in ("", ".add", ".max"):

            def want(p, q, r, *, a=a, b=b, then=then):
                yes = COMPARISONS[how](extract(p, 8, 8, a == "s32"), extract(q, 0, 8, b == "s32"))
                return second(then, int(yes), r, False)

            operands = "%z, %a.b1, %b.b0" + (", %c" if then else "")
            check(f"vset.{a}.{b}.{how}{then} {operands};", want)


def lanewise(f, count, d, a, b, *, sat=False, add=False, write=None, first=None, other=None):
    """A function of the operands that gives the result of an instruction of 2 or 4 lanes."""
    bits = 32 // count
    write = range(count) if write is None else write
    first = range(count) if first is None else first
    other = range(count, 2 * count) if other is None else other

    def want(p, q, r):
        both = p | q << 32
        result, total = r, r
        for n in range(count):
            if n not in write:
                continue
            x = extract(both, first[n] * bits, bits, a == "s32")
            y = extract(both, other[n] * bits, bits, b == "s32")
            value = int(f(x, y))
            value = saturate(value, d == "s32", bits) if sat else value
            mask = (1 << bits) - 1 << n * bits
            result = (result & ~mask) | (value << n * bits & mask)
            total += value
        return total if add else result

    return want


@pytest.mark.parametrize("opcode", [
    "vadd2", "vsub2", "vabsdiff2", "vavrg2", "vmin2", "vmax2",
    "vadd4", "vsub4", "vabsdiff4", "vavrg4", "vmin4", "vmax4",
])  # fmt: skip
def test_lanes(opcode):
    op, count = opcode[:-1], int(opcode[-1])
    for d, a, b in TYPES:
        code = f"{opcode}.{d}.{a}.{b}"
        for sat in ("", ".sat"):
            want = lanewise(OPERATIONS[op], count, d, a, b, sat=bool(sat))
            check(f"{code}{sat} %z, %a, %b, %c;", want)
        check(f"{code}.add %z, %a, %b, %c;", lanewise(OPERATIONS[op], count, d, a, b, add=True))


@pytest.mark.parametrize("count,mask,write,a_lanes,b_lanes", [
    (2, ".h1", [1], ".h01", ".h23"), (2, ".h0", [0], ".h33", ".h10"), (2, ".h10", [0, 1], "", ""),
    (4, ".b0", [0], ".b7654", ".b3210"), (4, ".b31", [1, 3], ".b0123", ".b4567"),
    (4, ".b210", [0, 1, 2], ".b5555", ".b0246"),
])  # fmt: skip
def test_lane_selectors(count, mask, write, a_lanes, b_lanes):
    first = [int(c) for c in reversed(a_lanes[2:])] or None
    other = [int(c) for c in reversed(b_lanes[2:])] or None
    want = lanewise(
        operator.sub, count, "s32", "s32", "u32", sat=True, write=write, first=first, other=other
    )
    check(f"vsub{count}.s32.s32.u32.sat %z{mask}, %a{a_lanes}, %b{b_lanes}, %c;", want)


@pytest.mark.parametrize("opcode", ["vset2", "vset4"])
@pytest.mark.parametrize("how", COMPARISONS)
def test_lane_comparisons(how, opcode):
    count = int(opcode[-1])
    for a, b in itertools.product(("u32", "s32"), repeat=2):
        want = lanewise(COMPARISONS[how], count, "u32", a, b)
        check(f"{opcode}.{a}.{b}.{how} %z, %a, %b, %c;", want)
        want = lanewise(COMPARISONS[how], count, "u32", a, b, add=True)
        check(f"{opcode}.{a}.{b}.{how}.add %z, %a, %b, %c;", want)


@pytest.mark.parametrize("code,message", [
    ("vadd.u32.u32.u32 %z, %a.b4, %b;", r"must be \.b0 to \.b3, .* \(got \.b4\)"),
    ("vadd2.u32.u32.u32 %z.b0, %a, %b, %c;", r"from high to low, such as .h10 \(got \.b0\)"),
    ("vadd4.u32.u32.u32 %z, %a.b8000, %b, %c;", r"\.b0000 to \.b7777 \(got \.b8000\)"),
    ("vadd.u32.u32.u32.add %z.b0, %a, %b, %c;", "operand 1 must be a whole register"),
    ("vmad.u32.u32.u32.po %z, -%a, %b, %c;", "no operand must be negated"),
    ("vshl.u32.u32.u32 %z, %a, %b;", "must include .clamp or .wrap"),
    ("vadd.u32.u32 %z, %a, %b;", "must include a type"),
    ("add.u32 %z, %a.b0, %b;", r"must be a whole register \(got .* register '%a\.b0'"),
    ("add.u32 %z, -%a, %b;", r"operand 2 must be a register that is not negated \(got .*'-%a'"),
])  # fmt: skip
def test_what_is_refused(code, message):
    with pytest.raises(ValueError, match=message):
        lanes(code, np.uint32, A, B, C)
