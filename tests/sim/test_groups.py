"""Several GPUs at once: what their grids may do to each other's memory (groups.cu)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from support.opcodes import HEADER
from torchext import sim
from torchext.sim.compiler import CompileError, find_nvcc

RANKS = 4  # that a Windows struct of groups.cu has room for
ROW = 256  # words
RUNS = [(mode, seed) for mode in ("eager", "late", "random") for seed in range(3)]


@pytest.fixture(scope="module")
def module():
    try:
        find_nvcc()
    except CompileError:
        pytest.skip("there is no nvcc to compile with")
    include = Path(__file__).parents[2]
    return sim.compile_cuda(Path(__file__).with_name("groups.cu"), options=["-I", str(include)])


def windows_of(ranks: int, words: int, access: str, name: str) -> list[object]:
    arrays = [np.zeros(words, np.uint32) for _ in range(ranks)]
    windows = [sim.window(a, d, access, f"{name} of rank {d}") for d, a in enumerate(arrays)]
    return [*windows, *[np.uint64(0)] * (RANKS - ranks)]


def exchange(module: sim.Module, kernel: str, ranks: int, rounds: int = 4, **options):
    """Each rank's rows go to their ranks. Returns the report, what arrived and what should have."""
    shape = (ranks, rounds, ranks, ROW)  # [sender, round, receiver]
    rows = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)
    out = np.zeros_like(rows)  # [receiver, round, sender]
    windows = sim.struct(
        *windows_of(ranks, 2 * ranks * ROW, "write", "slots"),
        *windows_of(ranks, ranks, "read_write", "arrived"),
        *windows_of(ranks, ranks, "read_write", "freed"),
    )
    launches = [
        sim.Launch(
            module, kernel, grid=2 * ranks, block=64, device=d,
            args=[windows, d, ranks, rounds, sim.read_only(rows[d]), sim.output(out[d])],
        )
        for d in range(ranks)
    ]  # fmt: skip
    report = sim.launch_group(launches, max_instructions=2_000_000, **options)
    return report, out, rows.transpose(2, 1, 0, 3)


@pytest.mark.parametrize(("kernel", "ranks"), [("by_stores", 2), ("by_bulk_stores", 4)])
def test_a_correct_exchange_has_no_finding(module, kernel, ranks):
    for completion, seed in RUNS:
        report, out, want = exchange(module, kernel, ranks, completion=completion, seed=seed)
        assert not report.findings, str(report)
        np.testing.assert_array_equal(out, want)
        assert [r.unwritten for r in report.reports] == [()] * ranks


FAULTS = {
    "no_proxy_fence": ("missing proxy fence", "no fence.proxy.async in between"),
    "weak_fence": ("data race", "scope too narrow"),
    "noncoherent": ("non-coherent load", "that this launch has written"),
    "gpu_release": ("data race", "releases at .gpu and acquires at .sys"),
    "gpu_acquire": ("data race", "releases at .sys and acquires at .gpu"),
    "flag_before_data": ("data race", "nothing orders after an earlier access"),
    "slot_reused": ("data race", "nothing orders after an earlier access"),
    "wrong_parity": ("data race", "nothing orders after an earlier access"),
    "count_off_by_one": ("deadlock", "device 1 CTA (2, 0, 0) warp 0"),
    "store_not_awaited": ("data race", "nothing orders after an earlier access"),
    "past_the_slot": ("out of bounds", "of 'slots of rank"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_in_every_run(module, fault):
    kind, message = FAULTS[fault]
    for completion, seed in RUNS:
        report, out, want = exchange(module, fault, 2, completion=completion, seed=seed)
        found = any(f.kind == kind and message in f.message for f in report.errors)
        # A sender that is far ahead releases later rows before the receiver looks for the first:
        # they arrive in order, but in the wrong rounds.
        found |= fault == "slot_reused" and bool((out != want).any())
        # If the copy is done before the wait, the wait is for a phase that nobody completes.
        found |= fault == "wrong_parity" and "deadlock" in kinds(report)
        assert found, f"{completion}, seed {seed}: {report}"
        assert {f.device for f in report.findings} <= {0, 1}


def test_a_race_names_both_devices(module):
    report, *_ = exchange(module, "gpu_release", 2)
    races = [f for f in report.errors if f.other_device not in (None, f.device)]
    assert races, str(report)
    race = races[0]
    assert f"device {race.other_device}, CTA (" in race.other
    assert f"where: device {race.device}, CTA (" in str(report)
    assert ".sys" in race.remedy


def test_a_deadlock_says_who_polls_which_flag(module):
    report, *_ = exchange(module, "count_off_by_one", 2)
    (deadlock,) = report.findings
    assert deadlock.kind == "deadlock" and "no warp of any device can go on" in deadlock.message
    lines = deadlock.message.splitlines()
    for device in range(2):
        for peer in range(2):
            who = f"device {device} CTA ({2 + peer}, 0, 0) warp 0 lanes 0x1, "
            what = f" for byte {4 * peer} of 'arrived of rank {device}' (8 bytes on device "
            line = next(line for line in lines if who in line)
            assert line.endswith(what + f"{device}), which is 4, compared with 5"), line


def test_stores_that_nothing_releases_are_noted(module):
    report, *_ = exchange(module, "never_released", 2, rounds=3)
    assert report.ok
    assert {f.kind for f in report.findings} == {"unreleased remote store"}, str(report)
    assert {f.device for f in report.findings} == {0, 1}


# ---- In PTX ----


def ptx(body: str) -> sim.Module:
    """A module whose kernel has %rd1, %rd2: its arguments; %r1: its rank; %r2: the thread."""
    return sim.Module(
        HEADER.format(target="sm_90a")
        + ".visible .entry kernel(.param .u64 a, .param .u64 b, .param .u32 rank)\n{\n"
        + ".reg .pred %p<8>;\n.reg .b32 %r<32>;\n.reg .b64 %rd<16>;\n"
        + ".shared .align 16 .b8 tile[16];\nld.param.u64 %rd1, [a];\nld.param.u64 %rd2, [b];\n"
        + "ld.param.u32 %r1, [rank];\nmov.u32 %r2, %tid.x;\n" + body + "\nret;\n}\n"
    )  # fmt: skip


def run(module: sim.Module, devices: int = 2, **options) -> tuple[sim.GroupReport, np.ndarray]:
    """%rd1: 64 words on device 0; %rd2: 64 words on device 1."""
    words = np.zeros((2, 64), np.uint32)
    args = [sim.window(words[d], d, name=f"words {d}") for d in range(2)]
    launches = [
        sim.Launch(module, "kernel", 1, 32, [*args, rank], device=rank) for rank in range(devices)
    ]
    return sim.launch_group(launches, **options), words


def kinds(report: sim.GroupReport) -> set[str]:
    return {finding.kind for finding in report.findings}


@pytest.mark.parametrize("scope", ["sys", "gpu", "cta"])
def test_atomics_of_two_devices(scope):
    report, words = run(ptx(f"red.relaxed.{scope}.global.add.u32 [%rd1], 1;"))
    if scope == "sys":
        assert not report.findings and words[0, 0] == 64, str(report)
    else:
        assert {f.kind for f in report.errors} == {"data race"}, str(report)
        message = f"scope too narrow, .{scope} here and .{scope} there, for threads of different"
        assert any(message + " devices" in f.message for f in report.findings)


@pytest.mark.parametrize("fence", ["sys", "gpu"])
def test_fences_and_relaxed_accesses(fence):
    body = f"""
        setp.ne.u32 %p1, %r2, 0;
        @%p1 bra END;
        setp.ne.u32 %p2, %r1, 0;
        @%p2 bra READ;
        st.global.u32 [%rd2], 7;
        fence.acq_rel.{fence};
        st.relaxed.sys.global.u32 [%rd2+4], 1;
        bra END;
    READ:
        ld.relaxed.sys.global.u32 %r4, [%rd2+4];
        setp.eq.u32 %p3, %r4, 0;
        @%p3 bra READ;
        fence.acq_rel.sys;
        ld.global.u32 %r5, [%rd2];
        st.global.u32 [%rd2+8], %r5;
    END:
    """
    for seed in range(3):
        report, words = run(ptx(body), seed=seed)
        if fence == "sys":
            assert not report.findings and words[1, 2] == 7, str(report)
        else:
            assert "data race" in kinds(report), str(report)
            assert any("scope too narrow" in f.message for f in report.errors)


def test_a_third_device_knows_what_the_second_acquired():
    body = """
        setp.ne.u32 %p1, %r2, 0;
        @%p1 bra END;
        setp.eq.u32 %p2, %r1, 0;
        @%p2 bra FIRST;
        mul.wide.u32 %rd3, %r1, 4;
        add.u64 %rd3, %rd1, %rd3;
    POLL:
        ld.acquire.sys.global.u32 %r4, [%rd3];
        setp.eq.u32 %p3, %r4, 0;
        @%p3 bra POLL;
        setp.eq.u32 %p4, %r1, 2;
        @%p4 bra THIRD;
        st.release.sys.global.u32 [%rd3+4], 1;
        bra END;
    THIRD:
        ld.global.u32 %r5, [%rd2];
        st.release.sys.global.u32 [%rd2+4], %r5;
        bra END;
    FIRST:
        st.global.u32 [%rd2], 9;
        st.release.sys.global.u32 [%rd1+4], 1;
    END:
    """
    report, words = run(ptx(body), devices=3)
    assert not report.findings and words[1, 1] == 9, str(report)


STORE = """
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra END;
    mov.u32 %r5, tile;
    st.shared.v4.u32 [%r5], {{%r2, %r2, %r2, %r2}};
    fence.proxy.async;
    cp.async.bulk.global.shared::cta.bulk_group [{to}], [%r5], 16;
    cp.async.bulk.commit_group;
    {wait}
END:
"""


@pytest.mark.parametrize("completion", ["eager", "late", "random"])
def test_a_bulk_store_to_a_peer_that_is_not_awaited(completion):
    half = "cp.async.bulk.wait_group.read 0;"
    report, _ = run(ptx(STORE.format(to="%rd2", wait=half)), devices=1, completion=completion)
    (finding,) = report.findings
    assert finding.kind == "outstanding remote store" and finding.grade == "error"
    assert "device 1" in finding.message and finding.device == 0
    for to, wait in (("%rd1", half), ("%rd2", "cp.async.bulk.wait_group 0;")):
        report, _ = run(ptx(STORE.format(to=to, wait=wait)), devices=1, completion=completion)
        assert not report.findings, str(report)


def test_bytes_of_a_window_that_nobody_wrote():
    words = np.zeros(4, np.uint32)
    window = sim.window(words, 1, access="write")
    kernel = ptx("ld.global.u32 %r4, [%rd1];\nld.global.u32 %r5, [%rd1+16];")
    report = sim.launch_group([sim.Launch(kernel, "kernel", 1, 1, [window, window, 0])])
    assert kinds(report) == {"uninitialized memory", "out of bounds"}, str(report)
    (past,) = [f for f in report.findings if f.kind == "out of bounds"]
    assert "0 bytes after the end of 'window' (16 bytes on device 1)" in past.message


def test_a_seed_gives_the_same_schedule():
    kernel = ptx("atom.relaxed.sys.global.add.u32 %r4, [%rd1], 1;\n"
                 "mul.wide.u32 %rd4, %r2, 4;\nadd.u64 %rd4, %rd2, %rd4;\n"
                 "setp.ne.u32 %p1, %r1, 0;\n@%p1 st.global.u32 [%rd4], %r4;")  # fmt: skip
    orders = [tuple(run(kernel, seed=seed)[1][1]) for seed in [*range(8), *range(8)]]
    assert orders[:8] == orders[8:]
    assert len(set(orders)) > 1


def test_the_reports_are_those_of_single_launches_where_nothing_is_shared():
    out = np.zeros((2, 32), np.uint32)
    kernel = ptx("mul.wide.u32 %rd4, %r2, 4;\nadd.u64 %rd4, %rd1, %rd4;\n"
                 "add.u32 %r4, %r1, %r2;\nst.global.u32 [%rd4], %r4;")  # fmt: skip
    group = sim.launch_group([
        sim.Launch(kernel, "kernel", 1, 32, [sim.output(out[d]), 0, d], device=d) for d in range(2)
    ])  # fmt: skip
    assert not group.findings and group.ok
    np.testing.assert_array_equal(out, np.arange(32) + np.arange(2)[:, None])
    alone = kernel.launch("kernel", grid=1, block=32, args=[np.zeros(32, np.uint32), 0, 0])
    assert [r.instructions for r in group.reports] == [alone.instructions] * 2
    assert "device 1, kernel 'kernel': no findings" in str(group)


def test_the_example_of_the_manual(capsys):
    manual = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()
    section = manual.split("### Several GPUs\n")[1]
    code, output = re.findall(r"```(?:python|text)\n(.*?)```", section, re.DOTALL)[:2]
    exec(code, {})
    assert capsys.readouterr().out == output


# ---- Errors ----


def test_errors_of_groups():
    kernel, words = ptx(""), np.zeros(4, np.uint32)
    window = sim.window(words, 0)
    one = sim.Launch(kernel, "kernel", 1, 1, [window, window, 0])
    with pytest.raises(ValueError, match="a device must have one launch"):
        sim.launch_group([one, one])
    with pytest.raises(ValueError, match="1 to 16 launches"):
        sim.launch_group([])
    with pytest.raises(ValueError, match="must belong to one device"):
        sim.launch_group([
            sim.Launch(kernel, "kernel", 1, 1, [words, words, d], device=d) for d in range(2)
        ])  # fmt: skip
    with pytest.raises(ValueError, match="launch 0 of kernel: args must have one entry"):
        sim.launch_group([sim.Launch(kernel, "kernel", 1, 1, [])])
    with pytest.raises(ValueError, match="launch 0 of kernel: grid must be 1 to 3"):
        sim.launch_group([sim.Launch(kernel, "kernel", [1] * 4, 1, [window, window, 0])])
    with pytest.raises(ValueError, match="window: access must be"):
        sim.window(words, 0, access="all")
    with pytest.raises(ValueError, match="window: device must be at least 0"):
        sim.window(words, -1)
    with pytest.raises(sim.SimulationError, match="out of bounds"):
        sim.launch_group([
            sim.Launch(ptx("st.global.u32 [%rd1+16], 1;"), "kernel", 1, 1, [window, window, 0])
        ]).raise_for_findings()  # fmt: skip


def test_a_module_with_variables_belongs_to_one_device():
    text = ".version 9.0\n.target sm_90a\n.address_size 64\n.global .u32 n;\n"
    text += ".visible .entry kernel()\n{\nred.relaxed.gpu.global.add.u32 [n], 1;\nret;\n}\n"
    shared = sim.Module(text)
    with pytest.raises(ValueError, match="has the variable 'n'"):
        sim.launch_group([sim.Launch(shared, "kernel", 1, 1, device=d) for d in range(2)])
    own = [sim.Module(text) for _ in range(2)]
    report = sim.launch_group([sim.Launch(m, "kernel", 1, 1, device=d) for d, m in enumerate(own)])
    assert not report.findings, str(report)
    assert [m.variable("n").get() for m in own] == [1, 1]
