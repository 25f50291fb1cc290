"""What a report says about the other access of a race, and about the remedy."""

import numpy as np
import pytest

from support.opcodes import kernel

WORD = """
    .shared .align 16 .b8 words[64];
    ld.param.u64 %rd1, [out];
    mov.u32 %r5, words;
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ctaid.y;
    shr.u32 %r4, %r1, 5;
"""


def race(code, **options):
    out = np.zeros(16, np.uint32)
    report = kernel(WORD + code).launch(
        "kernel", args=[out], **{"grid": 1, "block": 32, "num_threads": 1, **options}
    )
    (finding,) = [f for f in report.findings if f.kind == "data race"]
    return finding, str(report)


def test_lanes_of_a_warp():
    finding, text = race("st.shared.u32 [%r5], %r1;")
    assert finding.other_cta == finding.cta == (0, 0, 0)
    assert finding.other_warp == 0 and finding.other_lane == 0 and finding.lanes == (1,)
    assert "other: write by warp 0 lane 0, line " in text
    assert "bar.warp.sync (__syncwarp())" in finding.remedy


def test_warps_of_a_cta():
    finding, text = race(
        "and.b32 %r6, %r1, 31;\nsetp.eq.u32 %p1, %r6, 3;\n@%p1 st.shared.u32 [%r5], %r1;", block=64
    )
    assert {finding.warp, finding.other_warp} == {0, 1} and finding.other_lane == 3
    assert finding.other_cta == finding.cta
    assert f"other: write by warp {finding.other_warp} lane 3, line " in text
    assert "bar.sync, __syncthreads()" in finding.remedy


@pytest.mark.parametrize("cluster", [None, (2, 1, 1), (1, 3, 1)])
def test_ctas_of_a_grid(cluster):
    """Each CTA stores its own number to one address; the report names both CTAs."""
    code = "mad.lo.u32 %r6, %r3, 4, %r2;\nst.global.u32 [%rd1], %r6;"
    finding, text = race(code, grid=(4, 3), block=1, cluster=cluster, seed=3)
    assert finding.other_cta is not None and finding.other_cta != finding.cta
    x, y, z = finding.other_cta
    assert x < 4 and y < 3 and z == 0 and finding.other_warp == 0 and finding.other_lane == 0
    same = cluster is not None and all(
        mine // n == other // n
        for mine, other, n in zip(finding.cta, finding.other_cta, cluster, strict=True)
    )
    assert (
        f"other: write by CTA ({x}, {y}, 0){' of the same cluster' if same else ''}, warp 0" in text
    )
    if same:
        assert "cluster.sync()" in finding.remedy
    else:
        assert "No barrier orders CTAs of a grid: use an atomic" in finding.remedy


def test_the_named_cta_made_the_access():
    """Only CTAs (1, 0, 0) and (2, 1, 0) store."""
    code = """
        mad.lo.u32 %r6, %r3, 3, %r2;
        setp.eq.u32 %p1, %r6, 1;
        setp.eq.u32 %p2, %r6, 5;
        or.pred %p1, %p1, %p2;
        @%p1 st.global.u32 [%rd1], %r6;
    """
    finding, _ = race(code, grid=(3, 2), block=1)
    assert {finding.cta, finding.other_cta} == {(1, 0, 0), (2, 1, 0)}


def test_a_cluster_whose_ctas_are_known():
    code = """
        setp.eq.u32 %p1, %r2, 5;
        setp.eq.u32 %p2, %r2, 4;
        or.pred %p1, %p1, %p2;
        @%p1 st.global.u32 [%rd1], %r2;
    """
    finding, text = race(code, grid=6, block=1, cluster=2)
    assert {finding.cta, finding.other_cta} == {(4, 0, 0), (5, 0, 0)}
    assert "of the same cluster" in text and "cluster.sync()" in finding.remedy


CP_ASYNC = """
    cp.async.ca.shared.global [%r5], [%rd1], 4;
    cp.async.commit_group;
    bar.sync 0;
    ld.shared.u32 %r7, [%r5];
"""


def test_cp_async_is_to_be_waited_for():
    finding, text = race(CP_ASYNC, block=1)
    assert "cp.async.wait_group, __pipeline_wait_prior" in finding.remedy
    assert finding.other_warp is None and finding.other_lane is None
    assert "= remedy: Wait for the copy in the thread that started it" in text


BULK = """
    .shared .align 8 .b8 bar[8];
    mov.u32 %r8, bar;
    mbarrier.init.shared::cta.b64 [%r8], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], 16;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5], [%rd1], 16, [%r8];
    ld.shared.u32 %r7, [%r5];
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r8], 0;
    @!%p1 bra WAIT;
"""


def test_bulk_copies_are_to_be_waited_for():
    finding, _ = race(BULK, block=1)
    assert "Wait for the phase of the mbarrier" in finding.remedy


def test_too_many_bytes_are_said_in_words():
    code = BULK.replace("_, [%r8], 16", "_, [%r8], 8").replace(
        "    ld.shared.u32 %r7, [%r5];\n", ""
    )
    report = kernel(WORD + code).launch(
        "kernel", grid=1, block=1, args=[np.zeros(16, np.uint32)], num_threads=1
    )
    (deadlock,) = [f for f in report.findings if f.kind == "deadlock"]
    assert "lacks no arrival, but 8 more bytes arrived than were expected" in deadlock.message
    assert "-8" not in deadlock.message
