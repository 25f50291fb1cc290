"""Predictions as users meet them: reports of launches and ops, the command line, timelines."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import torchext
from support.opcodes import kernel
from torchext import _sim, sim
from torchext.sim.__main__ import main

ROOT = Path(__file__).resolve().parents[3]
available, reason = torchext.is_available("sim")

COPY = """
ld.param.u64 %rd1, [in];
ld.param.u64 %rd2, [out];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
mad.lo.u32 %r3, %r2, 128, %r1;
mul.wide.u32 %rd3, %r3, 4;
add.u64 %rd1, %rd1, %rd3;
add.u64 %rd2, %rd2, %rd3;
ld.global.u32 %r4, [%rd1];
st.global.u32 [%rd2], %r4;
"""
SPEC = """
kernel = "kernel"
grid = 8
block = 128
seeds = [0]
completion = ["late"]
[arrays.x]
dtype = "int32"
shape = [1024]
fill = "zeros"
access = "read"
[arrays.y]
dtype = "int32"
shape = [1024]
access = "write"
[[args]]
array = "x"
[[args]]
array = "y"
"""


def timed(report: sim.Report) -> sim.Timing:
    assert report.timing is not None, report.text
    return report.timing


def copy(**options) -> sim.Report:
    x, y = np.arange(1024, dtype=np.int32), np.zeros(1024, np.int32)
    module = kernel(COPY, ".param .u64 in, .param .u64 out")
    report = module.launch(
        "kernel", grid=8, block=128, args=[sim.read_only(x), sim.output(y)], **options
    )
    if not options.get("timing_only"):
        assert report.ok and (x == y).all()
    return report


@pytest.fixture(scope="module")
def gemm() -> list[sim.Report]:
    """The same launch of a GEMM, twice with the clock and once without."""
    if not available:
        pytest.skip(reason)
    torch.manual_seed(0)
    a = torchext.ops.quantize_1x128(torch.randn(256, 512).bfloat16())
    b = torchext.ops.quantize_128x128(torch.randn(256, 512).bfloat16())
    reports = []
    for gpu in ("h100", "h100", None):
        with sim.simulate(num_threads=1, timing=gpu) as simulation:
            torchext.ops.fp8_gemm_nt(*a, *b)
        reports += simulation.reports
    return reports


def test_a_prediction_is_deterministic_and_changes_nothing(gemm):
    first, again, without = gemm
    assert timed(first).to_dict() == timed(again).to_dict()
    assert without.timing is None and first.instructions == without.instructions


def test_a_gemm_has_roles_and_resources(gemm):
    timing = timed(gemm[0])
    assert {wait.role for wait in timing.waits} >= {"producer", "consumers"}
    assert any(w.reason == "full[slot]" for w in timing.waits if w.role == "consumers")
    assert 0 < timing.utilization["tensor cores"] < 1
    assert timing.dram_bytes >= 2 * 256 * 512  # both operands once
    for line in str(timing).splitlines():
        assert line.startswith(("predicted", "  ")), line


def test_the_timeline_is_a_chrome_trace(gemm, tmp_path):
    timing = timed(gemm[0])
    timing.save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert any("tensor cores" in track for track in tracks)
    assert any("(producer)" in track for track in tracks)
    last = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X")
    assert 0 < last <= 1.5 * timing.microseconds


def test_plot_draws_the_timeline(gemm, tmp_path):
    pytest.importorskip("matplotlib")
    timing, path = timed(gemm[0]), tmp_path / "plot.png"
    timing.plot(path)
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG")
    timing.plot(path, end=timing.cycles / 2)
    assert path.read_bytes() != whole
    with pytest.raises(ValueError, match="begin and end must enclose work of the kernel"):
        timing.plot(path, begin=2 * timing.cycles)


def test_plot_names_what_is_missing(gemm, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"Timing\.plot: matplotlib must be installed"):
        timed(gemm[0]).plot(tmp_path / "plot.png")


def test_h200_has_more_memory_bandwidth():
    data = np.zeros(1 << 22, np.int32)
    body = COPY.replace("128, %r1", "128, %r1")
    module = kernel(body, ".param .u64 in, .param .u64 out")
    times = {
        gpu: timed(module.launch(
            "kernel", grid=data.size // 128, block=128, args=[data, data.copy()],
            timing=gpu, timing_only=True,
        )).cycles
        for gpu in ("h100", "h200")
    }  # fmt: skip
    assert 1.1 < times["h100"] / times["h200"] < 1.4


def test_costly_accesses_are_named():
    """A warp stores a column of 32 words to shared memory, and loads one from each line."""
    body = (
        ".shared .align 128 .b8 tile[4096];\nld.param.u64 %rd1, [in];\nmov.u32 %r1, %tid.x;\n"
        "mul.wide.u32 %rd3, %r1, 128;\nadd.u64 %rd1, %rd1, %rd3;\nld.global.u32 %r4, [%rd1];\n"
        "mov.u32 %r5, tile;\nmad.lo.u32 %r5, %r1, 128, %r5;\n" + "st.shared.u32 [%r5], %r4;\n" * 8
    )
    module = kernel(body, ".param .u64 in, .param .u64 out")
    report = module.launch(
        "kernel", grid=1, block=32, args=[np.zeros(1024, np.int32), np.zeros(4, np.int32)],
        timing="h100",
    )  # fmt: skip
    remarks = {remark.kind: remark for remark in timed(report).remarks}
    assert "32.0 times" in remarks["bank conflicts"].text
    assert "8.0 times" in remarks["uncoalesced access"].text
    assert remarks["bank conflicts"].ptx_line > remarks["uncoalesced access"].ptx_line


def test_timing_only_runs_some_clusters():
    whole, part = copy(timing="h100"), copy(timing="h100", timing_only=True)
    assert timed(whole).to_dict() == timed(part).to_dict()


@pytest.mark.parametrize("options, message", [
    (dict(timing="a100"), "timing must be one of h100, "),
    (dict(timing_only=True), "timing must name a GPU if timing_only is True"),
])  # fmt: skip
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        copy(**options)


def test_the_command_line(tmp_path, capsys):
    (tmp_path / "copy.ptx").write_text(
        ".version 8.8\n.target sm_90a\n.address_size 64\n"
        ".visible .entry kernel(.param .u64 in, .param .u64 out)\n{\n"
        ".reg .b32 %r<8>;\n.reg .b64 %rd<8>;\n" + COPY + "ret;\n}\n"
    )
    (tmp_path / "spec.toml").write_text(SPEC)
    arguments = [str(tmp_path / "copy.ptx"), "--launch", str(tmp_path / "spec.toml")]
    trace = ["--trace", str(tmp_path / "trace.json")]
    assert main([*arguments, "--timing", "h100", *trace]) == 0
    assert "predicted for h100: " in capsys.readouterr().out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert main([*arguments, *trace]) == 2
    assert "--timing must name a GPU" in capsys.readouterr().err


def test_the_document_has_the_compiled_constants():
    path = ROOT / "tools" / "timing_tables.py"
    tool = runpy.run_path(str(path))
    assert tool["document"]() == tool["DOCUMENT"].read_text(), "run python tools/timing_tables.py"
    assert sum(fitted for _, _, _, fitted, *_ in _sim.timing_constants()) <= 6
