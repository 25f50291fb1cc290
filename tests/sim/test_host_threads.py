"""CTAs that synchronize by atomics: any number of host threads gives the same verdict."""

import numpy as np
import pytest

from support.opcodes import HEADER, kinds
from torchext import sim

GRID = 8
THREADS = pytest.mark.parametrize("num_threads", [1, 2, pytest.param(4, marks=pytest.mark.slow)])


def module(body: str) -> sim.Module:
    """A module whose kernel runs `body`.

    %rd1: address of the words for synchronization; %rd2: address of the data; %r1: the CTA's
    number; %r2: the thread's number; %r3: the number of CTAs.
    """
    return sim.Module(
        HEADER.format(target="sm_90a")
        + ".visible .entry kernel(.param .u64 sync, .param .u64 data)\n{\n.reg .pred %p<8>;\n"
        + ".reg .b32 %r<32>;\n.reg .b64 %rd<16>;\n.shared .align 4 .b8 word[4];\n"
        + "ld.param.u64 %rd1, [sync];\nld.param.u64 %rd2, [data];\nmov.u32 %r1, %ctaid.x;\n"
        + "mov.u32 %r2, %tid.x;\nmov.u32 %r3, %nctaid.x;\n"
        + body
        + "\nret;\n}\n"
    )


# Each thread adds one to the word at %rd2 under a lock.
INCREMENT = "ld.global.u32 %r5, [%rd2];\nadd.s32 %r5, %r5, 1;\nst.global.u32 [%rd2], %r5;\n"
SPIN = "SPIN:\n{take}\nsetp.ne.s32 %p1, %r4, 0;\n@%p1 bra SPIN;\n"
LOCKS = {
    "fences": SPIN.format(take="atom.global.cas.b32 %r4, [%rd1], 0, 1;")
    + "membar.gl;\n" + INCREMENT + "membar.gl;\natom.global.exch.b32 %r6, [%rd1], 0;",
    "fence.sc": SPIN.format(take="atom.relaxed.gpu.global.exch.b32 %r4, [%rd1], 1;")
    + "fence.sc.gpu;\n" + INCREMENT + "fence.sc.gpu;\nst.relaxed.gpu.global.u32 [%rd1], 0;",
    "acq_rel": SPIN.format(take="atom.acq_rel.gpu.global.cas.b32 %r4, [%rd1], 0, 1;")
    + INCREMENT + "atom.acq_rel.gpu.global.exch.b32 %r6, [%rd1], 0;",
    "red": SPIN.format(take="atom.acquire.gpu.global.cas.b32 %r4, [%rd1], 0, 1;")
    + INCREMENT + "red.release.gpu.global.add.u32 [%rd1], -1;",
    "volatile": SPIN.format(take="atom.global.cas.b32 %r4, [%rd1], 0, 1;")
    + "membar.gl;\n" + INCREMENT + "membar.gl;\nst.volatile.global.u32 [%rd1], 0;",
}  # fmt: skip
# The last CTA to arrive adds up what all have written.
LAST = """
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd3, %rd2, %rd3;
    add.u32 %r4, %r1, 1;
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra WRITTEN;
    st.global.u32 [%rd3+4], %r4;
    {release}
    {acquire}
    st.shared.u32 [word], %r5;
WRITTEN:
    bar.sync 0;
    ld.shared.u32 %r6, [word];
    add.u32 %r6, %r6, 1;
    setp.ne.u32 %p2, %r6, %r3;
    @%p2 bra END;
    setp.ne.u32 %p3, %r2, 33;
    @%p3 bra END;
    mov.u32 %r7, 0;
    mov.u32 %r8, 0;
    mov.u64 %rd4, %rd2;
ADD:
    ld.global.u32 %r9, [%rd4+4];
    add.u32 %r7, %r7, %r9;
    add.s64 %rd4, %rd4, 4;
    add.u32 %r8, %r8, 1;
    setp.lt.u32 %p4, %r8, %r3;
    @%p4 bra ADD;
    st.global.u32 [%rd2], %r7;
END:
"""
# Each CTA waits for all others, then reads what its neighbor wrote.
MEET = """
    setp.ne.u32 %p1, %r2, 0;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd3, %rd2, %rd3;
    add.u32 %r4, %r1, 1;
    @!%p1 st.global.u32 [%rd3+4], %r4;
    bar.sync 0;
    @%p1 bra MET;
    {arrive}
SPIN:
    {poll}
    setp.lt.u32 %p2, %r6, %r3;
    @%p2 bra SPIN;
    {after}
MET:
    bar.sync 0;
    setp.ne.u32 %p3, %r2, 40;
    rem.u32 %r7, %r4, %r3;
    mul.wide.u32 %rd4, %r7, 4;
    add.s64 %rd4, %rd2, %rd4;
    @!%p3 ld.global.u32 %r8, [%rd4+4];
    @!%p3 red.global.add.u32 [%rd2], %r8;
"""
# Each producer takes a ticket and writes its number to the slot of that ticket; CTA 0 consumes the
# slots in order.
QUEUE = """
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra END;
    setp.eq.u32 %p2, %r1, 0;
    @%p2 bra CONSUME;
    atom.global.add.u32 %r4, [%rd1], 1;
    mul.wide.u32 %rd3, %r4, 8;
    add.s64 %rd3, %rd2, %rd3;
    st.global.u32 [%rd3+8], %r1;
    mov.u32 %r5, 1;
    {publish}
    bra END;
CONSUME:
    mov.u32 %r6, 0;
    mov.u32 %r7, 1;
    mov.u64 %rd3, %rd2;
NEXT:
    {wait}
    setp.eq.u32 %p3, %r8, 0;
    @%p3 bra NEXT;
    {after}
    ld.global.u32 %r9, [%rd3+8];
    add.u32 %r6, %r6, %r9;
    add.s64 %rd3, %rd3, 8;
    add.u32 %r7, %r7, 1;
    setp.lt.u32 %p4, %r7, %r3;
    @%p4 bra NEXT;
    st.global.u32 [%rd2], %r6;
END:
"""
TAKE = "atom.global.add.u32 %r5, [%rd1], 1;"
CORRECT = {
    **{f"lock: {name}": (code, 32, GRID * 32) for name, code in LOCKS.items()},
    "last block, fences": (
        LAST.format(release="membar.gl;\n" + TAKE, acquire="membar.gl;"), 64, 36),
    "last block, acq_rel": (
        LAST.format(release=TAKE.replace("atom", "atom.acq_rel.gpu"), acquire=""), 64, 36),
    "grid barrier, fences": (
        MEET.format(arrive="membar.gl;\nred.global.add.u32 [%rd1], 1;",
                    poll="ld.volatile.global.u32 %r6, [%rd1];", after="membar.gl;"), 64, 36),
    "grid barrier, release and acquire": (
        MEET.format(arrive="red.release.gpu.global.add.u32 [%rd1], 1;",
                    poll="ld.acquire.gpu.global.u32 %r6, [%rd1];", after=""), 64, 36),
    "grid barrier, atomics": (
        MEET.format(arrive="atom.release.gpu.global.add.u32 %r6, [%rd1], 1;",
                    poll="atom.acquire.gpu.global.or.b32 %r6, [%rd1], 0;", after=""), 64, 36),
    "queue, fences": (
        QUEUE.format(publish="membar.gl;\nst.volatile.global.u32 [%rd3+12], %r5;",
                     wait="ld.relaxed.gpu.global.u32 %r8, [%rd3+12];", after="membar.gl;"), 32, 28),
    "queue, release and acquire": (
        QUEUE.format(publish="st.release.gpu.global.u32 [%rd3+12], %r5;",
                     wait="ld.acquire.gpu.global.u32 %r8, [%rd3+12];", after=""), 32, 28),
}  # fmt: skip


def launch(kernel, block, **options):
    data = np.zeros(64, np.int32)
    report = kernel.launch(
        "kernel", grid=GRID, block=block, args=[np.zeros(4, np.int32), data],
        max_instructions=5_000_000, **options,
    )  # fmt: skip
    return report, data[0]


@THREADS
@pytest.mark.parametrize("name", CORRECT)
@pytest.mark.slow
def test_what_is_ordered_has_no_finding(name, num_threads):
    code, block, want = CORRECT[name]
    kernel = module(code)
    for seed in range(8):
        report, got = launch(kernel, block, seed=seed, num_threads=num_threads)
        assert report.ok, f"seed {seed}: {report}"
        assert got == want, f"seed {seed}"


def without(name, *parts):
    code, block, _ = CORRECT[name]
    for part in parts:
        assert part in code
        code = code.replace(part, "" if part.endswith("\n") or part == "membar.gl;" else part[:4])
    return code, block


FAULTS = {
    "no lock": (INCREMENT, 1),
    "lock without fences": without("lock: fences", "membar.gl;\n"),
    "lock that acquires nothing": (LOCKS["acq_rel"].replace("atom.acq_rel.gpu.global.cas",
                                                            "atom.relaxed.gpu.global.cas"), 32),
    "lock that releases nothing": (LOCKS["acq_rel"].replace("atom.acq_rel.gpu.global.exch",
                                                            "atom.relaxed.gpu.global.exch"), 32),
    "last block without fences": without("last block, fences", "membar.gl;"),
    "grid barrier without fences": without("grid barrier, fences", "membar.gl;"),
    "queue without fences": without("queue, fences", "membar.gl;"),
    "queue that releases nothing": (CORRECT["queue, release and acquire"][0].replace(
        "st.release", "st.relaxed"), 32),
}  # fmt: skip


@THREADS
@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_ordered_is_found_in_every_run(name, num_threads):
    code, block = FAULTS[name]
    kernel = module(code)
    for seed in range(4):
        report, _ = launch(kernel, block, seed=seed, num_threads=num_threads)
        assert "data race" in kinds(report), f"seed {seed}: {report}"


@THREADS
def test_a_cta_that_polls_for_one_that_computes_is_no_deadlock(num_threads):
    code = """
        setp.ne.u32 %p1, %r2, 0;
        @%p1 bra END;
        setp.eq.u32 %p2, %r1, 0;
        mov.u32 %r4, 0;
        @!%p2 bra SPIN;
    WORK:
        add.u32 %r4, %r4, 1;
        setp.lt.u32 %p3, %r4, 600000;
        @%p3 bra WORK;
        st.release.gpu.global.u32 [%rd1], 1;
        bra END;
    SPIN:
        ld.acquire.gpu.global.u32 %r5, [%rd1];
        setp.eq.u32 %p4, %r5, 0;
        @%p4 bra SPIN;
    END:
        bar.sync 0;
    """
    report = module(code).launch(
        "kernel", grid=4, block=32, args=[np.zeros(4, np.int32), np.zeros(64, np.int32)],
        num_threads=num_threads,
    )  # fmt: skip
    assert report.ok, str(report)


@THREADS
def test_ctas_that_wait_for_each_other_are_a_deadlock(num_threads):
    code = MEET.format(
        arrive="red.release.gpu.global.add.u32 [%rd1], 1;",
        poll="ld.acquire.gpu.global.u32 %r6, [%rd1];\nsub.u32 %r6, %r6, 1;",
        after="",
    )
    report, _ = launch(module(code), 64, num_threads=num_threads)
    assert kinds(report) == {"deadlock"}


@THREADS
def test_equal_findings_are_those_of_the_smallest_cta(num_threads):
    """CTA 0 makes the same faults as CTA 1, but later. Each makes more than a report keeps."""
    faults = "".join(f"ld.global.u32 %r5, [%rd2+{2 * i + 1}];\n" for i in range(40))
    code = f"""
        setp.eq.u32 %p1, %r1, 1;
        @%p1 bra FAULTS;
    SPIN:
        ld.acquire.gpu.global.u32 %r5, [%rd1];
        setp.eq.u32 %p2, %r5, 0;
        @%p2 bra SPIN;
    FAULTS:
        {faults}
        st.release.gpu.global.u32 [%rd1], 1;
    """
    report = module(code).launch(
        "kernel", grid=2, block=1, args=[np.zeros(4, np.int32), np.zeros(64, np.int32)],
        num_threads=num_threads,
    )  # fmt: skip
    assert kinds(report) == {"misaligned access"} and report.findings_truncated
    assert {f.cta for f in report.findings} == {(0, 0, 0)}
    lines = [f.ptx_line for f in report.findings]
    assert lines == list(range(lines[0], lines[0] + 32))
