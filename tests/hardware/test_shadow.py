"""The shadow runs of the simulator's tests, with a driver that tests/hardware/shadow/fake_cuda.c
replaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.hardware.shadow import known
from tests.hardware.shadow.compare import Buffer, Verdict, compare
from tests.hardware.shadow.plugin import DEAD_CONTEXT

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")

TESTS = '''
import numpy as np
import pytest
from torchext import sim

HEAD = ".version 8.0\\n.target {target}\\n.address_size 64\\n"
COPY = """.visible .entry {name}(.param .u64 in, .param .u64 out)
{{
.reg .b64 %a<3>; .reg .b32 %r<3>;
ld.param.u64 %a1, [in]; ld.param.u64 %a2, [out];
mov.u32 %r1, %tid.x;
mad.wide.u32 %a1, %r1, 4, %a1; mad.wide.u32 %a2, %r1, 4, %a2;
ld.global.b32 %r2, [%a1];
st.global.b32 [%a2], %r2;
ret;
}}
"""
STORE = """.visible .global .u32 word = 5;
.visible .entry store(.param .u64 in)
{
.reg .b64 %a; .reg .b32 %r<3>;
ld.param.u64 %a, [in];
ld.global.b32 %r1, [%a]; ld.global.b32 %r2, [word];
add.u32 %r2, %r1, %r2;
st.global.b32 [word], %r2;
ret;
}
"""
MAP = """.visible .entry {name}(.param .align 64 .b8 map[128])
{{
ret;
}}
"""

def launch(name, target="sm_90a", extra="", **options):
    x = np.arange(32, dtype=np.uint32) + 7
    y = np.zeros(32, np.uint32)
    module = sim.Module(HEAD.format(target=target) + extra + COPY.format(name=name))
    report = module.launch(name, grid=options.pop("grid", 1), block=32,
                           args=[sim.read_only(x), sim.output(y)], **options)
    assert report.ok and (y == x).all()

def test_same():
    launch("copy", smem=64)
    launch("copy", smem=64)

def test_cluster():
    launch("copy", grid=(16, 1, 1), cluster=16, non_portable_cluster=True, checks=False)

def test_wrong():
    launch("wrong")

def test_refused():
    launch("copy", extra="// REFUSED\\n")

def test_other_target():
    launch("copy", target="sm_100a")

def test_variable():
    module = sim.Module(HEAD.format(target="sm_90") + STORE)
    for _ in range(2):
        module.launch("store", grid=1, block=1, args=[np.full(1, 3, np.uint32)])
    assert module.variable("word").get() == 11

def test_linked():
    texts = [HEAD.format(target="sm_90") + text for text in (STORE, COPY.format(name="copy"))]
    x = np.arange(32, dtype=np.uint32)
    sim.Module(texts).launch("copy", grid=1, block=32, args=[x, np.zeros(32, np.uint32)])

def test_map():
    module = sim.Module(HEAD.format(target="sm_90a") + MAP.format(name="map"))
    x = np.zeros((8, 32), np.uint8)
    module.launch("map", grid=1, block=32, args=[sim.tensor_map(x, box=(4, 16), swizzle=32)])

def test_pointer():
    module = sim.Module(HEAD.format(target="sm_90") + STORE + ".visible .global .u64 to;\\n")
    to = module.variable("to")
    to.set(np.array([to.address], np.uint64))
    module.launch("store", grid=1, block=1, args=[np.full(1, 3, np.uint32)])

def test_too_new():
    launch("copy", extra="// TOO NEW\\n")

def test_fault():
    launch("fault")

def test_hang():
    launch("hang")
'''


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert COMPILER is not None
    path = tmp_path_factory.mktemp("fake") / "libcuda.so"
    source = ROOT / "tests" / "hardware" / "shadow" / "fake_cuda.c"
    command = [COMPILER, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", str(path), str(source)], check=True)
    return path


class Run:
    """A run of TESTS: exit status, what pytest printed, the report, the driver's log."""

    def __init__(self, library: Path, folder: Path, only: str):
        (folder / "test_launches.py").write_text(TESTS)
        self.log = folder / "log"
        report = folder / "shadow.txt"
        done = subprocess.run(
            (sys.executable, "-m", "pytest", str(folder / "test_launches.py"), "-k", only,
             "-p", "tests.hardware.shadow.plugin", "--shadow-gpu", str(report),
             "--shadow-library", str(library), "--shadow-limit", "0.3", "-v", "--tb=short",
             "--rootdir", str(folder), "-p", "no:cacheprovider"),
            cwd=ROOT, env={**os.environ, "FAKE_CUDA_LOG": str(self.log)}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        self.status, self.output = done.returncode, done.stdout + done.stderr
        parts = [report.with_name("shadow.txt.jsonl"), *folder.glob("shadow.txt.parts/*")]
        lines = [line for part in parts if part.exists() for line in part.read_text().splitlines()]
        self.records = [json.loads(line) for line in lines]
        self.text = report.read_text() if report.exists() else ""

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


@needs_compiler
@pytest.mark.slow
def test_launches_are_repeated_and_compared(library, tmp_path):
    run = Run(library, tmp_path, "not fault and not hang")
    assert Counter(r["status"] for r in run.records) == {
        "same": 6, "skipped": 4, "differs": 1, "refused": 1,
    }, run.output  # fmt: skip
    assert run.status == 1 and "2 failed, 8 passed" in run.output
    assert run.calls() == [
        "copy attribute 8 = 64",
        "copy grid 1 1 1 block 32 1 1 shared 64",
        "copy attribute 14 = 1",
        "copy grid 16 1 1 block 32 1 1 shared 0 [4: 16 1 1]",
        "wrong grid 1 1 1 block 32 1 1 shared 0",
        "store grid 1 1 1 block 1 1 1 shared 0",
        "store grid 1 1 1 block 1 1 1 shared 0",
        "link <ptx>",
        "link <ptx>",
        "copy grid 1 1 1 block 32 1 1 shared 0",
        "map type 0 rank 2 dim 32 8 stride 32 box 16 4 steps 1 1 0 1 0 0",
        "map grid 1 1 1 block 32 1 1 shared 0",
    ]
    assert "argument 1 (uint32): 1 of 32 elements differ" in run.text
    assert "[3] gpu 0x0000000b sim 0x0000000a for argument 0[3]=0000000a" in run.text
    assert "error 218 (a fake error)\n  line 1: a fake message" in run.text
    assert "target sm_100a on a GPU of capability 90" in run.text
    assert "a variable holds an address of the simulator" in run.text
    assert "a PTX version that the driver does not know" in run.text


@needs_compiler
@pytest.mark.parametrize(
    "name,status,message",
    [("fault", "failed", "error 700 (an illegal"), ("hang", "hung", "did not end within 0.3 s")],
)
@pytest.mark.slow
def test_a_lost_gpu_ends_the_process(library, tmp_path, name, status, message):
    run = Run(library, tmp_path, name)
    assert run.status == DEAD_CONTEXT
    assert f"test_{name}: " in run.output and message in run.output
    assert [r["status"] for r in run.records] == [status]


def verdict_of(dtype, gpu, sim, text="", allocations=()):
    gpu, sim = (np.array(values, dtype) for values in (gpu, sim))
    verdict = Verdict()
    buffer = Buffer("out", str(gpu.dtype), gpu.itemsize, gpu.tobytes(), sim.tobytes())
    compare(verdict, buffer, text, list(allocations), [])
    return verdict


def test_what_may_differ():
    nan = verdict_of(np.uint32, [0x7FC00000, 1], [0x7FFFFFFF, 1], "add.f32 %f1, %f2, %f3;")
    assert nan.counts["NaN payload"] == 1 and not nan.mismatches
    integers = verdict_of(np.uint32, [0x7FC00000], [0x7FFFFFFF], "add.u32 %r1, %r2, %r3;")
    assert integers.mismatches
    halves = verdict_of(np.uint32, [0x7E003C00], [0x7FFF3C00], "add.f16x2 %r1, %r2, %r3;")
    assert halves.counts["NaN payload"] == 1 and not halves.mismatches
    address = verdict_of(np.uint64, [5010, 8], [1010, 8], allocations=[(1000, 5000, 100)])
    assert address.counts["address"] == 1 and not address.mismatches
    assert verdict_of(np.uint64, [5010], [1011], allocations=[(1000, 5000, 100)]).mismatches
    function = verdict_of(np.uint64, [0x7F00, 7], [0x0300000000000010, 7])
    assert function.counts["address"] == 1 and not function.mismatches
    gpu, ours = (np.array([9, a], np.uint64).view(np.uint8) for a in (5010, 1010))
    assert not verdict_of(np.uint8, gpu, ours, allocations=[(1000, 5000, 100)]).mismatches
    magic = np.frombuffer(b"xtexTmap", np.uint64)[0]
    maps = verdict_of(np.uint64, np.arange(18), [0, magic, *range(10, 25), 17])
    assert maps.counts["tensor map"] == 16 and not maps.mismatches
    clock = verdict_of(np.uint32, [1], [2], "mov.u32 %r1, %clock;")
    assert clock.counts["reads a register that varies"] == 1 and not clock.mismatches


def test_known_differences_need_their_test_and_code():
    heap = "tests/sim/test_device_heap.py::test_a_full_heap_returns_null"
    assert known.reason("differs", heap, "call.uni (q), malloc, (n);") == known.HEAP
    assert known.reason("differs", heap, "add.u32 %r1, %r2, %r3;") is None
    assert known.reason("failed", heap, "call.uni (q), malloc, (n);") is None
    video = "tests/sim/test_op_video.py::test_scalar"
    assert known.reason("differs", video, "vadd.u32.u32.u32.min %z, %a, %b, %c;") == known.VIDEO
    assert known.reason("differs", video, "vadd.u32.u32.u32.add %z, %a, %b, %c;") is None


def test_approximate_functions_are_bounded():
    text = "ex2.approx.ftz.f32 %z, %a;"
    one = np.float32(1)
    near = verdict_of(np.float32, [np.nextafter(one, 2, dtype=np.float32)], [one], text)
    assert near.counts["approximate function"] == 1 and not near.mismatches
    assert near.errors["ex2 f32"] == (2.0**-23, 2.0**-22)
    assert verdict_of(np.float32, [one * np.float32(1.001)], [one], text).mismatches
