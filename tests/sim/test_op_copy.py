"""Asynchronous copies: cp.async and cp.async.bulk; groups."""

import numpy as np
import pytest

from support.opcodes import kernel, kinds
from torchext import sim

COMPLETIONS = ["late", "eager", "random"]

# ---- cp.async -----------------------------------------------------------------------------------

PER_THREAD = """
    .shared .align 16 .b8 tile[4096];
    ld.param.u64 %rd1, [in];
    ld.param.u64 %rd2, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, tile;
    mad.lo.u32 %r3, %r1, 16, %r2;
    mad.wide.u32 %rd3, %r1, 16, %rd1;
    mad.wide.u32 %rd4, %r1, 16, %rd2;
    {copy}
    ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r3];
    st.global.v4.u32 [%rd4], {{%r10, %r11, %r12, %r13}};
"""


def per_thread(copy, **options):
    source, out = np.arange(512, dtype=np.uint32), np.zeros(512, np.uint32)
    module = kernel(PER_THREAD.format(copy=copy), ".param .u64 in, .param .u64 out")
    report = module.launch(
        "kernel", grid=1, block=128, args=[sim.read_only(source), sim.output(out)], **options
    )
    return report, source, out


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("copy", [
    "cp.async.cg.shared.global [%r3], [%rd3], 16;\ncp.async.commit_group;\ncp.async.wait_group 0;",
    "cp.async.ca.shared.global.L2::128B [%r3], [%rd3], 8;\n"
    "cp.async.ca.shared.global [%r3+8], [%rd3+8], 4;\n"
    "cp.async.ca.shared.global [%r3+12], [%rd3+12], 4;\ncp.async.wait_all;",
])  # fmt: skip
def test_cp_async(copy, completion):
    report, source, out = per_thread(copy, completion=completion)
    assert report.ok, str(report)
    np.testing.assert_array_equal(out, source)


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("copy", [
    "cp.async.cg.shared.global [%r3], [%rd3], 16;\ncp.async.commit_group;\ncp.async.wait_group 1;",
    "cp.async.cg.shared.global [%r3], [%rd3], 16;\ncp.async.wait_group 0;",
    "cp.async.cg.shared.global [%r3], [%rd3], 16;\ncp.async.commit_group;",
])  # fmt: skip
def test_cp_async_read_too_early(copy, completion):
    report, _, _ = per_thread(copy, completion=completion)
    assert kinds(report) == {"data race"}


def test_cp_async_zero_fill():
    report, source, out = per_thread(
        "cp.async.ca.shared.global [%r3], [%rd3], 16, 4;\ncp.async.wait_all;"
    )
    assert report.ok, str(report)
    want = source.reshape(-1, 4).copy()
    want[:, 1:] = 0
    np.testing.assert_array_equal(out.reshape(-1, 4), want)
    report, source, out = per_thread(
        "setp.ge.u32 %p1, %r1, 3;\ncp.async.cg.shared.global [%r3], [%rd3], 16, %p1;\n"
        "cp.async.wait_all;"
    )
    assert report.ok and not out[12:].any() and (out[:12] == source[:12]).all()


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("noinc", ["", ".noinc"])
def test_cp_async_mbarrier_arrive(noinc, completion):
    count = 128 if noinc else 1
    copy = f"""
        .shared .align 8 .b8 bar[8];
        mov.u32 %r4, bar;
        setp.eq.u32 %p1, %r1, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r4], {count};
        bar.sync 0;
        xor.b32 %r5, %r3, 1024;
        cp.async.cg.shared.global [%r3], [%rd3], 16;
        cp.async.mbarrier.arrive{noinc}.shared::cta.b64 [%r4];
        bar.sync 0;
        @%p1 mbarrier.arrive.shared::cta.b64 _, [%r4];
    WAIT:
        mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r4], 0;
        @!%p2 bra WAIT;
    """
    if noinc:
        copy = copy.replace("@%p1 mbarrier.arrive.shared::cta.b64 _, [%r4];", "")
    report, source, out = per_thread(copy, completion=completion)
    assert report.ok, str(report)
    np.testing.assert_array_equal(out, source)


# ---- cp.async.bulk ------------------------------------------------------------------------------

BULK = """
    .shared .align 128 .b8 tile[2048];
    .shared .align 8 .b8 bar[8];
    ld.param.u64 %rd1, [in];
    ld.param.u64 %rd2, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, tile;
    mov.u32 %r4, bar;
    mad.lo.u32 %r3, %r1, 4, %r2;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r4], 1;
    {init_fence}
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], {bytes};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1], {bytes}, [%r4];
READY:
    bar.sync 0;
    {wait}
    ld.shared.u32 %r10, [%r3];
    add.u32 %r10, %r10, 1;
    st.shared.u32 [%r3], %r10;
    {proxy_fence}
    bar.sync 0;
    @%p1 bra END;
    cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r2], {bytes};
    {commit}
END:
"""
PARTS = {
    "init_fence": "fence.mbarrier_init.release.cluster;",
    "bytes": "2048",
    "wait": "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r4], 0;\n@!%p2 bra WAIT;",
    "proxy_fence": "fence.proxy.async.shared::cta;",
    "commit": "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;",
}


def bulk(completion="late", seed=0, **parts):
    source, out = np.arange(512, dtype=np.uint32), np.zeros(512, np.uint32)
    module = kernel(BULK.format(**{**PARTS, **parts}), ".param .u64 in, .param .u64 out")
    report = module.launch(
        "kernel", grid=1, block=512, args=[sim.read_only(source), sim.output(out)],
        completion=completion, seed=seed,
    )  # fmt: skip
    return report, source, out


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_bulk_round_trip(completion):
    report, source, out = bulk(completion)
    assert report.ok, str(report)
    np.testing.assert_array_equal(out, source + 1)


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("fault,kind", [
    ({"init_fence": ""}, "missing mbarrier fence"),
    ({"wait": ""}, "data race"),
    ({"wait": ""}, "outstanding async copy"),
    ({"proxy_fence": ""}, "missing proxy fence"),
    ({"commit": ""}, "outstanding bulk store"),
    ({"commit": "cp.async.bulk.wait_group.read 0;"}, "outstanding bulk store"),
    ({"commit": "cp.async.bulk.commit_group;"}, "outstanding bulk store"),
    ({"commit": "cp.async.bulk.commit_group;\nst.shared.u32 [%r2], %r1;\n"
                "cp.async.bulk.wait_group.read 0;"}, "bulk store in flight"),
    ({"commit": PARTS["commit"] + "\nld.global.u32 %r11, [%rd2];"}, "data race"),
    ({"bytes": "2040"}, "misaligned access"),
    ({"bytes": "4096"}, "out of bounds"),
])  # fmt: skip
def test_bulk_faults(fault, kind, completion):
    report, _, _ = bulk(completion, **fault)
    assert kind in kinds(report), str(report)


def test_full_wait_makes_the_writes_visible():
    commit = "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\nld.global.u32 %r11, [%rd2];"
    report, _, _ = bulk(commit=commit)
    assert report.ok, str(report)


def test_bulk_reduction_from_every_cta():
    body = """
        .shared .align 16 .b8 tile[256];
        ld.param.u64 %rd2, [out];
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, tile;
        mad.lo.u32 %r3, %r1, 4, %r2;
        cvt.rn.f32.u32 %f1, %r1;
        st.shared.f32 [%r3], %f1;
        fence.proxy.async;
        bar.sync 0;
        setp.ne.u32 %p1, %r1, 0;
        @%p1 bra END;
        cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd2], [%r2], 256;
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0;
    END:
    """
    out = np.ones(64, np.float32)
    report = kernel(body).launch("kernel", grid=8, block=64, args=[out])
    assert report.ok, str(report)
    np.testing.assert_array_equal(out, 1 + 8 * np.arange(64))
    report = kernel(body).launch("kernel", grid=8, block=64, args=[sim.output(out)])
    assert kinds(report) == {"uninitialized memory"}


def test_bulk_copy_to_another_cta_and_prefetch():
    body = """
        .shared .align 128 .b8 tile[512];
        .shared .align 8 .b8 bar[8];
        ld.param.u64 %rd1, [in];
        ld.param.u64 %rd2, [out];
        cp.async.bulk.prefetch.L2.global [%rd1], 256;
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, tile;
        mov.u32 %r4, bar;
        mov.u32 %r5, %cluster_ctarank;
        mad.lo.u32 %r3, %r1, 4, %r2;
        mad.lo.u32 %r6, %r5, 1000, %r1;
        st.shared.u32 [%r3], %r6;
        setp.eq.u32 %p1, %r1, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r4], 1;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 256;
        fence.proxy.async;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        xor.b32 %r7, %r5, 1;
        mapa.shared::cluster.u32 %r8, %r2, %r7;
        mapa.shared::cluster.u32 %r9, %r4, %r7;
        add.u32 %r8, %r8, 256;
        @!%p1 bra WAIT;
        cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes
            [%r8], [%r2], 256, [%r9];
    WAIT:
        mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r4], 0;
        @!%p2 bra WAIT;
        ld.shared.u32 %r10, [%r3+256];
        mad.lo.u32 %r11, %r5, 64, %r1;
        mad.wide.u32 %rd3, %r11, 4, %rd2;
        st.global.u32 [%rd3], %r10;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
    """
    out = np.zeros(128, np.uint32)
    module = kernel(body, ".param .u64 in, .param .u64 out")
    for completion in COMPLETIONS:
        args = [np.zeros(64, np.uint32), sim.output(out)]
        report = module.launch(
            "kernel", grid=2, block=64, cluster=2, args=args, completion=completion
        )
        assert report.ok, str(report)
        np.testing.assert_array_equal(out, np.concatenate([np.arange(64) + 1000, np.arange(64)]))
