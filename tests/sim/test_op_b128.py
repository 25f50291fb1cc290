"""128-bit registers: mov, ld, st, atom.exch, atom.cas."""

import numpy as np
import pytest

from support.opcodes import kernel, kinds, lanes, random_bits
from torchext import sim

A, B = (random_bits(np.uint64, seed=s) for s in (1, 2))


def test_moves():
    code = """
        .reg .b128 %w, %v<2>;
        mov.b128 %w, {%a, %b};
        mov.b128 %v1, %w;
        mov.b128 {%z, %y}, %v1;
        mov.b128 {%x, _}, %w;"""
    low, high, again = lanes(code, [np.uint64] * 3, A, B)
    np.testing.assert_array_equal(low, A)
    np.testing.assert_array_equal(high, B)
    np.testing.assert_array_equal(again, A)


THROUGH = {  # each thread stores and loads 16 bytes of its own
    "global": "mov.b128 %v, %w;",
    "shared": ".shared .align 16 .b8 buffer[512];\nmov.u64 %rd2, buffer;\n"
    "mad.wide.u32 %rd2, %r1, 16, %rd2;\nst.shared.b128 [%rd2], %w;\nld.shared.b128 %v, [%rd2];",
    "local": ".local .align 16 .b8 buffer[16];\nst.local.b128 [buffer], %w;\n"
    "ld.local.b128 %v, [buffer];",
}


@pytest.mark.parametrize("space", THROUGH)
def test_loads_and_stores(space):
    body = f"""
        .reg .b128 %w, %v;
        mov.u32 %r1, %tid.x;
        ld.param.u64 %rd1, [in];
        mad.wide.u32 %rd1, %r1, 16, %rd1;
        ld.global.b128 %w, [%rd1];
        {THROUGH[space]}
        ld.param.u64 %rd3, [out];
        mad.wide.u32 %rd3, %r1, 16, %rd3;
        st.relaxed.gpu.global.b128 [%rd3], %v;"""
    x, out = np.stack([A[:32], B[:32]], 1), np.zeros((32, 2), np.uint64)
    module = kernel(body, ".param .u64 in, .param .u64 out")
    report = module.launch("kernel", grid=1, block=32, args=[sim.read_only(x), sim.output(out)])
    assert report.ok, str(report)
    np.testing.assert_array_equal(out, x)


def test_exchange_and_compare():
    body = """
        .reg .b128 %new, %old, %other;
        mov.u32 %r1, %tid.x;
        cvt.u64.u32 %rd2, %r1;
        add.u64 %rd3, %rd2, 1;
        ld.param.u64 %rd1, [out];
        mov.b128 %new, {%rd3, %rd3};
        mov.b128 %other, {%rd2, %rd2};
        // Lane n replaces (n, n) by (n + 1, n + 1): one after another, whatever the order.
    AGAIN:
        atom.global.cas.b128 %old, [%rd1], %other, %new;
        mov.b128 {%rd4, %rd5}, %old;
        setp.ne.u64 %p1, %rd4, %rd2;
        @%p1 bra AGAIN;
        // The low halves agree here and the high ones do not: nothing is stored.
        mov.b128 %other, {%rd3, %rd2};
        atom.global.cas.b128 %old, [%rd1+32], %other, %new;
        atom.global.exch.b128 %old, [%rd1+16], %new;"""
    out = np.zeros((3, 2), np.uint64)
    out[2] = 1, 5
    report = kernel(body).launch("kernel", grid=1, block=1, args=[out])
    assert report.ok, str(report)
    assert out.tolist() == [[1, 1], [1, 1], [1, 5]]


def test_misalignment_and_halves_never_assigned():
    body = """
        .reg .b128 %w;
        ld.param.u64 %rd1, [out];
        ld.global.b128 %w, [%rd1+8];"""
    report = kernel(body).launch("kernel", grid=1, block=1, args=[np.zeros(8)])
    assert kinds(report) == {"misaligned access"}
    body = """
        .reg .b128 %w;
        ld.param.u64 %rd1, [out];
        mov.b128 %w, {%rd1, %rd2};
        st.global.b128 [%rd1], %w;"""
    report = kernel(body).launch("kernel", grid=1, block=1, args=[np.zeros(8)])
    assert kinds(report) == {"uninitialized register"}


@pytest.mark.parametrize("code,message", [
    ("atom.global.add.b128 %w, [%u0], %w;", "must be .exch or .cas"),
    ("ld.global.v2.b128 {%w, %w}, [%u0];", r"got \.b128"),
    ("add.u64 %u0, %w, %u1;", r"must be a register, a number or a name \(got a vector of 2"),
    ("mov.b128 %w, %u0;", "vector of 2"),
])  # fmt: skip
def test_what_is_refused(code, message):
    with pytest.raises(ValueError, match=message):
        lanes(".reg .b128 %w;\n" + code, np.uint64, A)
