"""Warp collectives and control flow: shfl, vote, match, redux, elect, branches, calls, printf."""

import numpy as np
import pytest

from support.opcodes import HEADER, kernel, kinds, lanes, lanes_report, random_bits
from torchext import sim

LANE = np.arange(64, dtype=np.uint32) % 32
A = random_bits(np.uint32)


@pytest.mark.parametrize("mode,source", [
    ("up", lambda i, n: np.where(i >= n, i - n, i)),
    ("down", lambda i, n: np.where(i + n < 32, i + n, i)),
    ("bfly", lambda i, n: i ^ n),
    ("idx", np.full_like),
])  # fmt: skip
@pytest.mark.parametrize("n", [0, 1, 5, 16, 31])
def test_shfl(mode, source, n):
    clamp = 0 if mode == "up" else 31
    want = A.reshape(2, 32)[:, source(np.arange(32), n)].reshape(-1)
    got = lanes(f"shfl.sync.{mode}.b32 %z, %a, {n}, {clamp}, -1;", np.uint32, A)
    np.testing.assert_array_equal(got, want)


def test_shfl_segments_and_predicate():
    # The mask of width 8 is 0x18, in bits 8 to 12 of the operand.
    got, inside = lanes(
        "shfl.sync.down.b32 %z|%p, %a, 3, 0x181f, -1;\nselp.u32 %y, 1, 0, %p;",
        [np.uint32, np.uint32], A,
    )  # fmt: skip
    i = np.arange(64)
    within = i % 8 + 3 < 8
    np.testing.assert_array_equal(got, A[np.where(within, i + 3, i)])
    np.testing.assert_array_equal(inside, within)


def test_votes():
    odd = "and.b32 %t0, %a, 1;\nsetp.eq.u32 %p, %t0, 1;\n"
    bits = (A & 1).reshape(2, 32)
    ballot = (bits.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
    got = lanes(odd + "vote.sync.ballot.b32 %z, %p, -1;", np.uint32, A)
    np.testing.assert_array_equal(got, ballot.repeat(32))
    for mode, f in (
        ("any", bits.any(1)),
        ("all", bits.all(1)),
        ("uni", bits.min(1) == bits.max(1)),
    ):
        got = lanes(
            odd + f"vote.sync.{mode}.pred %q, %p, -1;\nselp.u32 %z, 1, 0, %q;", np.uint32, A
        )
        np.testing.assert_array_equal(got, f.repeat(32))
    got = lanes(
        "setp.lt.u32 %p, %a, 10;\n@%p activemask.b32 %z;\n@!%p mov.u32 %z, 0;", np.uint32, LANE
    )
    np.testing.assert_array_equal(got, np.where(LANE < 10, 0x3FF, 0))


def test_match():
    a = (A % 4).astype(np.uint32)
    got = lanes("match.any.sync.b32 %z, %a, -1;", np.uint32, a)
    for i in range(64):
        warp = a[i // 32 * 32 : i // 32 * 32 + 32]
        assert got[i] == sum(1 << j for j in range(32) if warp[j] == a[i])
    code = "match.all.sync.b64 %z|%p, %a, -1;\nselp.u32 %y, 1, 0, %p;"
    same, equal = lanes(code, [np.uint32, np.uint32], np.repeat(np.array([7, 9], np.uint64), 32))
    assert (same == 0xFFFFFFFF).all() and equal.all()
    same, equal = lanes(code, [np.uint32, np.uint32], np.arange(64, dtype=np.uint64))
    assert not same.any() and not equal.any()


@pytest.mark.parametrize("op,f,dtype", [
    ("add.u32", np.add, np.uint32), ("min.s32", np.minimum, np.int32),
    ("max.u32", np.maximum, np.uint32), ("and.b32", np.bitwise_and, np.uint32),
    ("or.b32", np.bitwise_or, np.uint32), ("xor.b32", np.bitwise_xor, np.uint32),
])  # fmt: skip
def test_redux(op, f, dtype):
    a = A.view(dtype)
    want = np.stack([f.reduce(a[:32], dtype=dtype), f.reduce(a[32:], dtype=dtype)]).repeat(32)
    np.testing.assert_array_equal(lanes(f"redux.sync.{op} %z, %a, -1;", dtype, a), want)


def test_elect_takes_one_lane():
    code = "elect.sync %z|%p, -1;\nselp.u32 %y, 1, 0, %p;"
    leader, elected = lanes(code, [np.uint32, np.uint32], block=64)
    assert elected.reshape(2, 32).sum(1).tolist() == [1, 1]
    np.testing.assert_array_equal(elected.reshape(2, 32).argmax(1).repeat(32), leader)


@pytest.mark.parametrize("seed", range(4))
def test_collective_in_a_branch_gathers_its_members(seed):
    # The two halves of the warp reach one shfl through different branches.
    code = """
        setp.lt.u32 %p, %a, 16;
        mov.u32 %t0, %a;
        @%p bra LOW;
        add.u32 %t0, %t0, 100;
        bar.warp.sync -1;
        bra MEET;
    LOW:
        add.u32 %t0, %t0, 200;
        bar.warp.sync -1;
    MEET:
        shfl.sync.bfly.b32 %z, %t0, 16, 31, -1;
    """
    got = lanes(code, np.uint32, LANE[:32], seed=seed)
    i = np.arange(32)
    np.testing.assert_array_equal(got, (i ^ 16) + np.where((i ^ 16) < 16, 200, 100))


def test_member_mask_that_leaves_a_lane_out():
    report, _ = lanes_report("shfl.sync.bfly.b32 %z, %a, 1, 31, 0xffff;", np.uint32, LANE[:32])
    assert "invalid operand" in kinds(report)


def test_missing_member_is_a_deadlock():
    code = """
        mov.u32 %z, 0;
        setp.lt.u32 %p, %a, 16;
        @%p bra END;
        shfl.sync.bfly.b32 %z, %a, 1, 31, -1;
        bar.sync 1, 32;
    END:
        bar.sync 0;
    """
    report, _ = lanes_report(code, np.uint32, LANE[:32])
    assert "deadlock" in kinds(report)


# ---- Control flow -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_loops_diverge_and_reconverge(seed):
    code = """
        mov.u32 %t0, 0;
        mov.u32 %t1, %a;
    AGAIN:
        setp.eq.u32 %p, %t1, 1;
        @%p bra DONE;
        and.b32 %t2, %t1, 1;
        setp.eq.u32 %q, %t2, 0;
        @%q shr.u32 %t1, %t1, 1;
        @%q bra NEXT;
        mad.lo.u32 %t1, %t1, 3, 1;
    NEXT:
        add.u32 %t0, %t0, 1;
        bra AGAIN;
    DONE:
        activemask.b32 %y;
        mov.u32 %z, %t0;
    """
    a = np.arange(1, 65, dtype=np.uint32)

    def collatz(n):
        return 0 if n == 1 else 1 + collatz(3 * n + 1 if n % 2 else n // 2)

    steps, mask = lanes(code, [np.uint32, np.uint32], a, seed=seed)
    np.testing.assert_array_equal(steps, [collatz(int(n)) for n in a])
    assert (mask == 0xFFFFFFFF).all()  # the lanes have reconverged


def test_early_return_does_not_hold_up_the_others():
    code = """
        setp.ge.u32 %p, %a, 20;
        mov.u32 %z, 7;
        @%p bra SKIP;
        mov.u32 %z, 9;
    SKIP:
        setp.ge.u32 %q, %a, 28;
        @%q bra OUT;
        vote.sync.ballot.b32 %z, %p, 0x0fffffff;
    OUT:
    """
    got = lanes(code, np.uint32, LANE[:32])
    np.testing.assert_array_equal(got, np.where(np.arange(32) < 28, 0x0FF00000, 7))


def test_branch_table():
    code = """
        and.b32 %t0, %a, 3;
    TABLE: .branchtargets L0, L1, L2, L3;
        brx.idx %t0, TABLE;
    L0: mov.u32 %z, 10;
        bra.uni END;
    L1: mov.u32 %z, 11;
        bra END;
    L2: mov.u32 %z, 12;
        bra END;
    L3: mov.u32 %z, 13;
    END:
        activemask.b32 %y;
    """
    got, mask = lanes(code, [np.uint32, np.uint32], LANE)
    np.testing.assert_array_equal(got, 10 + LANE % 4)
    assert (mask == 0xFFFFFFFF).all()


CALLS = (
    HEADER.format(target="sm_90a")
    + """
.func (.param .b32 result) square_or_zero(.param .b32 value, .param .align 8 .b8 limit[8])
{
    .reg .b32 %r<4>;
    .reg .pred %p;
    ld.param.u32 %r1, [value];
    ld.param.u32 %r2, [limit+4];
    setp.gt.u32 %p, %r1, %r2;
    @%p bra LARGE;
    mul.lo.u32 %r3, %r1, %r1;
    st.param.b32 [result], %r3;
    ret;
LARGE:
    st.param.b32 [result], 0;
    ret;
}
.visible .entry kernel(.param .u64 out)
{
    .reg .b32 %r<8>;
    .reg .b64 %rd<4>;
    .reg .pred %p;
    mov.u32 %r1, %tid.x;
    {
        .param .b32 param0;
        st.param.b32 [param0], %r1;
        .param .align 8 .b8 param1[8];
        st.param.v2.b32 [param1], {0, 20};
        .param .b32 retval0;
        call.uni (retval0), square_or_zero, (param0, param1);
        ld.param.b32 %r2, [retval0];
    }
    ld.param.u64 %rd1, [out];
    mad.wide.u32 %rd1, %r1, 4, %rd1;
    st.global.u32 [%rd1], %r2;
    vote.sync.all.pred %p, 1, -1;
    exit;
}
"""
)


def test_calls_with_divergent_returns():
    out = np.zeros(64, np.uint32)
    report = sim.Module(CALLS).launch("kernel", grid=1, block=64, args=[sim.output(out)])
    assert report.ok, str(report)
    i = np.arange(64)
    np.testing.assert_array_equal(out, np.where(i > 20, 0, i * i))


def test_trap_and_exit():
    report = kernel("trap;").launch("kernel", grid=1, block=32, args=[np.zeros(1)])
    assert kinds(report) == {"trap"}
    body = "mov.u32 %r1, %tid.x;\nsetp.gt.u32 %p1, %r1, 3;\n@%p1 exit;\n"
    report = kernel(body + "brkpt;").launch("kernel", grid=1, block=32, args=[np.zeros(1)])
    assert kinds(report) == {"trap"} and "no debugger" in str(report)
    body += "bar.sync 0;\n@%p1 brkpt;\npmevent 1;"
    report = kernel(body).launch("kernel", grid=1, block=128, args=[np.zeros(1)])
    assert report.ok, str(report)
    assert report.instructions["bar.sync"] == 1


def test_nanosleep_and_grid_dependency():
    body = "griddepcontrol.wait;\nnanosleep.u32 100;\ngriddepcontrol.launch_dependents;"
    assert kernel(body).launch("kernel", grid=1, block=32, args=[np.zeros(1)]).ok


@pytest.mark.parametrize("code,message", [
    ("frobnicate.u32 %z, %a;", "unknown instruction 'frobnicate.u32'"),
    ("add.frob.u32 %z, %a, %a;", r"modifiers must be ones that add takes here \(got '\.frob'\)"),
    ("add.u32 %z, %a;", r"number of operands must be 3 \(got 2\)"),
    ("add.u64 %z, %a, %a;", r"operand 1 must be a register of at least 64 bits \(got .*'%z'"),
    ("bra NOWHERE;", "unknown label 'NOWHERE'"),
    ("mov.u32 %z, nothing;", "unknown name 'nothing'"),
    ("add.u32 %z, %a, %nosuch;", "unknown special register '%nosuch'"),
    ("lop3.b32 %z, %a, %a, %a, %a;", r"operand 5 must be an integer \(got .*'%a'"),
    ("add.f32 %z, %a, 1;", r"operand 3 must be a floating-point number \(got an integer\); write"),
])  # fmt: skip
def test_errors_name_the_line(code, message):
    with pytest.raises(Exception, match=message) as error:
        lanes(code, np.uint32, LANE)
    assert "<ptx>:" in str(error.value)
