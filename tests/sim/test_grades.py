"""Findings have grades: errors fail a run, notes are shown."""

import re
from pathlib import Path

import numpy as np
import pytest

from support.opcodes import kernel, kinds
from torchext import _sim, sim

ROOT = Path(__file__).parents[2]
KINDS = {name: (grade, remedy, example) for name, grade, remedy, example in _sim.finding_kinds()}


def test_each_kind_has_one_row():
    assert len(KINDS) == len(_sim.finding_kinds())
    for name, (grade, remedy, example) in KINDS.items():
        assert grade in ("error", "note"), name
        assert remedy.endswith(".") and example, name


# One thread copies shared to global memory by a bulk copy, and does not wait for the copy.
STORE = """
    .shared .align 16 .b8 tile[{bytes}];
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, %ctaid.x;
    mul.wide.u32 %rd2, %r1, 16;
    add.s64 %rd1, %rd1, %rd2;
    mov.u32 %r2, tile;
    st.shared.v4.u32 [%r2], {{%r1, %r1, %r1, %r1}};
    fence.proxy.async.shared::cta;
    cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 16;
    {after}
"""


def store(grid, after, bytes=16, **options):
    out = np.zeros((grid, 4), np.uint32)
    module = kernel(STORE.format(bytes=bytes, after=after))
    report = module.launch("kernel", grid=grid, block=1, args=[sim.output(out)], **options)
    np.testing.assert_array_equal(out, np.arange(grid)[:, None].repeat(4, 1))
    return report


@pytest.mark.parametrize("after", ["cp.async.bulk.commit_group;", ""])
@pytest.mark.parametrize("completion", ["late", "eager", "random"])
def test_a_store_outstanding_at_exit_is_a_note(after, completion):
    report = store(3, after, completion=completion)
    assert report.ok and report.errors == ()
    assert [note.kind for note in report.notes] == ["outstanding bulk store"]
    assert report.notes == report.findings and report.notes[0].grade == "note"
    report.raise_for_findings()
    assert str(report).startswith("kernel 'kernel': 1 note (")
    assert "\nnote: outstanding bulk store: " in str(report)
    assert "error" not in str(report)


@pytest.mark.parametrize(
    "grid, bytes, num_sms, error",
    [
        (32, 16, 1, False),  # an SM holds 32 CTAs
        (33, 16, 1, True),
        (33, 16, 2, False),
        (4, 45 * 1024, 1, False),  # an SM's 228 KiB hold 4, each with 1 KiB for the driver
        (5, 45 * 1024, 1, True),
    ],
)
def test_it_is_an_error_where_another_cta_gets_the_memory(grid, bytes, num_sms, error):
    report = store(grid, "cp.async.bulk.commit_group;", bytes, num_sms=num_sms)
    assert kinds(report) == {"shared memory reused" if error else "outstanding bulk store"}
    assert report.ok is not error
    waits = "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;"
    assert not store(grid, waits, bytes, num_sms=num_sms).findings


def test_errors_come_before_notes():
    code = "st.global.u32 [%rd1+1600], %r1;"
    report = store(1, code)
    assert [finding.grade for finding in report.findings] == ["error", "note"]
    assert not report.ok and [error.kind for error in report.errors] == ["out of bounds"]
    assert str(report).startswith("kernel 'kernel': 2 findings, of which 1 is a note (")
    with pytest.raises(sim.SimulationError, match="out of bounds"):
        report.raise_for_findings()


def test_the_manual_lists_every_kind():
    """The table of docs/simulator.md has one row for each of `_sim.finding_kinds()`."""
    text = (ROOT / "docs" / "simulator.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (error|note) \| (.+) \|$", text, re.MULTILINE)
    assert rows == [(name, grade, example) for name, (grade, _, example) in KINDS.items()]


# ---- several stores of one value ----------------------------------------------------------------

# Threads store to the same words: global memory at %rd1, or shared memory at %r5.
PREPARE = """
    .shared .align 16 .b8 words[64];
    ld.param.u64 %rd1, [out];
    mov.u32 %r5, words;
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    shr.u32 %r3, %r1, 5;
    mov.u32 %r4, 7;
"""


def stores(code, grid=1, block=64, **options):
    out = np.zeros(16, np.uint32)
    report = kernel(PREPARE + code).launch("kernel", grid=grid, block=block, args=[out], **options)
    return report, out


SAME = {
    "global": "st.global.u32 [%rd1], %r4;",
    "shared": "st.shared.u32 [%r5], %r4;",
    "constant": "st.global.u32 [%rd1], 7;",
    "bytes": "st.global.u8 [%rd1+1], %r4;",
    "halves": "st.shared.u16 [%r5+2], %r4;",
    "eight bytes": "mov.b64 %rd2, {%r4, %r4};\nst.global.u64 [%rd1], %rd2;",
    "vector": "st.global.v4.u32 [%rd1], {%r4, %r4, %r4, %r4};",
    "two widths": (
        "setp.eq.u32 %p1, %r3, 0;\n@%p1 st.global.v2.u32 [%rd1], {%r4, %r4};\n"
        "@!%p1 st.global.u32 [%rd1], %r4;"
    ),
    "twice each": "st.global.u32 [%rd1], %r4;\nst.global.u32 [%rd1], %r4;",
    "if unset": (
        "and.b32 %r6, %r1, 31;\nsetp.eq.u32 %p1, %r6, 5;\n@%p1 st.global.u32 [%rd1], %r4;"
    ),
    "its own afterwards": "st.global.u32 [%rd1], %r4;\nld.global.u32 %r6, [%rd1];",
    "read by all after a barrier": (
        "st.shared.u32 [%r5], %r4;\nbar.sync 0;\nld.shared.u32 %r6, [%r5];"
    ),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_warps_that_store_the_same_value(name, num_threads):
    for seed in range(6):
        report, _ = stores(SAME[name], seed=seed, num_threads=num_threads)
        assert report.ok, str(report)
        assert {note.kind for note in report.notes} == {"same-value store"}


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("block", [1, 32, 96])
def test_ctas_that_set_one_flag(block, num_threads):
    for seed in range(6):
        report, out = stores(SAME["global"], 16, block, seed=seed, num_threads=num_threads)
        assert report.ok and out[0] == 7, str(report)
        assert kinds(report) == {"same-value store"}


def test_lanes_of_one_instruction_are_no_finding():
    report, out = stores(SAME["global"], block=32)
    assert not report.findings and out[0] == 7


DIFFERENT = {
    "values": "st.global.u32 [%rd1], %r3;",
    "lanes": "st.global.u32 [%rd1], %r1;",
    "half of the bytes": (
        "and.b32 %r6, %r3, 1;\nmov.b64 %rd2, {%r4, %r6};\nst.global.u64 [%rd1], %rd2;"
    ),
    "then another": "st.global.u32 [%rd1], %r4;\nst.global.u32 [%rd1], 8;",
    # The reader may see the old value.
    "reader": (
        "setp.eq.u32 %p1, %r3, 0;\n@%p1 st.global.u32 [%rd1], %r4;\n"
        "@!%p1 ld.global.u32 %r6, [%rd1];"
    ),
    # Both writers agree; the third warp may still see the old value.
    "writers and a reader": (
        "setp.lt.u32 %p1, %r3, 2;\n@%p1 st.shared.u32 [%r5], 3;\n"
        "bar.sync 0;\n"
        "@%p1 st.shared.u32 [%r5], %r4;\n@!%p1 ld.shared.u32 %r6, [%r5];"
    ),
    # One writer is ordered before the change, the other is not.
    "changed after one of them": (
        "setp.lt.u32 %p1, %r3, 2;\nsetp.ne.u32 %p2, %r3, 0;\n"
        "@%p1 st.shared.u32 [%r5], %r4;\n"
        "@%p2 bar.sync 1, 64;\n"
        "setp.eq.u32 %p3, %r3, 2;\n@%p3 st.shared.u32 [%r5], 8;"
    ),
    # The stored value happens to equal what the memory held before the launch.
    "a read of the value that is there": (
        "setp.eq.u32 %p1, %r3, 0;\n@%p1 st.global.u32 [%rd1], 0;\n@!%p1 ld.global.u32 %r6, [%rd1];"
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_races_that_matter_stay_errors(name):
    for seed in range(6):
        report, _ = stores(DIFFERENT[name], block=96, seed=seed, num_threads=1)
        assert "data race" in {error.kind for error in report.errors}, f"seed {seed}: {report}"


def test_a_reader_after_one_of_the_writers_sees_the_value():
    """Warps 0 and 1 store the same value; a barrier orders warp 2 after warp 1 only."""
    code = """
        setp.lt.u32 %p1, %r3, 2;
        setp.ne.u32 %p2, %r3, 0;
        @%p1 st.shared.u32 [%r5], %r4;
        @%p2 bar.sync 1, 64;
        setp.eq.u32 %p3, %r3, 2;
        @%p3 ld.shared.u32 %r6, [%r5];
    """
    for seed in range(12):
        report, _ = stores(code, block=96, seed=seed)
        assert not {error.kind for error in report.errors} - {"data race"}
        # Warp 0 may store after the read; the read sees the same value in either case.
        assert report.ok, f"seed {seed}: {report}"


def test_many_stores_of_one_value_take_no_time():
    report, _ = stores(SAME["global"], grid=2000, block=128)
    assert kinds(report) == {"same-value store"}
