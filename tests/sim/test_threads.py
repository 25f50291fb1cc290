"""What the host threads of the simulator share, touched by all of them at once.

`make tsan` runs these tests under ThreadSanitizer, which reports every access that lacks its lock.
No kernel here polls other CTAs: under ThreadSanitizer that takes minutes.

On 26 November 2026, 28 locks of the simulator were removed, one at a time. ThreadSanitizer reported
27. It missed that of OpSimulator::open, which Python never calls in two threads at once.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable

import numpy as np
import pytest

from support.op_interface import LAUNCH, Buffer, Simulator
from support.ptx_texts import text_of
from torchext import _sim, sim
from torchext.sim.options import launch_options
from torchext.sim.ptx_file import read_ptx

CTAS = 48
BLOCK = 32
THREADS = 4  # host threads of a launch
LAUNCHES = 4  # at once
DECLARE = """.extern .func (.param .b64 r) malloc(.param .b64 n);
.extern .func free(.param .b64 p);
.extern .func (.param .b32 r) vprintf(.param .b64 f, .param .b64 a);
.global .align 8 .u64 total;
.global .align 1 .b8 format[10] = {37, 117, 32, 37, 117, 32, 37, 117, 10, 0};
"""
# %r2: the CTA's number; %r3: the thread's number in the grid; %rd2: the address of its word of out
# (%rd1).
NUMBERS = """mov.u32 %r2, %ctaid.x;\nmov.u32 %r4, %ntid.x;\nmad.lo.u32 %r3, %r2, %r4, %r1;
mul.wide.u32 %rd2, %r3, 4;\nadd.u64 %rd2, %rd1, %rd2;
"""


def malloc(size: str) -> str:
    """PTX that allocates a block of `size` bytes and puts its address into %rd5."""
    return f"""{{ .param .b64 n;\n.param .b64 q;\nst.param.b64 [n], {size};
    call.uni (q), malloc, (n);\nld.param.b64 %rd5, [q]; }}\n"""


FREE = "{ .param .b64 p;\nst.param.b64 [p], %rd5;\ncall.uni free, (p); }\n"


def module(code: str, before: str = "", params: str = ".param .u64 out") -> sim.Module:
    return sim.Module(text_of(NUMBERS + code, DECLARE + before, params=params))


def launch(kernels: sim.Module, words: int = CTAS * BLOCK, kernel: str = "k", **options):
    """Launches on all host threads; returns the report and the buffer `out`."""
    out = np.zeros(words, np.uint32)
    options = {"grid": CTAS, "block": BLOCK, "num_threads": THREADS, **options}
    return kernels.launch(kernel, args=[out], **options), out


def at_once(*calls: Callable[[], None]) -> None:
    """Makes each call in a thread of its own, all at the same time; raises what any raises."""
    start = threading.Barrier(len(calls))
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            start.wait()
            call()
        except BaseException as error:  # of any kind: the test must not pass
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# ---- The device heap ----

KEEP = f"mov.u64 %rd9, 40;\n{malloc('%rd9')}st.u32 [%rd5+8], %r3;\nld.u32 %r5, [%rd5+8];\n"
STORE_WORD = "st.global.u32 [%rd2], %r5;\n"


def test_blocks_of_the_heap_are_apart():
    report, out = launch(module(KEEP * 2 + STORE_WORD + FREE))
    assert [f.kind for f in report.findings] == ["heap leak"], str(report)
    assert f"{CTAS * BLOCK} blocks of together" in report.findings[0].message
    np.testing.assert_array_equal(out, np.arange(CTAS * BLOCK))


def test_a_full_heap_gives_freed_memory_to_every_cta():
    once = KEEP.replace("40;", "1000000;") + FREE
    for checks, rounds in ((False, 4), (True, 1)):
        report, out = launch(module(once * rounds + STORE_WORD), grid=12, block=1, checks=checks)
        assert report.ok and not report.findings, str(report)
        np.testing.assert_array_equal(out[:12], np.arange(12))


def test_misuse_of_the_heap_is_found_on_every_thread():
    report, _ = launch(module(KEEP + FREE * 2 + "ld.u32 %r5, [%rd5];\n"))
    assert {f.kind for f in report.findings} == {"invalid free", "freed memory"}, str(report)
    assert all(re.search("line [0-9]+", f.message) for f in report.findings)


# ---- Findings and reports ----


def test_findings_of_all_threads_are_kept_once():
    """Each CTA makes 30 faults, and all CTAs make the same."""
    faults = "".join(f"ld.global.u32 %r5, [%rd1+{2 * i + 1}];\n" for i in range(30))
    kernels = module(faults)
    many, _ = launch(kernels)
    one, _ = launch(kernels, num_threads=1)
    assert {f.kind for f in many.findings} == {"misaligned access"}
    assert sorted(f.ptx_line for f in many.findings) == [f.ptx_line for f in one.findings]
    assert len(many.findings) == 30
    assert many.instructions == one.instructions


RACES = {
    "stores": "st.global.u32 [%rd1], %r3;\n",
    "loads and stores": "ld.global.v2.u32 {%r5, %r6}, [%rd1];\nst.global.u8 [%rd1+5], %r3;\n",
    "loads and atomics": "ld.global.u32 %r5, [%rd1];\nred.global.add.u32 [%rd1], 1;\n" * 16,
    "copies": """.shared .align 16 .b8 tile[16];\nmov.u32 %r5, tile;
    cp.async.ca.shared.global [%r5], [%rd1], 16;\ncp.async.wait_all;
    st.global.u32 [%rd1], %r3;\n""",
    "bulk stores": """.shared .align 128 .b8 tile[16];\nmov.u32 %r5, tile;
    st.shared.v4.u32 [%r5], {%r3, %r3, %r3, %r3};\nfence.proxy.async;
    cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r5], 16;
    cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n""",
    "bulk loads": """.shared .align 128 .b8 tile[16];\n.shared .align 8 .b64 bar;
    mov.u32 %r5, tile;\nmov.u32 %r6, bar;\nst.global.u32 [%rd1], %r3;\nfence.proxy.async;
    mbarrier.init.shared.b64 [%r6], 1;\nmbarrier.arrive.expect_tx.shared.b64 %rd3, [%r6], 16;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5], [%rd1], 16, [%r6];
    WAIT: mbarrier.try_wait.shared.b64 %p1, [%r6], %rd3;\n@!%p1 bra WAIT;\n""",
    "matrix loads and stores": """.reg .f32 %w<8>;
    wmma.load.c.sync.aligned.m16n16k16.row.global.f32
        {%w0, %w1, %w2, %w3, %w4, %w5, %w6, %w7}, [%rd1];
    wmma.store.d.sync.aligned.m16n16k16.row.global.f32 [%rd1],
        {%w0, %w1, %w2, %w3, %w4, %w5, %w6, %w7};\n""",
    "printed strings": """st.global.u32 [%rd1], %r2;
    { .param .b64 f; .param .b64 a; .param .b32 r;\nst.param.b64 [f], %rd1;
    st.param.b64 [a], 0;\ncall.uni (r), vprintf, (f, a); }\n""",
}  # fmt: skip


@pytest.mark.parametrize("name", RACES)
def test_a_race_of_ctas_is_found_and_is_none_of_the_simulator(name):
    """The kernel's race is a finding. In the simulator, one lock orders the accesses."""
    block = 32 if "matrix" in name else 1
    report, _ = launch(module(RACES[name]), block=block)
    assert "data race" in {f.kind for f in report.findings}, str(report)


@pytest.mark.parametrize("stop", ["trap;", "LOOP: add.u32 %r5, %r5, 1;\nbra LOOP;"])
def test_a_launch_stops_on_every_thread(stop):
    report, _ = launch(module("mov.u32 %r5, 0;\n" + stop), max_instructions=20_000)
    assert not report.ok


# ---- printf ----

PRINT = """.local .align 8 .b8 values[16];
mov.u64 %rd7, values;\ncvta.local.u64 %rd8, %rd7;\nst.local.u32 [%rd7], %r2;
st.local.u32 [%rd7+4], %r1;\nst.local.u32 [%rd7+8], %r3;
mov.u64 %rd6, format;\ncvta.global.u64 %rd6, %rd6;
{ .param .b64 f; .param .b64 a; .param .b32 r;
st.param.b64 [f], %rd6;\nst.param.b64 [a], %rd8;\ncall.uni (r), vprintf, (f, a); }
"""


def test_printed_lines_stay_whole():
    report, _ = launch(module(PRINT))
    assert report.ok, str(report)
    want = {f"{t // BLOCK} {t % BLOCK} {t}" for t in range(CTAS * BLOCK)}
    lines = report.output.splitlines()
    assert set(lines) == want and len(lines) == len(want)


# ---- Strong accesses and atomics ----


def test_atomics_lose_nothing():
    kernels = module(
        "mov.u32 %r9, 0;\n"
        "red.global.add.u32 [%rd1], 1;\n"
        "atom.acq_rel.gpu.global.add.u32 %r5, [%rd1+4], 1;\n"
        "atom.global.add.u64 %rd3, [%rd1+8], 1;\n"
        "red.global.add.f32 [%rd1+16], 0f3F800000;\n"
        "atom.global.max.u32 %r5, [%rd1+20], %r3;\n"
        "red.global.add.noftz.f16x2 [%rd1+24], %r9;\n"
        "ld.relaxed.gpu.global.u32 %r5, [%rd1];\n"
        "ld.volatile.global.u32 %r5, [%rd1+4];\n"
        "st.relaxed.gpu.global.u32 [%rd1+28], 7;\n"
    )
    for checks in (True, False):
        report, out = launch(kernels, words=8, checks=checks)
        assert report.ok, str(report)
        assert out[0] == out[1] == out[2] == CTAS * BLOCK
        assert out[4:5].view(np.float32) == CTAS * BLOCK
        assert out[5] == CTAS * BLOCK - 1 and out[7] == 7


def test_releases_at_many_addresses():
    """Each thread publishes at a word of its own what the next thread may read."""
    kernels = module("""atom.acq_rel.gpu.global.add.u32 %r5, [%rd2], 1;
        ld.acquire.gpu.global.u32 %r5, [%rd2+4];
        st.release.gpu.global.u32 [%rd2], 2;""")
    report, out = launch(kernels, words=CTAS * BLOCK + 1)
    assert report.ok, str(report)
    np.testing.assert_array_equal(out[:-1], np.full(CTAS * BLOCK, 2))


LAST = """st.global.u32 [%rd2+4], %r2;
{release}
mov.u32 %r5, %envreg2;\nmov.u32 %r6, %envreg1;\nmov.b64 %rd3, {{%r5, %r6}};
atom{semantics}.global.add.u32 %r7, [%rd3+4], 1;
setp.ne.u32 %p1, %r7, {last};\n@%p1 bra END;
{release}
mov.u32 %r8, 0;\nmov.u32 %r9, 0;\nmov.u64 %rd4, %rd1;
ADD: add.u64 %rd4, %rd4, 4;\nld.global.u32 %r10, [%rd4];\nadd.u32 %r8, %r8, %r10;
add.u32 %r9, %r9, 1;\nsetp.le.u32 %p1, %r9, {last};\n@%p1 bra ADD;
st.global.u32 [%rd1], %r8;
END:"""


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize(("release", "semantics"), [("membar.gl;", ""), ("", ".acq_rel.gpu")])
def test_the_last_cta_sees_what_all_have_written(release, semantics, checks):
    """The workspace of the grid counts the CTAs, as in cooperative groups."""
    kernels = module(LAST.format(release=release, semantics=semantics, last=CTAS - 1))
    report, out = launch(kernels, words=CTAS + 1, block=1, checks=checks)
    assert report.ok, str(report)
    assert out[0] == CTAS * (CTAS - 1) // 2


REDUCE = """.shared .align 128 .b8 tile[128];\nmov.u32 %r5, tile;
mov.u32 %r6, 1;\nmad.lo.u32 %r7, %r1, 4, %r5;\nst.shared.u32 [%r7], %r6;
fence.proxy.async;\nbar.sync 0;\nsetp.ne.u32 %p1, %r1, 0;\n@%p1 bra END;
cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd1], [%r5], 128;
cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\nEND:
"""


@pytest.mark.parametrize("atomics", [0, 1])
def test_copies_that_reduce_lose_nothing(atomics):
    """Nor do atomics on the same words. Those need no fence if nothing checks for one."""
    kernels = module(REDUCE + "red.global.add.u32 [%rd1+64], 1;\n" * atomics)
    report, out = launch(kernels, words=32, checks=not atomics)
    assert report.ok, str(report)
    want = np.full(32, CTAS)
    want[16] += CTAS * BLOCK * atomics
    np.testing.assert_array_equal(out, want)


USE_MAP = """fence.proxy.tensormap::generic.acquire.gpu [%rd1], 128;
prefetch.tensormap [%rd1];
cp.async.bulk.prefetch.tensor.1d.L2.global.tile [%rd1, {%r9}];
"""
CHANGE_MAP = "tensormap.replace.tile.global_address.global.b1024.b64 [%rd1], %rd1;\n"


def test_tensor_maps_are_fenced_and_changed_on_every_thread():
    """CTAs change a map while others use it: the kernel's race, and none of the simulator."""
    uint32 = 2  # CU_TENSOR_MAP_DATA_TYPE_UINT32
    encoded = _sim.encode_tensor_map(uint32, 4096, [32], [], [4], [1])
    kernels = module("mov.u32 %r9, 0;\n" + (CHANGE_MAP * 9 + USE_MAP) * 9)
    report = kernels.launch("k", grid=CTAS, block=1, args=[np.frombuffer(encoded, np.uint8).copy()],
                            num_threads=THREADS)  # fmt: skip
    assert "data race" in {f.kind for f in report.findings}, str(report)


# ---- Modules ----


def module_of(*codes: str) -> sim.Module:
    """A module with kernels k0, k1, ..."""
    text, _ = text_of("", DECLARE).split(".visible .entry")
    for i, code in enumerate(codes):
        _, entry = text_of(NUMBERS + code).split(".visible .entry")
        text += ".visible .entry" + entry.replace(" k(", f" k{i}(", 1)
    return sim.Module(text)


def test_launches_of_a_module_at_once():
    """Each launch has its own report and blocks of the heap; variables are common to all."""
    kernels = module_of(
        PRINT, KEEP, "red.global.add.u64 [total], 1;\n" * 2, "membar.gl;\n" * 99 + KEEP + FREE * 2,
    )  # fmt: skip
    reports: dict[tuple[int, int], sim.Report] = {}

    def run(thread: int) -> None:
        for i in range(4):
            kernel = (thread + i) % 4
            reports[thread, kernel], _ = launch(kernels, kernel=f"k{kernel}", num_threads=2, grid=8)

    at_once(*[lambda thread=thread: run(thread) for thread in range(LAUNCHES)])
    for (_, kernel), report in reports.items():
        kinds = [f.kind for f in report.findings]
        assert kinds == [[], ["heap leak"], [], ["invalid free"]][kernel], str(report)
        assert len(report.output.splitlines()) == (8 * BLOCK if kernel == 0 else 0)
        if kernel == 1:
            assert f"{8 * BLOCK} blocks" in report.findings[0].message
    assert kernels.variable("total").get() == LAUNCHES * 2 * 8 * BLOCK


def test_the_heap_of_a_module_begins_in_any_launch():
    """Kernels that do not use it ask whether there is one."""
    for _ in range(30):
        kernels = module_of("", KEEP + FREE)
        at_once(*[
            lambda m=kernels, i=i: launch(m, kernel=f"k{i % 2}", grid=1, num_threads=1)
            for i in range(LAUNCHES)
        ])  # fmt: skip


# ---- Simulated ops ----


def launch_op(simulator: _sim.OpSimulator, out: np.ndarray) -> None:
    """Launches `k` through the C interface, as an op does. ctypes releases the interpreter lock."""
    interface = Simulator.from_address(simulator.interface)
    triple = ctypes.c_uint32 * 3
    address = ctypes.c_uint64(out.ctypes.data)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(address))
    error = ctypes.create_string_buffer(1000)
    failed = LAUNCH(interface.launch)(
        interface.context, b"k", triple(CTAS, 1, 1), triple(BLOCK, 1, 1), triple(0, 0, 0), 0,
        arguments, Buffer(out.ctypes.data, out.nbytes, 2, b"out"), 1, error, len(error),
    )  # fmt: skip
    assert not failed, error.value.decode()


def test_ops_of_many_threads_are_simulated_at_once(tmp_path):
    """All of them add to one buffer; the PTX is parsed once, by whichever comes first."""
    path = tmp_path / "k.ptx"
    path.write_text(text_of(NUMBERS + "red.global.add.u32 [%rd1], 1;\n" + PRINT, DECLARE))
    options = launch_options("test", seed=0, completion="late", num_threads=2)
    simulator = _sim.OpSimulator([str(path)], read_ptx, options, 90)
    out = np.zeros(CTAS * BLOCK, np.uint32)

    def launch() -> None:
        for _ in range(3):
            launch_op(simulator, out)

    at_once(*[launch] * LAUNCHES)
    launches = simulator.launches()
    assert len(launches) == 3 * LAUNCHES
    assert all(len(raw["output"].splitlines()) == CTAS * BLOCK for raw in launches)
    assert out[0] == 3 * LAUNCHES * CTAS * BLOCK
