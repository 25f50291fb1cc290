"""ld.global.nc and ldu read memory that must not change while the kernel runs."""

import numpy as np
import pytest

from support.opcodes import kernel, kinds

SETUP = """
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd2, [y];
    mov.u32 %r1, %tid.x;
    mov.u32 %r9, %ctaid.x;
    mad.wide.u32 %rd3, %r1, 16, %rd1;
    mad.wide.u32 %rd4, %r1, 16, %rd2;
    xor.b32 %r2, %r1, 33;
    mad.wide.u32 %rd5, %r2, 16, %rd1;
    setp.ne.u32 %p1, %r1, 0;
    mov.u32 %r3, 7;
"""
LOADS = {
    "ld.global.nc": "ld.global.nc.u32 %r4, [ADDRESS];",
    "L1::no_allocate": "ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%r4, %r5, %r6, %r7}, "
    "[ADDRESS];",
    "v2": "ld.global.nc.v2.f32 {%f4, %f5}, [ADDRESS];",
    "byte": "ld.global.nc.u8 %r4, [ADDRESS];",
    "ldu": "ldu.global.u32 %r4, [ADDRESS];",
}
BARRIER = "bar.sync 0;\n"
WRITES = {
    "st": "st.global.u32 [%rd3], %r3;\n",
    "st.v4": "st.global.v4.u32 [%rd3], {%r3, %r3, %r3, %r3};\n",
    "st.b8": "st.global.b8 [%rd3], %r3;\n",
    "st.release": "st.release.gpu.global.u32 [%rd3], %r3;\n",
    "red": "red.global.add.u32 [%rd3], %r3;\n",
    "atom": "atom.global.exch.b32 %r8, [%rd3], %r3;\n",
    "bulk": """
    .shared .align 128 .b8 tile[1024];
    mov.u32 %r10, tile;
    mad.lo.u32 %r11, %r1, 16, %r10;
    st.shared.v4.u32 [%r11], {%r3, %r3, %r3, %r3};
    fence.proxy.async;
    bar.sync 0;
    @%p1 bra STORED;
    cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r10], 1024;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
STORED:
""",
}


def load(name, address):
    return LOADS[name].replace("ADDRESS", address) + "\n"


def run(body, grid=1, block=64, **options):
    x, y = np.zeros(1024, np.uint32), np.zeros(1024, np.uint32)
    params = ".param .u64 x, .param .u64 y"
    return kernel(SETUP + body, params).launch(
        "kernel", grid=grid, block=block, args=[x, y], **options
    )


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("write", WRITES)
def test_of_what_the_launch_has_written(name, write):
    """Another thread wrote, with all synchronization that an ordinary load needs."""
    report = run(WRITES[write] + BARRIER + load(name, "%rd5"))
    assert kinds(report) == {"non-coherent load"}, str(report)
    assert not report.ok
    ordinary = load("ld.global.nc", "%rd5").replace(".nc", "")
    assert run(WRITES[write] + BARRIER + ordinary).ok


@pytest.mark.parametrize("name", LOADS)
def test_of_what_the_thread_itself_has_written(name):
    assert kinds(run(WRITES["st"] + load(name, "%rd3"))) == {"non-coherent load"}


@pytest.mark.parametrize("name", LOADS)
def test_of_what_nobody_writes(name):
    report = run(load(name, "%rd5") + "st.global.u32 [%rd4], %r3;\n" + BARRIER + load(name, "%rd3"))
    assert not report.findings, str(report)


def test_of_the_neighbors_of_what_is_written():
    report = run("st.global.u32 [%rd3+4], %r3;\n" + BARRIER + load("ld.global.nc", "%rd5"))
    assert not report.findings, str(report)
    report = run("st.global.b8 [%rd3+1], %r3;\n" + BARRIER + load("byte", "%rd5"))
    assert not report.findings, str(report)


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("write", WRITES)
def test_overwritten_once_every_load_is_done(name, write):
    """A breach of the letter of PTX only, hence a note: no thread can have read a stale value."""
    report = run(load(name, "%rd5") + BARRIER + WRITES[write])
    assert kinds(report) == {"overwritten after a non-coherent load"}, str(report)
    assert report.ok


def test_read_again_after_it_was_overwritten():
    body = load("ld.global.nc", "%rd3") + WRITES["st"] + BARRIER + load("ld.global.nc", "%rd5")
    report = run(body)
    assert "non-coherent load" in kinds(report) and not report.ok


def test_an_ordinary_load_between_hides_nothing():
    body = load("ld.global.nc", "%rd5") + BARRIER + "ld.global.u32 %r4, [%rd5];\n"
    report = run(body + BARRIER + WRITES["st"])
    assert kinds(report) == {"overwritten after a non-coherent load"}, str(report)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_threads", [1, 2])
def test_written_with_no_order_by_another_cta(seed, num_threads):
    body = "setp.eq.u32 %p2, %r9, 0;\n@%p2 st.global.u32 [%rd3], %r3;\n@!%p2 "
    report = run(body + load("ld.global.nc", "%rd3"), grid=2, seed=seed, num_threads=num_threads)
    assert "non-coherent load" in kinds(report), str(report)
    assert not report.ok


@pytest.mark.parametrize("mode", ["late", "eager", "random"])
def test_in_every_mode(mode):
    report = run(WRITES["bulk"] + BARRIER + load("ld.global.nc", "%rd5"), completion=mode)
    assert kinds(report) == {"non-coherent load"}


def test_the_report_says_what_to_do():
    text = str(run(WRITES["st"] + BARRIER + load("ld.global.nc", "%rd5")))
    assert "non-coherent load of bytes that this launch has written" in text
    assert "const __restrict__" in text
