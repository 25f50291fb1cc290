"""mma.sync on integers, nibbles, bits and f64; mixed accumulators; what is refused."""

import numpy as np
import pytest

from support.opcodes import kernel, lanes
from torchext import sim

LANE = np.arange(32)


def operand_words(values: np.ndarray, bits: int) -> np.ndarray:
    """Words [register, lane] of a row-major [rows, k] operand, as PTX documents mma's fragments."""
    rows, k = values.shape
    per = 1 if bits == 64 else 32 // bits
    along = k // (4 * per)
    out = []
    for r in range(rows * k // 32 // per):
        row = LANE // 4 + (8 * (r & 1) if rows == 16 else 0)
        first = (LANE % 4) * per + (r >> 1 if rows == 16 else r) % along * 4 * per
        if bits == 64:
            out.append(values[row, first].astype(np.float64).view(np.uint64))
            continue
        word = np.zeros(32, np.uint32)
        for e in range(per):
            field = (values[row, first + e] & ((1 << bits) - 1)).astype(np.uint32)
            word |= field << np.uint32(bits * e)
        out.append(word)
    return np.stack(out)


def run(shape, a, b, c, types, *, bits, op="", suffix="", target="sm_80"):
    """Executes one mma and returns its D [m, n]; a is [m, k], b [n, k], c [m, n]."""
    m, n = c.shape
    wide = bits == 64
    kind, size = ("f64", 8) if wide else ("b32", 4)
    a_words, b_words = operand_words(a, bits), operand_words(b, bits)
    count = m * n // 32
    rows = [LANE // 4 + (8 * (e >> 1) if m == 16 else 0) for e in range(count)]
    columns = [2 * (LANE % 4) + (e & 1) for e in range(count)]
    c_words = np.stack([c[rows[e], columns[e]] for e in range(count)])
    c_words = c_words.astype(np.float64).view(np.uint64) if wide else c_words.astype(np.int32)
    body, lists = "mov.u32 %r1, %laneid;\n", []
    for name, words in zip("abc", (a_words, b_words, c_words), strict=True):
        body += f".reg .{kind} %{name}_<{len(words)}>;\nld.param.u64 %rd1, [in_{name}];\n"
        body += f"mad.wide.u32 %rd1, %r1, {size}, %rd1;\n"
        for r in range(len(words)):
            body += f"ld.global.b{8 * size} %{name}_{r}, [%rd1+{32 * size * r}];\n"
        lists.append("{" + ", ".join(f"%{name}_{r}" for r in range(len(words))) + "}")
    results = "{" + ", ".join(f"%d_{e}" for e in range(count)) + "}"
    body += f".reg .{kind} %d_<{count}>;\n"
    body += f"mma.sync.aligned.{shape}.row.col{suffix}.{types}{op} {results}, {', '.join(lists)};\n"
    body += f"ld.param.u64 %rd1, [out];\nmad.wide.u32 %rd1, %r1, {size}, %rd1;\n"
    for e in range(count):
        body += f"st.global.b{8 * size} [%rd1+{32 * size * e}], %d_{e};\n"
    out = np.zeros((count, 32), np.float64 if wide else np.int32)
    params = ".param .u64 in_a, .param .u64 in_b, .param .u64 in_c, .param .u64 out"
    report = kernel(body, params, target).launch(
        "kernel", grid=1, block=32,
        args=[*map(sim.read_only, (a_words, b_words, c_words)), sim.output(out)],
    )  # fmt: skip
    assert report.ok, str(report)
    got = np.zeros_like(c, out.dtype)
    for e in range(count):
        got[rows[e], columns[e]] = out[e]
    return got


RANGE = {"s8": (-128, 128), "u8": (0, 256), "s4": (-8, 8), "u4": (0, 16), "b1": (0, 2)}


def operands(shape, a_type, b_type, seed=0):
    m, n, k = (int(v) for v in shape[1:].replace("n", " ").replace("k", " ").split())
    rng = np.random.default_rng(seed)
    return (
        rng.integers(*RANGE[a_type], (m, k)), rng.integers(*RANGE[b_type], (n, k)),
        rng.integers(-1000, 1000, (m, n)),
    )  # fmt: skip


@pytest.mark.parametrize("shape,bits", [
    ("m8n8k16", 8), ("m16n8k16", 8), ("m16n8k32", 8),
    ("m8n8k32", 4), ("m16n8k32", 4), ("m16n8k64", 4),
])  # fmt: skip
@pytest.mark.parametrize("a_sign,b_sign", ["ss", "su", "us", "uu"])
def test_integers(shape, bits, a_sign, b_sign):
    a_type, b_type = f"{a_sign}{bits}", f"{b_sign}{bits}"
    a, b, c = operands(shape, a_type, b_type)
    target = "sm_75" if shape.startswith("m8") else "sm_90a"
    got = run(shape, a, b, c, f"s32.{a_type}.{b_type}.s32", bits=bits, target=target)
    np.testing.assert_array_equal(got, a @ b.T + c)


@pytest.mark.parametrize("shape", ["m8n8k16", "m16n8k32"])
def test_saturation(shape):
    a, b, c = operands(shape, "s8", "s8")
    c = np.where(c < 0, -(2**31), 2**31 - 1)
    exact = a @ b.T + c
    got = run(shape, a, b, c, "s32.s8.s8.s32", bits=8, suffix=".satfinite")
    np.testing.assert_array_equal(got, np.clip(exact, -(2**31), 2**31 - 1))
    got = run(shape, a, b, c, "s32.s8.s8.s32", bits=8)
    np.testing.assert_array_equal(got, exact.astype(np.uint32).view(np.int32))


@pytest.mark.parametrize("shape", ["m8n8k128", "m16n8k128", "m16n8k256"])
@pytest.mark.parametrize("op,f", [("xor", np.bitwise_xor), ("and", np.bitwise_and)])
def test_bits(shape, op, f):
    a, b, c = operands(shape, "b1", "b1")
    got = run(shape, a, b, c, "s32.b1.b1.s32", bits=1, op=f".{op}.popc")
    np.testing.assert_array_equal(got, f(a[:, None], b[None]).sum(-1) + c)


@pytest.mark.parametrize("shape,target", [
    ("m8n8k4", "sm_80"), ("m16n8k4", "sm_90"), ("m16n8k8", "sm_90"), ("m16n8k16", "sm_90a"),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["", ".rz", ".rm", ".rp"])
def test_f64(shape, target, mode):
    """The result is a chain of FMAs along K. Sums must be inexact: exact ones hide the order."""
    m, n, k = (int(v) for v in shape[1:].replace("n", " ").replace("k", " ").split())
    rng = np.random.default_rng(1)
    a, b, c = (rng.standard_normal(size) for size in ((m, k), (n, k), (m, n)))
    got = run(shape, a, b, c, f"f64.f64.f64.f64{mode}", bits=64, target=target)
    # The oracle is fma.f64, which test_op_floating64.py checks against rationals.
    rows, columns = (index.reshape(-1) for index in np.indices((m, n)))
    want = c[rows, columns]
    for kk in range(k):
        code = f"fma{mode or '.rn'}.f64 %z, %a, %b, %c;"
        want = lanes(code, float, a[rows, kk], b[columns, kk], want)
    np.testing.assert_array_equal(got.reshape(-1), want)
    np.testing.assert_allclose(got, a @ b.T + c, rtol=0, atol=1e-13)


@pytest.mark.parametrize("code,target,message", [
    ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {}, {}, {}, {};", "sm_80", "shape must be"),
    ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {}, {}, {}, {};", "sm_75", "must be sm_80"),
    ("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {}, {}, {}, {};", "sm_80", "must be sm_90"),
    ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {}, {}, {}, {};", "sm_80", "sm_89"),
    ("mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {}, {}, {}, {};", "sm_80", "of one kind"),
    ("mma.sync.aligned.m16n8k16.row.col.f16.bf16.bf16.f32 {}, {}, {}, {};", "sm_80", "of D and C"),
    ("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.f32 {}, {}, {}, {};", "sm_80", "must be .s32"),
    ("mma.sync.aligned.m16n8k32.row.col.f32.e2m1.e2m1.f32 {}, {}, {}, {};", "sm_90a", "types"),
    ("mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {}, {}, {}, {}, %t0, 0;", "sm_80",
     "sparse"),
])  # fmt: skip
def test_what_is_refused(code, target, message):
    with pytest.raises(ValueError, match=message):
        lanes(code, np.uint32, block=32, target=target)
