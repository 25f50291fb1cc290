"""wmma.load, wmma.mma, wmma.store: every shape and type, layouts, strides, spaces, misuse."""

import re

import numpy as np
import pytest
import torch

from support.opcodes import kernel, kinds, lanes
from torchext import sim

LANE = np.arange(32)
CUBES = ["m16n16k16", "m32n8k16", "m8n32k16"]
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "f32": torch.float32}


def sizes(shape: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", shape)))


def integers(type_: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random integers, small enough for exact sums; integer types use their whole range."""
    low, high = {
        "s8": (-128, 128), "u8": (0, 256), "s4": (-8, 8), "u4": (0, 16), "b1": (0, 2),
        "s32": (-1000, 1000),
    }.get(type_, (-8, 8))  # fmt: skip
    return np.random.default_rng(seed).integers(low, high, (rows, columns))


def stored(values: np.ndarray, type_: str) -> np.ndarray:
    """The matrix in the form in which memory holds it: elements of the last axis are adjacent."""
    if type_ in TORCH:
        code = torch.from_numpy(values).to(TORCH[type_])
        return code.view(torch.int16 if code.element_size() == 2 else torch.int32).numpy()
    if type_ == "f64":
        return values.astype(np.float64)
    if type_ in ("s4", "u4"):
        nibbles = (values & 15).astype(np.uint8)
        return nibbles[:, ::2] | nibbles[:, 1::2] << 4
    if type_ == "b1":
        return np.packbits(values.astype(np.uint8), axis=1, bitorder="little")
    return values.astype({"s8": np.int8, "u8": np.uint8, "s32": np.int32}[type_])


def image(values: np.ndarray, type_: str, rows_contiguous: bool, pad: int) -> tuple:
    """(array, stride): the matrix in memory with `pad` elements after each row or column."""
    lines = values if rows_contiguous else values.T
    stride = lines.shape[1] + pad
    padded = np.zeros((lines.shape[0], stride), values.dtype)
    padded[:, : lines.shape[1]] = lines
    return stored(np.ascontiguousarray(padded), type_), stride


def registers(type_: str, elements: int, *, operand: bool) -> tuple[int, str, str]:
    """(count, type, prefix of the names) of the registers of a fragment."""
    if operand and type_ == "f16":
        return 8, "b32", "%h"
    if type_ == "f64":
        return elements // 32, "f64", "%d"
    if type_ in ("f32", "s32"):
        return elements // 32, type_, "%s" if type_ == "s32" else "%g"
    bits = {"s8": 8, "u8": 8, "s4": 4, "u4": 4, "b1": 1, "tf32": 32}.get(type_, 16)
    return elements * bits // 32 // 32, "b32", "%h"


def names(prefix: str, count: int) -> str:
    return "{" + ", ".join(f"{prefix}{i}" for i in range(count)) + "}"


def run(
    shape, a_type, b_type, c_type, d_type, *, layouts=("row", "col"), order="row", space="global",
    pad=0, op="", suffix="", target="sm_80", result=None, **options,
):  # fmt: skip
    m, n, k = sizes(shape)
    a, b, c = integers(a_type, m, k, 1), integers(b_type, k, n, 2), integers(c_type, m, n, 3)
    parts = [
        image(a, a_type, layouts[0] == "row", pad), image(b, b_type, layouts[1] == "row", pad),
        image(c, c_type, order == "row", pad),
    ]  # fmt: skip
    declared, loads = [], []
    for name, (_, stride), type_, count, layout in zip(
        "abc", parts, (a_type, b_type, c_type), (m * k, k * n, m * n), (*layouts, order),
        strict=True,
    ):  # fmt: skip
        total, kind, prefix = registers(type_, count, operand=name != "c")
        declared.append(f".reg .{kind} {prefix}{name}<{total}>;")
        loads.append((name, names(prefix + name, total), type_, layout, stride))
    total, kind, prefix = registers(d_type, m * n, operand=False)
    declared.append(f".reg .{kind} {prefix}d<{total}>;")
    d_names = names(prefix + "d", total)

    body = "\n".join(declared) + "\n"
    where = "" if space == "generic" else f".{space}"
    for index, (name, register_names, type_, layout, stride) in enumerate(loads):
        body += f"ld.param.u64 %rd{index}, [in_{name}];\n"
        address = f"%rd{index}"
        if space == "shared":
            size = parts[index][0].nbytes
            body += f".shared .align 32 .b8 tile_{name}[{size}];\nmov.u32 %r{index}, tile_{name};\n"
            for at in range(0, size, 4):
                body += f"ld.global.u32 %r9, [%rd{index}+{at}];\n"
                body += f"st.shared.u32 [%r{index}+{at}], %r9;\n"
            body += "bar.warp.sync 0xffffffff;\n"
            address = f"%r{index}"
        body += (
            f"wmma.load.{name}.sync.aligned.{layout}.{shape}{where}.{type_} "
            f"{register_names}, [{address}], {stride};\n"
        )
    types = f"{d_type}.{c_type}" if a_type == "f16" else f"{d_type}.{a_type}.{b_type}.{c_type}"
    a_layout, b_layout = layouts
    fragments = ", ".join(load[1] for load in loads)
    body += (
        f"wmma.mma{op}.sync.aligned.{a_layout}.{b_layout}.{shape}.{types}{suffix} "
        f"{d_names}, {fragments};\nld.param.u64 %rd4, [out];\n"
        f"wmma.store.d.sync.aligned.row.{shape}.global.{d_type} [%rd4], {d_names}, {n};\n"
    )
    params = "".join(f".param .u64 in_{name}, " for name in "abc") + ".param .u64 out"
    out_type = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "s32": np.int32}[d_type]
    out = np.zeros((m, n), out_type)
    report = kernel(body, params, target).launch(
        "kernel", grid=1, block=32, args=[*(sim.read_only(p[0]) for p in parts), sim.output(out)],
        **options,
    )  # fmt: skip
    assert report.ok, str(report)
    np.testing.assert_array_equal(out, (a @ b + c if result is None else result(a, b, c)))


@pytest.mark.parametrize("shape", CUBES)
@pytest.mark.parametrize("types", [
    ("f16", "f16", "f32", "f32", "sm_75"), ("f16", "f16", "f16", "f16", "sm_75"),
    ("f16", "f16", "f32", "f16", "sm_80"), ("f16", "f16", "f16", "f32", "sm_89"),
    ("bf16", "bf16", "f32", "f32", "sm_80"), ("s8", "s8", "s32", "s32", "sm_75"),
    ("u8", "u8", "s32", "s32", "sm_90a"),
])  # fmt: skip
def test_shapes_and_types(shape, types):
    *operands, target = types
    for layouts in (("row", "col"), ("col", "row"), ("row", "row"), ("col", "col")):
        run(shape, *operands, layouts=layouts, target=target)


@pytest.mark.parametrize("shape", CUBES)
@pytest.mark.parametrize("type_,c_type", [("f16", "f16"), ("bf16", "f32"), ("s8", "s32")])
def test_strides_spaces_and_columns(shape, type_, c_type):
    for space in ("global", "shared", "generic"):
        run(shape, type_, type_, c_type, c_type, space=space, pad=16, order="col")


@pytest.mark.parametrize("layouts", [("row", "col"), ("col", "row")])
def test_tf32_and_f64(layouts):
    run("m16n16k8", "tf32", "tf32", "f32", "f32", layouts=layouts, pad=8, order="col")
    run("m8n8k4", "f64", "f64", "f64", "f64", layouts=layouts, pad=4, order="col")
    run("m8n8k4", "f64", "f64", "f64", "f64", suffix=".rm", layouts=layouts)


def bit_product(f):
    return lambda a, b, c: np.array(
        [[f(a[i], b[:, j]).sum() + c[i, j] for j in range(b.shape[1])] for i in range(len(a))]
    )


@pytest.mark.parametrize("type_", ["s4", "u4"])
def test_nibbles(type_):
    run("m8n8k32", type_, type_, "s32", "s32", pad=32)
    run("m8n8k32", type_, type_, "s32", "s32", suffix=".satfinite", target="sm_75")


@pytest.mark.parametrize("op,f", [(".xor.popc", np.bitwise_xor), (".and.popc", np.bitwise_and)])
def test_bits(op, f):
    run("m8n8k128", "b1", "b1", "s32", "s32", op=op, result=bit_product(f), pad=128)


def test_saturation():
    most = 2**31 - 1
    for suffix, want in (("", -(2**31) + 128 * 128 * 16 - 1), (".satfinite", most)):
        code = f"""
            .reg .b32 %w<8>;
            wmma.mma.sync.aligned.row.col.m16n16k16.s32.s8.s8.s32{suffix}
                {{%w0, %w1, %w2, %w3, %w4, %w5, %w6, %w7}}, {{%a, %a}}, {{%a, %a}},
                {{{", ".join([str(most)] * 8)}}};
            mov.b32 %z, %w5;"""
        got = lanes(code, np.int32, np.full(32, 0x80808080, np.uint32), target="sm_80")
        assert (got == want).all()


@pytest.mark.parametrize("shape,place", [
    ("m16n16k16", lambda g, t, e: (g + 8 * (e >> 1 & 1), 2 * t + (e & 1) + 8 * (e >> 2))),
    ("m32n8k16", lambda g, t, e: (g + 8 * (e >> 1), 2 * t + (e & 1))),
    ("m8n32k16", lambda g, t, e: (2 * t + (e & 1), g + 8 * (e >> 1))),
])  # fmt: skip
def test_accumulators_lie_where_ptxas_puts_them(shape, place):
    """The places are those of the SASS that ptxas 13.0 makes for sm_80. Code that edits fragments
    relies on them."""
    m, n, _ = sizes(shape)
    values = "\n".join(f"mad.lo.u32 %w{e}, %r1, 8, {e};" for e in range(8))
    body = f"""
        .reg .b32 %w<8>;
        mov.u32 %r1, %laneid;
        {values}
        ld.param.u64 %rd1, [out];
        wmma.store.d.sync.aligned.row.{shape}.global.s32 [%rd1], {names("%w", 8)}, {n};"""
    out = np.zeros((m, n), np.int32)
    report = kernel(body, target="sm_80").launch("kernel", grid=1, block=32, args=[sim.output(out)])
    assert report.ok, str(report)
    for e in range(8):
        np.testing.assert_array_equal(out[place(LANE // 4, LANE % 4, e)], 8 * LANE + e)


LOAD = """
    .reg .b32 %w<8>;
    ld.param.u64 %rd1, [out];
    {prepare}
    wmma.load.a.sync.aligned.row.m16n16k16.global.f16
        {{%w0, %w1, %w2, %w3, %w4, %w5, %w6, %w7}}, [%rd1], {stride};
"""


@pytest.mark.parametrize("prepare,stride,block,kind", [
    ("add.u64 %rd1, %rd1, 8;", "16", 32, "misaligned access"),
    ("", "20", 32, "misaligned access"),
    ("", "512", 32, "out of bounds"),
    ("mov.u32 %r1, %laneid;\nand.b32 %r1, %r1, 16;\nadd.u32 %r1, %r1, 16;", "%r1", 32,
     "invalid operand"),
    ("", "16", 16, "divergent collective"),
    ("mov.u32 %r1, %laneid;\nsetp.eq.u32 %p1, %r1, 3;\n@%p1", "16", 32, "divergent collective"),
    ("", "%r9", 32, "uninitialized register"),
])  # fmt: skip
def test_misuse_is_found(prepare, stride, block, kind):
    data = np.zeros(1024, np.float16)
    module = kernel(LOAD.format(prepare=prepare, stride=stride), target="sm_80")
    report = module.launch("kernel", grid=1, block=block, args=[data])
    assert kind in kinds(report), str(report)


@pytest.mark.parametrize("fill,block,kind", [
    ("st.shared.v4.u32 [%r3], {%r4, %r4, %r4, %r4};", 32, None),
    ("st.shared.v4.u32 [%r3], {%r4, %r4, %r4, %r4};", 64, "data race"),
    ("", 32, "uninitialized memory"),
])  # fmt: skip
def test_shared_tiles_are_checked(fill, block, kind):
    """A warp's load is ordered after its own stores, not after another warp's."""
    body = f"""
        .shared .align 32 .b8 tile[512];
        .reg .b32 %w<8>;
        mov.u32 %r1, %laneid;
        mov.u32 %r4, %tid.x;
        mov.u32 %r2, tile;
        mad.lo.u32 %r3, %r1, 16, %r2;
        {fill}
        wmma.load.a.sync.aligned.row.m16n16k16.shared.f16
            {{%w0, %w1, %w2, %w3, %w4, %w5, %w6, %w7}}, [%r2], 16;"""
    module = kernel(body, target="sm_80")
    report = module.launch("kernel", grid=1, block=block, args=[np.zeros(4)])
    assert kinds(report) == ({kind} if kind else set()), str(report)


@pytest.mark.parametrize("code,message", [
    ("wmma.load.a.sync.aligned.row.m16n16k16.bf16 {%t0, %t1, %t2, %t3}, [%u0];", "must be sm_80"),
    ("wmma.load.a.sync.aligned.row.m16n8k16.f16 {%t0, %t1, %t2, %t3}, [%u0];", "shape must be"),
    ("wmma.load.a.sync.aligned.row.m16n16k16.f16 {%t0, %t1, %t2, %t3}, [%u0];", "8 elements"),
    ("wmma.load.b.sync.aligned.row.m8n8k32.s4 {%t0}, [%u0];", ".col for B"),
    ("wmma.load.c.sync.aligned.row.m16n16k16.s8 {%t0}, [%u0];", "shape must be"),
    ("wmma.mma.sync.aligned.row.col.m16n16k16.f32.f16 {%t0}, {%t0}, {%t0}, {%t0};", "8 elements"),
    ("wmma.mma.sync.aligned.row.col.m8n8k128.s32.b1.b1.s32 {%t0}, {%t0}, {%t0}, {%t0};", "popc"),
    ("wmma.mma.and.popc.sync.aligned.row.col.m8n8k128.s32.b1.b1.s32 {%t0}, {%t0}, {%t0}, {%t0};",
     "must be sm_80"),
    ("wmma.mma.sync.aligned.row.col.m16n16k16.f16.f16.satfinite {%t0}, {%t0}, {%t0}, {%t0};",
     "got '.satfinite'"),
    ("wmma.mma.sync.aligned.row.col.m16n16k16.s32.s8.u4.s32 {%t0}, {%t0}, {%t0}, {%t0};",
     "of one kind"),
])  # fmt: skip
def test_what_is_refused(code, message):
    with pytest.raises(ValueError, match=message):
        lanes(code, np.uint32, block=32, target="sm_75")
