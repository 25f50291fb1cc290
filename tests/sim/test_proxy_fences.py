"""fence.proxy.*: each makes writes in one state space visible to one proxy, and to no other."""

import numpy as np
import pytest

from support.opcodes import kernel, kinds
from torchext import sim

# For each fence, the generic writes that it makes visible to the async proxy.
FENCES = {
    "fence.proxy.async": {"shared", "global"},
    "fence.proxy.async.shared::cta": {"shared"},
    "fence.proxy.async.shared::cluster": {"shared"},
    "fence.proxy.async.global": {"global"},
    "fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster": {"shared"},
    "fence.proxy.alias": set(),
    "fence.proxy.tensormap::generic.release.gpu": set(),
    "fence.acq_rel.gpu": set(),
    "fence.sc.sys": set(),
    "membar.sys": set(),
}
OUT = ".param .u64 out, .param .u64 source, .param .u64 flag"


def run(body, grid=1, cluster=None, block=64, **options):
    out, source, flag = np.zeros(256, np.uint32), np.zeros(256, np.uint32), np.zeros(1, np.uint32)
    report = kernel(body, OUT).launch(
        "kernel", grid=grid, block=block, args=[out, source, flag], cluster=cluster, **options
    )
    return report, out


def fenced(report, fine):
    assert report.ok == fine, str(report)
    if not fine:
        assert kinds(report) == {"missing proxy fence"}, str(report)


SETUP = """
    .shared .align 128 .b8 tile[1024];
    .shared .align 8 .b8 bar[8];
    ld.param.u64 %rd1, [out];
    ld.param.u64 %rd2, [source];
    ld.param.u64 %rd3, [flag];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, tile;
    mov.u32 %r3, bar;
    mov.u32 %r9, %ctaid.x;
    setp.ne.u32 %p1, %r1, 0;
    mad.lo.u32 %r4, %r1, 4, %r2;
    mad.wide.u32 %rd4, %r1, 4, %rd2;
    @!%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
    @!%p1 fence.mbarrier_init.release.cluster;
"""
STORE = """
    @%p1 bra END;
    cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 256;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
END:
"""
LOAD = """
    @%p1 bra END;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd2], 256, [%r3];
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0;
    @!%p2 bra WAIT;
END:
"""


@pytest.mark.parametrize("fence", FENCES)
def test_bulk_store_of_shared_memory(fence):
    report, out = run(SETUP + f"st.shared.u32 [%r4], %r1;\n{fence};\nbar.sync 0;" + STORE)
    fenced(report, "shared" in FENCES[fence])
    np.testing.assert_array_equal(out[:64], np.arange(64))


@pytest.mark.parametrize("fence", FENCES)
def test_bulk_load_of_global_memory(fence):
    report, _ = run(SETUP + f"st.global.u32 [%rd4], %r1;\n{fence};\nbar.sync 0;" + LOAD)
    fenced(report, "global" in FENCES[fence])


def test_the_finding_names_the_fence_that_is_there():
    report, _ = run(
        SETUP + "st.shared.u32 [%r4], %r1;\nfence.proxy.async.global;\nbar.sync 0;" + STORE
    )
    assert (
        "there is fence.proxy.async.global, but shared memory needs fence.proxy.async or "
        "fence.proxy.async.shared::cta" in str(report)
    )
    report, _ = run(
        SETUP + "st.global.u32 [%rd4], %r1;\nfence.proxy.async.shared::cta;\nbar.sync 0;" + LOAD
    )
    assert "but global memory needs fence.proxy.async or fence.proxy.async.global" in str(report)
    report, _ = run(SETUP + "st.shared.u32 [%r4], %r1;\nbar.sync 0;" + STORE)
    assert "there is" not in report.findings[0].message


@pytest.mark.parametrize(
    "name,code,fine",
    [
        ("before the write", "F;\nst.shared.u32 [%r4], %r1;\nbar.sync 0;", False),
        ("by the issuing thread alone", "st.shared.u32 [%r4], %r1;\n@!%p1 F;\nbar.sync 0;", False),
        ("by another thread", "st.shared.u32 [%r4], %r1;\n@%p1 F;\nbar.sync 0;", False),
        ("after the barrier", "st.shared.u32 [%r4], %r1;\nbar.sync 0;\n@!%p1 F;", True),
        (
            "between two barriers, by one thread",
            "st.shared.u32 [%r4], %r1;\nbar.sync 0;\nsetp.eq.u32 %p3, %r1, 40;\n@%p3 F;\n"
            "bar.sync 0;",
            True,
        ),
        (
            "two kinds, of which one is right",
            "st.shared.u32 [%r4], %r1;\nfence.proxy.async.global;\nF;\nbar.sync 0;",
            True,
        ),
        (
            "right before a second write",
            "st.shared.u32 [%r4], %r1;\nF;\nst.shared.u32 [%r4], %r1;\nbar.sync 0;",
            False,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and ";" not in value else "",
)
def test_who_fences_and_when(name, code, fine):
    report, _ = run(SETUP + code.replace("F;", "fence.proxy.async.shared::cta;") + STORE)
    fenced(report, fine)


@pytest.mark.parametrize("fence", FENCES)
def test_cp_async_writes_through_the_generic_proxy(fence):
    code = """
    cp.async.ca.shared.global [%r4], [%rd4], 4;
    cp.async.wait_all;
    """
    report, _ = run(SETUP + code + f"{fence};\nbar.sync 0;" + STORE)
    fenced(report, "shared" in FENCES[fence])


@pytest.mark.parametrize("fence", FENCES)
def test_atomics_write_through_the_generic_proxy(fence):
    code = "st.shared.u32 [%r4], 0;\natom.shared.add.u32 %r5, [%r4], 7;\n"
    report, _ = run(SETUP + code + f"{fence};\nbar.sync 0;" + STORE)
    fenced(report, "shared" in FENCES[fence])


@pytest.mark.parametrize("fence", FENCES)
def test_tensor_load_of_what_the_kernel_has_written(fence):
    x = np.zeros((16, 16), np.float32)
    body = """
    .shared .align 128 .b8 tile[1024];
    .shared .align 8 .b8 bar[8];
    mov.u64 %rd1, map;
    cvta.param.u64 %rd1, %rd1;
    ld.param.u64 %rd2, [x];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, tile;
    mov.u32 %r3, bar;
    setp.ne.u32 %p1, %r1, 0;
    mad.wide.u32 %rd4, %r1, 4, %rd2;
    @!%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
    @!%p1 fence.mbarrier_init.release.cluster;
    st.global.u32 [%rd4], %r1;
    FENCE;
    bar.sync 0;
    @%p1 bra END;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 512;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r2], [%rd1, {0, 0}], [%r3];
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0;
    @!%p2 bra WAIT;
END:
""".replace("FENCE", fence)
    module = kernel(body, ".param .align 64 .b8 map[128], .param .u64 x")
    report = module.launch("kernel", grid=1, block=64, args=[sim.tensor_map(x, box=(8, 16)), x])
    fenced(report, "global" in FENCES[fence])


# CTA 0 writes to the shared memory of CTA 1, which stores it by a bulk copy.
REMOTE = (
    SETUP
    + """
    setp.ne.u32 %p3, %r9, 0;
    st.shared.u32 [%r4], %r1;
    fence.proxy.async.shared::cta;
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire;
    @%p3 bra MET;
    mapa.shared::cluster.u32 %r5, %r4, 1;
    st.shared::cluster.u32 [%r5], %r1;
    FENCE;
MET:
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire;
    @!%p3 bra END;
"""
    + STORE
)


@pytest.mark.parametrize(
    "fence,fine",
    [
        ("fence.proxy.async", True),
        ("fence.proxy.async.shared::cluster", True),
        ("fence.proxy.async.shared::cta", False),
        ("fence.proxy.async.global", False),
    ],
)
def test_another_ctas_shared_memory(fence, fine):
    report, _ = run(REMOTE.replace("FENCE", fence), grid=2, cluster=2)
    fenced(report, fine)
    if not fine:
        assert "shared memory of another CTA needs" in str(report)


# CTA 0 writes global memory and raises a flag; CTA 1 loads the data by a bulk copy.
BETWEEN = (
    SETUP
    + """
    setp.ne.u32 %p3, %r9, 0;
    @%p3 bra READ;
    st.global.u32 [%rd4], %r1;
    WRITER
    bar.sync 0;
    @%p1 bra END;
    fence.acq_rel.gpu;
    st.relaxed.gpu.global.u32 [%rd3], 1;
    bra END;
READ:
    @%p1 bra END;
SPIN:
    ld.acquire.gpu.global.u32 %r5, [%rd3];
    setp.eq.u32 %p2, %r5, 0;
    @%p2 bra SPIN;
    READER
"""
    + LOAD
)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    "writer,reader,fine",
    [
        ("", "", False),
        ("fence.proxy.async;", "", True),
        ("fence.proxy.async.global;", "", True),
        ("", "fence.proxy.async.global;", True),
        ("fence.proxy.async.shared::cta;", "fence.proxy.async.shared::cta;", False),
        ("fence.proxy.alias;", "", False),
    ],
)
def test_between_ctas(writer, reader, fine, num_threads):
    body = BETWEEN.replace("WRITER", writer).replace("READER", reader)
    report, _ = run(body, grid=2, num_threads=num_threads)
    fenced(report, fine)


@pytest.mark.parametrize(
    "fence,fine",
    [
        ("fence.proxy.async", True),
        ("fence.proxy.async.shared::cta", True),
        ("fence.mbarrier_init.release.cluster", True),
        ("fence.proxy.async.global", False),
        ("fence.proxy.alias", False),
        ("fence.proxy.tensormap::generic.release.gpu", False),
    ],
)
def test_initialized_mbarriers(fence, fine):
    body = SETUP.replace("fence.mbarrier_init.release.cluster", fence) + "bar.sync 0;" + LOAD
    report, _ = run(body)
    assert report.ok == fine, str(report)
    if not fine:
        assert kinds(report) == {"missing mbarrier fence"}


@pytest.mark.parametrize("mode", ["late", "eager", "random"])
def test_in_every_mode(mode):
    body = SETUP + "st.shared.u32 [%r4], %r1;\nfence.proxy.async.global;\nbar.sync 0;" + STORE
    for seed in range(3):
        fenced(run(body, completion=mode, seed=seed)[0], False)
