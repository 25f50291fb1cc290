"""The clock against published microbenchmarks of Hopper, within 10 %.

Each kernel runs a chain or a loop; two lengths of it give the cycles of one step. The figures and
their sources are those of csrc/runtime/timing.inc and docs/timing.md: flash-vla (wgmma, curve of
device memory, cold reads), HPMLL (latencies, TMA), Luo et al. (latencies).
"""

import numpy as np
import pytest

from support.opcodes import HEADER
from torchext import sim

TOLERANCE = 0.1


def module(body: str, registers: str = "", params: str = ".param .u64 in") -> sim.Module:
    return sim.Module(
        HEADER.format(target="sm_90a")
        + ".extern .shared .align 1024 .b8 window[];\n"
        + f".visible .entry kernel({params})\n{{\n"
        ".reg .pred %p<4>;\n.reg .b32 %r<16>;\n.reg .b64 %rd<16>;\n"
        f".reg .f32 %f<132>;\n{registers}"
        "ld.param.u64 %rd1, [in];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\n"
        "setp.eq.u32 %p1, %r1, 0;\nmov.u32 %r3, window;\n" + body + "\nret;\n}\n"
    )


def predict(body, *, gpu="h100", data=None, grid=1, block=32, **options) -> sim.Timing:
    data = np.zeros(64, np.uint64) if data is None else data
    report = module(body).launch(
        "kernel", grid=grid, block=block, args=[data], smem=24 << 10, timing=gpu,
        timing_only=True, **options,
    )  # fmt: skip
    assert report.timing is not None, report.text
    return report.timing


def step(body, first: int, last: int, **options) -> float:
    """Cycles that one step more of a kernel takes; body(n) has n steps."""
    cycles = [predict(body(n), **options).cycles for n in (first, last)]
    return (cycles[1] - cycles[0]) / (last - first)


def near(got: float, want: float) -> bool:
    return abs(got - want) <= TOLERANCE * want


# ---- Tensor cores ------------------------------------------------------------------------------


def wgmma(n: int) -> str:
    registers = ", ".join(f"%f{i}" for i in range(n // 2))
    return (
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{registers}}}, %rd2, %rd2, "
        "1, 1, 1, 0, 0;\n"
    )


COMMIT = "wgmma.commit_group.sync.aligned;\n"
START = "mov.u64 %rd2, 0x4000004000010040;\nwgmma.fence.sync.aligned;\n"


def wait(groups: int) -> str:
    return f"wgmma.wait_group.sync.aligned {groups};\n"


@pytest.mark.parametrize("n, cycles", [
    (8, 18.9), (16, 20.7), (32, 24.7), (64, 32.8), (96, 48.7), (128, 65.0), (192, 97.1),
    (256, 129.3),
])  # fmt: skip
def test_interval_of_wgmma(n, cycles):
    got = step(lambda k: START + wgmma(n) * k + COMMIT + wait(0), 8, 24, block=128)
    assert near(got, cycles)


@pytest.mark.parametrize("group, pending, cycles", [
    (1, 0, 79), (1, 1, 42), (1, 3, 34), (2, 0, 56), (2, 1, 33), (4, 0, 45), (4, 1, 32), (8, 0, 38),
])  # fmt: skip
def test_wait_for_wgmma(group, pending, cycles):
    def body(k):
        return START + (wgmma(64) * group + COMMIT + wait(pending)) * k + wait(0)

    assert near(step(body, 8, 24, block=128) / group, cycles)


def test_two_warpgroups_share_the_tensor_cores():
    def cycles(block):
        return step(lambda k: START + wgmma(128) * k + COMMIT + wait(0), 8, 24, block=block)

    assert near(cycles(256) / cycles(128), 1.965)


def test_arithmetic_hides_behind_wgmma():
    """ptxas computes the next addresses while the tensor cores work, whatever the PTX's order."""

    def cycles(registers: list[int]) -> float:
        arithmetic = "".join(f"xor.b32 %r{r}, %r{r}, 0;\n" for r in registers)
        turn = wgmma(64) + COMMIT + wait(0) + arithmetic + "ld.shared.u32 %r5, [%r4];\n"
        return step(lambda k: START + "mov.u32 %r4, %r3;\n" + turn * k, 8, 24, block=128)

    assert abs(cycles([4] * 8) - cycles([4, *range(8, 15)])) <= 2


# ---- Latencies -----------------------------------------------------------------------------------


def test_dependent_ffma():
    got = step(lambda k: "fma.rn.f32 %f0, %f0, %f1, %f0;\n" * k, 64, 256)
    assert 4.0 <= got <= 4.4


def test_shared_latency():
    got = step(lambda k: "ld.shared.u32 %r3, [%r3];\n" * k, 16, 64)
    assert near(got, 28.8)


CHASE = "ld.global.cg.u64 %rd4, [%rd1];\nadd.u64 %rd1, %rd1, %rd4;\n"


def test_l2_latency():
    got = step(lambda k: CHASE * k, 64, 256) - 4  # the addition
    assert near(got, 261)


def test_dram_latency():
    strides = np.full(4096, 256, np.uint64)
    got = step(lambda k: CHASE * k, 16, 64, data=strides) - 4
    assert near(got, 479)


def test_distributed_shared_latency():
    there = "mov.u32 %r4, 1;\nmapa.shared::cluster.u32 %r3, %r3, %r4;\n"

    def body(k):
        chain = "ld.shared::cluster.u32 %r5, [%r3];\nand.b32 %r5, %r5, 0;\nadd.u32 %r3, %r3, %r5;\n"
        return there + chain * k + SYNC_CLUSTER

    got = step(body, 16, 64, grid=2, cluster=2) - 2 * 4  # the two instructions of the address
    assert 181 <= got <= 213


SYNC_CLUSTER = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
INIT = "@%p1 mbarrier.init.shared.b64 [%r3], 1;\nfence.mbarrier_init.release.cluster;\n"


def test_round_trip_of_an_mbarrier():
    def body(k):
        turn = (
            "mbarrier.arrive.shared.b64 _, [%r3];\n"
            "WAIT{0}: mbarrier.try_wait.parity.shared.b64 %p2, [%r3], {1};\n@!%p2 bra WAIT{0};\n"
        )
        turns = "".join(turn.format(n, n % 2) for n in range(k))
        return INIT + "@!%p1 bra END;\n" + turns + "END:\n"

    assert near(step(body, 16, 64), 65)


# ---- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kilobytes, warps, loads, gigabytes_per_second", [
    (256, 4, 1, 1043), (512, 4, 2, 1960), (1024, 16, 1, 2672), (2048, 16, 2, 2881),
    (4096, 16, 4, 3002),
])  # fmt: skip
def test_memory_by_bytes_in_flight(kilobytes, warps, loads, gigabytes_per_second):
    pitch = 132 * warps * loads * 512  # all CTAs' bytes in a step
    data = np.zeros(pitch * 8 // 8, np.uint64)
    address = (
        f"mad.lo.u32 %r4, %r2, {32 * warps}, %r1;\nmul.wide.u32 %rd3, %r4, 16;\n"
        "add.u64 %rd1, %rd1, %rd3;\n"
    )

    def body(k):
        load = "".join(
            f"ld.global.cg.v2.u64 {{%rd{4 + 2 * j}, %rd{5 + 2 * j}}}, "
            f"[%rd1+{j * pitch // loads}];\n" for j in range(loads)
        )  # fmt: skip
        use = "".join(f"add.u64 %rd1, %rd1, %rd{4 + 2 * j};\n" for j in range(loads))
        return address + (load + use + f"add.u64 %rd1, %rd1, {pitch};\n") * k

    got = step(body, 2, 8, grid=132, block=32 * warps, data=data)
    assert near(pitch / got * 1.9, gigabytes_per_second)


@pytest.mark.parametrize("size, ctas, gigabytes", [
    (1, 114, 223), (1, 228, 437), (1, 456, 830), (4, 114, 759), (4, 228, 1312), (4, 456, 1748),
    (8, 114, 1229), (8, 228, 1729), (16, 114, 1708), (16, 228, 1807),
])  # fmt: skip
def test_ladder_of_tma_copies(size, ctas, gigabytes):
    size *= 1024
    data = np.zeros(ctas * size * 12 // 8, np.uint64)

    def body(k):
        turn = (
            "mbarrier.arrive.expect_tx.shared.b64 _, [%r3], {size};\n"
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[%r3+1024], [%rd1], {size}, [%r3];\nadd.u64 %rd1, %rd1, {pitch};\n"
            "WAIT{n}: mbarrier.try_wait.parity.shared.b64 %p2, [%r3], {parity};\n"
            "@!%p2 bra WAIT{n};\n"
        )
        turns = "".join(
            turn.format(size=size, pitch=ctas * size, n=n, parity=n % 2) for n in range(k)
        )
        start = f"mul.wide.u32 %rd3, %r2, {size};\nadd.u64 %rd1, %rd1, %rd3;\n"
        return INIT + start + "@!%p1 bra END;\n" + turns + "END:\n"

    got = step(body, 4, 12, gpu="h800_pcie", grid=ctas, data=data)
    assert near(ctas * size / got * 1.755 / 1.0737, gigabytes)


@pytest.mark.parametrize("ctas, gigabytes", [(114, 178), (228, 346), (456, 643)])
def test_ladder_of_tensor_copies(ctas, gigabytes):
    """Copies of 1 KB in eight rows, which the descriptor of a tensor names."""

    def cycles(steps: int) -> float:
        turn = (
            "mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 1024;\n"
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
            "[%r3+1024], [%rd5, {{%r5, %r4}}], [%r3];\nadd.u32 %r4, %r4, {pitch};\n"
            "WAIT{n}: mbarrier.try_wait.parity.shared.b64 %p2, [%r3], {parity};\n"
            "@!%p2 bra WAIT{n};\n"
        )
        turns = "".join(turn.format(pitch=8 * ctas, n=n, parity=n % 2) for n in range(steps))
        start = (
            "mov.b64 %rd5, rows;\ncvta.param.u64 %rd5, %rd5;\nmov.u32 %r5, 0;\n"
            "shl.b32 %r4, %r2, 3;\n"
        )
        body = INIT + start + "@!%p1 bra END;\n" + turns + "END:\n"
        data = sim.read_only(np.zeros((8 * ctas * steps, 128), np.uint8))
        report = module(body, params=".param .u64 in, .param .align 64 .b8 rows[128]").launch(
            "kernel", grid=ctas, block=32, smem=4 << 10, timing="h800_pcie", timing_only=True,
            args=[data, sim.tensor_map(data, box=(8, 128))],
        )  # fmt: skip
        assert report.timing is not None, report.text
        return report.timing.cycles

    got = (cycles(12) - cycles(4)) / 8
    assert near(ctas * 1024 / got * 1.755 / 1.0737, gigabytes)


@pytest.mark.parametrize("megabytes, microseconds", [(4.19, 3.34), (33.55, 14.26)])
def test_cold_read(megabytes, microseconds):
    """Every thread reads 64 bytes: 1.85 us + 1 us for each 2.77 MB."""
    threads = round(megabytes * 1e6 / 64 / 256) * 256
    data = np.zeros(threads * 8, np.uint64)
    body = (
        "mad.lo.u32 %r4, %r2, 1024, %r1;\nmul.wide.u32 %rd3, %r4, 16;\nadd.u64 %rd1, %rd1, %rd3;\n"
        + "".join(
            f"ld.global.cg.v2.u64 {{%rd{4 + 2 * j}, %rd{5 + 2 * j}}}, [%rd1+{4096 * j}];\n"
            for j in range(4)
        )
        + "".join(f"add.u64 %rd1, %rd1, %rd{4 + 2 * j};\n" for j in range(4))
    )
    got = predict(body, grid=threads // 256, block=256, data=data).microseconds
    assert near(got, microseconds)
