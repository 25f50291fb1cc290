"""Several modules linked into one: how names resolve, what is refused, where findings point."""

import re
import subprocess

import numpy as np
import pytest

from support.ptx_texts import HEADER, ptxas_accepts, text_of
from torchext import sim
from torchext.sim.compiler import CompileError, find_nvcc

STORE = "mul.wide.u32 %rd2, %r1, 4;\nadd.u64 %rd1, %rd1, %rd2;\nst.global.u32 [%rd1], %r2;"
DECLARED = ".extern .func (.param .b32 r) f(.param .b32 a);\n"
CALL = "{ .param .b32 q;\ncall (q), f, (%r1);\nld.param.b32 %r2, [q]; }\n"


def function(code: str, head: str = ".visible", name: str = "f", before: str = "") -> str:
    return f"""{HEADER}{before}
    {head} .func (.param .b32 r) {name}(.param .b32 a)
    {{ .reg .b32 x, y; .reg .b64 p; ld.param.b32 x, [a];\n{code}\nst.param.b32 [r], x; ret; }}
    """


KERNEL = text_of(CALL + STORE, DECLARED)


def launch(*texts: str, block: int = 32):
    for text in texts:
        assert ptxas_accepts(text) == ""
    module = sim.Module(list(texts))
    out = np.zeros(32, np.uint32)
    report = module.launch("k", grid=1, block=block, args=[out])
    return report, out


@pytest.mark.parametrize("order", [1, -1])
def test_functions_of_another_module(order):
    report, out = launch(*[KERNEL, function("mul.lo.u32 x, x, 3;")][::order])
    assert report.ok, str(report)
    np.testing.assert_array_equal(out, 3 * np.arange(32))


def test_link_takes_modules_and_files(tmp_path):
    path = tmp_path / "f.ptx"
    path.write_text(function("mul.lo.u32 x, x, 3;"))
    module = sim.link([sim.Module(KERNEL.replace("call (q)", "call.uni (q)")), path])
    out = np.zeros(32, np.uint32)
    assert module.launch("k", grid=1, block=32, args=[out]).ok
    np.testing.assert_array_equal(out, 3 * np.arange(32))
    assert module.target == "sm_90a" and [k.name for k in module.kernels()] == ["k"]


def test_variables_of_another_module():
    use = text_of(
        "ld.global.u32 %r3, [x+4];\nld.const.u32 %r4, [c];\nadd.u32 %r2, %r3, %r4;\n"
        "ld.global.u64 %rd5, [to];\nld.u32 %r5, [%rd5];\nadd.u32 %r2, %r2, %r5;\n" + STORE,
        ".extern .global .align 4 .u32 x[2];\n.extern .const .align 4 .u32 c;\n"
        ".global .align 8 .u64 to = x;\n",
    )
    define = HEADER + (
        ".visible .global .align 4 .u32 x[2] = {5, 6};\n.visible .const .align 4 .u32 c = 100;\n"
    )
    report, out = launch(use, define)
    assert report.ok, str(report)
    assert (out == 111).all()


def test_own_names_stay_apart():
    """Both modules have a function, a variable, shared memory and static locals of equal names."""
    own = """.global .align 4 .u32 v = {value};\n.shared .align 4 .u32 s;
    .func (.param .b32 r) g(.param .b32 a) {{ .global .align 4 .u32 here = {value};
    .reg .b32 x, y; ld.global.u32 x, [v]; ld.global.u32 y, [here]; add.u32 x, x, y;
    st.shared.u32 [s], x; ld.shared.u32 x, [s]; st.param.b32 [r], x; ret; }}\n"""
    ask = "{ .param .b32 q;\ncall (q), g, (0);\nld.param.b32 %r3, [q]; }\nadd.u32 %r2, %r2, %r3;\n"
    theirs = function(
        "{ .param .b32 q; call (q), g, (0); ld.param.b32 x, [q]; }", before=own.format(value=7)
    )
    report, out = launch(text_of(CALL + ask + STORE, own.format(value=1000) + DECLARED), theirs,
                         block=1)  # fmt: skip
    assert report.ok, str(report)
    assert out[0] == 2 * 7 + 2 * 1000


@pytest.mark.parametrize(
    ("heads", "factor"),
    [((".weak", ".visible"), 3), ((".visible", ".weak"), 2), ((".weak", ".weak"), 2)],
)
def test_weak_functions_give_way(heads, factor):
    report, out = launch(
        KERNEL, function("mul.lo.u32 x, x, 2;", heads[0]), function("mul.lo.u32 x, x, 3;", heads[1])
    )
    assert report.ok, str(report)
    np.testing.assert_array_equal(out, factor * np.arange(32))


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        (".weak .global .u32 x = 2;", ".visible .global .u32 x = 3;", 3),
        (".weak .global .u32 x = 2;", ".weak .global .u32 x = 3;", 2),
        (".common .global .u32 x;", ".visible .global .u32 x = 3;", 3),
        (".common .global .u32 x;", ".common .global .u32 x;", 0),
        (".common .global .u32 x[1];", ".common .global .u32 x[9];", 0),
    ],
)
def test_one_definition_of_a_variable_counts(first, second, value):
    use = text_of(f"ld.global.u32 %r2, [x];\n{STORE}", first)
    report, out = launch(use, f"{HEADER}{second}\n")
    assert report.ok, str(report)
    assert (out == value).all()


def test_dynamic_shared_memory_is_one():
    before = ".extern .shared .align 16 .b8 memory[];\n"
    kernel = text_of("st.shared.u32 [memory], 77;\n" + CALL + STORE, before + DECLARED)
    module = sim.Module([kernel, function("ld.shared.u32 x, [memory];", before=before)])
    out = np.zeros(1, np.uint32)
    report = module.launch("k", grid=1, block=1, args=[out], smem=16)
    assert report.ok and out[0] == 77


@pytest.mark.parametrize(
    ("second", "place", "message"),
    [
        (function("") , "b.ptx:5", "'f' is defined in a.ptx:5 too"),
        (".visible .global .u64 x;", "a.ptx:4", "'x' has another size or state space in b.ptx:4"),
        (".visible .const .u32 x;", "a.ptx:4", "'x' has another size or state space"),
        (".visible .global .u32 y = 1;", "b.ptx:4", "'y' is defined in a.ptx:4 too"),
        (".extern .func f(.param .b64 a);", "b.ptx:4", "'f' has other parameters or results"),
        (".extern .global .u32 z;\n.global .u64 to = z;", "b.ptx:5",
         r"none of the linked modules \(a.ptx, b.ptx\) defines 'z'"),
        (".extern .func g();\n.func h() {\ncall g;\nret; }", "b.ptx:6", "defines 'g'"),
        (".visible .entry e() { ret; }", "b.ptx:4", "'e' is defined in a.ptx:4 too"),
    ],
)  # fmt: skip
def test_refused(tmp_path, second, place, message):
    first = function(
        "", before=".extern .global .u32 x; .visible .global .u32 y; .entry e() {ret;}"
    )
    (tmp_path / "a.ptx").write_text(first)
    text = second if second.startswith(".version") else HEADER + second
    (tmp_path / "b.ptx").write_text(text + "\n")
    with pytest.raises(sim.PtxError) as error:
        sim.Module([tmp_path / "a.ptx", tmp_path / "b.ptx"])
    assert re.search(
        f"{re.escape(place)}: .*{message}", str(error.value).replace(f"{tmp_path}/", "")
    )


def test_what_is_declared_and_not_used_may_be_missing():
    report, _ = launch(text_of(STORE.replace("%r2", "%r1"), DECLARED), HEADER)
    assert report.ok


def test_one_module_says_what_to_link():
    with pytest.raises(sim.PtxError, match="'f' has no body: link the module that defines it"):
        sim.Module(KERNEL).check("k")
    text = text_of("ld.global.u32 %r2, [x];", ".extern .global .u32 x;")
    with pytest.raises(sim.PtxError, match=r"'x' is \.extern: link the module that defines it"):
        sim.Module(text).check("k")


def test_findings_name_the_module_and_its_line(tmp_path):
    """A store of one module races with a load of the other."""
    shared = ".visible .global .align 4 .u32 cell;\n"
    load = function("\nld.global.u32 x, [cell];", before=".extern .global .align 4 .u32 cell;\n")
    kernel = text_of("st.global.u32 [cell], %r1;\n" + CALL + STORE, shared + DECLARED)
    for name, text in (("kernel", kernel), ("load", load)):
        (tmp_path / f"{name}.ptx").write_text(text)
    module = sim.Module([tmp_path / "kernel.ptx", tmp_path / "load.ptx"])
    report = module.launch("k", grid=1, block=64, args=[np.zeros(64, np.uint32)])
    (race,) = [f for f in report.findings if f.kind == "data race" and "ld.global" in f.opcode][:1]
    line = load.split("\n").index("ld.global.u32 x, [cell];") + 1
    other = kernel.split("\n").index("st.global.u32 [cell], %r1;") + 1
    assert race.module.endswith("load.ptx") and race.ptx_line == line
    assert race.other_module.endswith("kernel.ptx") and race.other_ptx_line == other
    text = str(report).replace(f"{tmp_path}/", "")
    assert f"--> load.ptx:{line}\n" in text and f"--> kernel.ptx:{other}\n" in text
    assert f"line {other} of {tmp_path}/kernel.ptx: st.global.u32" in race.other


SOURCES = {
    "a": """
        __device__ int total;
        __constant__ int factors[4];
        extern __device__ int scale(int);
        static __device__ int own = 1;
        static __device__ __noinline__ int helper(int x) { return x + own; }
        __global__ void kernel(int* out) {
          out[threadIdx.x] = helper(scale(threadIdx.x)) + total;
        }""",
    "b": """
        extern __device__ int total;
        extern __constant__ int factors[4];
        static __device__ int own = 2;
        static __device__ __noinline__ int helper(int x) { return x * own; }
        __device__ int scale(int x) {
          return helper(x * factors[x & 3]) + total;
        }""",
}


def test_relocatable_modules_of_nvcc(tmp_path):
    try:
        nvcc = find_nvcc()
    except CompileError:
        pytest.skip("there is no nvcc to compile with")
    for name, source in SOURCES.items():
        (tmp_path / f"{name}.cu").write_text(source)
        command = [str(nvcc), "-arch=compute_90", "-rdc=true", "-lineinfo", "-ptx", f"{name}.cu"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    module = sim.Module([tmp_path / "a.ptx", tmp_path / "b.ptx"])
    module.variable("total").set(1000)
    module.variable("factors").set(np.array([1, 2, 3, 4], np.int32))
    out = np.zeros(32, np.int32)
    (kernel,) = module.kernels()
    report = module.launch(kernel.name, grid=1, block=32, args=[out])
    assert report.ok, str(report)
    lane = np.arange(32)
    np.testing.assert_array_equal(out, 2 * lane * (lane % 4 + 1) + 1 + 2 * 1000)
