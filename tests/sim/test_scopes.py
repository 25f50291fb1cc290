"""Scopes of fences and strong accesses: what they order, between which threads."""

import numpy as np
import pytest

from support.opcodes import kernel, kinds

# Thread 0 of CTA 0 writes data[0] and sets a flag; thread 0 of each other CTA waits for the flag,
# then reads data[0].
# %r9 is the CTA's number.
WHO = """
    ld.param.u64 %rd1, [data];
    ld.param.u64 %rd2, [flag];
    mov.u32 %r1, %tid.x;
    mov.u32 %r9, %ctaid.x;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra DONE;
    setp.ne.u32 %p1, %r9, 0;
    @%p1 bra READ;
"""


PARAMS = ".param .u64 data, .param .u64 flag"


def between_ctas(write, read, spin="ld.relaxed.gpu.global.u32"):
    """`read` is "LOAD|AFTER": the load that polls the flag, and the code that follows the loop."""
    load, _, fence = read.partition("|")
    return kernel(
        WHO
        + f"""
    mov.u32 %r2, 42;
    st.global.u32 [%rd1], %r2;
    {write}
    bra DONE;
READ:
SPIN:
    {load.replace("LOAD", spin)}
    setp.eq.u32 %p2, %r4, 0;
    @%p2 bra SPIN;
    {fence}
    ld.global.u32 %r5, [%rd1];
    st.global.u32 [%rd1+4], %r5;
DONE:
""",
        PARAMS,
    )


def run(module, grid=2, cluster=None, block=1, **options):
    data, flag = np.zeros(2, np.int32), np.zeros(1, np.int32)
    arguments = {"cluster": cluster} if cluster else {}
    report = module.launch(
        "kernel", grid=grid, block=block, args=[data, flag], **arguments, **options
    )
    return report, data


STORES = {
    "fence": "fence.acq_rel.{s};\nst.relaxed.gpu.global.u32 [%rd2], %r2;",
    "fence.sc": "fence.sc.{s};\nst.relaxed.gpu.global.u32 [%rd2], %r2;",
    "fence.release": "fence.release.{s};\nst.relaxed.gpu.global.u32 [%rd2], %r2;",
    "release": "st.release.{s}.global.u32 [%rd2], %r2;",
    "atom.release": "atom.release.{s}.global.add.u32 %r6, [%rd2], %r2;",
    "red.release": "red.release.{s}.global.add.u32 [%rd2], %r2;",
    "red": "fence.acq_rel.{s};\nred.relaxed.gpu.global.add.u32 [%rd2], %r2;",
    "access": "fence.acq_rel.gpu;\nst.relaxed.{s}.global.u32 [%rd2], %r2;",
}
LOADS = {
    "fence": "LOAD %r4, [%rd2];|fence.acq_rel.{s};",
    "fence.acquire": "LOAD %r4, [%rd2];|fence.acquire.{s};",
    "acquire": "ld.acquire.{s}.global.u32 %r4, [%rd2];",
    "atom.acquire": "atom.acquire.{s}.global.cas.b32 %r4, [%rd2], 1, 1;",
    "access": "ld.relaxed.{s}.global.u32 %r4, [%rd2];|fence.acq_rel.gpu;",
}


def release(name, scope):
    return (
        STORES[name].replace("[%rd2], %r2;", "[%rd2], %r2;").replace("{s}", scope)
    )  # the flag is any value but 0


def acquire(name, scope):
    return LOADS[name].replace("{s}", scope)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("load", LOADS)
def test_wide_scopes_order_ctas(store, load, num_threads):
    module = between_ctas(release(store, "gpu"), acquire(load, "gpu"))
    for seed in range(3):
        report, data = run(module, seed=seed, num_threads=num_threads)
        assert report.ok, str(report)
        assert data[1] == 42


@pytest.mark.parametrize("scope", ["cta", "cluster"])
@pytest.mark.parametrize("store", STORES)
def test_a_narrow_release_does_not(store, scope):
    module = between_ctas(release(store, scope), acquire("acquire", "gpu"))
    report, _ = run(module)
    assert kinds(report) == {"data race"}, str(report)
    assert "scope too narrow" in str(report) and f".{scope}" in str(report)


@pytest.mark.parametrize("scope", ["cta", "cluster"])
@pytest.mark.parametrize("load", LOADS)
def test_a_narrow_acquire_does_not(load, scope):
    module = between_ctas(release("release", "gpu"), acquire(load, scope))
    report, _ = run(module)
    assert kinds(report) == {"data race"}, str(report)
    assert "scope too narrow" in str(report) and f".{scope}" in str(report)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("load", LOADS)
def test_cluster_scope_orders_a_cluster(store, load):
    module = between_ctas(release(store, "cluster"), acquire(load, "cluster"))
    report, data = run(module, cluster=2)
    assert report.ok, str(report)
    assert data[1] == 42
    report, _ = run(module, grid=2)
    assert "data race" in kinds(report)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("load", LOADS)
def test_cta_scope_orders_a_cta(store, load):
    """Scope .cta is enough between two warps of one CTA, but not between the CTAs of a cluster."""
    text = between_ctas(release(store, "cta"), acquire(load, "cta"))
    report, _ = run(text, cluster=2)
    assert "scope too narrow" in str(report)
    module = within_cta(release(store, "cta"), acquire(load, "cta"))
    report, data = run(module, grid=1, block=64)
    assert report.ok, str(report)
    assert data[1] == 42


def within_cta(write, read):
    load, _, fence = read.partition("|")
    load = load.replace("LOAD", "ld.relaxed.cta.global.u32")
    return kernel(
        f"""
    ld.param.u64 %rd1, [data];
    ld.param.u64 %rd2, [flag];
    mov.u32 %r1, %tid.x;
    and.b32 %r3, %r1, 31;
    setp.ne.u32 %p1, %r3, 0;
    @%p1 bra DONE;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra SPIN;
    mov.u32 %r2, 42;
    st.global.u32 [%rd1], %r2;
    {write}
    bra DONE;
SPIN:
    {load}
    setp.eq.u32 %p2, %r4, 0;
    @%p2 bra SPIN;
    {fence}
    ld.global.u32 %r5, [%rd1];
    st.global.u32 [%rd1+4], %r5;
DONE:
""",
        PARAMS,
    )


@pytest.mark.parametrize(
    "fence,fine", [("membar.cta", False), ("membar.gl", True), ("membar.sys", True)]
)
def test_membar_has_a_scope(fence, fine):
    volatile = "st.volatile.global.u32 [%rd2], %r2;"
    module = between_ctas(
        f"{fence};\n{volatile}", f"LOAD %r4, [%rd2];|{fence};", "ld.volatile.global.u32"
    )
    report, _ = run(module)
    assert report.ok == fine, str(report)
    module = within_cta(f"{fence};\n{volatile}", f"ld.volatile.global.u32 %r4, [%rd2];|{fence};")
    assert run(module, grid=1, block=64)[0].ok


def test_an_atomic_without_scope_reaches_the_gpu():
    module = between_ctas(
        "fence.acq_rel.gpu;\natom.global.add.u32 %r6, [%rd2], %r2;",
        "atom.global.or.b32 %r4, [%rd2], 0;|fence.acq_rel.gpu;",
    )
    assert run(module)[0].ok


def test_an_acquire_fence_releases_nothing_and_the_reverse():
    module = between_ctas(
        "fence.acquire.gpu;\nst.relaxed.gpu.global.u32 [%rd2], %r2;", acquire("acquire", "gpu")
    )
    assert kinds(run(module)[0]) == {"data race"}
    module = between_ctas(release("release", "gpu"), "LOAD %r4, [%rd2];|fence.release.gpu;")
    assert kinds(run(module)[0]) == {"data race"}


def test_a_narrow_fence_after_a_wide_one_keeps_what_the_wide_one_released():
    """A .gpu fence follows the data; a .cta fence for other data comes between it and the flag."""
    module = between_ctas(
        "fence.acq_rel.gpu;\nfence.acq_rel.cta;\nst.relaxed.gpu.global.u32 [%rd2], %r2;",
        "LOAD %r4, [%rd2];|fence.acq_rel.cta;\nfence.acq_rel.gpu;",
    )
    report, data = run(module)
    assert report.ok, str(report)
    assert data[1] == 42


COUNT = """
    ld.param.u64 %rd1, [data];
    {} [%rd1], 1;
"""


@pytest.mark.parametrize(
    "scope,grid,cluster,fine",
    [
        ("cta", 1, None, True),
        ("cta", 2, None, False),
        ("cta", 2, 2, False),
        ("cluster", 2, 2, True),
        ("cluster", 2, None, False),
        ("gpu", 2, None, True),
        ("sys", 2, None, True),
    ],
)
@pytest.mark.parametrize("op", ["red.relaxed.{}.global.add.u32", "atom.{}.global.add.u32 %r1,"])
def test_atomics_race_beyond_their_scope(op, scope, grid, cluster, fine):
    module = kernel(COUNT.format(op.format(scope)), PARAMS)
    report, _ = run(module, grid=grid, cluster=cluster, block=32)
    assert report.ok == fine, str(report)
    if not fine:
        assert kinds(report) == {"data race"}
        assert f"scope too narrow, .{scope} here and .{scope} there" in str(report)


def test_one_narrow_side_is_enough_for_a_race():
    module = kernel(
        """
    ld.param.u64 %rd1, [data];
    mov.u32 %r9, %ctaid.x;
    setp.eq.u32 %p1, %r9, 0;
    @%p1 st.relaxed.gpu.global.u32 [%rd1], 5;
    @!%p1 ld.relaxed.cta.global.u32 %r2, [%rd1];
""",
        PARAMS,
    )
    assert kinds(run(module)[0]) == {"data race"}


def test_the_report_survives_a_barrier():
    """One thread synchronizes for its CTA, another thread races: the report names the scopes."""
    module = kernel(
        """
    ld.param.u64 %rd1, [data];
    ld.param.u64 %rd2, [flag];
    mov.u32 %r1, %tid.x;
    mov.u32 %r9, %ctaid.x;
    setp.ne.u32 %p3, %r1, 0;
    setp.ne.u32 %p1, %r9, 0;
    @%p1 bra READ;
    @%p3 bra DONE;
    st.global.u32 [%rd1], 42;
    fence.acq_rel.cta;
    st.relaxed.gpu.global.u32 [%rd2], 1;
    bra DONE;
READ:
    @%p3 bra MEET;
SPIN:
    ld.acquire.gpu.global.u32 %r4, [%rd2];
    setp.eq.u32 %p2, %r4, 0;
    @%p2 bra SPIN;
MEET:
    bar.sync 0;
    setp.ne.u32 %p3, %r1, 40;
    @%p3 bra DONE;
    ld.global.u32 %r5, [%rd1];
    st.global.u32 [%rd1+4], %r5;
DONE:
""",
        PARAMS,
    )
    report, _ = run(module, block=64)
    assert kinds(report) == {"data race"}
    assert "releases at .cta and acquires at .gpu" in str(report)


# ---- barriers of a cluster ----------------------------------------------------------------------

# CTA 0 writes its own shared memory and signals CTA 1, which reads it remotely.
REMOTE = """
    .shared .align 8 .b8 word[8];
    .shared .align 8 .b8 bar[8];
    ld.param.u64 %rd1, [data];
    mov.u32 %r9, %cluster_ctarank;
    mov.u32 %r1, word;
    mov.u32 %r2, bar;
    mbarrier.init.shared.b64 [%r2], 1;
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire;
    setp.ne.u32 %p1, %r9, 0;
    @%p1 bra READ;
    st.shared.u32 [%r1], 42;
    ARRIVE
    bra END;
READ:
    WAIT
    mapa.shared::cluster.u32 %r5, %r1, 0;
    ld.shared::cluster.u32 %r6, [%r5];
    st.global.u32 [%rd1+4], %r6;
END:
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire;
"""


def remote(arrive, wait):
    text = REMOTE.replace("ARRIVE", f"mapa.shared::cluster.u32 %r7, %r2, 1;\n{arrive}")
    spin = f"SPIN:\n{wait.partition('|')[0]}\n@!%p2 bra SPIN;\n{wait.partition('|')[2]}"
    return kernel(text.replace("WAIT", spin), PARAMS)


ARRIVALS = {
    "default": ("mbarrier.arrive.shared::cluster.b64 _, [%r7];", True),
    "cluster": ("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r7];", True),
    "cta": ("mbarrier.arrive.release.cta.shared::cluster.b64 _, [%r7];", False),
    "relaxed after a fence": (
        "fence.acq_rel.cluster;\nmbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%r7];",
        True,
    ),
    "relaxed after a narrow fence": (
        "fence.acq_rel.cta;\nmbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%r7];",
        False,
    ),
    "relaxed without a fence": (
        "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%r7];",
        False,
    ),
}
WAITS = {
    "default": ("mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;", True),
    "cluster": ("mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r2], 0;", True),
    "cta": ("mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p2, [%r2], 0;", False),
    "relaxed before a fence": (
        "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 %p2, [%r2], 0;|"
        "fence.acq_rel.cluster;",
        True,
    ),
    "relaxed before a narrow fence": (
        "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 %p2, [%r2], 0;|"
        "fence.acq_rel.cta;",
        False,
    ),
}


@pytest.mark.parametrize("arrive", ARRIVALS)
@pytest.mark.parametrize("wait", WAITS)
def test_mbarriers_between_ctas(arrive, wait):
    (arrival, wide), (waiting, reaches) = ARRIVALS[arrive], WAITS[wait]
    report, data = run(remote(arrival, waiting), cluster=2)
    if wide and reaches:
        assert report.ok, str(report)
        assert data[1] == 42
    else:
        assert kinds(report) == {"data race"}, str(report)
        assert arrive == "relaxed without a fence" or "scope too narrow" in str(report)


@pytest.mark.parametrize("scope,fine", [("cta", False), ("cluster", True), ("gpu", True)])
def test_a_relaxed_cluster_barrier_passes_on_what_a_fence_did(scope, fine):
    module = kernel(
        f"""
    .shared .align 8 .b8 word[8];
    ld.param.u64 %rd1, [data];
    mov.u32 %r9, %cluster_ctarank;
    mov.u32 %r1, word;
    setp.ne.u32 %p1, %r9, 0;
    @!%p1 st.shared.u32 [%r1], 42;
    fence.acq_rel.{scope};
    barrier.cluster.arrive.relaxed;
    barrier.cluster.wait.acquire;
    @!%p1 bra END;
    mapa.shared::cluster.u32 %r5, %r1, 0;
    ld.shared::cluster.u32 %r6, [%r5];
    st.global.u32 [%rd1+4], %r6;
END:
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire;
""",
        PARAMS,
    )
    report, _ = run(module, cluster=2)
    assert report.ok == fine, str(report)
    assert fine or "scope too narrow" in str(report)


def test_within_a_cta_a_narrow_fence_is_enough_for_a_relaxed_cluster_barrier():
    module = kernel(
        """
    .shared .align 8 .b8 word[8];
    ld.param.u64 %rd1, [data];
    mov.u32 %r3, %tid.x;
    mov.u32 %r1, word;
    setp.ne.u32 %p1, %r3, 0;
    @!%p1 st.shared.u32 [%r1], 42;
    fence.acq_rel.cta;
    barrier.cluster.arrive.relaxed;
    barrier.cluster.wait.acquire;
    setp.ne.u32 %p1, %r3, 32;
    @%p1 bra END;
    ld.shared.u32 %r6, [%r1];
    mov.u32 %r9, %cluster_ctarank;
    setp.eq.u32 %p1, %r9, 0;
    @%p1 st.global.u32 [%rd1+4], %r6;
END:
""",
        PARAMS,
    )
    report, data = run(module, cluster=2, block=64)
    assert report.ok, str(report)
    assert data[1] == 42
