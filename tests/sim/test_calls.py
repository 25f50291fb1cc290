"""Calls of device functions: direct, indirect, recursive; how values pass; what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest

from support.ptx_texts import ptxas_accepts, run, text_of, value_of
from torchext import sim
from torchext.sim.compiler import CompileError, find_nvcc

LANE = np.arange(32)
STORE = "mul.wide.u32 %rd2, %r1, 4;\nadd.u64 %rd1, %rd1, %rd2;\nst.global.u32 [%rd1], %r2;"
UNARY = ".func (.param .b32 r) {name}(.param .b32 a)\n{{ .reg .b32 x; ld.param.b32 x, [a];\n{code}"
UNARY += "\nst.param.b32 [r], x;\nret; }}\n"
FUNCTIONS = UNARY.format(name="twice", code="add.u32 x, x, x;") + UNARY.format(
    name="square", code="mul.lo.u32 x, x, x;"
)
TABLE = FUNCTIONS + ".global .align 8 .u64 table[2] = {twice, square};\n"
PICK = """and.b32 %r3, %r1, 1;\nmul.wide.u32 %rd4, %r3, 8;\nmov.u64 %rd3, table;
add.u64 %rd3, %rd3, %rd4;\nld.global.u64 %rd3, [%rd3];
"""
EXPECTED = np.where(LANE & 1, LANE * LANE, 2 * LANE)
PROTOTYPE = "proto: .callprototype (.param .b32 _) _ (.param .b32 _);\n"


def call(target: str, signature: str, guard: str = "") -> str:
    return f"""{{ .param .b32 p;\n.param .b32 q;\nst.param.b32 [p], %r1;
    {guard} call (q), {target}, (p){signature};\nld.param.b32 %r2, [q]; }}\n"""


def result(code: str, before: str, **options) -> np.ndarray:
    text = text_of(f"{code}\n{STORE}", before)
    assert ptxas_accepts(text) == ""
    report, out = run(text, **options)
    assert report.ok, str(report)
    return out


def findings(code: str, before: str = "", **options) -> list[sim.Finding]:
    text = text_of(code, before)
    assert ptxas_accepts(text) == ""
    return list(run(text, **options)[0].findings)


# ---- Indirect calls ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declare", "signature"),
    [
        (PROTOTYPE, ", proto"),
        ("targets: .calltargets twice, square;\n", ", targets"),
        ("", ", table"),
    ],
    ids=["prototype", "targets", "variable"],
)
def test_lanes_call_different_functions(declare, signature):
    np.testing.assert_array_equal(result(declare + PICK + call("%rd3", signature), TABLE), EXPECTED)


@pytest.mark.parametrize(
    ("code", "alone"),
    [
        (PROTOTYPE + PICK + call("%rd3", ", proto"), EXPECTED),
        (
            "setp.lt.u32 %p1, %r1, 9;\n"
            + call("square", "", "@%p1")
            + "@!%p1 mov.u32 %r2, 5;\n",  # q of a call that is not made is undefined
            np.where(LANE < 9, LANE * LANE, 5),
        ),
    ],
    ids=["indirect", "guarded"],
)
def test_the_warp_is_whole_again_behind_a_call(code, alone):
    meet = "shfl.sync.bfly.b32 %r2, %r2, 1, 0x1f, -1;\nbar.sync 0;"
    out = result(code + meet, TABLE)
    np.testing.assert_array_equal(out, alone[LANE ^ 1])


def test_a_function_pointer_from_the_host_and_from_an_operand():
    text = text_of(PROTOTYPE + "ld.global.u64 %rd3, [to];\n" + call("%rd3", ", proto") + STORE,
                   TABLE + ".visible .global .align 8 .u64 to;")  # fmt: skip
    module = sim.Module(text)
    module.variable("to").set(module.variable("table").get()[1:])
    report, out = run(module)
    assert report.ok, str(report)
    np.testing.assert_array_equal(out, LANE * LANE)
    out = result(PROTOTYPE + "mov.u64 %rd3, twice;\n" + call("%rd3", ", proto"), FUNCTIONS)
    np.testing.assert_array_equal(out, 2 * LANE)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ("mov.u64 %rd3, 0;", "call through a null pointer"),
        ("mov.u64 %rd3, 12345;", "call through 0x3039, which is no function"),
        ("mov.u64 %rd3, %rd1;", "which is no function"),
        ("mov.u64 %rd3, other;", "which is no function of this signature"),
        ("mov.u64 %rd3, k;", "which is no function"),
    ],
)
def test_calls_of_what_is_no_function(load, message):
    other = ".func other(.param .b64 a) { ret; }\n"
    found = findings(load + PROTOTYPE + call("%rd3", ", proto"), TABLE + other, block=1)
    assert [f.kind for f in found] == ["invalid call"]
    assert message in found[0].message


# ---- Arguments and results -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "code", "value"),
    [
        (".func (.reg .u32 r) f(.reg .u32 a) { add.u32 r, a, 1; ret; }",
         "mov.u32 %r3, 6;\ncall (%r2), f, (%r3);", 7),
        (".func (.reg .u32 r) f(.reg .u32 a) { add.u32 r, a, 1; ret; }",
         "call (%r2), f, (2*3);", 7),
        (".func (.reg .f32 r) f(.reg .f32 a) { add.f32 r, a, a; ret; }",
         "call (%f1), f, (1.5);\nmov.b32 %r2, %f1;", 0x40400000),
        (".func (.reg .u32 r) f(.reg .pred p) { selp.u32 r, 1, 2, p; ret; }", "", None),
        (FUNCTIONS, "{ .param .b32 q;\ncall (q), square, (9);\nld.param.b32 %r2, [q]; }", 81),
        (FUNCTIONS, "mov.u32 %r3, 9;\ncall (_), square, (%r3);\nmov.u32 %r2, 3;", 3),
        (".func f() { ret; }", "call f;\ncall f, ();\ncall.uni f;\nmov.u32 %r2, 1;", 1),
        (".func (.param .align 16 .b8 r[48]) f(.param .align 8 .b8 a[24])\n"
         "{ .reg .b64 x; ld.param.b64 x, [a+16]; st.param.b64 [r+40], x; ret; }",
         "{ .param .align 8 .b8 p[24];\n.param .align 16 .b8 q[48];\nst.param.b64 [p+16], 77;\n"
         "call (q), f, (p);\nld.param.b32 %r2, [q+40]; }", 77),
        (".func (.param .b8 r) f(.param .b8 a, .param .b64 b)\n"
         "{ .reg .b16 x; ld.param.b8 x, [a]; st.param.b8 [r], x; ret; }",
         "{ .param .b8 p;\n.param .b64 q;\n.param .b8 s;\nmov.u16 %h1, 200;\n"
         "st.param.b8 [p], %h1;\nst.param.b64 [q], 1;\ncall (s), f, (p, q);\n"
         "ld.param.u8 %h2, [s];\ncvt.u32.u16 %r2, %h2; }", 200),
        (".visible .func (.param .b32 r) f(.param .b32 a) { .reg .b32 x; ld.param.b32 x, [a];\n"
         "st.param.b32 [r], x; ret; }\n.visible .func (.param .b32 r) g(.param .b32 a);\n"
         ".alias g, f;", "{ .param .b32 q;\ncall (q), g, (4);\nld.param.b32 %r2, [q]; }", 4),
        (".func (.param .b32 r) f(.param .b32 a);\n.func (.param .b32 r) f(.param .b32 a)\n"
         "{ .reg .b32 x; ld.param.b32 x, [a]; st.param.b32 [r], x; ret; }",
         "{ .param .b32 q;\ncall (q), f, (4);\nld.param.b32 %r2, [q]; }", 4),
    ],
)  # fmt: skip
def test_values(function, code, value):
    if value is not None:
        assert value_of(code, function) == value


def test_two_results():
    """ptxas accepts several results only when it compiles the whole program at once."""
    function = ".func (.reg .u32 r, .reg .u32 s) f() { mov.u32 r, 5; mov.u32 s, 6; ret; }"
    report, out = run(text_of("call (%r3, %r2), f;\nst.global.u32 [%rd1], %r2;", function), block=1)
    assert report.ok, str(report)
    assert out[0] == 6


def test_what_a_function_does_not_set_is_invalid():
    function = ".func (.param .b32 r) f() { ret; }"
    found = findings(
        "{ .param .b32 q;\ncall (q), f;\nld.param.b32 %r2, [q]; }\nst.global.u32 [%rd1], %r2;",
        function,
        block=1,
    )
    assert [f.kind for f in found] == ["uninitialized register"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("call nothing;", "unknown function 'nothing'"),
        ("call k;", "must not be a kernel .got 'k'"),
        ("call square;", r"number of arguments must be 1 \(got 0\)"),
        ("call (%r2, %r3), square, (%r1);", r"number of results must be at most 1 \(got 2\)"),
        ("call %rd1;", "last operand of an indirect call must name"),
        ("call %rd1, nothing;", "must be the name of a .callprototype .*got 'nothing'"),
        ("{ .param .b16 p;\ncall (_), square, (p); }", r"'p' must have 4 bytes, .* \(got 2\)"),
        ("call (_), absent, (%r1);", "'absent' has no body: link the module"),
        ("call (_), cudaLaunchDeviceV2, (%r1);", "dynamic parallelism is not supported"),
    ],
)
def test_refused_calls(code, message):
    before = FUNCTIONS + "".join(
        f".extern .func (.param .b32 r) {name}(.param .b32 a);\n"
        for name in ("absent", "cudaLaunchDeviceV2")
    )
    with pytest.raises(sim.PtxError, match=message):
        sim.Module(text_of(code, before)).check("k")


# ---- Recursion and the stack ---------------------------------------------------------------------

# f(n) = n < 2 ? 1 : n * f(n - 1)
FACTORIAL = """.func (.param .b32 r) f(.param .b32 a)
{ .reg .b32 n, m; .reg .pred p; ld.param.b32 n, [a]; mov.u32 m, 1; setp.lt.u32 p, n, 2;
@p bra DONE;
{ .param .b32 b; .param .b32 s; sub.u32 m, n, 1; st.param.b32 [b], m; call (s), f, (b);
ld.param.b32 m, [s]; }
mul.lo.u32 m, m, n;
DONE: st.param.b32 [r], m; ret; }
"""


def test_recursion_to_different_depths():
    out = result("and.b32 %r1, %r1, 7;\n" + call("f", "") + "mov.u32 %r1, %tid.x;", FACTORIAL)
    np.testing.assert_array_equal(out, [math.factorial(n % 8) for n in LANE])


def test_recursion_through_a_pointer():
    before = FACTORIAL.replace(
        "call (s), f, (b);", "pr: .callprototype (.param .b32 _) _ (.param .b32 _);\n"
        ".reg .b64 to; ld.global.u64 to, [self]; call (s), to, (b), pr;",
    )  # fmt: skip
    before = ".func (.param .b32 r) f(.param .b32 a);\n.global .align 8 .u64 self = f;\n" + before
    out = result("and.b32 %r1, %r1, 7;\n" + call("f", "") + "mov.u32 %r1, %tid.x;", before)
    np.testing.assert_array_equal(out, [math.factorial(n % 8) for n in LANE])


def test_each_activation_has_its_own_local_variables():
    """g(n, p) stores n at p, calls g(n - 1, address of its own variable), adds n to the result."""
    function = """.func (.reg .u32 r) g(.reg .u32 n, .reg .u64 p)
    { .local .align 4 .u32 mine; .reg .u64 at; .reg .u32 x; .reg .pred q;
    st.u32 [p], n; mov.u32 r, 0; setp.eq.u32 q, n, 0; @q bra END;
    sub.u32 x, n, 1; mov.u64 at, mine; cvta.local.u64 at, at; call (x), g, (x, at);
    ld.local.u32 r, [mine]; add.u32 r, r, x; add.u32 r, r, n;
    END: ret; }"""
    code = """.local .align 4 .u32 top; mov.u64 %rd3, top; cvta.local.u64 %rd3, %rd3;
    call (%r2), g, (%r1, %rd3); ld.local.u32 %r3, [top]; add.u32 %r2, %r2, %r3;"""
    # g(n) = (n - 1) + g(n - 1) + n = n^2, and the kernel adds n.
    np.testing.assert_array_equal(result(code, function), LANE * LANE + LANE)


def test_endless_recursion_is_a_finding():
    before = FACTORIAL.replace("@p bra DONE;", "")
    found = findings(call("f", ""), before, block=64)
    assert [f.kind for f in found] == ["stack overflow"]


ALLOCA = "mov.u64 %rd3, 16;\nalloca.u64 %rd4, %rd3, 16;\n"


def test_alloca_and_restore():
    code = f"""stacksave.u64 %rd5;\n{ALLOCA}st.local.u32 [%rd4+12], %r1;
    alloca.u64 %rd6, %rd3;\nst.local.u32 [%rd6], 5;\nld.local.u32 %r2, [%rd4+12];
    cvta.local.u64 %rd7, %rd6;\nld.u32 %r3, [%rd7];\nadd.u32 %r2, %r2, %r3;
    stackrestore.u64 %rd5;\nalloca.u64 %rd8, %rd3, 16;\nsetp.ne.u64 %p1, %rd8, %rd4;
    @%p1 mov.u32 %r2, 0;"""
    np.testing.assert_array_equal(result(code, ""), LANE + 5)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("st.local.u32 [%rd4+16], 1;", "out of bounds"),
        ("cvta.local.u64 %rd4, %rd4;\nld.u32 %r2, [%rd4+-2000000];", "out of bounds"),
        ("ld.local.u32 %r2, [%rd4];\nst.global.u32 [%rd1], %r2;", "uninitialized register"),
        ("stacksave.u64 %rd5;\nadd.u64 %rd5, %rd5, 8;\nstackrestore.u64 %rd5;", "invalid operand"),
        ("mov.u64 %rd3, 1000000;\nalloca.u64 %rd4, %rd3;", "stack overflow"),
        ("call (%rd4), f;\nst.local.u32 [%rd4+64], 1;", "out of bounds"),
    ],
)
def test_misuse_of_alloca(code, kind):
    function = """.func (.reg .u64 r) f()
    { .reg .u64 n; mov.u64 n, 128; alloca.u64 r, n, 16; ret; }"""
    assert {f.kind for f in findings(ALLOCA + code, function, block=1)} == {kind}


# ---- nvcc ----------------------------------------------------------------------------------------


def test_calls_as_nvcc_writes_them(tmp_path):
    try:
        find_nvcc()
    except CompileError:
        pytest.skip("there is no nvcc to compile with")
    module = sim.compile_cuda(Path(__file__).with_name("calls.cu"), keep=tmp_path / "calls.ptx")

    def launch(name, *args, block=32):
        return module.launch(name, grid=1, block=block, args=args)

    out = np.zeros((5, 32), np.int32)
    report = launch("calls", out)
    assert report.ok, str(report)
    fibonacci = [0, 1, 1, 2, 3, 5, 8]
    other = np.where(LANE & 1, 2 * LANE, LANE * LANE)
    expected = [EXPECTED, other, EXPECTED + 1 + (LANE & 1), [fibonacci[n % 7] for n in LANE]]
    np.testing.assert_array_equal(out, [*expected, 8 * LANE + 28])

    areas = np.zeros(32, np.float32)
    report = launch("virtual_calls", areas)
    assert report.ok and not report.findings, str(report)
    np.testing.assert_array_equal(areas, np.where(LANE & 1, 1, 3) * LANE * LANE)

    kept, values = np.zeros(32, np.uint64), np.zeros(32, np.int32)
    report = launch("keep", kept)
    assert report.ok and [f.kind for f in report.findings] == ["heap leak"], str(report)
    report = launch("release", kept, values)
    assert report.ok and not report.findings, str(report)
    np.testing.assert_array_equal(values, LANE)
    assert {f.kind for f in launch("release", kept, values).findings} == {
        "freed memory", "invalid free"
    }  # fmt: skip

    sums = np.zeros(32, np.int32)
    report = launch("variable_length", sums, np.int32(5))
    assert report.ok, str(report)
    np.testing.assert_array_equal(sums, 10 + 5 * LANE)

    report = launch("prints", np.int32(7), block=1)
    assert report.output == "7 x 1.50 5 1     7|\n"
    assert [f.kind for f in report.findings] == ["assertion"]
    assert "assertion 'n < 5' failed" in report.findings[0].message
