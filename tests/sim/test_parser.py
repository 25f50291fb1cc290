"""The grammar of PTX: constant expressions, operands, directives, names. ptxas accepts every
text."""

import numpy as np
import pytest

from support.ptx_texts import HEADER, ptxas_accepts, run, text_of, value_of
from torchext import sim

# ---- Constant expressions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(3*4)+1", 13),
        ("3+4*2", 11),
        ("(3+4)*2", 14),
        ("20-5-3", 12),
        ("7 % 4", 3),
        ("17/5", 3),
        ("-7/2", -3),
        ("1<<4|1", 17),
        ("0xF0&0x3C^1", 0x31),
        ("~0", -1),
        ("!5", 0),
        ("!0", 1),
        ("- -5", 5),
        ("-(2+3)", -5),
        ("+5", 5),
        ("1<2", 1),
        ("2>=3", 0),
        ("1==1&&0||1", 1),
        ("3!=3", 0),
        ("1<2?5:6", 5),
        ("0?5:1?7:8", 7),
        ("WARP_SZ", 32),
        ("WARP_SZ*2-1", 63),
        ("(.s64)5", 5),
        ("(.u64)-1>>63", 1),
        ("-1>>63", -1),
        ("0xFFFFFFFFFFFFFFFFU>>60", 15),
        ("-1<0U", 0),
        ("-1<0", 1),
        ("017", 15),
        ("0b101", 5),
        ("0XfFU", 255),
        ("5U", 5),
        ("1.5<2.0", 1),
        ("0x1E+5", 35),
    ],
)
def test_integer_expressions(expression, value):
    result = value_of(f"mov.b64 %rd2, {expression};", dtype=np.int64)
    assert result == value


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("1.5e-3", 1.5e-3),
        ("1E+5", 1e5),
        ("1e5", 1e5),
        ("2.5E2", 250),
        ("1.", 1),
        (".5", 0.5),
        ("-.5e+1", -5),
        ("1.5*2.0+1.0", 4),
        ("1.0/4.0-1.0", -0.75),
        ("0f3FC00000", 1.5),
        ("0d3FF8000000000000", 1.5),
    ],
)
def test_floating_point_literals(literal, value):
    bits = value_of(f"mov.f32 %f1, {literal};\nmov.b32 %r2, %f1;")
    assert bits.view(np.float32) == np.float32(value)
    wide = value_of(f"mov.f64 %d1, {literal};\nmov.b64 %rd2, %d1;", dtype=np.uint64)
    # ptxas uses the 32 bits of a 0f constant as the low half of the double.
    expected = np.uint64(0x3FC00000) if literal.startswith("0f") else np.float64(value)
    assert wide == expected.view(np.uint64)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("mov.u32 %r2, 1/0;", "a divisor must not be 0"),
        ("mov.u32 %r2, 1<<64;", r"must be by 0 to 63 bits \(got 64\)"),
        ("mov.u32 %r2, 0x;", "'0x' is not a number"),
        ("mov.u32 %r2, 12ab;", "'12ab' is not a number"),
        ("mov.u32 %r2, 1.2.3;", "'1.2.3' is not a number"),
        ("mov.u32 %r2, 08;", "'08' is not a number"),
        ("mov.u64 %rd2, 18446744073709551616;", "is not a number"),
        ("mov.f32 %f1, 0f3F80;", "'0f3F80' is not a number"),
        ("mov.f32 %f1, 0f3F800000+1.0;", r"must not be 0f and 0d constants"),
        ("mov.u32 %r2, 1.5%2;", "operands of '%' must be integers"),
        ("mov.u32 %r2, ~1.5;", "operand of '~' must be an integer"),
        ("mov.u32 %r2, -%r1;", r"a register that is not negated \(got .*'-%r1'\)"),
        ("mov.u32 %r2, (.s64)1.5;", "operand of a cast must be an integer"),
        ("mov.u32 %r2, (1;", r"must be '\)' \(got ';'\)"),
        ("mov.u32 %r2, " + "(" * 500 + "1" + ")" * 500 + ";", "nested too deeply"),
        ("ld.global.u32 %r2, [%rd1+%rd2];", r"must be a number or an expression \(got '%rd2'\)"),
        ("ld.global.u32 %r2, [%rd1+1.5];", "an offset must be an integer"),
    ],
)
def test_bad_expressions_name_the_line(code, message):
    text = text_of(f"\n{code}")
    line = text.split("\n").index(code) + 1
    with pytest.raises(sim.PtxError, match=f":{line}: .*{message}"):
        sim.Module(text).check("k")


# ---- Operands ------------------------------------------------------------------------------------

ARRAY = ".global .align 16 .u32 array[8] = {10, 11, 12, 13, 14, 15, 16, 17};"


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("ld.global.u32 %r2, [array];", 10),
        ("ld.global.u32 %r2, [array+8];", 12),
        ("ld.global.u32 %r2, [array+4*3];", 13),
        ("ld.global.u32 %r2, [array+(4+4)];", 12),
        ("mov.u64 %rd3, array;\nld.global.u32 %r2, [%rd3+16];", 14),
        ("mov.u64 %rd3, array+8;\nld.global.u32 %r2, [%rd3];", 12),
        ("mov.u64 %rd3, array+8;\nld.global.u32 %r2, [%rd3+-4];", 11),
        ("mov.u64 %rd3, array+2*4+4;\nld.global.u32 %r2, [%rd3+2*-4];", 11),
        ("cvta.global.u64 %rd3, array;\nld.u32 %r2, [%rd3+4];", 11),
        ("ld.global.v4.u32 {%r3, _, %r2, _}, [array+16];", 16),
        (".reg .v4 .u32 v;\nld.global.v4.u32 v, [array];\nmov.u32 %r2, v.z;", 12),
        (".reg .v4 .u32 v;\nld.global.v4.u32 v, [array];\nmov.u32 %r2, v.a;", 13),
        (".reg .v2 .u32 v<3>;\nmov.u32 v2.x, 5;\nmov.u32 v2.y, v2.x;\nmov.u32 %r2, v2.g;", 5),
        (".reg .v2 .b32 v;\nmov.b64 v, 0x700000009;\nmov.b32 %r2, v.y;", 7),
        (".reg .v4 .u32 v;\nmov.v4.u32 v, %ntid;\nmov.u32 %r2, v.x;", 1),
        ("mov.v4.u32 {%r3, %r4, %r5, %r2}, %ctaid;", 0),
        ("mov.v2.u32 {%r3, %r2}, {%r1, %r1};", 0),
        ("mov.u32 %r3, 1;\nmov.u32 %r2, 2;\nmov.v2.u32 {%r2, %r3}, {%r3, %r2};", 1),
        ("mov.u32 %r2, %tid.w;", 0),
        ("mov.u16 %h1, %ntid.y;\ncvt.u32.u16 %r2, %h1;", 1),
        ("cvt.u32.u16 %r2, %nctaid.x;", 1),
        ("mov.b32 %r2, %envreg31;", 0),
        ("mov.pred %p1, %is_explicit_cluster;\nselp.u32 %r2, 1, 2, %p1;", 2),
        ("mov.pred %p1, 1;\nselp.u32 %r2, 1, 2, %p1;", 1),
        ("mov.pred %p2, 0;\nsetp.eq.and.u32 %p1, %r1, %r1, !%p2;\nselp.u32 %r2, 1, 2, %p1;", 1),
        ("mov.u64 %rd3, %current_graph_exec;\ncvt.u32.u64 %r2, %rd3;", 0),
        ("mov.u32 %r2, %reserved_smem_offset_begin;", 0),
        ("mov.u32 %r2, %reserved_smem_offset_cap;", 1024),
        ("bfe.u32 %r2, 0xABCD, 4, 8;", 0xBC),
    ],
)
def test_operands(code, value):
    assert value_of(code, ARRAY) == value


def test_an_explicit_cluster_is_a_predicate():
    text = text_of(
        "mov.pred %p1, %is_explicit_cluster;\nselp.u32 %r2, 1, 2, %p1;\nst.global.u32 [%rd1], %r2;"
    )
    for cluster, expected in ((None, 2), (1, 1)):
        report, out = run(text, words=1, block=1, cluster=cluster)
        assert report.ok and out[0] == expected
    explicit = text.replace(".param .u64 out)", ".param .u64 out) .explicitcluster")
    assert run(explicit, words=1, block=1)[1][0] == 1


def test_every_thread_reads_its_own_vector():
    code = """mov.v4.u32 {%r2, %r3, %r4, %r5}, %tid;
    mad.lo.u32 %r6, %r3, 8, %r2;\nmul.wide.u32 %rd2, %r6, 4;\nadd.u64 %rd1, %rd1, %rd2;
    mad.lo.u32 %r7, %r3, 100, %r2;\nadd.u32 %r7, %r7, %r5;\nst.global.u32 [%rd1], %r7;"""
    report, out = run(text_of(code), words=32, block=(8, 4))
    assert report.ok
    np.testing.assert_array_equal(out.reshape(4, 8), np.arange(4)[:, None] * 100 + np.arange(8))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("mov.u32 %r2, %nosuch;", "unknown special register '%nosuch'"),
        ("mov.u32 %r2, %envreg32;", "unknown special register '%envreg32'"),
        ("mov.u32 %r2, %pm0;", "performance monitors .'%pm0'. are not supported"),
        (
            "mov.u32 %r2, %is_explicit_cluster;",
            "must be a number, not a predicate .got '%is_explicit_cluster'",
        ),
        ("mov.pred %p1, %laneid;", "must be a predicate .got '%laneid'"),
        (
            "mov.u32 %r2, %tid;",
            r"must be one number \(got '%tid', which has 4 elements\); write mov.v4, or %tid.x",
        ),
        (
            "mov.v2.u32 {%r2, %r3}, %tid;",
            r"operand 2 must be a vector of 2 elements \(got '%tid', which has 4",
        ),
        ("mov.b64 %rd2, {};", r"operand 2 must be .* \(got a vector of 0 elements\)"),
        ("ld.global.u32 %r2, array[2];", r"write \[array\+n\]"),
        ("ld.global.u32 %r2, [nothing];", "unknown name 'nothing'"),
    ],
)
def test_bad_operands_name_the_line(code, message):
    text = text_of(f"\n{code}", ARRAY)
    line = text.split("\n").index(code) + 1
    with pytest.raises(sim.PtxError, match=f":{line}: .*{message}"):
        sim.Module(text).check("k")


# ---- Directives ----------------------------------------------------------------------------------

STORE = "mul.wide.u32 %rd2, %r1, 4;\nadd.u64 %rd1, %rd1, %rd2;\nst.global.u32 [%rd1], %r1;"


@pytest.mark.parametrize(
    "attributes",
    [
        '.pragma "nounroll";',
        '.pragma "nounroll", "nounroll";',
        '.maxntid 32, 1, 1\n.pragma "nounroll";\n.minnctapersm 2\n.maxnreg 64',
        ".maxntid 32 .minnctapersm 2",
        ".reqntid 32",
        ".reqntid 32, 1, 1\n.explicitcluster\n.reqnctapercluster 1, 1, 1",
        ".maxclusterrank 8",
        "/* a */ .maxntid /* b */ 32, // c\n 1",
    ],
)
def test_directives_of_a_kernel(attributes):
    text = text_of(STORE, attributes=attributes)
    assert ptxas_accepts(text) == ""
    report, out = run(text)
    assert report.ok, str(report)
    np.testing.assert_array_equal(out, np.arange(32))


@pytest.mark.parametrize(
    "before",
    [
        '.pragma "nounroll";',
        '.file 1 "a.cu"\n.file 2 "b.cu", 123, 456',
        ".section .debug_str\n{\ns0:\n.b8 101,0\n}\n"
        ".section .debug_abbrev\n{\n.b8 1\n.b32 .debug_str\n.b64 s0\n}",
        ".func f()\n.noreturn\n{ trap; exit; }",
        ".visible .func f() { ret; }\n.visible .func g();\n.alias g, f;",
        ".extern .func (.param .b32 r) vf(.param .b32 a, .param .align 8 .b8 b[]);",
        ".entry e(.param .u64 .ptr .global .align 16 a, .param .u64 .ptr b,\n"
        ".param .align 8 .b8 s[24]) { ret; }",
        ".entry e\n{ ret; }",
        ".entry e(.param .u32 a);\n.entry e(.param .u32 a) { ret; }",
        ".weak .entry e() { ret; }",
        ".visible .global .attribute(.managed) .u32 m;",
        '# 5 "x.cu"\n#line 7 "x.cu"',
    ],
)
def test_directives_of_a_module(before):
    text = text_of(STORE, before)
    assert ptxas_accepts(text) == ""
    report, out = run(text)
    assert report.ok, str(report)
    np.testing.assert_array_equal(out, np.arange(32))


@pytest.mark.parametrize(
    "code",
    [
        '.pragma "nounroll";',
        "{ .reg .u32 a; mov.u32 a, 1; { .reg .u32 a, b<3>; mov.u32 a, 2; mov.u32 b2, a; } }",
        "bra $L__BB0_1;\n$L__BB0_1: bra %L;\n%L: bra _x1;\n_x1: $unused_2: ",
        ".loc 1 5 3\n.loc 1 6 3, function_name $f0, inlined_at 1 5 3",
        ".loc 1 5 3 mov.u32 %r3, 1;",
        "{.reg.b16 h,i;\n .local.align 8 .b8 l[8]; mov.b16 h, 1; }",
        ".param .b64 p;\nst.param.b64 [p+0], %rd1;",
        "{ .shared .align 4 .u32 s[4]; st.shared.u32 [s+4], 1; }",
        "{ .local .align 8 .b8 l[16]; st.local.u64 [l+8], %rd1; }",
        "ts: .branchtargets A, B;\nmov.u32 %r3, 1;\nbrx.idx %r3, ts;\nA:\nB:\n",
        "{ { t: .branchtargets C; mov.u32 %r3, 0; brx.idx %r3, t; C: } }",
    ],
)
def test_bodies(code):
    before = '.file 1 "a.cu"\n'
    text = text_of(f"{code}\n{STORE}", before)
    if "function_name" not in code:  # the label is in the DWARF sections
        assert ptxas_accepts(text) == ""
    report, out = run(text)
    assert {f.kind for f in report.findings} <= {"data race"}, str(report)
    np.testing.assert_array_equal(out, np.arange(32))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (HEADER + "\n#define A 1\n", 5, "preprocess the text first"),
        (HEADER + ".target sm_90, nonsense\n", 4, "unknown target option 'nonsense'"),
        (HEADER + ".target sm_90, map_f64_to_f32\n", 4, "map_f64_to_f32 is not supported"),
        (HEADER.replace("64\n", "32\n"), 3, ".address_size must be 64"),
        (HEADER + ".texref t;\n", 4, "textures and surfaces"),
        (HEADER + ".nonsense\n", 4, "unknown directive '.nonsense'"),
        (HEADER + ".entry k()\n.nonsense\n{ret;}", 5, "unknown function directive '.nonsense'"),
        (HEADER + ".entry k()\n.blocksareclusters\n{ret;}", 5, ".blocksareclusters"),
        (HEADER + '.entry k()\n.pragma "a"\n{ret;}', 6, r"must be ';' \(got '{'"),
        (HEADER + ".entry k()\n{\n.nonsense 1;\n}", 6, "unknown directive '.nonsense'"),
        (HEADER + ".entry k()\n{\n.loc 1 2 3, nonsense 4\n}", 6, "inlined_at"),
        (HEADER + ".entry k()\n{\n.reg .u32 %r<4294967297>;\n}", 6, "below 2^32"),
        (HEADER + ".func f(.reg .v2 .u32 a){ret;}", 4, "vector registers as parameters"),
        (HEADER + ".global .pred x;", 4, "a predicate must be a register"),
    ],
)
def test_refused_directives_name_the_line(text, line, message):
    with pytest.raises(sim.PtxError, match=f"<ptx>:{line}: .*{message}".replace("^", r"\^")):
        sim.Module(text)
