"""torchext.sim.Module: arguments, memory, reports and errors, on hand-written PTX."""

import ctypes
import re
from typing import Any

import numpy as np
import pytest
import torch

from support.kernels import HEADER, MAKE_MAP, PEERS, RACE, SCALE, STORE, STRUCT, TMA
from torchext import sim


def scale(x, y, a=2.0, n=None, **options):
    n = len(x) if n is None else n
    options = {"grid": -(-n // 128), "block": 128, **options}
    return sim.Module(SCALE).launch("scale", args=[x, y, np.float32(a), np.uint32(n)], **options)


def test_launch_computes_and_counts():
    x, y = np.arange(300, dtype=np.float32), np.zeros(300, np.float32)
    report = scale(sim.read_only(x), sim.output(y), n=300)
    assert report.ok, str(report)
    np.testing.assert_array_equal(y, 2 * x)
    assert report.instructions["st.global.f32"] == 10  # 300 threads are ten warps
    assert report.warp_instructions == sum(report.instructions.values())
    assert str(report).startswith("kernel 'scale': no findings (seed=0, completion=\"late\"")
    report.raise_for_findings()


def test_module_from_a_file(tmp_path):
    path = tmp_path / "scale.ptx"
    path.write_text(SCALE)
    for source in (path, str(path)):
        module = sim.Module(source)
        assert module.target == "sm_90a"
        (kernel,) = module.kernels()
        assert kernel.name == "scale" and str(kernel) == "scale(8 bytes, 8 bytes, 4 bytes, 4 bytes)"
        assert [p.name for p in kernel.parameters] == ["x", "y", "a", "n"]
        module.check("scale")
    with pytest.raises(FileNotFoundError):
        sim.Module("no_such_file.ptx")


@pytest.mark.parametrize("completion", ["late", "eager", "random"])
@pytest.mark.parametrize("seed", [0, 1, 12345678901])
def test_options_reach_the_report(seed, completion):
    x = np.ones(4, np.float32)
    report = scale(x, x.copy(), seed=seed, completion=completion, num_threads=1)
    assert f'seed={seed}, completion="{completion}"' in str(report)


def test_out_of_bounds_reads_like_a_compiler_error():
    x, y = np.ones(100, np.float32), np.zeros(100, np.float32)
    report = scale(sim.read_only(x, name="x"), y, n=101)
    assert not report.ok
    finding = report.findings[0]
    assert finding.kind == "out of bounds" and finding.kernel == "scale"
    line = SCALE.splitlines()[finding.ptx_line - 1].strip()
    assert line == "ld.global.f32 %f2, [%rd4];" and finding.opcode == "ld.global.f32"
    assert finding.cta == (0, 0, 0) and finding.warp == 3 and finding.lanes == (4,)
    text = str(report)
    assert text.startswith("kernel 'scale': ")
    assert f"  --> <ptx>:{finding.ptx_line}\n" in text and f" | {line}\n" in text
    assert "where: CTA (0, 0, 0), warp 3, lane 4" in text
    assert "after the end of 'x' (400 bytes)" in text and "remedy: " in text
    with pytest.raises(sim.SimulationError, match="out of bounds"):
        report.raise_for_findings()


def test_guard_gaps_catch_a_long_overshoot():
    """Buffers lie so far apart that an index which is off by several buffers hits no other."""
    x, y = np.ones(4096, np.float32), np.zeros(4096, np.float32)
    report = scale(x, sim.output(y), n=5 * 4096)
    assert {f.kind for f in report.findings} == {"out of bounds"}
    np.testing.assert_array_equal(y, 2)


def test_access_is_checked():
    x, y = np.ones(32, np.float32), np.ones(32, np.float32)
    report = scale(x, sim.read_only(y), n=32)
    assert {f.kind for f in report.findings} == {"read-only memory"}
    np.testing.assert_array_equal(y, 1)
    report = scale(sim.output(x), y, n=32)
    assert {f.kind for f in report.findings} == {"uninitialized memory"}
    y.flags.writeable = False
    report = scale(x, y)
    assert {f.kind for f in report.findings} == {"read-only memory"}
    with pytest.raises(ValueError, match="numpy marks read-only"):
        sim.output(y)


def test_unwritten_output_is_noted():
    x, y = np.ones(64, np.float32), np.full(64, 7, np.float32)
    report = scale(x, sim.output(y, name="y"), n=60)
    assert report.ok and report.unwritten == (("y", 16, 240),)
    assert "16 bytes of output 'y' were not written, the first at offset 240" in str(report)


def test_a_race_names_both_accesses():
    out = np.zeros(64, np.uint32)
    report = sim.Module(RACE).launch("race", grid=1, block=64, args=[sim.output(out)])
    kinds = {f.kind for f in report.findings}
    assert kinds & {"data race", "uninitialized memory"}
    race = next(f for f in report.findings if f.kind == "data race")
    lines = {RACE.splitlines()[n - 1].strip() for n in (race.ptx_line, race.other_ptx_line)}
    assert lines == {"st.shared.u32 [%r4], %r1;", "ld.shared.u32 %r7, [%r6];"}
    assert race.other and "other: " in str(report)


def test_one_array_twice_is_updated_in_place():
    x = np.ones(32, np.float32)
    assert scale(sim.read_only(x), sim.output(x), n=32).ok
    np.testing.assert_array_equal(x, 2)


def test_views_keep_their_alignment():
    store = np.zeros(4 * 33 + 4, np.uint8)
    x = store[4:].view(np.float32)
    assert scale(x[1:], x[1:]).ok
    odd = store[2 : 2 + 4 * 33].view(np.float32)
    report = scale(odd, odd)
    assert {f.kind for f in report.findings} == {"misaligned access"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.uint8])
def test_torch_tensors(dtype):
    x = torch.arange(64).to(dtype)
    y = torch.zeros(128, dtype=dtype)[64:]
    count = 64 * x.element_size() // 4
    report = scale(x, y, a=1.0, n=count)
    assert report.ok, str(report)
    assert torch.equal(x, y)


def test_structs():
    y = np.arange(4, dtype=np.float32)
    module = sim.Module(STRUCT)
    args = [sim.struct(y, np.float32(10), np.uint32(3))]
    assert module.launch("by_struct", grid=1, block=1, args=args).ok
    np.testing.assert_array_equal(y, [0, 1, 2, 30])

    class Packed(ctypes.Structure):
        _fields_ = (("a", ctypes.c_float), ("n", ctypes.c_uint))

    args = [sim.struct(y, Packed(0.5, 3))]
    assert module.launch("by_struct", grid=1, block=1, args=args).ok
    assert y[3] == 15
    padded = sim.struct(np.uint8(1), y, np.uint16(2))
    assert padded.size == 24 and padded.alignment == 8


@pytest.mark.parametrize("corner", [(0, 0), (4, 3), (-4, -1), (28, 18)])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_tensor_maps(library, corner):
    data = np.random.default_rng(0).standard_normal((20, 36)).astype(np.float32)
    array = data if library == "numpy" else torch.from_numpy(data.copy())
    out = np.full((8, 16), np.nan, np.float32)
    x, y = corner
    args = [
        sim.tensor_map(sim.read_only(array), box=(8, 16)),
        sim.output(out),
        np.int32(x),
        np.int32(y),
    ]
    report = sim.Module(TMA).launch("tma", grid=1, block=128, args=args)
    assert report.ok, str(report)
    padded = np.zeros((60, 80), np.float32)
    padded[20:40, 20:56] = data
    np.testing.assert_array_equal(out, padded[20 + y : 28 + y, 20 + x : 36 + x])


def test_tensor_map_of_a_view():
    """A column block of a wider matrix: the view's pitch and offset go into the map."""
    wide = np.arange(8 * 64, dtype=np.float32).reshape(8, 64)
    out = np.zeros((8, 16), np.float32)
    args = [sim.tensor_map(wide[:, 16:32], box=(8, 16)), out, np.int32(0), np.int32(0)]
    assert sim.Module(TMA).launch("tma", grid=1, block=128, args=args).ok
    np.testing.assert_array_equal(out, wide[:, 16:32])


@pytest.mark.parametrize("completion", ["late", "eager", "random"])
def test_lanes_that_agree_make_one_tensor_store(completion):
    """ptxas issues one UTMASTG for each distinct value of the operands."""
    out = np.zeros((8, 64), np.int32)
    for step, kinds in ((0, set()), (4, {"data race"})):
        args = [np.int32(step), sim.tensor_map(sim.output(out), box=(8, 16))]
        report = sim.Module(STORE).launch(
            "store", grid=1, block=32, args=args, completion=completion
        )
        assert {f.kind for f in report.findings} == kinds, str(report)
        if step == 0:
            expected = np.repeat(np.arange(32), 4).reshape(8, 16)
            np.testing.assert_array_equal(out[:, :16], expected)
            assert not out[:, 16:].any()


@pytest.mark.parametrize(
    "fence, read, kinds",
    [
        ("fence.mbarrier_init.release.cluster;", "", set()),
        ("fence.acq_rel.cluster;", "ld.shared::cluster.u32 %r7, [%r6];", set()),
        ("", "", {"mbarrier misuse"}),
        # This fence publishes the initialization of the mbarrier only, not the stored number.
        (
            "fence.mbarrier_init.release.cluster;",
            "ld.shared::cluster.u32 %r7, [%r6];",
            {"data race"},
        ),
    ],
)
def test_a_fence_and_a_relaxed_arrival_publish_mbarriers(fence, read, kinds):
    ptx = PEERS.replace("FENCE", fence).replace("READ", read)
    out = np.zeros(2, np.uint32)
    report = sim.Module(ptx).launch("peers", grid=2, block=1, cluster=2, args=[out])
    assert {f.kind for f in report.findings} == kinds, str(report)


def test_the_alignment_after_ptr_is_of_the_pointee():
    """Triton writes `.ptr .global .align 1`; the parameter itself stays aligned to its size."""
    ptx = (
        STRUCT.replace(
            ".param .align 8 .b8 p[16]", ".param .u32 n, .param .u64 .ptr .global .align 1 p"
        )
        .replace("[p+8]", "[n]")
        .replace("[p+12]", "[n]")
    )
    kernel = sim.Module(ptx).kernel("by_struct")
    assert [(p.size, p.alignment) for p in kernel.parameters] == [(4, 4), (8, 8)]
    report = sim.Module(ptx).launch("by_struct", grid=1, block=1, args=[np.uint32(0), np.ones(1)])
    assert report.ok, str(report)


def make_map(ptx=MAKE_MAP):
    source = np.arange(512, dtype=np.float32).reshape(16, 32)
    scratch, out = np.zeros(128, np.uint8), np.zeros((8, 16), np.float32)
    args = [sim.read_only(source), sim.output(scratch), sim.output(out)]
    report = sim.Module(ptx).launch("make_map", grid=1, block=32, args=args)
    return report, np.array_equal(out, source[8:, 16:])


def test_a_kernel_makes_its_own_tensor_map():
    report, right = make_map()
    assert report.ok and right, str(report)


@pytest.mark.parametrize(
    "old, new, kind, message",
    [
        ("rank.shared::cta.b1024.b32 [%rd4], 0x1", "rank.shared::cta.b1024.b32 [%rd4], 0x5",
         "tensor map", "tensorRank - 1 must be less than 5"),
        ("element_stride.shared::cta.b1024.b32 [%rd4], 0x1, 1", "fill_mode.b1024.b32 [%rd5], 0",
         "tensor map", r"elementStrides\[1\] must be 1 to 8 \(got 0\)"),
        ("mov.u64 %rd6, 128", "mov.u64 %rd6, 120", "tensor map", r"of 16 bytes \(got 120\)"),
        ("[%rd2], [%rd4], 128", "[%rd2+64], [%rd4], 128", "misaligned access", "multiple of 128"),
    ],
)  # fmt: skip
def test_faults_in_making_a_tensor_map(old, new, kind, message):
    assert old in MAKE_MAP
    report, _ = make_map(MAKE_MAP.replace(old, new, 1))
    finding = next(f for f in report.findings if f.kind == kind)
    assert re.search(message, finding.message)


def test_a_tensor_map_changed_before_all_lanes_have_cleared_it():
    report, _ = make_map(MAKE_MAP.replace("    bar.warp.sync -1;\n", ""))
    assert "data race" in {f.kind for f in report.findings}


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda x: sim.tensor_map(x.T, box=(8, 8)), ValueError, "must be contiguous"),
        (lambda x: sim.tensor_map(x[::-1], box=(8, 8)), TypeError, "non-negative"),
        (lambda x: sim.tensor_map(x, box=(8,)), ValueError, "box must have one number for each"),
        (lambda x: sim.tensor_map(x, box=(8, 8), swizzle=16), ValueError, "swizzle must be 0, 32"),
        (lambda x: sim.tensor_map(x, box=(8, 8), oob_fill="1"), ValueError, "'zero' or 'nan'"),
        (lambda x: sim.tensor_map(x, box=(8, 3)), sim.TensorMapError, r"of 16 bytes \(got 12\)"),
        (lambda x: sim.tensor_map(x[:, 1:], box=(8, 4)), sim.TensorMapError, "globalAddress"),
        (lambda x: sim.tensor_map(x[:, :9].copy(), box=(8, 4)), sim.TensorMapError, "Strides"),
        (lambda x: sim.tensor_map(x.astype(complex), box=(8, 4)), TypeError, "got complex128"),
        (lambda x: sim.tensor_map(x[0, 0], box=()), TypeError, "array must be a numpy array"),
    ],
)  # fmt: skip
def test_tensor_map_errors(make, error, message):
    with pytest.raises(error, match=message):
        make(np.zeros((16, 16), np.float32))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(args=[]), ValueError, r"kernel's 4 parameters \(got 0\)"),
        (dict(name="other"), ValueError, r"\(got 'other'\); the module has scale"),
        (dict(a="2"), TypeError, r"argument 2 must be an array, .*\(got str\)"),
        (dict(n=5.0), TypeError, r"argument 3 must be an integer of type u32 \(got the float"),
        (dict(n=np.int64(5)), ValueError, r"argument 3 must have 4 bytes, .* n \(got 8\)"),
        (dict(x="text"), TypeError, r"argument 0 must be an array, .*\(got str\)"),
        (dict(x=np.array([None])), TypeError, r"argument 0 must be an array of numbers"),
        (dict(x=torch.zeros(3, device="meta")), TypeError, "0 must be on the CPU, .* on meta"),
        (dict(completion="soon"), ValueError, "completion must be one of late, eager, random"),
        (dict(lane_order="x"), ValueError, "lane_order must be one of converged, strict"),
        (dict(seed=-1), ValueError, r"seed must be at least 0 \(got -1\)"),
        (dict(grid=()), ValueError, "grid must be 1 to 3 numbers"),
        (dict(block=0), ValueError, "block"),
        (dict(block=2000), ValueError, "block"),
    ],
)  # fmt: skip
def test_launch_errors(change, error, message):
    values = dict(
        x=np.ones(5, np.float32), y=np.ones(5, np.float32), a=np.float32(1), n=np.int32(5)
    )
    options: dict[str, Any] = dict(grid=1, block=32)
    for key, value in change.items():
        (values if key in values else options)[key] = value
    options.setdefault("args", list(values.values()))
    with pytest.raises(error, match=message):
        sim.Module(SCALE).launch(options.pop("name", "scale"), **options)


def test_malformed_ptx_names_the_line():
    with pytest.raises(sim.PtxError, match=r"<ptx>:5: "):
        sim.Module(HEADER + ".visible .entry k()\n{ add.s32 %r1 %r2; }\n")


def test_unknown_opcodes_are_refused():
    body = (
        HEADER + ".visible .entry k()\n{\n    .reg .b32 %r<3>;\n    frobnicate.s32 %r1, %r2;\n}\n"
    )
    module = sim.Module(body)
    for use in (lambda: module.check("k"), lambda: module.launch("k", grid=1, block=1)):
        with pytest.raises(sim.PtxError, match=r"<ptx>:7: .*frobnicate"):
            use()
