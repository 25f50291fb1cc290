"""`python -m torchext.sim`: listing, launching, exit status."""

import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from support.kernels import HEADER, RACE, SCALE, TMA
from torchext.sim.__main__ import main
from torchext.sim.compiler import CompileError, find_nvcc

ROOT = Path(__file__).resolve().parents[2]

SCALE_SPEC = """
    kernel = "scale"
    grid = 1
    block = 128
    [arrays.x]
    shape = [100]
    dtype = "float32"
    fill = "arange"
    access = "read"
    [arrays.y]
    shape = [100]
    dtype = "float32"
    access = "write"
    save = "y.npy"
    [[args]]
    array = "x"
    [[args]]
    array = "y"
    [[args]]
    scalar = 3
    type = "float32"
    [[args]]
    scalar = 100
    type = "uint32"
"""


def run(tmp_path, ptx, spec=None):
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    arguments = [str(source)]
    if spec is not None:
        path = tmp_path / "spec.toml"
        path.write_text(textwrap.dedent(spec))
        arguments += ["--launch", str(path)]
    return main(arguments)


def test_listing(tmp_path, capsys):
    assert run(tmp_path, SCALE) == 0
    out = capsys.readouterr().out
    assert out.startswith("sm_90a: 1 kernel\n") and "a: 4 bytes, aligned to 4" in out


def test_listing_says_what_cannot_be_simulated(tmp_path, capsys):
    ptx = HEADER + ".visible .entry k()\n{\n    .reg .b32 %r<3>;\n    frobnicate.s32 %r1, %r2;\n}\n"
    assert run(tmp_path, ptx) == 2
    assert "cannot be simulated: " in capsys.readouterr().out


def test_launch(tmp_path, capsys):
    assert run(tmp_path, SCALE, SCALE_SPEC) == 0
    out = capsys.readouterr().out
    assert out.startswith("scale: 9 runs, 0 with findings, 0 distinct; ")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), 3 * np.arange(100, dtype=np.float32))


def test_findings_are_printed_once(tmp_path, capsys):
    spec = SCALE_SPEC.replace("scalar = 100", "scalar = 101")
    assert run(tmp_path, SCALE, spec) == 1
    out = capsys.readouterr().out
    assert out.count("error: out of bounds") == 2  # the load and the store
    assert "scale: 9 runs, 9 with findings, 2 distinct; " in out


def test_files_and_tensor_maps(tmp_path, capsys):
    np.save(tmp_path / "in.npy", np.arange(512, dtype=np.float32).reshape(16, 32))
    spec = """
        kernel = "tma"
        grid = 1
        block = 128
        seeds = [5]
        completion = ["random"]
        [arrays.in]
        file = "in.npy"
        access = "read"
        [arrays.out]
        shape = [8, 16]
        dtype = "float32"
        access = "write"
        save = "out.npy"
        [[args]]
        tensor_map = "in"
        box = [8, 16]
        [[args]]
        array = "out"
        [[args]]
        scalar = 16
        type = "int32"
        [[args]]
        scalar = 8
        type = "int32"
    """
    assert run(tmp_path, TMA, spec) == 0, capsys.readouterr()
    expected = np.load(tmp_path / "in.npy")[8:, 16:]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_outputs_that_depend_on_the_schedule(tmp_path, capsys):
    spec = """
        kernel = "race"
        grid = 1
        block = 64
        seeds = [0, 1, 2, 3, 4, 5, 6, 7]
        [arrays.out]
        shape = [64]
        dtype = "int32"
        access = "write"
        [[args]]
        array = "out"
    """
    assert run(tmp_path, RACE, spec) == 1
    out = capsys.readouterr().out
    assert "error: data race" in out
    assert "the bits of out depend on the schedule" in out


def run_json(tmp_path, capsys, ptx, spec=None):
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    arguments = [str(source), "--format", "json"]
    if spec is not None:
        path = tmp_path / "spec.toml"
        path.write_text(textwrap.dedent(spec))
        arguments += ["--launch", str(path)]
    status = main(arguments)
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["exit_status"] == status
    return outcome


def test_json_of_a_listing(tmp_path, capsys):
    outcome = run_json(tmp_path, capsys, SCALE.replace("entry scale", "entry _Z5scalePfS_fj"))
    (kernel,) = outcome["kernels"]
    assert outcome["target"] == "sm_90a" and outcome["exit_status"] == 0
    assert kernel["name"] == "_Z5scalePfS_fj" and kernel["error"] is None
    assert kernel["signature"] == "scale(float*, float*, float, unsigned int)"
    assert kernel["parameters"][2] == {
        "name": "a", "size": 4, "alignment": 4, "type": "f32", "is_array": False,
        "is_pointer": False,
    }  # fmt: skip


def test_json_of_a_launch(tmp_path, capsys):
    outcome = run_json(tmp_path, capsys, SCALE, SCALE_SPEC)
    assert outcome["ok"] and outcome["exit_status"] == 0 and len(outcome["runs"]) == 9
    outcome = run_json(tmp_path, capsys, SCALE, SCALE_SPEC.replace("scalar = 100", "scalar = 101"))
    assert not outcome["ok"] and outcome["exit_status"] == 1
    run = outcome["runs"][4]
    assert (run["seed"], run["completion"], run["ok"]) == (1, "eager", False)
    assert {f["kind"] for f in run["findings"]} == {"out of bounds"}
    assert {f["grade"] for f in run["findings"]} == {"error"}
    assert run["findings"][0]["lanes"] == [4] and run["findings"][0]["cta"] == [0, 0, 0]
    assert run["differs_from_first_run"] == [] and "text" not in run


def test_json_of_an_error(tmp_path, capsys):
    outcome = run_json(tmp_path, capsys, SCALE, SCALE_SPEC.replace("block = 128", "block = 4096"))
    assert outcome["exit_status"] == 2 and "at most 1024" in outcome["error"]


def test_notes_leave_the_exit_status_alone(tmp_path, capsys):
    ptx = SCALE.replace("    @%p1 bra DONE;\n", "").replace(
        "mad.lo.s32 %r5, %r2, %r3, %r4", "mov.u32 %r5, 0"
    )
    assert run(tmp_path, ptx, SCALE_SPEC) == 0
    out = capsys.readouterr().out
    assert "note: same-value store: " in out
    assert "scale: 9 runs, 0 with findings, 9 with notes only, 1 distinct; " in out
    assert run_json(tmp_path, capsys, ptx, SCALE_SPEC)["ok"]


def test_scalars_without_a_type(tmp_path, capsys):
    spec = SCALE_SPEC.replace('    type = "float32"\n', "").replace('    type = "uint32"\n', "")
    assert spec.count("type =") == 2  # those of the two arrays
    assert run(tmp_path, SCALE, spec) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), 3 * np.arange(100, dtype=np.float32))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("kernel =", "kernal =", "must have the key 'kernel'"),
        (
            "block = 128",
            "block = 128\nsize = 3",
            r"keys must be among kernel, grid.*\(got 'size'\)",
        ),
        ('dtype = "float32"', 'dtype = "float31"', r"\[arrays.x\]: dtype must be one of torch's"),
        ('fill = "arange"', 'fill = "random"', r"\[arrays.x\]: fill must be a number or one of"),
        ('access = "read"', 'access = "none"', r"\[arrays.x\]: access must be read"),
        ('array = "y"', 'array = "z"', r"args\[1\]: array .*; there is no \[arrays.z\]"),
        ("scalar = 100", "scalar = -1", r"args\[3\]: "),
        ('type = "uint32"', 'type = "word"', r"args\[3\]: .*word"),
        ("[[args]]", "[[args", r"spec\.toml: the file must be TOML"),
        ("scalar = 100", 'scalar = "100"', r"args\[3\]: scalar must be a number"),
        ("block = 128", "block = 4096", "block"),
        ('kernel = "scale"', 'kernel = "x"', "a kernel of the module .got 'x'"),
    ],
)
def test_specifications_are_checked(tmp_path, capsys, old, new, message):
    assert old in SCALE_SPEC
    assert run(tmp_path, SCALE, SCALE_SPEC.replace(old, new, 1)) == 2
    error = capsys.readouterr().err
    assert error.startswith("torchext.sim: ")
    assert re.search(message, error), error


def test_missing_files(tmp_path, capsys):
    assert main([str(tmp_path / "none.ptx")]) == 2
    assert "none.ptx" in capsys.readouterr().err
    assert run(tmp_path, "not ptx\n") == 2


def test_without_nvcc(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert main([str(tmp_path / "k.cu")]) == 2
    assert "nvcc must be in CUDA_HOME" in capsys.readouterr().err


def has_nvcc():
    try:
        find_nvcc()
    except CompileError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="there is no nvcc to compile with")


@needs_nvcc
def test_compiler_errors_are_passed_on(tmp_path, capsys):
    source = tmp_path / "k.cu"
    source.write_text("__global__ void k( {}\n")
    assert main([str(source)]) == 2
    assert "error:" in capsys.readouterr().err


@needs_nvcc
@pytest.mark.parametrize("mended", [False, True])
def test_the_worked_example(capsys, mended):
    """The example of docs/simulator.md: a missing fence, though every run gives right numbers."""
    folder = ROOT / "docs" / "examples"
    arguments = [str(folder / "tile_gemm.cu"), "-I", str(ROOT)]
    arguments += ["--launch", str(folder / "tile_gemm.toml")]
    arguments += ["--nvcc-option=-DMENDED"] if mended else []
    assert main(arguments) == (0 if mended else 1)
    out = capsys.readouterr().out
    assert "depend on the schedule" not in out
    if mended:
        assert "9 runs, 0 with findings" in out
    else:
        assert "9 runs, 9 with findings, " in out and out.count("error: ") == 1
        assert "error: missing proxy fence" in out
        for quoted in ("ptx::cp_async_bulk_tensor_2d_store(&d_map", "ptx::st_shared_v2_f32("):
            assert f" | {quoted}" in out
        assert re.search(r"--> .*tile_gemm\.cu:\d+\n", out)
        assert re.search(r"inlined .*ptx/isa/tma\.h:\d+\n", out)
