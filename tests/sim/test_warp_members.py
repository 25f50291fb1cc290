"""Member masks that differ by lane: each part of a warp synchronizes by itself at .sync
instructions."""

import numpy as np
import pytest

from support.opcodes import kinds, lanes, lanes_report, random_bits

LANE = np.arange(32)
A = random_bits(np.uint32)[:32]
SEEDS = range(3)

# Ways to cut a warp into parts: (PTX that computes each lane's member mask in %t7, number of each
# lane's part).
CUTS = {
    f"tiles of {n}": (
        f"and.b32 %t6, %tid_, {32 - n};\nmov.u32 %t7, {(1 << n) - 1};\nshl.b32 %t7, %t7, %t6;\n",
        LANE // n,
    )
    for n in (1, 2, 4, 8, 16)
}
CUTS["every third lane"] = (
    "rem.u32 %t6, %tid_, 3;\nmov.u32 %t7, 0x49249249;\nsetp.eq.u32 %r0, %t6, 1;\n"
    "@%r0 mov.u32 %t7, 0x92492492;\nsetp.eq.u32 %r0, %t6, 2;\n@%r0 mov.u32 %t7, 0x24924924;\n",
    LANE % 3,
)
CUTS["one and the rest"] = (
    "setp.eq.u32 %r0, %tid_, 13;\nselp.b32 %t7, 0x2000, 0xffffdfff, %r0;\n",
    LANE == 13,
)
cuts = pytest.mark.parametrize("cut", CUTS)
DIVERGED = """
    and.b32 %t5, %tid_, {bit};
    setp.eq.u32 %q, %t5, 0;
    @%q bra OTHER;
    {code}
    bra MET;
OTHER:
    add.u32 %t4, %tid_, 1;
    {code}
MET:
"""


def parts_of(part):
    return [np.flatnonzero(part == value) for value in np.unique(part)]


def by_part(part, f):
    """For each lane, f(lanes of its part)."""
    out = np.zeros(32, np.uint32)
    for members in parts_of(part):
        out[members] = f(members)
    return out


def bits(members):
    return np.bitwise_or.reduce(np.uint32(1) << members.astype(np.uint32))


def ballot(members):
    return bits(members[A[members] % 2 == 1]) if (A[members] % 2).any() else np.uint32(0)


PREDICATE = "and.b32 %t0, %a, 1;\nsetp.eq.u32 %p, %t0, 1;\n"
OPS = {
    "shfl": ("", "shfl.sync.idx.b32 %z, %a, {leader}, 31, %t7;", None),
    "ballot": (PREDICATE, "vote.sync.ballot.b32 %z, %p, %t7;", ballot),
    "any": (
        PREDICATE,
        "vote.sync.any.pred %p, %p, %t7;\nselp.u32 %z, 1, 0, %p;",
        lambda m: (A[m] % 2).any(),
    ),
    "all": (
        PREDICATE,
        "vote.sync.all.pred %p, %p, %t7;\nselp.u32 %z, 1, 0, %p;",
        lambda m: (A[m] % 2).all(),
    ),
    "uni": (
        PREDICATE,
        "vote.sync.uni.pred %p, %p, %t7;\nselp.u32 %z, 1, 0, %p;",
        lambda m: (A[m] % 2).min() == (A[m] % 2).max(),
    ),
    "match.any": (
        "and.b32 %t0, %a, 1;",
        "match.any.sync.b32 %z, %t0, %t7;",
        lambda m: [bits(m[A[m] % 2 == A[lane] % 2]) for lane in m],
    ),
    "match.all": (
        "cvt.u64.u32 %u0, %t7;",
        "match.all.sync.b64 %z|%p, %u0, %t7;\n@!%p mov.u32 %z, 7;",
        bits,
    ),
    "redux.add": ("", "redux.sync.add.u32 %z, %a, %t7;", lambda m: np.add.reduce(A[m])),
    "redux.min": (
        "",
        "redux.sync.min.s32 %z, %a, %t7;",
        lambda m: A[m].view(np.int32).min().view(np.uint32),
    ),
    "redux.xor": ("", "redux.sync.xor.b32 %z, %a, %t7;", lambda m: np.bitwise_xor.reduce(A[m])),
    "elect": ("", "elect.sync %z|%p, %t7;\n@!%p add.u32 %z, %z, 32;", None),
}


def expected(op, part):
    want = OPS[op][2]
    if op == "shfl":
        return by_part(part, lambda m: A[m[0]])
    if op == "elect":
        return by_part(part, lambda m: np.where(m == m[0], m[0], m[0] + 32))
    return by_part(part, want)


def code_of(op, cut):
    setup, part = CUTS[cut]
    before, code, _ = OPS[op]
    # shfl reads the first lane of each part, which is the lowest bit of the mask.
    leader = "brev.b32 %t3, %t7;\nclz.b32 %t3, %t3;\n"
    if "leader" in code:
        before += leader
    return setup + before, code.format(leader="%t3"), part


@cuts
@pytest.mark.parametrize("op", OPS)
def test_parts_that_execute_together(op, cut):
    before, code, part = code_of(op, cut)
    np.testing.assert_array_equal(lanes(before + code, np.uint32, A), expected(op, part))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bit", [1, 4, 16])
@pytest.mark.parametrize("cut", ["tiles of 2", "tiles of 8", "every third lane"])
@pytest.mark.parametrize("op", ["shfl", "ballot", "match.any", "redux.add", "elect"])
def test_members_come_from_different_branches(op, cut, bit, seed):
    """Lanes with `bit` and lanes without it wait at two different instructions of one kind."""
    before, code, part = code_of(op, cut)
    got = lanes(before + DIVERGED.format(code=code, bit=bit), np.uint32, A, seed=seed)
    np.testing.assert_array_equal(got, expected(op, part))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_whole_warp_may_meet_at_two_instructions(seed):
    code = """
        setp.lt.u32 %p, %tid_, 16;
        @%p bra LOW;
        mov.u32 %t0, %a;
        shfl.sync.bfly.b32 %z, %t0, 16, 31, -1;
        bra END;
    LOW:
        add.u32 %t1, %a, 100;
        shfl.sync.bfly.b32 %z, %t1, 16, 31, -1;
    END:
        activemask.b32 %y;
    """
    got, active = lanes(code, [np.uint32, np.uint32], LANE.astype(np.uint32), seed=seed)
    other = LANE ^ 16
    np.testing.assert_array_equal(got, other + np.where(other < 16, 100, 0))
    assert (active == 0xFFFFFFFF).all(), "the lanes are together again"


@pytest.mark.parametrize("seed", SEEDS)
def test_tiles_loop_for_as_long_as_each_needs(seed):
    """Tile n of four lanes sums its lanes by butterflies n + 1 times."""
    setup, part = CUTS["tiles of 4"]
    code = (
        setup
        + """
        mov.u32 %z, %a;
        shr.u32 %t0, %tid_, 2;
    AGAIN:
        shfl.sync.bfly.b32 %t1, %z, 1, 0x1c1f, %t7;
        add.u32 %z, %z, %t1;
        shfl.sync.bfly.b32 %t1, %z, 2, 0x1c1f, %t7;
        add.u32 %z, %z, %t1;
        sub.s32 %t0, %t0, 1;
        setp.ge.s32 %p, %t0, 0;
        @%p bra AGAIN;
        vote.sync.ballot.b32 %y, 1, -1;
    """
    )
    got, met = lanes(code, [np.uint32, np.uint32], A, seed=seed)
    want = by_part(part, lambda m: np.add.reduce(A[m]) * np.uint32(4) ** np.uint32(m[0] // 4))
    np.testing.assert_array_equal(got, want)
    assert (met == 0xFFFFFFFF).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_that_wait_for_members_elsewhere_do_not_hold_up_the_others(seed):
    """Lanes 16 to 23 are a part; lanes 24 to 31 are another, which also waits for lane 15."""
    code = """
        mov.u32 %z, 0;
        setp.lt.u32 %p, %tid_, 16;
        @%p bra LOW;
        setp.lt.u32 %q, %tid_, 24;
        selp.b32 %t7, 0x00ff0000, 0xff008000, %q;
        redux.sync.add.u32 %z, %tid_, %t7;
        bra END;
    LOW:
        setp.ne.u32 %q, %tid_, 15;
        @%q bra END;
        redux.sync.add.u32 %z, %tid_, 0xff008000;
    END:
    """
    got = lanes(code, np.uint32, block=32, seed=seed)
    want = np.zeros(32, np.uint32)
    want[16:24] = sum(range(16, 24))
    want[24:] = want[15] = sum(range(24, 32)) + 15
    np.testing.assert_array_equal(got, want)


def test_lanes_that_have_exited_are_not_waited_for():
    code = """
        setp.ge.u32 %p, %tid_, 29;
        @%p exit;
        and.b32 %t6, %tid_, 24;
        mov.u32 %t7, 255;
        shl.b32 %t7, %t7, %t6;
        vote.sync.ballot.b32 %z, 1, %t7;
    """
    report, got = lanes_report(code, np.uint32, block=32)
    assert report.ok, str(report)
    want = np.uint32(0xFF) << (LANE // 8 * 8).astype(np.uint32)
    np.testing.assert_array_equal(got[:29], np.where(LANE < 24, want, 0x1F000000)[:29])


def test_lanes_that_a_guard_turns_away_go_on():
    """The odd lanes skip the vote that the even lanes wait for."""
    code = """
        and.b32 %t0, %tid_, 1;
        setp.eq.u32 %p, %t0, 0;
        mov.u32 %z, 0;
        @%p vote.sync.ballot.b32 %z, 1, 0x55555555;
        bar.warp.sync -1;
    """
    got = lanes(code, np.uint32, block=32)
    np.testing.assert_array_equal(got, np.where(LANE % 2 == 0, 0x55555555, 0))


# ---- order -------------------------------------------------------------------------------------

HAND_OVER = """
    .shared .align 4 .b8 slots[128];
    mov.u32 %t0, slots;
    mad.lo.u32 %t1, %tid_, 4, %t0;
    st.shared.u32 [%t1], %tid_;
    {barrier}
    xor.b32 %t2, %tid_, {distance};
    mad.lo.u32 %t1, %t2, 4, %t0;
    ld.shared.u32 %z, [%t1];
"""


@pytest.mark.parametrize("lane_order", ["converged", "strict"])
@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_a_tile_s_barrier_orders_the_tile_alone(n, lane_order):
    setup, _ = CUTS[f"tiles of {n}"]
    within = HAND_OVER.format(barrier=setup + "bar.warp.sync %t7;", distance=n - 1)
    got = lanes(within, np.uint32, block=32, lane_order=lane_order)
    np.testing.assert_array_equal(got, LANE ^ (n - 1))
    across = HAND_OVER.format(barrier=setup + "bar.warp.sync %t7;", distance=n)
    report, _ = lanes_report(across, np.uint32, block=32, lane_order=lane_order)
    assert kinds(report) == {"data race"}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [2, 8])
def test_a_tile_meets_at_two_barriers(n, seed):
    setup, _ = CUTS[f"tiles of {n}"]
    barrier = setup + DIVERGED.format(code="bar.warp.sync %t7;", bit=1)
    got = lanes(HAND_OVER.format(barrier=barrier, distance=1), np.uint32, block=32, seed=seed,
                lane_order="strict")  # fmt: skip
    np.testing.assert_array_equal(got, LANE ^ 1)


# ---- faults ------------------------------------------------------------------------------------


def test_masks_that_disagree_never_complete():
    code = """
        setp.lt.u32 %p, %tid_, 8;
        selp.b32 %t7, 0xff, 0xffff, %p;
        setp.ge.u32 %p, %tid_, 16;
        selp.b32 %t7, 0xffff0000, %t7, %p;
        vote.sync.ballot.b32 %z, 1, %t7;
        barrier.sync 0;
    """
    report, _ = lanes_report(code, np.uint32, block=32)
    (finding,) = report.findings
    assert finding.kind == "deadlock"
    assert "lanes 0xff00, line" in finding.message
    assert "vote.sync.ballot.b32, member mask 0xffff, for lanes 0xff, which" in finding.message


def test_different_qualifiers_do_not_meet():
    code = """
        setp.lt.u32 %p, %tid_, 16;
        @%p bra LOW;
        vote.sync.any.pred %q, 1, -1;
        bra END;
    LOW:
        vote.sync.all.pred %q, 1, -1;
    END:
        mov.u32 %z, 0;
    """
    report, _ = lanes_report(code, np.uint32, block=32)
    assert kinds(report) == {"deadlock"}


@pytest.mark.parametrize("op", OPS)
def test_a_lane_outside_its_own_mask(op):
    before, code, _ = code_of(op, "tiles of 8")
    before += "setp.eq.u32 %r0, %tid_, 9;\n@%r0 shl.b32 %t7, %t7, 8;\n"
    report, _ = lanes_report(before + code, np.uint32, A)
    wrong = [f for f in report.findings if "leaves it out" in f.message]
    assert [(f.kind, f.lanes) for f in wrong] == [("invalid operand", (9,))]


def test_shfl_from_a_lane_of_another_tile():
    setup, _ = CUTS["tiles of 8"]
    report, _ = lanes_report(
        setup + "shfl.sync.bfly.b32 %z, %a, 8, 31, %t7;", np.uint32, A
    )  # fmt: skip
    assert kinds(report) == {"invalid operand"}
    assert "does not take part" in report.findings[0].message
