"""ld, st, cvta, isspacep, prefetch, cache policies, local and constant memory, atomics."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from support.opcodes import kernel, kinds, lanes, lanes_report, random_bits
from torchext import sim


@pytest.mark.parametrize("space", ["shared", "local"])
@pytest.mark.parametrize("width,count", [
    (width, count) for width in (8, 16, 32, 64) for count in (1, 2, 4) if width * count <= 128
])  # fmt: skip
def test_store_then_load(space, width, count):
    vector = {1: "", 2: ".v2", 4: ".v4"}[count]
    a = random_bits(np.uint64)
    size = width * count // 8
    registers = ["%u0", "%u1", "%u2", "%u3"][:count]
    code = f".{space} .align 16 .b8 buffer[{64 * size}];\nmov.u64 %u4, buffer;\n"
    code += f"mad.wide.u32 %u4, %tid_, {size}, %u4;\n" if space == "shared" else ""
    for k, r in enumerate(registers):
        code += f"add.u64 {r}, %a, {k};\n"
    listed = "{" + ", ".join(registers) + "}" if count > 1 else registers[0]
    code += f"st.{space}{vector}.b{width} [%u4], {listed};\n"
    code += "".join(f"mov.u64 {r}, 0;\n" for r in registers)
    code += f"ld.{space}{vector}.b{width} {listed}, [%u4];\nadd.u64 %z, %u0, 0;\n"
    for r in registers[1:]:
        code += f"add.u64 %z, %z, {r};\n"
    mask = (1 << width) - 1
    want = [sum((int(v) + k) & mask for k in range(count)) % 2**64 for v in a]
    np.testing.assert_array_equal(lanes(code, np.uint64, a), np.array(want, np.uint64))


def test_signed_loads_extend_and_unsigned_do_not():
    a = random_bits(np.int8)
    code = "ld.param.u64 %u0, [in_a];\ncvt.u64.u32 %u1, %tid_;\nadd.u64 %u0, %u0, %u1;\n"
    got = lanes(code + "ld.global.s8 %z, [%u0];", np.int32, a)
    np.testing.assert_array_equal(got, a.astype(np.int32))
    got = lanes(code + "ld.global.u8 %z, [%u0];", np.uint32, a)
    np.testing.assert_array_equal(got, a.view(np.uint8).astype(np.uint32))


@pytest.mark.parametrize("load", [
    "ld.global.nc.L1::no_allocate.L2::128B.b32", "ld.volatile.global.u32",
    "ld.relaxed.gpu.global.u32", "ld.acquire.sys.global.u32", "ldu.global.u32",
    "ld.global.L1::evict_last.L2::256B.u32", "ld.u32", "ld.global.cg.u32", "ld.weak.global.u32",
])  # fmt: skip
def test_load_variants(load):
    a = random_bits(np.uint32)
    code = "ld.param.u64 %u0, [in_a];\nmad.wide.u32 %u0, %tid_, 4, %u0;\n"
    np.testing.assert_array_equal(lanes(code + f"{load} %z, [%u0];", np.uint32, a), a)


def test_cache_policy_operand_and_hints():
    a = random_bits(np.uint32)
    code = """
        ld.param.u64 %u0, [in_a];
        mad.wide.u32 %u0, %tid_, 4, %u0;
        createpolicy.fractional.L2::evict_first.b64 %u1, 1.0;
        prefetch.global.L2 [%u0];
        prefetchu.L1 [%u0];
        ld.global.L2::cache_hint.b32 %z, [%u0], %u1;
        applypriority.global.L2::evict_normal [%u0], 128;
    """
    np.testing.assert_array_equal(lanes(code, np.uint32, a), a)


def test_generic_addresses():
    a = random_bits(np.uint32, 32)
    code = """
        .shared .align 4 .b8 buffer[128];
        .local .align 4 .b8 own[4];
        mov.u64 %u0, buffer;
        mad.wide.u32 %u0, %tid_, 4, %u0;
        cvta.shared.u64 %u1, %u0;
        st.u32 [%u1], %a;
        cvta.to.shared.u64 %u2, %u1;
        ld.shared.u32 %t0, [%u2];
        mov.u64 %u3, own;
        cvta.local.u64 %u4, %u3;
        st.u32 [%u4], %t0;
        ld.local.u32 %z, [own];
        isspacep.shared %p, %u1;
        isspacep.local %q, %u4;
        and.pred %p, %p, %q;
        isspacep.global %q, %u1;
        not.pred %q, %q;
        and.pred %p, %p, %q;
        selp.u32 %y, 1, 0, %p;
    """
    value, spaces = lanes(code, [np.uint32, np.uint32], a)
    np.testing.assert_array_equal(value, a)
    assert spaces.all()


def test_global_and_constant_variables():
    text = """.version 8.0
.target sm_90a
.address_size 64
.const .align 4 .u32 table[4] = {10, 20, 30, 40};
.global .align 4 .u32 counter = 5;
.global .align 8 .u64 pointer = generic(counter);
.visible .entry kernel(.param .u64 out)
{
    .reg .b32 %r<8>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [out];
    ld.const.u32 %r1, [table+8];
    ld.global.u64 %rd2, [pointer];
    atom.global.add.u32 %r2, [%rd2], 1;
    add.u32 %r3, %r1, %r2;
    st.global.u32 [%rd1], %r3;
    ret;
}
"""
    module, out = sim.Module(text), np.zeros(1, np.uint32)
    for want in (35, 36):  # .global variables outlive a launch
        report = module.launch("kernel", grid=1, block=1, args=[sim.output(out)])
        assert report.ok and out[0] == want, str(report)


ATOMICS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "add.u32": (np.uint32, lambda v: np.sum(v, dtype=np.uint32)),
    "add.s32": (np.int32, lambda v: np.sum(v, dtype=np.int32)),
    "add.u64": (np.uint64, lambda v: np.sum(v, dtype=np.uint64)),
    "min.s32": (np.int32, np.min), "max.u32": (np.uint32, np.max), "min.u64": (np.uint64, np.min),
    "and.b32": (np.uint32, np.bitwise_and.reduce), "or.b32": (np.uint32, np.bitwise_or.reduce),
    "xor.b64": (np.uint64, np.bitwise_xor.reduce),
}  # fmt: skip


@pytest.mark.parametrize("op", ATOMICS)
@pytest.mark.parametrize("form", ["red", "atom"])
def test_atomics(op, form):
    dtype, f = ATOMICS[op]
    a = random_bits(dtype)
    slot = a[:1].copy()
    width = 8 * a.itemsize
    result = f"%rd{8}, " if width == 64 else "%r8, "
    register = "%rd7" if width == 64 else "%r7"
    body = f"""
        ld.param.u64 %rd1, [values];
        ld.param.u64 %rd2, [slot];
        mov.u32 %r1, %tid.x;
        mad.wide.u32 %rd1, %r1, {a.itemsize}, %rd1;
        ld.global.b{width} {register}, [%rd1];
        {form}.global.{op} {result if form == "atom" else ""}[%rd2], {register};
    """
    module = kernel(body, ".param .u64 values, .param .u64 slot")
    report = module.launch("kernel", grid=1, block=64, args=[sim.read_only(a), slot])
    assert report.ok, str(report)
    with np.errstate(over="ignore"):
        assert slot[0] == f(np.concatenate([a, a[:1]]))


def test_atomic_results_count_every_thread_once():
    code = """
        .shared .align 4 .b8 counter[4];
        setp.eq.u32 %p, %tid_, 0;
        @%p st.shared.u32 [counter], 0;
        bar.sync 0;
        atom.shared.inc.u32 %z, [counter], 1000;
    """
    got = lanes(code, np.uint32, block=256)
    np.testing.assert_array_equal(np.sort(got), np.arange(256))
    code = code.replace("inc.u32 %z, [counter], 1000", "dec.u32 %z, [counter], 255")
    got = lanes(code, np.uint32, block=256)
    np.testing.assert_array_equal(np.sort(got), np.arange(256))


def test_cas_and_exch():
    lock = """
        .shared .align 8 .b8 total[8];
        setp.eq.u32 %p, %tid_, 0;
        mov.u64 %u3, 0;
        @%p st.shared.u64 [total], %u3;
        bar.sync 0;
        cvt.u64.u32 %u4, %a;
    AGAIN:
        ld.volatile.shared.u64 %u0, [total];
        add.u64 %u1, %u0, %u4;
        atom.shared.cas.b64 %u2, [total], %u0, %u1;
        setp.ne.u64 %p, %u2, %u0;
        @%p bra AGAIN;
        bar.sync 0;
        ld.shared.u64 %z, [total];
    """
    a = random_bits(np.uint32)
    np.testing.assert_array_equal(lanes(lock, np.uint64, a), np.full(64, a.astype(np.uint64).sum()))
    out, slot = np.zeros(64, np.uint32), np.array([1000], np.uint32)
    body = """
        ld.param.u64 %rd1, [out];
        ld.param.u64 %rd2, [slot];
        mov.u32 %r1, %tid.x;
        atom.global.exch.b32 %r2, [%rd2], %r1;
        mad.wide.u32 %rd1, %r1, 4, %rd1;
        st.global.u32 [%rd1], %r2;
    """
    module = kernel(body, ".param .u64 out, .param .u64 slot")
    assert module.launch("kernel", grid=1, block=64, args=[sim.output(out), slot]).ok
    assert sorted([*out.tolist(), int(slot[0])]) == [*range(64), 1000]


@pytest.mark.parametrize("name,dtype", [
    ("f32", torch.float32), ("f64", torch.float64), ("f16x2", torch.float16),
    ("bf16x2", torch.bfloat16),
])  # fmt: skip
def test_floating_atomics(name, dtype):
    values = (torch.arange(64) % 4).to(dtype)  # sums stay exact
    slot = torch.zeros(2, dtype=dtype)
    packed = name.endswith("x2")
    width, threads = (64, 64) if name == "f64" else (32, 32 if packed else 64)
    noftz = ".noftz" if packed else ""
    register = "%rd7" if width == 64 else "%r7"
    body = f"""
        ld.param.u64 %rd1, [values];
        ld.param.u64 %rd2, [slot];
        mov.u32 %r1, %tid.x;
        mad.wide.u32 %rd1, %r1, {width // 8}, %rd1;
        ld.global.b{width} {register}, [%rd1];
        red.relaxed.gpu.global.add{noftz}.{name} [%rd2], {register};
    """
    module = kernel(body, ".param .u64 values, .param .u64 slot")
    report = module.launch("kernel", grid=1, block=threads, args=[sim.read_only(values), slot])
    assert report.ok, str(report)
    want: list[Any] = [values[::2].sum(), values[1::2].sum()] if packed else [values.sum(), 0]
    assert slot.tolist() == [float(v) for v in want]


def test_vector_reduction():
    slot = np.zeros(4, np.float32)
    body = """
        ld.param.u64 %rd1, [out];
        mov.f32 %f1, 0f3F800000;
        mov.f32 %f2, 0f40000000;
        red.global.add.v4.f32 [%rd1], {%f1, %f2, %f1, %f2};
    """
    assert kernel(body).launch("kernel", grid=2, block=64, args=[slot]).ok
    np.testing.assert_array_equal(slot, [128, 256, 128, 256])


def test_release_acquire_hands_data_to_another_cta():
    def launch(write, read, order=""):
        body = f"""
            ld.param.u64 %rd1, [data];
            ld.param.u64 %rd2, [flag];
            ld.param.u64 %rd3, [out];
            mov.u32 %r1, %ctaid.x;
            setp.ne.u32 %p1, %r1, 0;
            @%p1 bra CONSUMER;
            st.global.u32 [%rd1], 42;
            {order}
            {write} [%rd2], 1;
            ret;
        CONSUMER:
            {read} %r2, [%rd2];
            setp.ne.u32 %p2, %r2, 1;
            @%p2 bra CONSUMER;
            {order}
            ld.global.u32 %r3, [%rd1];
            st.global.u32 [%rd3], %r3;
        """
        data, flag, out = (np.zeros(1, np.uint32) for _ in range(3))
        module = kernel(body, ".param .u64 data, .param .u64 flag, .param .u64 out")
        report = module.launch("kernel", grid=2, block=1, args=[data, flag, sim.output(out)])
        assert out[0] == 42
        return report

    report = launch("st.release.gpu.global.u32", "ld.acquire.gpu.global.u32")
    assert report.ok, str(report)
    report = launch("st.volatile.global.u32", "ld.volatile.global.u32", "membar.gl;")
    assert report.ok, str(report)
    report = launch("red.release.gpu.global.add.u32", "ld.acquire.gpu.global.u32")
    assert report.ok, str(report)
    report = launch("st.relaxed.gpu.global.u32", "ld.relaxed.gpu.global.u32", "fence.acq_rel.gpu;")
    assert report.ok, str(report)
    assert kinds(launch("st.relaxed.gpu.global.u32", "ld.relaxed.gpu.global.u32")) == {"data race"}
    assert kinds(launch("st.global.u32", "ld.volatile.global.u32")) == {"data race"}


def test_discard_makes_no_promise_but_checks_bounds():
    out = np.zeros(32, np.uint32)
    body = "ld.param.u64 %rd1, [out];\ndiscard.global.L2 [%rd1], 128;\n"
    assert kernel(body).launch("kernel", grid=1, block=1, args=[out]).ok
    body = body.replace("discard", "add.u64 %rd1, %rd1, 128;\ndiscard")
    report = kernel(body).launch("kernel", grid=1, block=1, args=[out])
    assert kinds(report) == {"out of bounds"}


def test_misaligned_and_null():
    report, _ = lanes_report("mov.u64 %u0, 0;\nld.global.u32 %z, [%u0];", np.uint32, block=1)
    assert kinds(report) == {"out of bounds"}
    code = "ld.param.u64 %u0, [in_a];\nld.global.u32 %z, [%u0+2];"
    report, _ = lanes_report(code, np.uint32, np.zeros(32, np.uint32))
    assert kinds(report) == {"misaligned access"}
    code = (
        ".shared .align 4 .b8 s[128];\nmov.u32 %t0, 1;\nst.shared.u32 [%t0], %t0;\nmov.u32 %z, 0;"
    )
    report, _ = lanes_report(code, np.uint32, block=1)
    assert kinds(report) == {"misaligned access"}


def test_f32_atomics_flush_in_global_memory_alone():
    """PTX ISA, atom: in global memory, subnormal inputs and results of an f32 sum become zero."""
    least, normal = np.float32(1e-45), np.float32(1.17549435e-38)
    body = """
        .shared .align 4 .f32 cell;
        ld.param.u64 %rd1, [out];
        ld.global.f32 %f1, [%rd1];
        ld.global.f32 %f2, [%rd1+4];
        st.shared.f32 [cell], %f1;
        red.shared.add.f32 [cell], %f2;
        ld.shared.f32 %f3, [cell];
        st.global.f32 [%rd1+8], %f3;
        red.global.add.f32 [%rd1], %f2;"""
    for a, b, in_global in (
        (least, least, 0), (normal, least, normal), (-least, -0.0, -0.0),
        (normal, -np.nextafter(normal, np.float32(1)), -0.0),
    ):  # fmt: skip
        memory = np.array([a, b, 0], np.float32)
        report = kernel(body).launch("kernel", grid=1, block=1, args=[memory])
        assert report.ok, str(report)
        assert memory[2] == np.float32(a) + np.float32(b)
        assert memory[0] == in_global and np.signbit(memory[0]) == np.signbit(in_global)


@pytest.mark.parametrize("op,identity", [("and", "0"), ("or", "0xffffffff")])
def test_clearing_or_setting_unwritten_bits_reads_nothing(op, identity):
    """Cooperative groups initialize the barriers of tiles this way. An atomic that returns the old
    value, or any other reduction, does read."""
    body = f"""
        .shared .align 4 .b32 cell;
        red.release.cta.shared.{op}.b32 [cell], {identity};
        ld.shared.b32 %r1, [cell];
        setp.ne.b32 %p1, %r1, {identity};
        @%p1 trap;"""
    assert kernel(body).launch("kernel", grid=1, block=1, args=[np.zeros(1)]).ok
    for reading in (f"atom.shared.{op}.b32 %r2, [cell], 1;", "red.shared.add.u32 [cell], 1;"):
        body = f".shared .align 4 .b32 cell;\n{reading}"
        report = kernel(body).launch("kernel", grid=1, block=1, args=[np.zeros(1)])
        assert kinds(report) == {"uninitialized memory"}, str(report)


@pytest.mark.parametrize("type_", ["f32", "f64"])
def test_floating_minima_are_no_atomics(type_):
    register = "%f1" if type_ == "f32" else "%rd2"
    with pytest.raises(ValueError, match=r"must be \.add"):
        kernel(f"red.global.min.{type_} [%rd1], {register};").check("kernel")
