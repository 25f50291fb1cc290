"""Registers with some bits never assigned: which uses are legal, and which are findings.

%h0, %r0, %f0 and %rd0 are never assigned. %r1 is the thread's number; %h1, %f1 and %rd1 hold it in
other types. %rd9 is the address of the thread's 8 bytes of output."""

import numpy as np
import pytest
import torch

from support.opcodes import kernel, kinds
from torchext import sim

SETUP = """
    ld.param.u64 %rd9, [out];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd9, %r1, 8, %rd9;
    cvt.u16.u32 %h1, %r1;
    cvt.rn.f32.u32 %f1, %r1;
    cvt.u64.u32 %rd1, %r1;
"""
HALF = "mov.b32 %r2, {%h1, %h0};\n"  # the low half of %r2 is valid
HIGH = "mov.b32 %r2, {%h0, %h1};\n"
BYTE = "cvt.u16.u32 %h2, %r1;\ncvt.rn.satfinite.e4m3x2.f32 %h2, %f0, %f1;\n"  # %h2: the low byte
PAIR = "mov.b64 %rd2, {%r1, %r0};\n"  # %rd2: the low half


def run(code):
    out = np.zeros(32, np.uint64)
    return kernel(SETUP + code).launch("kernel", grid=1, block=32, args=[out]), out


FINE = {
    "low half": HALF + "st.global.b16 [%rd9], %r2;",
    "high half": HIGH + "shr.u32 %r3, %r2, 16;\nst.global.b32 [%rd9], %r3;",
    "unpacked": HALF + "mov.b32 {%h3, %h4}, %r2;\nst.global.b16 [%rd9], %h3;",
    "unpacked to a sink": HALF + "mov.b32 {%h3, _}, %r2;\nst.global.b16 [%rd9], %h3;",
    "repacked": HALF + HIGH.replace("%r2", "%r3") + "mov.b32 {%h3, %h4}, %r2;\n"
    "mov.b32 {%h5, %h6}, %r3;\nmov.b32 %r4, {%h3, %h6};\nst.global.b32 [%rd9], %r4;",
    "copied": HALF + "mov.b32 %r3, %r2;\nmov.b32 %f3, %r3;\nst.global.b16 [%rd9], %r3;",
    "byte of an FP8 pair": BYTE + "st.global.b8 [%rd9], %h2;",
    "high byte of an FP8 pair": "cvt.rn.satfinite.e5m2x2.f32 %h2, %f1, %f0;\n"
    "shr.u16 %h3, %h2, 8;\nst.global.b8 [%rd9], %h3;",
    "16-bit pair": "cvt.rn.bf16x2.f32 %r2, %f0, %f1;\nst.global.b16 [%rd9], %r2;",
    "pair to pair": BYTE + "cvt.rn.f16x2.e4m3x2 %r2, %h2;\nst.global.b16 [%rd9], %r2;",
    "and back": HALF + "cvt.rn.satfinite.e4m3x2.f16x2 %h2, %r2;\nst.global.b8 [%rd9], %h2;",
    "four bytes of pairs": BYTE + "mov.b32 %r2, {%h2, %h2};\nprmt.b32 %r3, %r2, 0, 0x0200;\n"
    "prmt.b32 %r3, %r3, %r3, 0x5410;\nst.global.b32 [%rd9], %r3;",
    "prmt picks valid bytes": HALF + "prmt.b32 %r3, %r2, %r1, 0x5410;\nst.global.b32 [%rd9], %r3;",
    "prmt copies a sign": HALF + "prmt.b32 %r3, %r2, %r1, 0x9910;\nst.global.b32 [%rd9], %r3;",
    "and": HALF + "and.b32 %r3, %r2, 0xffff;\nst.global.b32 [%rd9], %r3;",
    "and bits": HALF + "and.b32 %r3, %r2, 0x1f;\nsetp.eq.u32 %p1, %r3, 3;\n"
    "@%p1 st.global.b32 [%rd9], %r1;",
    "or ones": HALF + "or.b32 %r3, %r2, 0xffff0000;\nst.global.b32 [%rd9], %r3;",
    "or of halves": HALF + "and.b32 %r3, %r2, 0xffff;\nshl.b32 %r4, %r2, 16;\n"
    "or.b32 %r5, %r3, %r4;\nst.global.b32 [%rd9], %r5;",
    "xor": HALF + "xor.b32 %r3, %r2, %r1;\nst.global.b16 [%rd9], %r3;",
    "not": HALF + "not.b32 %r3, %r2;\nst.global.b16 [%rd9], %r3;",
    "lop3": HALF + "lop3.b32 %r3, %r2, 0xffff, %r1, 0xea;\nst.global.b32 [%rd9], %r3;",
    "shl": HALF + "shl.b32 %r3, %r2, 16;\nst.global.b32 [%rd9], %r3;",
    "shl by nibbles": HALF + "shl.b32 %r3, %r2, 20;\nshr.u32 %r3, %r3, 4;\n"
    "st.global.b32 [%rd9], %r3;",
    "shr signed": HIGH + "shr.s32 %r3, %r2, 16;\nst.global.b32 [%rd9], %r3;",
    "shf": HALF + "shf.l.wrap.b32 %r3, %r2, %r1, 16;\nmov.b32 {%h3, %h4}, %r3;\n"
    "shf.l.clamp.b32 %r3, %r1, %r2, 16;\nst.global.b32 [%rd9], %r3;",
    "bfe": HALF + "bfe.u32 %r3, %r2, 4, 8;\nst.global.b32 [%rd9], %r3;",
    "bfe signed": HALF + "bfe.s32 %r3, %r2, 0, 16;\nst.global.b32 [%rd9], %r3;",
    "bfe wide": PAIR + "bfe.u64 %rd3, %rd2, 0, 32;\nst.global.b64 [%rd9], %rd3;",
    "bfi over what is invalid": HALF + "bfi.b32 %r3, %r1, %r2, 16, 16;\nst.global.b32 [%rd9], %r3;",
    "bfi of what is valid": HALF + "bfi.b32 %r3, %r2, %r1, 8, 8;\nst.global.b32 [%rd9], %r3;",
    "bfi wide": PAIR + "bfi.b64 %rd3, %rd1, %rd2, 32, 32;\nst.global.b64 [%rd9], %rd3;",
    "szext": HALF + "szext.clamp.s32 %r3, %r2, 16;\nst.global.b32 [%rd9], %r3;",
    "brev": HIGH + "brev.b32 %r3, %r2;\nst.global.b16 [%rd9], %r3;",
    "cvt": HALF + "cvt.u16.u32 %h3, %r2;\nst.global.b16 [%rd9], %h3;",
    "cvt of a byte": BYTE + "cvt.u32.u8 %r3, %h2;\nst.global.b32 [%rd9], %r3;",
    "cvt extends the sign": BYTE + "cvt.s32.s8 %r3, %h2;\nst.global.b32 [%rd9], %r3;",
    "cvt to float": BYTE + "cvt.rn.f32.s8 %f3, %h2;\nst.global.f32 [%rd9], %f3;",
    "cvt.pack": "cvt.pack.sat.s8.s32.b32 %r3, %r1, %r1, %r0;\nst.global.b16 [%rd9], %r3;",
    "cvt wide": PAIR + "cvt.u32.u64 %r3, %rd2;\nst.global.b32 [%rd9], %r3;",
    "shr wide": "mov.b64 %rd2, {%r0, %r1};\nshr.u64 %rd3, %rd2, 32;\nst.global.b64 [%rd9], %rd3;",
    "halves of 64 bits": PAIR + "mov.b64 {%r3, %r4}, %rd2;\nst.global.b32 [%rd9], %r3;",
    "quarters of 64 bits": "mov.b64 %rd2, {%h1, %h0, %h1, %h0};\n"
    "mov.b64 {%h3, %h4, %h5, %h6}, %rd2;\nmov.b32 %r3, {%h3, %h5};\nst.global.b32 [%rd9], %r3;",
    "bytes of 32 bits": "mov.b32 %r2, {%b1, %b0, %b1, %b0};\nmov.b32 {%b2, %b3, %b4, %b5}, %r2;\n"
    "st.global.b8 [%rd9], %b4;",
    "add carries upwards": HALF + "add.u32 %r3, %r2, 5;\nst.global.b16 [%rd9], %r3;",
    "mul.lo carries upwards": HALF + "mul.lo.u32 %r3, %r2, 5;\nst.global.b16 [%rd9], %r3;",
    "mad.lo carries upwards": HALF + "mad.lo.u32 %r3, %r2, 5, %r2;\nst.global.b16 [%rd9], %r3;",
    "f16x2 by half": HALF + "fma.rn.f16x2 %r3, %r2, %r2, %r2;\nst.global.b16 [%rd9], %r3;",
    "bf16x2 by half": HALF + "abs.bf16x2 %r3, %r2;\nneg.bf16x2 %r3, %r3;\n"
    "max.bf16x2 %r3, %r3, %r2;\nst.global.b16 [%rd9], %r3;",
    "u16x2 by half": HALF + "add.u16x2 %r3, %r2, %r2;\nst.global.b16 [%rd9], %r3;",
    "setp of a pair": HALF + "setp.eq.f16x2 %p1|%p2, %r2, %r2;\n@%p1 st.global.b32 [%rd9], %r1;",
    "selp": HALF + "setp.eq.u32 %p1, %r1, 3;\nselp.b32 %r3, %r2, %r1, %p1;\n"
    "st.global.b16 [%rd9], %r3;",
    "selp picks what is valid": "setp.lt.u32 %p1, %r1, 99;\nselp.b32 %r3, %r1, %r0, %p1;\n"
    "st.global.b32 [%rd9], %r3;",
    "slct picks what is valid": "slct.b32.s32 %r3, %r1, %r0, %r1;\nst.global.b32 [%rd9], %r3;",
    "shfl": HALF + "shfl.sync.bfly.b32 %r3, %r2, 1, 0x1f, 0xffffffff;\nst.global.b16 [%rd9], %r3;",
    "local memory": ".local .align 8 .b8 own[8];\n" + HALF + "st.local.b32 [own], %r2;\n"
    "ld.local.b32 %r3, [own];\nld.local.u16 %h3, [own];\nst.global.b16 [%rd9], %r3;\n"
    "st.global.b16 [%rd9], %h3;",
    "local vector": ".local .align 8 .b8 own[8];\nst.local.b32 [own], %r1;\n"
    "ld.local.v2.b32 {%r3, %r4}, [own];\nst.global.b32 [%rd9], %r3;",
    "local memory, by byte": ".local .align 8 .b8 own[8];\n" + BYTE + "st.local.b8 [own+3], %h2;\n"
    "ld.local.b32 %r3, [own];\nshr.u32 %r3, %r3, 24;\nst.global.b32 [%rd9], %r3;",
    "local memory, by bit": ".local .align 8 .b8 own[8];\n" + HALF + "shl.b32 %r3, %r2, 4;\n"
    "st.local.b32 [own], %r3;\nld.local.s8 %r4, [own+2];\nand.b32 %r4, %r4, 15;\n"
    "st.global.b32 [%rd9], %r4;",
    "16-bit atomics": HALF + "cvt.u16.u32 %h3, %r2;\natom.global.add.noftz.f16 %h4, [%rd9], %h3;",
    "assigned whole at last": HALF + "mov.u32 %r2, 7;\nst.global.b32 [%rd9], %r2;",
    "in some lanes only": HALF + "setp.lt.u32 %p1, %r1, 8;\n@%p1 mov.u32 %r2, 7;\n"
    "@%p1 st.global.b32 [%rd9], %r2;\n@!%p1 st.global.b16 [%rd9], %r2;",
}

FAULTS = {
    "never assigned": "st.global.b32 [%rd9], %r0;",
    "stored whole": HALF + "st.global.b32 [%rd9], %r2;",
    "the wrong half": HALF + "mov.b32 {%h3, %h4}, %r2;\nst.global.b16 [%rd9], %h4;",
    "the wrong byte": BYTE + "st.global.b16 [%rd9], %h2;",
    "the wrong byte of prmt": HALF + "prmt.b32 %r3, %r2, 0, 0x4442;\nst.global.b32 [%rd9], %r3;",
    "the wrong sign of prmt": HALF + "prmt.b32 %r3, %r2, 0, 0xb410;\nst.global.b32 [%rd9], %r3;",
    "bits of a mask": HALF + "and.b32 %r3, %r2, 0x10000;\nst.global.b32 [%rd9], %r3;",
    "a predicate": HALF + "setp.eq.u32 %p1, %r2, 3;\n@%p1 st.global.b32 [%rd9], %r1;",
    "a branch": HALF + "setp.eq.u32 %p1, %r2, 3;\n@%p1 bra L;\nst.global.b32 [%rd9], %r1;\nL:",
    "the other predicate": HALF + "setp.eq.f16x2 %p1|%p2, %r2, %r2;\n"
    "@%p2 st.global.b32 [%rd9], %r1;",
    "an address": HALF + "and.b32 %r3, %r2, 0x10000;\nmov.u32 %r4, 2048;\nadd.u32 %r3, %r3, %r4;\n"
    ".shared .align 8 .b8 tile[4096];\nst.shared.b32 [%r3], %r1;",
    "a shift count": HALF + "and.b32 %r3, %r2, 0x10000;\nshl.b32 %r4, %r1, %r3;\n"
    "st.global.b32 [%rd9], %r4;",
    "a selector": HALF + "prmt.b32 %r4, %r1, %r1, %r2;\nst.global.b32 [%rd9], %r4;",
    "what selp picks": "setp.lt.u32 %p1, %r1, 99;\nselp.b32 %r3, %r0, %r1, %p1;\n"
    "st.global.b32 [%rd9], %r3;",
    "selp by an invalid predicate": "selp.b32 %r3, %r1, 7, %p7;\nst.global.b32 [%rd9], %r3;",
    "a carry out of what is invalid": "mov.b32 %r2, {%h0, %h1};\nadd.u32 %r3, %r2, 1;\n"
    "shr.u32 %r3, %r3, 16;\nst.global.b32 [%rd9], %r3;",
    "a product's high half": HALF + "mul.hi.u32 %r3, %r2, 5;\nst.global.b32 [%rd9], %r3;",
    "a wide product": HALF + "mul.wide.u32 %rd3, %r2, 5;\nst.global.b16 [%rd9], %rd3;",
    "a float": HALF + "mov.b32 %f3, %r2;\nadd.f32 %f3, %f3, %f1;\nst.global.b16 [%rd9], %f3;",
    "the sign of a byte": BYTE + "shr.u16 %h3, %h2, 8;\ncvt.s32.s8 %r3, %h3;\n"
    "st.global.b32 [%rd9], %r3;",
    "the other half by shuffle": HALF + "shfl.sync.bfly.b32 %r3, %r2, 1, 0x1f, 0xffffffff;\n"
    "st.global.b32 [%rd9], %r3;",
    "from local memory": ".local .align 8 .b8 own[8];\n" + HALF + "st.local.b32 [own], %r2;\n"
    "ld.local.b32 %r3, [own];\nst.global.b32 [%rd9], %r3;",
    "the other element of a vector": ".local .align 8 .b8 own[8];\nst.local.b32 [own], %r1;\n"
    "ld.local.v2.b32 {%r3, %r4}, [own];\nst.global.b32 [%rd9], %r4;",
    "a shared store": ".shared .align 8 .b8 tile[8];\n" + HALF + "st.shared.b32 [tile], %r2;",
    "an atomic": HALF + "red.global.add.u32 [%rd9], %r2;",
    "overwritten by what is invalid": HALF + "mov.b32 %r2, %r0;\nst.global.b16 [%rd9], %r2;",
    "bfi of what is invalid": HALF + "bfi.b32 %r3, %r2, %r1, 8, 20;\nst.global.b32 [%rd9], %r3;",
}  # fmt: skip


def with_bytes(code):
    return (".reg .b8 %b<8>;\ncvt.u8.u32 %b1, %r1;\n" + code) if "%b" in code else code


@pytest.mark.parametrize("name", FINE)
def test_valid_parts_may_be_used(name):
    report, _ = run(with_bytes(FINE[name]))
    assert report.ok, str(report)


@pytest.mark.parametrize("name", FAULTS)
def test_invalid_parts_may_not(name):
    report, _ = run(with_bytes(FAULTS[name]))
    assert "uninitialized register" in kinds(report), str(report)


def test_the_finding_names_the_bits():
    report, _ = run(HALF + "st.global.b32 [%rd9], %r2;")
    (finding,) = report.findings
    assert "register %r2 is used as a value to store but bits 16 to 31 of it" in finding.message
    report, _ = run("st.global.b32 [%rd9], %r0;")
    assert "but was never assigned" in report.findings[0].message


def test_triton_casts_one_value_to_fp8():
    """x.to(tl.float8e4nv), one element per thread: the pair's other input is never assigned."""
    out = torch.zeros(32, dtype=torch.uint8)
    code = """
        ld.param.u64 %rd1, [out];
        mov.u32 %r1, %tid.x;
        cvt.u64.u32 %rd2, %r1;
        add.s64 %rd1, %rd1, %rd2;
        cvt.rn.f32.u32 %f1, %r1;
        cvt.rn.satfinite.e4m3x2.f32 %h1, %f2, %f1;
        st.global.b8 [%rd1], %h1;
    """
    report = kernel(code).launch("kernel", grid=1, block=32, args=[sim.output(out)])
    assert report.ok, str(report)
    assert torch.equal(out, torch.arange(32.0).to(torch.float8_e4m3fn).view(torch.uint8))
