"""Barriers: bar, barrier.cluster, mbarrier; and the deadlocks and misuses of each."""

import numpy as np
import pytest

from support.opcodes import kernel, kinds, lanes, lanes_report
from torchext import sim

SEEDS = range(3)

EXCHANGE = """
    .shared .align 4 .b8 slots[4096];
    mov.u32 %t0, slots;
    mad.lo.u32 %t1, %tid_, 4, %t0;
    st.shared.u32 [%t1], %tid_;
    {barrier}
    xor.b32 %t2, %tid_, {distance};
    mad.lo.u32 %t1, %t2, 4, %t0;
    ld.shared.u32 %z, [%t1];
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("barrier,distance", [
    ("bar.sync 0;", 128), ("barrier.sync 3;", 64), ("barrier.sync.aligned 2, 256;", 32),
    ("bar.warp.sync -1;", 1), ("barrier.cta.sync.aligned 0;", 200),
    ("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;", 128),
])  # fmt: skip
def test_barriers_order_shared_memory(barrier, distance, seed):
    code = EXCHANGE.format(barrier=barrier, distance=distance)
    got = lanes(code, np.uint32, block=256, seed=seed)
    np.testing.assert_array_equal(got, np.arange(256) ^ distance)


@pytest.mark.parametrize("barrier,distance", [
    ("", 128), ("bar.warp.sync -1;", 32),
    ("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;", 128),
])  # fmt: skip
def test_too_weak_a_barrier_is_a_race(barrier, distance):
    report, _ = lanes_report(
        EXCHANGE.format(barrier=barrier, distance=distance), np.uint32, block=256
    )
    assert kinds(report) <= {"data race", "uninitialized memory"} and "data race" in kinds(report)


def test_lane_order_modes():
    code = EXCHANGE.format(barrier="vote.sync.ballot.b32 %t3, 1, -1;", distance=1)
    lanes(code, np.uint32, block=32)
    report, _ = lanes_report(code, np.uint32, block=32, lane_order="strict")
    assert kinds(report) == {"data race"}
    lanes(code.replace("vote.sync.ballot.b32 %t3, 1, -1", "bar.warp.sync -1"), np.uint32, block=32,
          lane_order="strict")  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barrier_hands_over_from_producers_to_consumers(seed):
    code = """
        .shared .align 4 .b8 slots[512];
        mov.u32 %t0, slots;
        and.b32 %t1, %tid_, 63;
        mad.lo.u32 %t1, %t1, 4, %t0;
        setp.ge.u32 %p, %tid_, 64;
        mov.u32 %z, 0;
        @%p bra CONSUME;
        st.shared.u32 [%t1], %tid_;
        bar.arrive 1, 128;
        bra END;
    CONSUME:
        bar.sync 1, 128;
        ld.shared.u32 %z, [%t1];
    END:
    """
    got = lanes(code, np.uint32, block=128, seed=seed)
    np.testing.assert_array_equal(got[64:], np.arange(64))


def test_barrier_reductions():
    odd = "and.b32 %t0, %tid_, 1;\nsetp.eq.u32 %p, %t0, 1;\n"
    assert (lanes(odd + "bar.red.popc.u32 %z, 0, %p;", np.uint32, block=96) == 48).all()
    for op, want in (("and", 0), ("or", 1)):
        code = odd + f"barrier.red.{op}.pred %q, 1, 96, %p;\nselp.u32 %z, 1, 0, %q;"
        assert (lanes(code, np.uint32, block=96) == want).all()


def test_barrier_misuse():
    report, _ = lanes_report("mov.u32 %z, 0;\nbar.sync 1, 33;", np.uint32, block=64)
    assert kinds(report) == {"barrier misuse"}
    report, _ = lanes_report("mov.u32 %z, 0;\nmov.u32 %t0, 16;\nbar.sync %t0;", np.uint32, block=64)
    assert kinds(report) == {"barrier misuse"}
    code = "mov.u32 %z, 0;\nmov.u32 %t0, %warpid;\nmad.lo.u32 %t0, %t0, 32, 64;\nbar.sync 1, %t0;"
    report, _ = lanes_report(code, np.uint32, block=64)
    assert "barrier misuse" in kinds(report)


def test_barrier_deadlock_says_who_waits():
    code = """
        mov.u32 %z, 0;
        setp.lt.u32 %p, %tid_, 32;
        @%p bar.sync 1, 96;
        bar.sync 0;
    """
    report, _ = lanes_report(code, np.uint32, block=64)
    (finding,) = report.findings
    assert finding.kind == "deadlock"
    assert "barrier 1, where 32 of 96 threads have arrived" in finding.message
    assert "barrier 0, where 32 of 64 threads have arrived" in finding.message


def test_divergent_barrier():
    code = "mov.u32 %z, 0;\nsetp.lt.u32 %p, %tid_, 16;\n@%p bar.sync 0;\n@!%p bar.sync 0;"
    report, _ = lanes_report(code, np.uint32, block=32)
    assert "divergent collective" in kinds(report)


# ---- mbarrier -----------------------------------------------------------------------------------

INIT = """
    .shared .align 8 .b8 bar[16];
    .shared .align 4 .b8 slots[4096];
    mov.u32 %t7, bar;
    setp.eq.u32 %p, %tid_, 0;
    @%p mbarrier.init.shared::cta.b64 [%t7], {count};
    {fence}
    bar.sync 0;
"""
ONE = "mbarrier.init.shared::cta.b64 [%t7], 1;\n"
WAIT = """
WAIT{n}:
    mbarrier.try_wait.parity.shared::cta.b64 %q, [%t7], {parity};
    @!%q bra WAIT{n};
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("wait", ["try_wait", "test_wait"])
def test_mbarrier_orders_and_counts_phases(wait, seed):
    exchange = EXCHANGE.split("\n", 2)[2]
    code = INIT.format(count=128, fence="") + "mov.u32 %y, 0;\n"
    for phase in range(3):
        step = exchange.format(
            barrier="mbarrier.arrive.shared::cta.b64 _, [%t7];\n"
            + WAIT.format(n=phase, parity=phase % 2).replace("try_wait", wait),
            distance=1 << (phase + 4),
        )
        code += step + "add.u32 %y, %y, %z;\nbar.sync 0;\n"
    got = lanes(code, [np.uint32, np.uint32], block=128, seed=seed)[1]
    i = np.arange(128)
    np.testing.assert_array_equal(got, (i ^ 16) + (i ^ 32) + (i ^ 64))


def test_mbarrier_state_tokens_drop_and_pending_count():
    code = (
        INIT.format(count=64, fence="")
        + """
        mbarrier.arrive.shared::cta.b64 %u0, [%t7];
    WAIT0:
        mbarrier.try_wait.shared::cta.b64 %q, [%t7], %u0;
        @!%q bra WAIT0;
        mbarrier.arrive_drop.shared::cta.b64 %u1, [%t7];
    WAIT1:
        mbarrier.test_wait.shared::cta.b64 %q, [%t7], %u1;
        @!%q bra WAIT1;
        mbarrier.pending_count.b64 %z, %u0;
        bar.sync 0;
        @%p mbarrier.inval.shared::cta.b64 [%t7];
    """
    )
    got = lanes(code, np.uint32, block=64)
    # The 32 lanes of a warp get one token, from before their arrivals (an H200, 2026-11-26).
    np.testing.assert_array_equal(np.sort(got), np.repeat([32, 64], 32))


def test_transactions_hold_a_phase_open():
    code = INIT.format(count=1, fence="") + """
        mov.u32 %z, 0;
        setp.eq.u32 %p, %tid_, 32;
        @%p mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%t7], 16;
        @%p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%t7], 16;
        @%p mbarrier.complete_tx.shared::cta.b64 [%t7], 32;
    """ + WAIT.format(n=0, parity=0)  # fmt: skip
    lanes(code, np.uint32, block=64)
    report, _ = lanes_report(code.replace("[%t7], 32", "[%t7], 31"), np.uint32, block=64)
    (finding,) = report.findings
    assert finding.kind == "deadlock" and "lacks 0 of 1 arrivals and 1 bytes" in finding.message


@pytest.mark.parametrize("code,kind", [
    ("mbarrier.init.shared::cta.b64 [%t7], 0;", "mbarrier misuse"),
    (ONE + ONE, "mbarrier misuse"),
    ("mbarrier.arrive.shared::cta.b64 _, [%t7];", "mbarrier misuse"),
    (ONE + "mbarrier.arrive.shared::cta.b64 _, [%t7], 2;", "mbarrier misuse"),
    (ONE + "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%t7], 1048576;",
     "mbarrier misuse"),
    (ONE + "mbarrier.inval.shared::cta.b64 [%t7];\n"
     "mbarrier.arrive.shared::cta.b64 _, [%t7];", "mbarrier misuse"),
    (ONE + "st.shared.u32 [%t7], %t7;\n"
     "mbarrier.arrive.shared::cta.b64 _, [%t7];", "mbarrier misuse"),
    (ONE + "mbarrier.arrive.noComplete.release.cta.shared::cta.b64 %u0, [%t7], 1;",
     "mbarrier misuse"),
    ("mbarrier.init.shared::cta.b64 [%t7+4], 1;", "misaligned access"),
])  # fmt: skip
def test_mbarrier_misuse(code, kind):
    text = ".shared .align 8 .b8 bar[16];\nmov.u32 %t7, bar;\nmov.u32 %z, 0;\n" + code
    report, _ = lanes_report(text, np.uint32, block=1)
    assert kind in kinds(report), str(report)


def test_mbarrier_use_must_be_ordered_after_init():
    code = INIT.format(count=64, fence="").replace("bar.sync 0;", "nanosleep.u32 10;")
    code += "mov.u32 %z, 0;\nmbarrier.arrive.shared::cta.b64 _, [%t7];"
    for seed in SEEDS:
        report, _ = lanes_report(code, np.uint32, block=64, seed=seed)
        assert "mbarrier misuse" in kinds(report)


# ---- Clusters -----------------------------------------------------------------------------------

CLUSTER = """
    .shared .align 8 .b8 bar[8];
    .shared .align 16 .b8 slots[512];
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %cluster_ctarank;
    mov.u32 %r3, slots;
    mov.u32 %r4, bar;
    mad.lo.u32 %r5, %r1, 4, %r3;
    xor.b32 %r6, %r2, 1;
    setp.eq.u32 %p1, %r1, 0;
"""
OUT = """
    mov.u32 %r20, %ctaid.x;
    mad.lo.u32 %r20, %r20, 64, %r1;
    mad.wide.u32 %rd2, %r20, 4, %rd1;
    st.global.u32 [%rd2], %r10;
"""
SYNC = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"


def run_cluster(body, **options):
    out = np.zeros(256, np.uint32)
    report = kernel(CLUSTER + body + OUT).launch(
        "kernel", grid=4, block=64, cluster=2, args=[sim.output(out)], **options
    )
    return report, out.reshape(4, 64)


@pytest.mark.parametrize("seed", SEEDS)
def test_distributed_shared_memory(seed):
    body = """
        mad.lo.u32 %r7, %r2, 1000, %r1;
        st.shared.u32 [%r5], %r7;
    """ + SYNC + """
        mapa.shared::cluster.u32 %r8, %r5, %r6;
        ld.shared::cluster.u32 %r10, [%r8];
        cvt.u64.u32 %rd3, %r5;
        cvta.shared.u64 %rd3, %rd3;
        mapa.u64 %rd4, %rd3, %r6;
        ld.u32 %r11, [%rd4];
        getctarank.u64 %r12, %rd4;
        sub.u32 %r11, %r11, %r10;
        add.u32 %r10, %r10, %r11;
        xor.b32 %r12, %r12, %r6;
        add.u32 %r10, %r10, %r12;
    """ + SYNC  # fmt: skip
    report, out = run_cluster(body, seed=seed)
    assert report.ok, str(report)
    for cta in range(4):
        np.testing.assert_array_equal(out[cta], np.arange(64) + 1000 * ((cta & 1) ^ 1))
    report, _ = run_cluster(body.replace(SYNC, "", 1), seed=seed)
    assert "data race" in kinds(report)


@pytest.mark.parametrize("completion", ["late", "eager", "random"])
def test_remote_arrive_and_async_store(completion):
    body = """
        @%p1 mbarrier.init.shared::cta.b64 [%r4], 64;
        fence.mbarrier_init.release.cluster;
    """ + SYNC + """
        mapa.shared::cluster.u32 %r8, %r5, %r6;
        mapa.shared::cluster.u32 %r9, %r4, %r6;
        mad.lo.u32 %r7, %r2, 1000, %r1;
        mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%r9], 4;
        st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r8], %r7, [%r9];
    WAIT:
        mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r4], 0;
        @!%p2 bra WAIT;
        ld.shared.u32 %r10, [%r5];
    """ + SYNC  # fmt: skip
    report, out = run_cluster(body, completion=completion)
    assert report.ok, str(report)
    for cta in range(4):
        np.testing.assert_array_equal(out[cta], np.arange(64) + 1000 * ((cta & 1) ^ 1))
    report, _ = run_cluster(
        body.replace("fence.mbarrier_init.release.cluster;", ""), completion=completion
    )
    assert "missing mbarrier fence" in kinds(report)
    unwaited = body[: body.index("WAIT:")] + body[body.index("ld.shared.u32 %r10") :]
    report, _ = run_cluster(unwaited, completion=completion)
    assert "data race" in kinds(report)


def test_async_reduction():
    body = """
        mov.u32 %r7, 5;
        st.shared.u32 [%r5], %r7;
        @%p1 mbarrier.init.shared::cta.b64 [%r4], 1;
        fence.proxy.async;
    """ + SYNC + """
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 256;
        mapa.shared::cluster.u32 %r8, %r5, %r6;
        mapa.shared::cluster.u32 %r9, %r4, %r6;
        red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32
            [%r8], %r1, [%r9];
    WAIT:
        mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r4], 0;
        @!%p2 bra WAIT;
        ld.shared.u32 %r10, [%r5];
    """ + SYNC  # fmt: skip
    report, out = run_cluster(body)
    assert report.ok, str(report)
    np.testing.assert_array_equal(out, np.tile(np.arange(64) + 5, (4, 1)))


def test_access_to_a_cta_that_has_exited():
    body = SYNC + """
        setp.eq.u32 %p2, %r2, 1;
        mov.u32 %r10, 0;
        @%p2 bra END;
        mov.u32 %r11, 0;
    SPIN:
        add.u32 %r11, %r11, 1;
        setp.lt.u32 %p3, %r11, 20000;
        @%p3 bra SPIN;
        mapa.shared::cluster.u32 %r8, %r5, 1;
        st.shared::cluster.u32 [%r8], %r1;
    END:
    """  # fmt: skip
    report, _ = run_cluster(body)
    assert kinds(report) == {"exited CTA"}


def test_cluster_barrier_misuse():
    report, _ = run_cluster("mov.u32 %r10, 0;\nbarrier.cluster.wait;\n")
    assert kinds(report) == {"barrier misuse"}
    arrive = "barrier.cluster.arrive;\n"
    report, _ = run_cluster("mov.u32 %r10, 0;\n" + arrive * 2 + "barrier.cluster.wait;\n")
    assert "barrier misuse" in kinds(report)
