"""ldmatrix, stmatrix, movmatrix, mma.sync and wgmma, and the findings for the misuse of each."""

import numpy as np
import pytest
import torch

from support.opcodes import kernel, kinds, lanes
from torchext import sim

COMPLETIONS = ["late", "eager", "random"]
LANE = np.arange(32)


# ---- ldmatrix, stmatrix, movmatrix -------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(count, trans):
    elements = np.random.default_rng(0).integers(0, 65536, (32, 8), np.uint16)
    source = elements.view(np.uint64).reshape(32, 2)
    registers = ["%z", "%y", "%x", "%w"][:count]
    code = f"""
        .shared .align 16 .b8 rows[512];
        mov.u32 %t0, rows;
        mad.lo.u32 %t1, %tid_, 16, %t0;
        st.shared.v2.b64 [%t1], {{%a, %b}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared::cta.b16
            {{{", ".join(registers)}}}, [%t1];
    """
    got = lanes(code, [np.uint32] * count, source[:, 0], source[:, 1])
    for j in range(count):
        matrix = elements[8 * j : 8 * j + 8]
        matrix = matrix.T if trans else matrix
        pairs = got[j].view(np.uint16).reshape(32, 2)
        for lane in range(32):
            np.testing.assert_array_equal(pairs[lane], matrix[lane // 4, 2 * (lane % 4) :][:2])


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_inverse(count, trans):
    values = np.random.default_rng(1).integers(0, 2**32, (4, 32), np.uint32)
    names = ["%a", "%b", "%c", "%d"][:count]
    results = ["%z", "%y", "%x", "%w"][:count]
    code = f"""
        .shared .align 16 .b8 rows[512];
        mov.u32 %t0, rows;
        mad.lo.u32 %t1, %tid_, 16, %t0;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%t1], {{{", ".join(names)}}};
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{", ".join(results)}}}, [%t1];
    """
    got = lanes(code, [np.uint32] * count, *values[:count])
    np.testing.assert_array_equal(np.stack(got), values[:count])


def test_movmatrix():
    elements = np.random.default_rng(2).integers(0, 65536, (8, 8), np.uint16)
    got = lanes(
        "movmatrix.sync.aligned.m8n8.trans.b16 %z, %a;",
        np.uint32,
        elements.reshape(-1).view(np.uint32),
    )
    np.testing.assert_array_equal(got.view(np.uint16).reshape(8, 8), elements.T)


# ---- mma.sync ----------------------------------------------------------------------------------


def fragment(matrix: np.ndarray, registers: int) -> list[np.ndarray]:
    """The 32-bit registers that hold a row-major [rows, k] operand of mma.

    A has 16 rows; B, given transposed, has 8. Each register is an array with a word for each lane.
    """
    per = 4 // matrix.itemsize
    out = []
    rows = matrix.shape[0]
    for r in range(registers):
        high_row, high_k = (r & 1, r >> 1) if rows == 16 else (0, r)
        row = LANE // 4 + 8 * high_row
        k = (LANE % 4) * per + high_k * 4 * per
        words = np.stack([matrix[row, k + e] for e in range(per)], 1)
        out.append(np.ascontiguousarray(words).view(np.uint32).reshape(-1))
    return out


FLOATS = {
    "f16": (torch.float16, 2), "bf16": (torch.bfloat16, 2), "e4m3": (torch.float8_e4m3fn, 1),
    "e5m2": (torch.float8_e5m2, 1), "tf32": (torch.float32, 4),
}  # fmt: skip


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    ).numpy()


@pytest.mark.parametrize("a_type,b_type,k,target", [
    ("f16", "f16", 8, "sm_80"), ("f16", "f16", 16, "sm_80"), ("bf16", "bf16", 16, "sm_80"),
    ("bf16", "bf16", 8, "sm_90a"), ("tf32", "tf32", 8, "sm_80"), ("tf32", "tf32", 4, "sm_80"),
    ("e4m3", "e4m3", 32, "sm_89"), ("e5m2", "e4m3", 32, "sm_89"), ("e4m3", "e5m2", 32, "sm_90a"),
])  # fmt: skip
def test_mma(a_type, b_type, k, target):
    torch.manual_seed(0)
    small = torch.randint(-8, 8, (24, k)).float()  # small enough that sums are exact
    a = small[:16].to(FLOATS[a_type][0])
    b = small[16:].to(FLOATS[b_type][0])
    registers = k * FLOATS[a_type][1] // 16
    c = torch.randint(-100, 100, (16, 8)).float()
    want = a.float() @ b.float().T + c
    a_names = ["%a", "%b", "%c", "%d"][: 2 * registers]
    b_names = ["%e", "%f"][:registers] if registers == 2 else ["%c"]
    inputs = fragment(as_numpy(a), 2 * registers) + fragment(as_numpy(b), registers)
    code, names = "", "abcdefg"
    # The accumulators are in constant memory: `lanes` has too few inputs for all registers.
    for r in range(4):
        rows, columns = LANE // 4 + 8 * (r >> 1), 2 * (LANE % 4) + (r & 1)
        table = ", ".join(
            str(int(v)) for v in c[rows, columns].to(torch.int32).numpy().view(np.uint32)
        )
        code += f".const .align 4 .b32 c{r}[32] = {{{table}}};\nmov.u64 %u0, c{r};\n"
        code += f"mad.wide.u32 %u0, %tid_, 4, %u0;\nld.const.s32 %t{r}, [%u0];\n"
        code += f"cvt.rn.f32.s32 %t{r}, %t{r};\n"
    a_list = ", ".join(f"%{n}" for n in names[: 2 * registers])
    b_list = ", ".join(f"%{n}" for n in names[2 * registers : 3 * registers])
    del a_names, b_names
    code += (
        f"mma.sync.aligned.m16n8k{k}.row.col.f32.{a_type}.{b_type}.f32 "
        f"{{%z, %y, %x, %w}}, {{{a_list}}}, {{{b_list}}}, {{%t0, %t1, %t2, %t3}};"
    )
    got = lanes(code, [np.float32] * 4, *inputs, target=target)
    for r in range(4):
        rows, columns = LANE // 4 + 8 * (r >> 1), 2 * (LANE % 4) + (r & 1)
        np.testing.assert_array_equal(got[r], want[rows, columns].numpy())


@pytest.mark.parametrize("a_type,b_type", [("s8", "s8"), ("u8", "s8"), ("u8", "u8")])
def test_integer_mma(a_type, b_type):
    rng = np.random.default_rng(3)
    make = lambda t, n: rng.integers(*((-128, 128) if t == "s8" else (0, 256)), (n, 16))  # noqa: E731
    a, b = make(a_type, 16), make(b_type, 8)
    want = a @ b.T + 5
    inputs = fragment(a.astype(np.uint8), 2) + fragment(b.astype(np.uint8), 1)
    code = (
        f"mma.sync.aligned.m16n8k16.row.col.s32.{a_type}.{b_type}.s32 "
        "{%z, %y, %x, %w}, {%a, %b}, {%c}, {5, 5, 5, 5};"
    )
    got = lanes(code, [np.int32] * 4, *inputs)
    for r in range(4):
        rows, columns = LANE // 4 + 8 * (r >> 1), 2 * (LANE % 4) + (r & 1)
        np.testing.assert_array_equal(got[r], want[rows, columns])


def test_half_accumulator():
    torch.manual_seed(0)
    a, b = torch.randint(-4, 4, (16, 16)).half(), torch.randint(-4, 4, (8, 16)).half()
    want = (a.float() @ b.float().T).numpy()
    inputs = fragment(as_numpy(a), 4) + fragment(as_numpy(b), 2)
    code = (
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
        "{%z, %y}, {%a, %b, %c, %d}, {%e, %f}, {%z, 0};"
    )
    with pytest.raises(sim.PtxError, match=r"C of \.f16 must have a register"):
        lanes(code.replace("{%z, 0}", "{0, 0}"), [np.uint32] * 2, *inputs)
    code = "mov.b32 %z, 0;\n" + code
    got = lanes(code, [np.uint32] * 2, *inputs)
    for h in range(2):
        pairs = got[h].view(np.float16).reshape(32, 2)
        for i in range(2):
            np.testing.assert_array_equal(pairs[:, i], want[LANE // 4 + 8 * h, 2 * (LANE % 4) + i])


# ---- wgmma -------------------------------------------------------------------------------------

# in: the bytes of A, then of B, as shared memory is to hold them. out: [64, n] f32.
WGMMA = """
    .shared .align 1024 .b8 tile[{bytes}];
    ld.param.u64 %rd1, [in];
    ld.param.u64 %rd2, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, tile;
    mov.u32 %r3, %r1;
FILL:
    mad.wide.u32 %rd3, %r3, 4, %rd1;
    ld.global.u32 %r4, [%rd3];
    mad.lo.u32 %r5, %r3, 4, %r2;
    st.shared.u32 [%r5], %r4;
    add.u32 %r3, %r3, 128;
    setp.lt.u32 %p1, %r3, {words};
    @%p1 bra FILL;
    {proxy_fence}
    {barrier}
    cvt.u64.u32 %rd4, %r2;
    shr.u64 %rd4, %rd4, 4;
    add.u64 %rd5, %rd4, {b_at};
    or.b64 %rd4, %rd4, {a_layout};
    or.b64 %rd5, %rd5, {b_layout};
    {load_a}
    setp.ne.u32 %p2, %r1, %r1;
    {fence}
    {multiply}
    {commit}
    {wait}
    shr.u32 %r10, %r1, 2;
    and.b32 %r10, %r10, 7;
    shr.u32 %r11, %r1, 5;
    mad.lo.u32 %r10, %r11, 16, %r10;
    and.b32 %r11, %r1, 3;
    shl.b32 %r11, %r11, 1;
    mad.lo.u32 %r12, %r10, {n}, %r11;
    mad.wide.u32 %rd6, %r12, 4, %rd2;
    {store}
"""


def layout(leading: int, stride: int, swizzle: int) -> str:
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return hex(leading >> 4 << 16 | stride >> 4 << 32 | mode << 62)


def swizzled(image: np.ndarray, swizzle: int) -> np.ndarray:
    if swizzle == 0:
        return image
    at = np.arange(image.size)
    out = np.zeros_like(image)
    out[at ^ ((at >> 7 & (swizzle // 16 - 1)) << 4)] = image
    return out


def k_major_image(matrix: np.ndarray, swizzle: int) -> tuple[np.ndarray, str]:
    """(bytes, layout) of a K-major operand [rows, 32 bytes] in shared memory.

    Without a swizzle it is core matrices; with one, each row is padded to `swizzle` bytes.
    """
    rows = matrix.view(np.uint8).reshape(matrix.shape[0], 32)
    if swizzle == 0:  # cores of 8 rows x 16 bytes: 128 bytes apart along K, 256 along rows
        image = rows.reshape(-1, 8, 2, 16).transpose(0, 2, 1, 3).reshape(-1)
        return image, layout(128, 256, 0)
    padded = np.zeros((len(rows), swizzle), np.uint8)
    padded[:, :32] = rows
    return swizzled(padded.reshape(-1), swizzle), layout(16, 8 * swizzle, swizzle)


def mn_major_image(matrix: np.ndarray, swizzle: int) -> tuple[np.ndarray, str]:
    """(bytes, layout) of an MN-major operand in shared memory, from a matrix [rows, 16] of 16 bits.

    K is outermost; rows are contiguous within an atom of `swizzle` bytes.
    """
    rows = matrix.T.copy().view(np.uint8).reshape(16, -1)  # [k, 2 * rows bytes]
    width = rows.shape[1]
    if swizzle == 0:  # 16-byte chunks along MN are `stride` apart, groups of 8 k `leading`
        image = rows.reshape(2, 8, width // 16, 16).transpose(0, 2, 1, 3).reshape(-1)
        return image, layout(128 * width // 16, 128, 0)
    image = rows.reshape(2, 8, width // swizzle, swizzle).transpose(2, 0, 1, 3).reshape(-1)
    return swizzled(image, swizzle), layout(16 * swizzle, 8 * swizzle, swizzle)


def wgmma(
    a_type="e4m3", b_type="e4m3", *, n=16, swizzle=128, a_major="k", b_major="k",
    a_registers=False, negate=1, half=False, completion="late", lane_order="converged", seed=0,
    **parts,
):  # fmt: skip
    torch.manual_seed(0)
    k = 32 // FLOATS[a_type][1]
    a = torch.randint(-7, 8, (64, k)).float().to(FLOATS[a_type][0])
    b = torch.randint(-7, 8, (n, k)).float().to(FLOATS[b_type][0])
    image = {"k": k_major_image, "mn": mn_major_image}
    a_image, a_layout = image[a_major](as_numpy(a), swizzle)
    b_image, b_layout = image[b_major](as_numpy(b), swizzle)
    a_image = np.pad(a_image, (0, -len(a_image) % 1024))
    source = np.concatenate([a_image, b_image])
    source = np.pad(source, (0, -len(source) % 512))
    count = n // 4 if half else n // 2
    registers = ", ".join(f"%r{20 + i}" if half else f"%f{i}" for i in range(count))
    a_operand, load_a = "%rd4", ""
    if a_registers:
        a_operand = "{%r56, %r57, %r58, %r59}"
        fragments = np.stack([
            np.concatenate([fragment(as_numpy(a)[16 * w : 16 * w + 16], 4)[r] for w in range(4)])
            for r in range(4)
        ])  # fmt: skip
        for r in range(4):
            table = ", ".join(map(str, fragments[r]))
            load_a += f".const .align 4 .b32 a{r}[128] = {{{table}}};\nmov.u64 %rd10, a{r};\n"
            load_a += f"mad.wide.u32 %rd10, %r1, 4, %rd10;\nld.const.b32 %r{56 + r}, [%rd10];\n"
    accumulator = "f16" if half else "f32"
    may_transpose = FLOATS[a_type][1] == 2
    tail = ""
    if may_transpose:
        tail = "" if a_registers else f", {int(a_major == 'mn')}"
        tail += f", {int(b_major == 'mn')}"
    mma = (
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{accumulator}.{a_type}.{b_type} "
        f"{{{registers}}}, {a_operand}, %rd5, %p2, {negate}, 1{tail};\n"
    )
    twice = mma + "setp.eq.u32 %p2, %r1, %r1;\n" + mma  # D = 2 * A * B
    store = ""
    for j in range(n // 8):
        for h in range(2):
            for i in range(2):
                at = 4 * (8 * h * n + 8 * j + i)
                if half:
                    register = 20 + 2 * j + h
                    store += f"mov.b32 {{%h1, %h2}}, %r{register};\ncvt.f32.f16 %f150, %h{1 + i};\n"
                    store += f"st.global.f32 [%rd6+{at}], %f150;\n"
                else:
                    store += f"st.global.f32 [%rd6+{at}], %f{4 * j + 2 * h + i};\n"
    text = {
        "bytes": len(source), "words": len(source) // 4, "n": n, "b_at": len(a_image) // 16,
        "a_layout": a_layout, "b_layout": b_layout, "load_a": load_a, "store": store,
        "proxy_fence": "fence.proxy.async.shared::cta;", "barrier": "bar.sync 0;",
        "fence": "wgmma.fence.sync.aligned;",
        "multiply": twice, "commit": "wgmma.commit_group.sync.aligned;",
        "wait": "wgmma.wait_group.sync.aligned 0;", **parts,
    }  # fmt: skip
    if "insert" in text:
        before, after = text.pop("insert")
        text["multiply"] = before + text["multiply"] + after
    out = np.zeros((64, n), np.float32)
    module = kernel(WGMMA.format(**text), ".param .u64 in, .param .u64 out")
    report = module.launch(
        "kernel",
        grid=1,
        block=128,
        args=[sim.read_only(source), sim.output(out)],
        completion=completion,
        lane_order=lane_order,
        seed=seed,
    )
    return report, out, (2 * negate * (a.float() @ b.float().T)).numpy()


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("case", [
    dict(a_type="e4m3", b_type="e5m2", n=64), dict(a_type="e5m2", b_type="e4m3", n=256),
    dict(a_type="f16", b_type="f16", n=24), dict(a_type="bf16", b_type="bf16", n=8),
    dict(swizzle=0), dict(swizzle=32), dict(swizzle=64), dict(n=40, swizzle=64),
    dict(a_registers=True), dict(a_type="bf16", b_type="bf16", a_registers=True, n=32),
    dict(a_type="bf16", b_type="bf16", negate=-1), dict(a_type="f16", b_type="f16", half=True),
    dict(a_type="tf32", b_type="tf32"),
])  # fmt: skip
def test_wgmma(case, completion):
    report, got, want = wgmma(completion=completion, **case)
    assert report.ok, str(report)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("a_major,b_major", [("mn", "k"), ("k", "mn"), ("mn", "mn")])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_wgmma_mn_major(a_major, b_major, swizzle):
    report, got, want = wgmma(
        "bf16", "bf16", n=64, swizzle=swizzle, a_major=a_major, b_major=b_major
    )
    assert report.ok, str(report)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("fault,kind", [
    ({"fence": ""}, "missing wgmma.fence"),
    ({"fence": "wgmma.fence.sync.aligned;\nmov.f32 %f3, 0f00000000;"}, "missing wgmma.fence"),
    ({"commit": ""}, "wgmma register in flight"),
    ({"wait": ""}, "wgmma register in flight"),
    ({"wait": "wgmma.wait_group.sync.aligned 1;"}, "wgmma register in flight"),
    ({"wait": "wgmma.wait_group.sync.aligned 1;", "store": "mov.u32 %r0, 0;"},
     "wgmma not committed"),
    ({"proxy_fence": ""}, "missing proxy fence"),
    ({"insert": ("", "mov.f32 %f1, 0f00000000;")}, "wgmma register in flight"),
    ({"insert": ("", "st.shared.u32 [%r5+0], %r4;")}, "wgmma operand in flight"),
    ({"insert": ("setp.lt.u32 %p3, %r1, 32;\n@%p3 add.u64 %rd5, %rd5, 2;\n", "")},
     "wgmma disagreement"),
    ({"insert": ("setp.lt.u32 %p3, %r1, 96;\n@%p3 bra SKIP;\n", "SKIP:\n")},
     "wgmma disagreement"),
    ({"insert": ("and.b32 %r9, %r1, 1;\nsetp.eq.u32 %p3, %r9, 0;\n"
                 "@%p3 add.u64 %rd5, %rd5, 2;\n", "")},
     "wgmma disagreement"),
    ({"b_layout": hex(1 << 62 | 0x3FFF << 32)}, "out of bounds"),
])  # fmt: skip
def test_wgmma_faults(fault, kind, completion):
    report, _, _ = wgmma(completion=completion, **fault)
    assert kind in kinds(report), str(report)


def test_uninitialized_accumulator():
    code = "setp.eq.u32 %p2, %r1, %r1;\nwgmma.fence.sync.aligned;"
    report, _, _ = wgmma(fence=code)
    assert "uninitialized register" in kinds(report)


def test_wgmma_needs_its_target():
    with pytest.raises(Exception, match="sm_90"):
        lanes("wgmma.fence.sync.aligned;\nmov.u32 %z, 0;", np.uint32, block=128, target="sm_89")


# ---- wgmma: where the four warps of a warpgroup meet ---------------------------------------------

SCHEDULES = [(seed, completion) for seed in range(3) for completion in COMPLETIONS]


@pytest.mark.parametrize("seed,completion", SCHEDULES)
def test_a_wgmma_reads_what_all_four_warps_have_written(seed, completion):
    """No barrier is needed: each warp fences its own writes, and the wgmma joins all four."""
    report, got, want = wgmma(barrier="", seed=seed, completion=completion)
    assert report.ok, str(report)
    np.testing.assert_array_equal(got, want)
    report, _, _ = wgmma(barrier="", proxy_fence="", seed=seed, completion=completion)
    assert kinds(report) == {"missing proxy fence"}
    # By the letter of PTX a wgmma does not order the four warps.
    report, _, _ = wgmma(barrier="", seed=seed, completion=completion, lane_order="strict")
    assert "data race" in kinds(report)


READ = "ld.shared.u32 %r14, [%r13];\n"
FREE = "setp.eq.u32 %p3, %r1, 32;\n@%p3 st.shared.u32 [%r13], %r1;\n"
WAIT = "wgmma.wait_group.sync.aligned 0;\n"
SCALE = """
    .shared .align 4 .b8 scale[4];
    mov.u32 %r13, scale;
    setp.eq.u32 %p3, %r1, 0;
    @%p3 st.shared.u32 [%r13], 7;
    fence.proxy.async.shared::cta;
"""


@pytest.mark.parametrize("seed,completion", SCHEDULES)
@pytest.mark.parametrize("read,wait,ordered", [
    (READ, WAIT + FREE, True), ("", READ + WAIT + FREE, False), (READ, FREE + WAIT, False),
])  # fmt: skip
def test_who_has_waited_knows_what_the_others_read_before(read, wait, ordered, seed, completion):
    """One thread overwrites a scale that all threads read before they issued the wgmma."""
    report, _, _ = wgmma(
        proxy_fence=SCALE, insert=(read, ""), wait=wait, seed=seed, completion=completion
    )
    assert report.ok == ordered, str(report)
    assert ordered or kinds(report) == {"data race"}
