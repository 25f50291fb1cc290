"""Tensor maps in memory that the kernel writes: their fences, races and use in flight."""

import re
from pathlib import Path

import numpy as np
import pytest

from support.opcodes import kernel, kinds
from torchext import sim

README = (Path(__file__).parents[2] / "ptx" / "sim" / "README.md").read_text()

# As in grouped GEMMs: a warp copies a map from its parameters to shared memory, one lane changes
# this copy, and the warp copies it to global memory. Then lane 0 loads a box with it.
PARAMS = (
    ".param .align 64 .b8 base[128], .param .u64 scratch, .param .u64 other, .param .u64 out, "
    ".param .u64 flag"
)
START = """
    .shared .align 128 .b8 map[128];
    .shared .align 128 .b8 tile[2048];
    .shared .align 8 .b8 bar[32];
    ld.param.u64 %rd2, [scratch];
    ld.param.u64 %rd3, [other];
    ld.param.u64 %rd9, [out];
    ld.param.u64 %rd10, [flag];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, map;
    mov.u32 %r3, tile;
    mov.u32 %r4, bar;
    mov.u32 %r9, %ctaid.x;
    setp.ne.u32 %p1, %r1, 0;
    setp.ge.u32 %p4, %r1, 32;
    cvt.u64.u32 %rd4, %r2;
    shl.b32 %r5, %r1, 2;
    add.u32 %r6, %r2, %r5;
    mov.u64 %rd5, base;
    cvt.u64.u32 %rd6, %r5;
    add.u64 %rd5, %rd5, %rd6;
    add.u64 %rd8, %rd2, %rd6;
    @!%p1 mbarrier.init.shared::cta.b64 [%r4], 1;
    @!%p1 mbarrier.init.shared::cta.b64 [%r4+8], 1;
    @!%p1 mbarrier.init.shared::cta.b64 [%r4+16], 1;
    @!%p1 fence.mbarrier_init.release.cluster;
    bar.sync 0;
"""
TO_SHARED = """
    @%p4 bra COPIED;
    ld.param.u32 %r7, [%rd5];
    st.shared.u32 [%r6], %r7;
    bar.warp.sync -1;
    @!%p1 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%rd4], %rd3;
    bar.warp.sync -1;
COPIED:
"""
CP_FENCE = """
    @%p4 bra FENCED;
    tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned
        [%rd2], [%rd4], 128;
FENCED:
"""
# The same with generic stores: each lane stores one word of the map.
STORES = """
    @%p4 bra STORED;
    ld.shared.u32 %r7, [%r6];
    st.global.u32 [%rd8], %r7;
STORED:
"""
ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128;\n"
RELEASE = "fence.proxy.tensormap::generic.release.gpu;\n"

AGAIN = TO_SHARED.replace("COPIED", "COPIED2") + CP_FENCE.replace("FENCED", "FENCED2") + ACQUIRE


def load(map_address="%rd2", barrier=0, coordinates="0, 0"):
    return f"""
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4+{8 * barrier}], 512;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r3+{512 * barrier}], [{map_address}, {{{coordinates}}}], [%r4+{8 * barrier}];
"""


def wait(barrier=0, label="W"):
    return f"""
{label}:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r4+{8 * barrier}], 0;
    @!%p2 bra {label};
"""


USE = "@%p1 bra USED;\n" + load() + wait() + "USED:\nbar.sync 0;\n"
READ = """
    @%p4 bra READ;
    add.u32 %r8, %r3, %r5;
    ld.shared.u32 %r7, [%r8];
    add.u64 %rd11, %rd9, %rd6;
    st.global.u32 [%rd11], %r7;
READ:
"""


def run(body, block=32, grid=1, cluster=None, scratch=None, **options):
    base = np.zeros((16, 16), np.uint32)
    other = np.arange(256, dtype=np.uint32).reshape(16, 16) + 1
    scratch = sim.output(np.zeros(64, np.uint64)) if scratch is None else scratch
    out, flag = np.zeros(32, np.uint32), np.zeros(1, np.uint32)
    report = kernel(START + body, PARAMS).launch(
        "kernel",
        grid=grid,
        block=block,
        args=[sim.tensor_map(base, box=(8, 16)), scratch, other, out, flag],
        cluster=cluster,
        **options,
    )
    return report, out


def check(report, kind=None, text=""):
    errors = {f.kind for f in report.findings if f.grade == "error"}
    assert errors == ({kind} if kind else set()), str(report)
    assert text in str(report), str(report)


MODES = pytest.mark.parametrize("mode", ["late", "eager", "random"])


@MODES
def test_cutlass_sequence(mode):
    report, out = run(TO_SHARED + CP_FENCE + ACQUIRE + USE + READ, completion=mode)
    check(report)
    np.testing.assert_array_equal(out, np.arange(32) + 1)


@MODES
def test_generic_stores_with_both_fences(mode):
    body = TO_SHARED + STORES + RELEASE + "bar.warp.sync -1;\n" + ACQUIRE + USE + READ
    report, out = run(body, completion=mode)
    check(report)
    np.testing.assert_array_equal(out, np.arange(32) + 1)


# Faults planted in that kernel: what is wrong, the body, and what the report says.
MISSING = "missing tensormap fence"
FAULTS = {
    "no acquire": (TO_SHARED + CP_FENCE + USE, "no fence.proxy.tensormap::generic.acquire"),
    "no release": (
        TO_SHARED + STORES + "bar.warp.sync -1;\n" + ACQUIRE + USE,
        "finds no fence.proxy.tensormap::generic.release",
    ),
    "neither": (TO_SHARED + STORES + "bar.warp.sync -1;\n" + USE, "no fence.proxy.tensormap"),
    "release before the write": (
        TO_SHARED + RELEASE + STORES + "bar.warp.sync -1;\n" + ACQUIRE + USE,
        "finds no fence.proxy.tensormap::generic.release",
    ),
    "release by one lane of those that wrote": (
        TO_SHARED + STORES + "@!%p1 " + RELEASE + "bar.warp.sync -1;\n" + ACQUIRE + USE,
        "finds no fence.proxy.tensormap::generic.release",
    ),
    "acquire before the release": (
        TO_SHARED + STORES + ACQUIRE + RELEASE + "bar.warp.sync -1;\n" + USE,
        "finds no fence.proxy.tensormap::generic.release",
    ),
    "acquire of another address": (
        TO_SHARED + CP_FENCE + ACQUIRE.replace("%rd2", "%rd2+128") + USE,
        "no fence.proxy.tensormap::generic.acquire",
    ),
    "fence.proxy.async instead": (
        TO_SHARED + STORES + "fence.proxy.async;\nbar.warp.sync -1;\nfence.proxy.async;\n" + USE,
        "no fence.proxy.tensormap",
    ),
    "acquire by a thread that the user does not know of": (
        TO_SHARED + CP_FENCE + "setp.eq.u32 %p5, %r1, 40;\n@%p5 " + ACQUIRE + USE,
        "no fence.proxy.tensormap::generic.acquire",
    ),
    "map made by another warp, no barrier": (
        TO_SHARED + CP_FENCE + "setp.ne.u32 %p1, %r1, 32;\n" + ACQUIRE + USE,
        "data race|tensor map in flight|uninitialized memory",
    ),
    "map that nobody made": (USE, "uninitialized memory"),
    "half a map": (
        TO_SHARED
        + STORES.replace("@%p4", "setp.ge.u32 %p4, %r1, 16;\n@%p4")
        + RELEASE
        + "bar.warp.sync -1;\n"
        + ACQUIRE
        + USE,
        "uninitialized memory",
    ),
    "map changed while a load is under way": (
        TO_SHARED
        + CP_FENCE
        + ACQUIRE
        + "@%p1 bra STARTED;\n"
        + load()
        + "STARTED:\nbar.warp.sync -1;\n"
        + AGAIN
        + "@%p1 bra USED;\n"
        + wait()
        + "USED:\n",
        "tensor map in flight",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_caught_in_every_run(name):
    body, text = FAULTS[name]
    (row,) = re.findall(rf"^\| {re.escape(name)} \| (.+) \|$", README, re.MULTILINE)
    for mode in ("late", "eager", "random"):
        for seed in range(3):
            report, _ = run(body, completion=mode, seed=seed, block=64)
            assert set(row.split(", ")) & kinds(report), str(report)
            assert re.search(text, str(report)), str(report)


def test_one_thread_may_acquire_for_its_cta():
    body = TO_SHARED + CP_FENCE + "bar.sync 0;\nsetp.eq.u32 %p5, %r1, 40;\n@%p5 " + ACQUIRE
    check(run(body + "bar.sync 0;\n" + USE, block=64)[0])


def test_another_warp_may_make_the_map():
    body = TO_SHARED + CP_FENCE + "bar.sync 0;\nsetp.ne.u32 %p1, %r1, 32;\n" + ACQUIRE + USE
    check(run(body, block=64)[0])
    body = TO_SHARED + STORES + RELEASE + "bar.sync 0;\nsetp.ne.u32 %p1, %r1, 32;\n" + ACQUIRE
    check(run(body + USE, block=64)[0])


# ---- scopes -------------------------------------------------------------------------------------

# CTA 0 makes the map, CTA 1 uses it.
BETWEEN = (
    "setp.ne.u32 %p5, %r9, 0;\n@%p5 bra TAKE;\n"
    + TO_SHARED
    + CP_FENCE
    + """
    @%p1 bra USED;
    fence.acq_rel.gpu;
    st.relaxed.gpu.global.u32 [%rd10], 1;
    bra USED;
TAKE:
    @%p1 bra USED;
SPIN:
    ld.acquire.gpu.global.u32 %r7, [%rd10];
    setp.eq.u32 %p2, %r7, 0;
    @%p2 bra SPIN;
"""
    + ACQUIRE
    + load()
    + wait()
    + "USED:\n"
)


@pytest.mark.parametrize(
    "release,acquire,cluster,fine",
    [
        ("gpu", "gpu", None, True),
        ("sys", "sys", None, True),
        ("cta", "gpu", None, False),
        ("gpu", "cta", None, False),
        ("cluster", "cluster", None, False),
        ("cluster", "cluster", 2, True),
        ("cta", "cta", 2, False),
    ],
)
def test_scopes_between_ctas(release, acquire, cluster, fine):
    body = BETWEEN.replace("release.gpu.sync", f"release.{release}.sync")
    body = body.replace("acquire.gpu [", f"acquire.{acquire} [")
    report, _ = run(body, grid=2, cluster=cluster)
    check(report, None if fine else MISSING, "" if fine else "scope too narrow")


def test_cta_scope_within_a_cta():
    body = TO_SHARED + CP_FENCE.replace("release.gpu", "release.cta")
    body += "bar.sync 0;\nsetp.ne.u32 %p1, %r1, 32;\n" + ACQUIRE.replace("gpu", "cta") + USE
    check(run(body, block=64)[0])


# ---- in flight ----------------------------------------------------------------------------------


@MODES
def test_changed_after_the_load_was_waited_for(mode):
    body = TO_SHARED + CP_FENCE + ACQUIRE + USE + AGAIN
    body += "@%p1 bra USED2;\n" + load(barrier=1) + wait(1, "W2") + "USED2:\n"
    check(run(body, completion=mode)[0])


@MODES
def test_cutlass_waits_for_the_last_load_alone(mode):
    """The simulator lets one thread's copies finish in order: the barrier of the last is enough."""
    body = TO_SHARED + CP_FENCE + ACQUIRE + "@%p1 bra STARTED;\n" + load() + load(barrier=1)
    body += wait(1) + "STARTED:\nbar.warp.sync -1;\n" + AGAIN
    body += "@%p1 bra USED;\n" + wait(0, "W2") + "USED:\n"
    check(run(body, completion=mode)[0])


@MODES
def test_deep_gemm_waits_for_a_bulk_group(mode):
    group = "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;\n"
    body = TO_SHARED + CP_FENCE + ACQUIRE + "@%p1 bra STARTED;\n" + load() + group
    body += "STARTED:\nbar.warp.sync -1;\n" + AGAIN + "@%p1 bra USED;\n" + wait() + "USED:\n"
    check(run(body, completion=mode)[0])


@MODES
@pytest.mark.parametrize("waited", [True, False])
def test_stores_read_their_map_until_their_group_is_waited_for(mode, waited):
    store = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {0, 0}], [%r3];\n"
    group = "cp.async.bulk.commit_group;\n"
    wait_group = "cp.async.bulk.wait_group.read 0;\n"
    fill = "".join(f"st.shared.u32 [%r8+{128 * k}], %r1;\n" for k in range(4))
    body = "add.u32 %r8, %r3, %r5;\n" + fill + "fence.proxy.async;\n"
    body += TO_SHARED + CP_FENCE + ACQUIRE + "@%p1 bra STARTED;\n" + store + group
    body += (wait_group if waited else "") + "STARTED:\nbar.warp.sync -1;\n" + AGAIN
    body += "@!%p1 " + wait_group
    check(run(body, completion=mode)[0], None if waited else "tensor map in flight")


# ---- where a map may lie ------------------------------------------------------------------------


def test_a_parameter_needs_no_fence():
    body = "mov.u64 %rd2, base;\ncvta.param.u64 %rd2, %rd2;\n" + USE
    check(run(body)[0])


def test_the_address_of_a_parameter_is_not_generic_before_cvta():
    # An H200 faults on both (2026-11-26).
    report, _ = run("mov.u64 %rd2, base;\n" + USE)
    assert "given by its address in the .param space" in str(report)
    report, _ = run("mov.u64 %rd2, base;\nld.u32 %r7, [%rd2];\n")
    assert "generic read of a kernel parameter" in str(report)
    report, _ = run("mov.u64 %rd2, base;\nprefetch.tensormap [%rd2];\n")
    assert "given by its address in the .param space" in str(report)


def test_not_in_shared_memory():
    body = TO_SHARED + "cvta.shared.u64 %rd2, %rd4;\n" + USE
    report, _ = run(body)
    assert "tensor map" in kinds(report), str(report)
    assert "in shared or local memory" in str(report)


def test_misaligned():
    body = "mov.u64 %rd2, base;\ncvta.param.u64 %rd2, %rd2;\nadd.u64 %rd2, %rd2, 32;\n" + USE
    report, _ = run(body)
    assert "not aligned to 64 bytes" in str(report)


def test_prefetch():
    fine = (
        "mov.u64 %rd2, base;\nprefetch.param.tensormap [%rd2];\ncvta.param.u64 %rd2, %rd2;\n"
        "prefetch.tensormap [%rd2];\n"
    )
    check(run(fine + USE)[0])
    report, _ = run("mov.u64 %rd2, 4096;\nprefetch.tensormap [%rd2];\n")
    assert kinds(report) == {"out of bounds"}
    box = "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd2, {0, 0}];\n"
    check(run(TO_SHARED + CP_FENCE + "@!%p1 " + box)[0], MISSING)
    check(run(TO_SHARED + CP_FENCE + ACQUIRE + "@!%p1 " + box + USE)[0])


@pytest.mark.parametrize(
    "text,message",
    [
        (
            "fence.proxy.tensormap::generic.acquire.gpu [%rd1], 64;",
            r"operand 2 must be 128 \(got 64\)",
        ),
        (
            "fence.proxy.tensormap::generic.acquire [%rd1], 128;",
            "must include .cta, .cluster, .gpu or .sys",
        ),
        ("fence.proxy.tensormap::generic.release;", "must include .cta, .cluster, .gpu or .sys"),
    ],
)
def test_forms_that_there_are_not(text, message):
    with pytest.raises(ValueError, match=message):
        kernel(text).check("kernel")
