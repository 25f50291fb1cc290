"""Initial values of .global and .const variables, byte for byte. ptxas accepts every text."""

import struct

import numpy as np
import pytest

from support.ptx_texts import HEADER, ptxas_accepts, run, text_of
from torchext import sim


def initial_bytes(declaration: str, count: int, space: str = "global") -> bytes:
    """The first `count` bytes of variable x, as a kernel reads them."""
    code = f"""mov.u64 %rd2, x;\ncvt.u64.u32 %rd3, %r1;\nadd.u64 %rd2, %rd2, %rd3;
    add.u64 %rd1, %rd1, %rd3;\nld.{space}.u8 %h1, [%rd2];\nst.global.u8 [%rd1], %h1;"""
    text = text_of(code, declaration)
    assert ptxas_accepts(text) == ""
    report, out = run(text, words=count, dtype=np.uint8, block=count)
    assert report.ok, str(report)
    return out.tobytes()


@pytest.mark.parametrize(
    ("declaration", "format", "values"),
    [
        (".global .f32 x[3] = {1.5, -2.0, 0f3F800000};", "3f", (1.5, -2, 1)),
        (".global .f32 x[2] = {1e3, -1.5e-3};", "2f", (1e3, -1.5e-3)),
        (".global .f64 x[2] = {1.5, 0d3FF0000000000000};", "2d", (1.5, 1)),
        (".global .b32 x[2] = {1.5, 7};", "fi", (1.5, 7)),
        (".global .b64 x = 1.5;", "d", (1.5,)),
        (".global .b16 x[2] = {0x3c00, 15};", "2H", (0x3C00, 15)),
        # Values fill the array from its beginning, as ptxas has it (an H200, 2026-11-26).
        (".global .u32 x[3][2] = {{1}, {2, 3}};", "6I", (1, 2, 3, 0, 0, 0)),
        (".global .u32 x[][2] = {{1}, {2}, {3}};", "6I", (1, 2, 3, 0, 0, 0)),
        (".global .s32 x[][2] = {{-1, 0}, {0, -1}, {1}};", "6i", (-1, 0, 0, -1, 1, 0)),
        (".global .u8 x[2][2][2] = {{{1}}, {{2, 3}, {4}}};", "8B", (1, 2, 3, 4, 0, 0, 0, 0)),
        (".global .u32 x[] = {1, 2, 3};", "3I", (1, 2, 3)),
        (".global .v4 .f32 x = {1.0, 2.0, 3.0, 4.0};", "4f", (1, 2, 3, 4)),
        (".global .v2 .u32 x[2] = {{1, 2}, {3, 4}};", "4I", (1, 2, 3, 4)),
        (".global .u32 x[2] = {1 + 2 * 3, (1 << 4) | 1};", "2I", (7, 17)),
        (".global .u32 x[3] = {1 > 2 ? 3 : 4, ~0, WARP_SZ};", "3I", (4, 0xFFFFFFFF, 32)),
        (".global .u8 x[2] = {-1, 256};", "2B", (255, 0)),
        (".global .u32 x[4] = {1};", "4I", (1, 0, 0, 0)),
        (".global .u32 a = 9, x[2] = {1, 2}, b;", "2I", (1, 2)),
        (".weak .global .u32 x = 3;", "I", (3,)),
        (".common .global .u32 x;", "I", (0,)),
        (".visible .global .attribute(.managed) .align 8 .u32 x = 3;", "I", (3,)),
        (".const .align 4 .u32 x[2] = {5, 6};", "2I", (5, 6)),
    ],
)  # fmt: skip
def test_values(declaration, format, values):
    space = "const" if declaration.startswith(".const") else "global"
    expected = struct.pack("<" + format, *values)
    assert initial_bytes(declaration, len(expected), space) == expected


TABLE = ".global .align 4 .u32 table[4] = {10, 11, 12, 13};\n"


@pytest.mark.parametrize(
    ("element", "value"),
    [
        ("table", 10),
        ("table+8", 12),
        ("table+2*4", 12),
        ("generic(table)", 10),
        ("generic(table)+12", 13),
    ],
)
@pytest.mark.parametrize("space", ["global", "const"])
def test_addresses(element, value, space):
    pointers = f".{space} .align 8 .u64 pointers[2] = {{0, {element}}};"
    code = f"""ld.{space}.u64 %rd3, [pointers+8];\nld.global.u32 %r2, [%rd3];
    st.global.u32 [%rd1], %r2;"""
    text = text_of(code, TABLE + pointers)
    assert ptxas_accepts(text) == ""
    report, out = run(text, words=1, block=1)
    assert report.ok, str(report)
    assert out[0] == value


def test_addresses_in_bytes():
    """nvcc initializes a struct that holds a pointer byte by byte, with masks of the address."""
    masked = ", ".join(f"0xFF{'00' * i}(generic(table)+8)" for i in range(8))
    pointers = f".global .align 8 .u8 s[24] = {{1, 0, 0, 0, 0, 0, 0, 0, {masked}, 7}};"
    code = """ld.global.u64 %rd3, [s+8];\nld.u32 %r2, [%rd3];\nld.global.u8 %r3, [s+16];
    add.u32 %r2, %r2, %r3;\nst.global.u32 [%rd1], %r2;"""
    text = text_of(code, TABLE + pointers)
    assert ptxas_accepts(text) == ""
    report, out = run(text, words=1, block=1)
    assert report.ok, str(report)
    assert out[0] == 12 + 7


def test_addresses_of_what_follows_and_of_each_other():
    before = """.extern .global .align 8 .u64 b[2];
    .visible .global .align 8 .u64 a[2] = {b, 5};\n.visible .global .align 8 .u64 b[2] = {a, 7};"""
    code = """ld.global.u64 %rd3, [a];\nld.global.u64 %rd4, [%rd3+8];
    ld.global.u64 %rd5, [%rd3];\nld.global.u64 %rd6, [%rd5+8];\nadd.u64 %rd4, %rd4, %rd6;
    st.global.u64 [%rd1], %rd4;"""
    text = text_of(code, before)
    assert ptxas_accepts(text) == ""
    report, out = run(text, words=1, dtype=np.uint64, block=1)
    assert report.ok, str(report)
    assert out[0] == 12


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        (".global .u32 x[2] = {1, 2, 3};", "'x' must have at most 2 elements"),
        (".global .u32 x[2][2] = {{1, 2, 3}, {4}};", "'x' must have at most 2 elements"),
        (".global .u32 x[2][2] = {1, 2};", r"must be '{' \(got "),
        (".global .f32 x = 1;", "initial values of 'x' must be floating-point"),
        (".global .u32 x = 1.5;", "initial values of 'x' must be integers"),
        (".shared .u32 x = 1;", "'x' must be .global or .const"),
        (".extern .global .u32 x = 1;", "must have no initial value, as it is .extern"),
        (".common .const .u32 x;", "a .common variable must be .global"),
        (".global .u64 x = nothing;", "refers to 'nothing'"),
        (".global .u64 x = y; .global .u32 y;", "refers to 'y', which is not declared before it"),
        (".global .u64 x[2] = {x, 0};", "refers to 'x', which is not declared before it"),
        (".global .u64 x = f; .func f() { ret; }", "refers to 'f'"),
        (".shared .u32 s; .global .u64 x = s;", "refers to 's'"),
        (".global .u32 y; .global .u16 x = y;", "'x' must have 8 bytes to hold an address"),
        (".global .u32 y; .global .u8 x = 0xFFFF(y);", r"must be 0xFF, .* \(got 0xFFFF\)"),
        (".global .u32 x[0];", "must have a size"),
        (".global .u32 x[][];", "must be given, except for the first"),
        (".global .u32 x[2] = {1, };", r"must be a value \(got '}'"),
        (".const .b8 a[65536]; .const .u8 b;", "with 'b' the .const variables have 65537 bytes"),
        (".global .b8 x[2] = \"ab\";", r"must be '{' \(got "),
    ],
)  # fmt: skip
def test_refused(declaration, message):
    with pytest.raises(sim.PtxError, match=f"<ptx>:4: .*{message}"):
        sim.Module(HEADER + declaration)
