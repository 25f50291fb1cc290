"""Findings have grades: errors fail a run, notes are shown."""

import re
from pathlib import Path

import numpy as np
import pytest
from opcodes import kernel, kinds

from torchext import _sim, sim

ROOT = Path(__file__).parents[2]
KINDS = {name: (grade, remedy, example) for name, grade, remedy, example in _sim.finding_kinds()}


def test_each_kind_has_one_row():
    assert len(KINDS) == len(_sim.finding_kinds())
    for name, (grade, remedy, example) in KINDS.items():
        assert grade in ("error", "note"), name
        assert remedy.endswith(".") and example, name


# One thread stores shared memory by a bulk copy, and does not wait for it.
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
        (4, 45 * 1024, 1, False),  # with the driver's 1 KiB each, 4 of them fill 228 KiB
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
    """docs/simulator.md's table is `_sim.finding_kinds()`."""
    text = (ROOT / "docs" / "simulator.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (error|note) \| (.+) \|$", text, re.MULTILINE)
    assert rows == [(name, grade, example) for name, (grade, _, example) in KINDS.items()]
