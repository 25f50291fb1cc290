"""Tensor copies: cp.async.bulk.tensor, with swizzle, reduction and multicast."""

import numpy as np
import pytest

from support.opcodes import kernel, kinds
from torchext import sim

COMPLETIONS = ["late", "eager", "random"]

TENSOR = """
    .shared .align 1024 .b8 tile[16384];
    .shared .align 8 .b8 bar[8];
    mov.u64 %rd1, map;
    cvta.param.u64 %rd1, %rd1;
    ld.param.u64 %rd2, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, tile;
    mov.u32 %r4, bar;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra READY;
    prefetch.tensormap [%rd1];
    mbarrier.init.shared::cta.b64 [%r4], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], {bytes};
    {copy}
READY:
    bar.sync 0;
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r4], 0;
    @!%p2 bra WAIT;
    mov.u32 %r3, %r1;
LOOP:
    setp.ge.u32 %p3, %r3, {words};
    @%p3 bra END;
    mad.lo.u32 %r5, %r3, 4, %r2;
    ld.shared.u32 %r6, [%r5];
    mad.wide.u32 %rd3, %r3, 4, %rd2;
    st.global.u32 [%rd3], %r6;
    add.u32 %r3, %r3, 64;
    bra LOOP;
END:
"""
MAP = ".param .align 64 .b8 map[128], .param .u64 out"


def load_box(array, box, coordinates, swizzle=0, completion="late", **options):
    """Loads a box by TMA; returns its bytes in shared memory. `coordinates`: innermost first."""
    rank = array.ndim
    words = int(np.prod(box)) * array.itemsize // 4
    listed = ", ".join(str(c) for c in coordinates)
    copy = (
        f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        f" [%r2], [%rd1, {{{listed}}}], [%r4];"
    )
    out = np.zeros(words, np.uint32)
    module = kernel(TENSOR.format(copy=copy, bytes=4 * words, words=words), MAP)
    tensor_map = sim.tensor_map(array, box=box, swizzle=swizzle, **options)
    report = module.launch("kernel", grid=1, block=64, args=[tensor_map, sim.output(out)],
                           completion=completion)  # fmt: skip
    assert report.ok, str(report)
    return out.view(array.dtype).reshape(box)


def slice_box(array, box, coordinates):
    out = np.zeros(box, array.dtype)
    for index in np.ndindex(*box):
        at = tuple(i + c for i, c in zip(index, reversed(coordinates), strict=True))
        if all(0 <= a < n for a, n in zip(at, array.shape, strict=True)):
            out[index] = array[at]
    return out


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("shape,box,coordinates", [
    ((64,), (16,), (8,)),
    ((20, 32), (8, 16), (4, 3)),
    ((20, 32), (8, 16), (-4, -2)),
    ((20, 32), (8, 16), (28, 17)),
    ((6, 10, 16), (3, 4, 8), (4, 8, -1)),
    ((4, 3, 5, 8), (2, 2, 3, 4), (-4, 3, 2, 3)),
    ((3, 2, 3, 4, 8), (2, 2, 2, 2, 4), (4, 3, 2, -1, 2)),
])  # fmt: skip
def test_tensor_load(shape, box, coordinates, completion):
    array = np.arange(1, 1 + np.prod(shape), dtype=np.int32).reshape(shape)
    got = load_box(array, box, coordinates, completion=completion)
    np.testing.assert_array_equal(got, slice_box(array, box, coordinates))


@pytest.mark.parametrize("span", [32, 64, 128])
def test_tensor_load_swizzled(span):
    array = np.arange(64 * 128, dtype=np.uint8).reshape(64, 128)
    got = load_box(array, (16, span), (0, 5), swizzle=span).reshape(-1)
    want = np.zeros_like(got)
    for row in range(16):
        for column in range(span):
            at = row * span + column
            at ^= (at >> 7 & (span // 16 - 1)) << 4
            want[at] = array[5 + row, column]
    np.testing.assert_array_equal(got, want)


STORE = """
    .shared .align 1024 .b8 tile[1024];
    mov.u64 %rd1, map;
    cvta.param.u64 %rd1, %rd1;
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, tile;
    mad.lo.u32 %r3, %r1, 4, %r2;
    st.shared.u32 [%r3], %r1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra END;
    {copy}
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
END:
"""


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("x,y", [(0, 0), (24, 17), (-4, -2)])
def test_tensor_store_and_reduce(x, y, completion):
    # 8 rows of 16 words, of which only 128 threads' words are written
    array = np.full((20, 32), 7, np.int32)
    tile = np.arange(128, dtype=np.int32).reshape(8, 16)
    where = np.zeros_like(array, bool)
    want = array.copy()
    for r in range(8):
        for c in range(16):
            if 0 <= y + r < 20 and 0 <= x + c < 32:
                want[y + r, x + c] = tile[r, c]
                where[y + r, x + c] = True
    store = f"cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {{{x}, {y}}}], [%r2];"
    for copy, expected in (
        (store, want),
        (store.replace("cp.async.bulk.tensor.2d.global.shared::cta",
                       "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile"),
         np.where(where, 7 + want, 7)),
        (store.replace("cp.async.bulk.tensor.2d.global.shared::cta",
                       "cp.reduce.async.bulk.tensor.2d.global.shared::cta.max.tile"),
         np.where(where, np.maximum(7, want), 7)),
    ):  # fmt: skip
        out = array.copy()
        module = kernel(STORE.format(copy=copy), ".param .align 64 .b8 map[128]")
        args = [sim.tensor_map(out, box=(8, 16))]
        report = module.launch("kernel", grid=1, block=128, args=args, completion=completion)
        assert report.ok, str(report)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("x", [-3, 1, 2, 30])
@pytest.mark.parametrize("load", [True, False])
def test_boxes_begin_at_multiples_of_16_bytes(load, x):
    """An H200 reports an illegal instruction for others."""
    array = np.zeros((20, 32), np.int32)
    if load:
        with pytest.raises(AssertionError, match=f"innermost coordinate is {x}"):
            load_box(array, (8, 16), (x, 0))
        return
    copy = f"cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {{{x}, 0}}], [%r2];"
    module = kernel(STORE.format(copy=copy), ".param .align 64 .b8 map[128]")
    args = [sim.tensor_map(array, box=(8, 16))]
    report = module.launch("kernel", grid=1, block=128, args=args)
    assert [finding.kind for finding in report.findings] == ["misaligned access"], str(report)
    assert not array.any()


@pytest.mark.parametrize("columns", [29, 30, 31, 32])
def test_a_store_fills_the_last_16_bytes_of_a_row(columns):
    """Seen on an H200: behind the end of a tensor's row, up to 12 bytes come from the box."""
    array = np.full((20, 36), 7, np.int32)
    copy = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {24, -5}], [%r2];"
    module = kernel(STORE.format(copy=copy), ".param .align 64 .b8 map[128]")
    args = [sim.tensor_map(array[:, :columns], box=(8, 16))]
    report = module.launch("kernel", grid=1, block=128, args=args)
    assert report.ok, str(report)
    want = np.full_like(array, 7)
    want[:3, 24:32] = np.arange(128).reshape(8, 16)[5:, :8]
    np.testing.assert_array_equal(array, want)


def test_a_store_may_run_past_the_end_of_a_buffer():
    array = np.zeros((20, 36), np.int32)
    copy = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {24, 17}], [%r2];"
    module = kernel(STORE.format(copy=copy), ".param .align 64 .b8 map[128]")
    args = [sim.tensor_map(array[:, :31], box=(8, 16))]
    assert kinds(module.launch("kernel", grid=1, block=128, args=args)) == {"out of bounds"}


def test_two_ctas_that_store_one_tile_race():
    copy = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {0, 0}], [%r2];"
    module = kernel(STORE.format(copy=copy), ".param .align 64 .b8 map[128]")
    out = np.zeros((20, 32), np.int32)
    report = module.launch("kernel", grid=2, block=128, args=[sim.tensor_map(out, box=(8, 16))])
    assert kinds(report) == {"data race"}


def test_tensor_faults():
    array = np.zeros((20, 32), np.int32)

    def launch(copy, tensor_map=None, words=128):
        module = kernel(TENSOR.format(copy=copy, bytes=512, words=words), MAP)
        tensor_map = tensor_map or sim.tensor_map(array, box=(8, 16))
        return module.launch("kernel", grid=1, block=64,
                             args=[tensor_map, sim.output(np.zeros(128, np.uint32))])  # fmt: skip

    load = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    good = launch(f"{load} [%r2], [%rd1, {{0, 0}}], [%r4];")
    assert good.ok, str(good)
    assert "misaligned access" in kinds(
        launch(f"add.u32 %r9, %r2, 16;\n{load} [%r9], [%rd1, {{0, 0}}], [%r4];")
    )
    wrong_rank = load.replace("2d", "3d")
    assert "tensor map" in kinds(launch(f"{wrong_rank} [%r2], [%rd1, {{0, 0, 0}}], [%r4];"))
    assert "tensor map" in kinds(launch(f"{load} [%r2], [%rd1, {{0, 0}}], [%r4];", bytes(128)))
    assert "tensor map" in kinds(
        launch(f"add.u64 %rd9, %rd1, 32;\n{load} [%r2], [%rd9, {{0, 0}}], [%r4];")
    )
    assert "mbarrier misuse" in kinds(launch(f"{load} [%r2], [%rd1, {{0, 0}}], [%r2];"))
    with pytest.raises(Exception, match="2 coordinates"):
        launch(f"{load} [%r2], [%rd1, {{0, 0, 0}}], [%r4];")


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_multicast(completion):
    body = """
        .shared .align 128 .b8 tile[1024];
        .shared .align 8 .b8 bar[8];
        mov.u64 %rd1, map;
        cvta.param.u64 %rd1, %rd1;
        ld.param.u64 %rd2, [out];
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, tile;
        mov.u32 %r4, bar;
        mov.u32 %r5, %cluster_ctarank;
        setp.eq.u32 %p1, %r1, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r4], 1;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 512;
        fence.mbarrier_init.release.cluster;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        mov.u16 %h1, 3;
        mad.lo.u32 %r6, %r5, 256, %r2;
        mul.lo.u32 %r7, %r5, 4;
        @!%p1 bra WAIT;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
            [%r6], [%rd1, {0, %r7}], [%r4], %h1;
    WAIT:
        mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r4], 0;
        @!%p2 bra WAIT;
        mad.lo.u32 %r8, %r1, 4, %r2;
        ld.shared.u32 %r10, [%r8];
        mad.lo.u32 %r11, %r5, 128, %r1;
        mad.wide.u32 %rd3, %r11, 4, %rd2;
        st.global.u32 [%rd3], %r10;
        {end}
    """
    sync = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"
    array = np.arange(8 * 16, dtype=np.int32).reshape(8, 16)

    def launch(end, body=body):
        out = np.zeros((2, 8, 16), np.int32)
        report = kernel(body.replace("{end}", end), MAP).launch(
            "kernel", grid=2, block=128, cluster=2, completion=completion,
            args=[sim.tensor_map(array, box=(4, 16)), sim.output(out)],
        )  # fmt: skip
        return report, out

    report, out = launch(sync)
    assert report.ok, str(report)
    np.testing.assert_array_equal(out, np.stack([array, array]))
    # CTA 1 leaves without waiting for its own copy; CTA 0 still sends to it.
    early = body.replace("mov.u16 %h1, 3;", "mov.u16 %h1, 3;\nsetp.eq.u32 %p3, %r5, 1;\n@%p3 exit;")
    report, _ = launch("", early)
    assert kinds(report) & {"exited CTA", "outstanding async copy"}
