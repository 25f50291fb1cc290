"""Threads of a warp progress independently: locks, flags, exits, barriers that count threads."""

import numpy as np
import pytest

from support.opcodes import HEADER, kinds, lanes, lanes_report
from torchext import sim

SEEDS = range(3)


def module(body: str, params: str = "lock out") -> sim.Module:
    declared = ", ".join(f".param .u64 {name}" for name in params.split())
    return sim.Module(
        HEADER.format(target="sm_90a")
        + f".visible .entry kernel({declared})\n{{\n.reg .pred %p<8>;\n.reg .b32 %r<32>;\n"
        + ".reg .b64 %rd<16>;\n"
        + "".join(f"ld.param.u64 %rd{n}, [{name}];\n" for n, name in enumerate(params.split(), 1))
        + body
        + "\nret;\n}\n"
    )


def launch(kernel: sim.Module, *arrays, block=32, grid=1, **options):
    options.setdefault("max_instructions", 2_000_000)
    return kernel.launch("kernel", grid=grid, block=block, args=list(arrays), **options)


def zeros(n=1):
    return np.zeros(n, np.int32)


# ---- locks: each thread locks %rd1, adds one to %rd2, unlocks %rd1 -------------------------------

CRITICAL = """
    membar.gl;
    ld.global.u32 %r2, [%rd2];
    add.s32 %r2, %r2, 1;
    st.global.u32 [%rd2], %r2;
    membar.gl;
"""
LOCKS = {
    "cas": "SPIN:\natom.global.cas.b32 %r1, [%rd1], 0, 1;\nsetp.ne.s32 %p1, %r1, 0;\n"
    "@%p1 bra SPIN;" + CRITICAL + "atom.global.exch.b32 %r3, [%rd1], 0;",
    "exch": "SPIN:\natom.global.exch.b32 %r1, [%rd1], 1;\nsetp.ne.s32 %p1, %r1, 0;\n"
    "@%p1 bra SPIN;" + CRITICAL + "st.relaxed.gpu.global.u32 [%rd1], 0;",
    "acquire and release": "SPIN:\natom.acquire.gpu.global.cas.b32 %r1, [%rd1], 0, 1;\n"
    "setp.ne.s32 %p1, %r1, 0;\n@%p1 bra SPIN;"
    + CRITICAL.replace("membar.gl;", "")
    + "st.release.gpu.global.u32 [%rd1], 0;",
    "with a nap": "bra TRY;\nSPIN:\nnanosleep.u32 100;\nTRY:\n"
    "atom.global.cas.b32 %r1, [%rd1], 0, 1;\nsetp.ne.s32 %p1, %r1, 0;\n@%p1 bra SPIN;"
    + CRITICAL + "atom.global.exch.b32 %r3, [%rd1], 0;",
    "test, then set": "SPIN:\nld.volatile.global.u32 %r1, [%rd1];\nsetp.ne.s32 %p1, %r1, 0;\n"
    "@%p1 bra SPIN;\natom.global.cas.b32 %r1, [%rd1], 0, 1;\nsetp.ne.s32 %p1, %r1, 0;\n"
    "@%p1 bra SPIN;" + CRITICAL + "atom.global.exch.b32 %r3, [%rd1], 0;",
    "try": "mov.u32 %r4, 0;\nAGAIN:\natom.global.cas.b32 %r1, [%rd1], 0, 1;\n"
    "setp.ne.s32 %p1, %r1, 0;\n@%p1 bra NEXT;" + CRITICAL
    + "atom.global.exch.b32 %r3, [%rd1], 0;\nmov.u32 %r4, 1;\nNEXT:\n"
    "setp.eq.u32 %p2, %r4, 0;\n@%p2 bra AGAIN;",
    "ticket": "add.s64 %rd3, %rd1, 4;\natom.global.add.u32 %r5, [%rd1], 1;\nSPIN:\n"
    "ld.acquire.gpu.global.u32 %r1, [%rd3];\nsetp.ne.s32 %p1, %r1, %r5;\n@%p1 bra SPIN;"
    + CRITICAL + "add.s32 %r6, %r5, 1;\nst.release.gpu.global.u32 [%rd3], %r6;",
}  # fmt: skip


@pytest.mark.parametrize("block", [2, 32, 33, 100])
@pytest.mark.parametrize("lock", LOCKS)
def test_each_thread_takes_a_lock(lock, block):
    kernel = module(LOCKS[lock])
    for seed in SEEDS:
        count = zeros()
        report = launch(kernel, zeros(2), count, block=block, seed=seed)
        assert report.ok, str(report)
        assert count[0] == block


@pytest.mark.parametrize("lock", ["cas", "ticket"])
def test_the_warp_is_together_behind_a_lock(lock):
    """The warp reconverges at the next barrier at the latest: mma.sync needs all lanes."""
    code = LOCKS[lock] + """
    bar.sync 0;
    mov.u32 %r10, 0;
    mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%r11, %r12}, {%r10, %r10}, {%r10},
        {%r10, %r10};
    shfl.sync.bfly.b32 %r10, %r10, 1, 31, -1;
    """  # fmt: skip
    report = launch(module(code), zeros(2), zeros(), block=64)
    assert report.ok, str(report)


def test_a_lock_that_is_never_released_is_a_deadlock():
    code = LOCKS["cas"].replace("atom.global.exch.b32 %r3, [%rd1], 0;", "")
    report = launch(module(code), zeros(2), zeros())
    assert kinds(report) == {"deadlock"}
    assert "polls at" in report.findings[0].message


def test_a_lock_without_a_fence_is_a_race():
    report = launch(module(LOCKS["cas"].replace("membar.gl;", "")), zeros(2), zeros(), block=64)
    assert "data race" in kinds(report)


# ---- flags among the lanes of a warp -------------------------------------------------------------

# Lane n waits until lane n - 1 (or n + 1) has written its slot.
CHAIN = """
    .shared .align 4 .b8 slots[128];
    mov.u32 %t0, slots;
    mad.lo.u32 %t1, %tid_, 4, %t0;
    mov.u32 %t2, 0;
    st.shared.u32 [%t1], %t2;
    bar.warp.sync -1;
    mov.u32 %z, 1;
    setp.eq.u32 %p, %tid_, {first};
    @%p bra WRITE;
WAIT:
    {wait}
    setp.eq.u32 %q, %t3, 0;
    @%q bra WAIT;
    add.u32 %z, %t3, 1;
WRITE:
    {write}
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("first", "offset"), [(0, -4), (31, 4)])
@pytest.mark.parametrize(("wait", "write"), [
    ("ld.volatile.shared.u32 %t3, [%t1+{offset}];", "st.volatile.shared.u32 [%t1], %z;"),
    ("ld.acquire.cta.shared.u32 %t3, [%t1+{offset}];", "st.release.cta.shared.u32 [%t1], %z;"),
    ("atom.shared.add.u32 %t3, [%t1+{offset}], 0;", "atom.shared.exch.b32 %t4, [%t1], %z;"),
])  # fmt: skip
def test_lanes_hand_on_a_value(wait, write, first, offset, seed):
    code = CHAIN.format(wait=wait.format(offset=offset), write=write, first=first)
    got = lanes(code, np.uint32, block=32, seed=seed)
    lane = np.arange(32)
    np.testing.assert_array_equal(got, lane + 1 if first == 0 else 32 - lane)


def test_a_flag_that_nobody_sets_is_a_deadlock():
    code = CHAIN.format(wait="ld.volatile.shared.u32 %t3, [%t1-4];", write="", first=0)
    report, _ = lanes_report(code, np.uint32, block=32)
    assert kinds(report) == {"deadlock"}


@pytest.mark.parametrize("tries", [2_000, 30_000])
@pytest.mark.parametrize("poll", ["ld.volatile.global.u32 %r1, [%rd1];",
                                  "atom.global.cas.b32 %r1, [%rd1], 1, 0;",
                                  "nanosleep.u32 20;"])  # fmt: skip
def test_a_poll_that_gives_up_is_no_deadlock(poll, tries):
    code = f"""
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
    mov.u32 %r5, %tid.x;
    setp.ne.u32 %p3, %r5, 0;
    @%p3 bra END;
SPIN:
    {poll}
    add.u32 %r2, %r2, 1;
    setp.eq.u32 %p1, %r1, 0;
    setp.lt.and.u32 %p2, %r2, {tries}, %p1;
    @%p2 bra SPIN;
    st.global.u32 [%rd2], %r2;
END:
    bar.sync 0;
    """
    count = zeros()
    report = launch(module(code), zeros(), count, block=64)
    assert report.ok, str(report)
    assert count[0] == tries


@pytest.mark.parametrize("mbarrier", ["try_wait", "test_wait"])
def test_a_wait_that_gives_up_is_no_deadlock(mbarrier):
    code = f"""
        .shared .align 8 .b8 bar[8];
        mov.u32 %t0, bar;
        mbarrier.init.shared::cta.b64 [%t0], 1;
        mov.u32 %z, 0;
    WAIT:
        mbarrier.{mbarrier}.parity.shared::cta.b64 %p, [%t0], 0;
        @%p bra END;
        add.u32 %z, %z, 1;
        setp.lt.u32 %q, %z, 1000;
        @%q bra WAIT;
    END:
    """
    assert lanes(code, np.uint32, block=1).tolist() == [1000]


def test_a_hang_ends_at_the_instruction_limit():
    code = "SPIN:\nadd.u32 %r1, %r1, 1;\nld.volatile.global.u32 %r2, [%rd1];\n"
    code += "setp.eq.u32 %p1, %r2, 0;\n@%p1 bra SPIN;"
    report = launch(module("mov.u32 %r1, 0;\n" + code), zeros(), zeros(), max_instructions=200_000)
    assert kinds(report) == {"instruction limit"}


# ---- threads that leave before a barrier ---------------------------------------------------------

LEAVE = {
    "bra": "setp.ge.u32 %p1, %r1, {n};\n@%p1 bra DONE;",
    "ret": "setp.ge.u32 %p1, %r1, {n};\n@%p1 ret;",
    "exit": "setp.ge.u32 %p1, %r1, {n};\n@%p1 exit;",
    "nested": "setp.lt.u32 %p1, %r1, {n};\n@%p1 bra STAY;\nand.b32 %r2, %r1, 1;\n"
    "setp.eq.u32 %p2, %r2, 0;\n@%p2 bra DONE;\nexit;\nSTAY:",
}
BARRIERS = {
    "bar.sync": "bar.sync 0;",
    "barrier.sync": "barrier.sync 3;",
    "cta": "barrier.cta.sync.aligned 1;",
    "count": "bar.sync 2, {padded};",
    "red": "bar.red.popc.u32 %r7, 0, %p0;",
    "cluster": "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;",
    "cluster, not aligned": "barrier.cluster.arrive;\nbarrier.cluster.wait;",
    "mbarrier": "mov.u32 %r8, bar;\nsetp.eq.u32 %p3, %r1, 0;\n"
    "@%p3 mbarrier.init.shared::cta.b64 [%r8], {n};\nbar.sync 0;\n"
    "mbarrier.arrive.shared::cta.b64 _, [%r8];\nWAIT:\n"
    "mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r8], 0;\n@!%p4 bra WAIT;",
}
NEIGHBOR = """
    .shared .align 8 .b8 bar[8];
    .shared .align 4 .b8 slots[512];
    mov.u32 %r1, %tid.x;
    setp.eq.u32 %p0, %r1, %r1;
    {leave}
    mov.u32 %r3, slots;
    mad.lo.u32 %r4, %r1, 4, %r3;
    st.shared.u32 [%r4], %r1;
    {barrier}
    add.u32 %r5, %r1, 1;
    rem.u32 %r5, %r5, {n};
    mad.lo.u32 %r4, %r5, 4, %r3;
    ld.shared.u32 %r6, [%r4];
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd3, %rd1, %rd3;
    st.global.u32 [%rd3], %r6;
DONE:
"""


@pytest.mark.parametrize(("block", "n"), [(64, 40), (64, 64), (40, 33), (96, 31), (33, 1), (1, 1)])
@pytest.mark.parametrize("barrier", BARRIERS)
@pytest.mark.parametrize("leave", LEAVE)
def test_threads_leave_before_a_barrier(leave, barrier, block, n):
    """The barrier orders the remaining threads, whatever the CTA's size and whichever have left."""
    code = NEIGHBOR.format(
        leave=LEAVE[leave].format(n=n),
        barrier=BARRIERS[barrier].format(n=n, padded=-(-n // 32) * 32),
        n=n,
    )
    kernel = module(code, "out")
    for seed in SEEDS:
        out = np.full(block, -1, np.int32)
        report = launch(kernel, out, block=block, seed=seed)
        assert report.ok, str(report)
        want = np.full(block, -1)
        want[:n] = (np.arange(n) + 1) % n
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("block", [1, 33, 40, 65])
def test_barrier_reductions_count_the_threads_there_are(block):
    code = "setp.ge.u32 %p, %tid_, 0;\nbar.red.popc.u32 %z, 0, %p;"
    assert (lanes(code, np.uint32, block=block) == block).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_arrive_at_a_barrier_one_branch_after_the_other(seed):
    """Two instructions of one barrier without .aligned, with and without a thread count; the last
    warp is not full."""
    code = """
        .shared .align 4 .b8 slots[160];
        mov.u32 %t0, slots;
        mad.lo.u32 %t1, %tid_, 4, %t0;
        st.shared.u32 [%t1], %tid_;
        setp.lt.u32 %p, %tid_, 20;
        @%p bra LOW;
        barrier.sync {id};
        bra MET;
    LOW:
        barrier.sync {id};
    MET:
        sub.u32 %t2, 39, %tid_;
        mad.lo.u32 %t1, %t2, 4, %t0;
        ld.shared.u32 %z, [%t1];
    """
    for barrier in ("1", "1, 64"):
        got = lanes(code.format(id=barrier), np.uint32, block=40, seed=seed)
        np.testing.assert_array_equal(got, 39 - np.arange(40))


@pytest.mark.parametrize("seed", SEEDS)
def test_each_half_of_a_block_has_a_barrier_of_its_own(seed):
    """Lanes of one warp wait at barriers of different numbers."""
    code = """
        .shared .align 4 .b8 slots[384];
        mov.u32 %t0, slots;
        mad.lo.u32 %t1, %tid_, 4, %t0;
        st.shared.u32 [%t1], %tid_;
        setp.ge.u32 %p, %tid_, 48;
        selp.u32 %t3, 5, 4, %p;
        barrier.sync %t3, 64;
        mov.u32 %z, 0;
    """
    report, _ = lanes_report(code, np.uint32, block=96, seed=seed)
    assert kinds(report) == {"deadlock"}
    assert "barrier 4, where 48 of 64" in str(report)
    assert "barrier 5, where 48 of 64" in str(report)


def test_a_thread_that_waits_for_one_that_has_passed_the_barrier_by():
    """Lanes 16 to 31 skip the barrier; lane 0 polls for what they write after it."""
    code = """
        mov.u32 %r1, %tid.x;
        setp.ge.u32 %p1, %r1, 16;
        @%p1 bra SKIP;
    SPIN:
        ld.acquire.gpu.global.u32 %r2, [%rd1];
        setp.eq.u32 %p2, %r2, 0;
        @%p2 bra SPIN;
        bra END;
    SKIP:
        st.release.gpu.global.u32 [%rd1], %r1;
    END:
    """
    for seed in SEEDS:
        report = launch(module(code), zeros(), zeros(), seed=seed)
        assert {f.kind for f in report.findings} <= {"data race"}, str(report)


# ---- .aligned ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [
    "@%p bar.sync 0;\n@!%p bar.sync 0;",
    "@%p bra LOW;\nbar.sync 0;\nbra END;\nLOW: bar.sync 0;\nEND:",
    "@%p bra LOW;\nbar.sync 0;\nLOW: bar.sync 0;",
    "@%p bra LOW;\nbarrier.cluster.arrive.aligned;\nLOW: barrier.cluster.arrive.aligned;",
    "@%p mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%t0, %t1}, {%z, %z}, {%z}, {%z, %z};",
    "@%p bra END;\nmma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%t0, %t1}, {%z, %z}, {%z}, "
    "{%z, %z};\nEND:",
])  # fmt: skip
@pytest.mark.parametrize("seed", SEEDS)
def test_an_aligned_instruction_that_part_of_a_warp_executes(code, seed):
    text = "mov.u32 %z, 0;\nsetp.lt.u32 %p, %tid_, 16;\n" + code
    report, _ = lanes_report(text, np.uint32, block=32, seed=seed)
    assert "divergent collective" in kinds(report), str(report)


# ---- schedules ---------------------------------------------------------------------------------

# Each warp stores sevens, more than the warp before, waits at a barrier and takes a ticket.
TICKETS = """
    .shared .b32 next;
    mov.u32 %r1, %tid.x;
    shr.u32 %r2, %r1, 5;
    setp.ne.u32 %p1, %r1, 0;
    @!%p1 st.shared.u32 [next], 0;
    bar.sync 0;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd3, %rd3, %rd1;
    shl.b32 %r3, %r2, 4;
    mov.u32 %r4, 7;
AGAIN:
    st.global.u32 [%rd3], %r4;
    add.s64 %rd3, %rd3, 1024;
    sub.u32 %r3, %r3, 1;
    setp.ge.s32 %p2, %r3, 0;
    @%p2 bra AGAIN;
    bar.sync 0;
    and.b32 %r5, %r1, 31;
    setp.ne.u32 %p3, %r5, 0;
    @%p3 bra DONE;
    atom.shared.add.u32 %r6, [next], 1;
    mul.wide.u32 %rd4, %r2, 4;
    add.s64 %rd4, %rd4, %rd2;
    st.global.u32 [%rd4], %r6;
DONE:
"""


def test_a_schedule_does_not_depend_on_what_an_output_held():
    kernel = module(TICKETS, "out tickets")
    for seed in range(10):
        orders = set()
        for before in (0, 7):
            tickets = zeros(8)
            launch(kernel, np.full(256 * 128, before, np.int32), tickets, block=256, seed=seed)
            orders.add(tuple(tickets.tolist()))
        assert len(orders) == 1, f"{seed=}"
