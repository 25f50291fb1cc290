"""PTX of other projects: CUB and libcu++, which nvcc compiles (third_party.cu), and Triton's
(triton_ptx/, with the script that makes it)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from torchext import sim
from torchext.sim.compiler import CompileError, find_nvcc

COMPLETIONS = ["late", "eager", "random"]


@pytest.fixture(scope="module")
def module():
    try:
        find_nvcc()
    except CompileError:
        pytest.skip("there is no nvcc to compile with")
    return sim.compile_cuda(Path(__file__).with_name("third_party.cu"))


@pytest.fixture(params=COMPLETIONS)
def launch(request, module):
    def run(name, block, args, grid=1):
        return [
            module.launch(
                name, grid=grid, block=block, args=args, seed=seed, completion=request.param
            )
            for seed in range(3)
        ]

    return run


def check(reports):
    for report in reports:
        assert report.ok, str(report)


@pytest.mark.slow
def test_block_reduce(launch):
    x = np.random.default_rng(0).integers(-50, 50, 1000).astype(np.float32)
    total = np.zeros(1, np.float32)
    check(launch("block_sum", 128, [sim.read_only(x), sim.output(total), np.int32(1000)]))
    assert total[0] == x.sum()


def test_block_radix_sort(launch):
    keys = np.random.default_rng(1).integers(0, 2**32, 512, dtype=np.uint32)
    expected = np.sort(keys)
    check(launch("block_sort", 128, [keys]))
    np.testing.assert_array_equal(keys, expected)


def test_block_scan(launch):
    x = np.ones(256, np.int32)
    check(launch("block_scan", 256, [x]))
    expected = np.ones(256, np.int64)
    for _ in range(3):  # three seeds: each launch scans x in place
        expected = np.cumsum(expected)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("fenced", [True, False])
def test_memcpy_async(launch, fenced):
    """Results are right in both cases. Without the fence after init(), the async proxy need not see
    the initialized barrier: a finding."""
    x = np.random.default_rng(2).integers(0, 2**31, (2, 256, 4), dtype=np.int32)
    y = np.zeros_like(x)
    name = "reverse_fenced" if fenced else "reverse_unfenced"
    reports = launch(name, 256, [sim.read_only(x), sim.output(y)], grid=2)
    np.testing.assert_array_equal(y, x[:, ::-1])
    kinds = {f.kind for report in reports for f in report.findings}
    assert kinds == (set() if fenced else {"missing mbarrier fence"})


NO_SCRATCH = np.zeros(0, np.uint8)


def triton_module(name):
    return sim.Module(Path(__file__).parent / "triton_ptx" / f"{name}.ptx")


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("name", ["softmax_sm80", "softmax_sm90"])
def test_triton_softmax(name, completion):
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    y = torch.zeros_like(x)
    args = [sim.read_only(x), sim.output(y), np.int32(1000), NO_SCRATCH, NO_SCRATCH]
    report = triton_module(name).launch(
        "softmax", grid=3, block=128, smem=16, args=args, completion=completion
    )
    assert report.ok, str(report)
    torch.testing.assert_close(y, x.softmax(1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_triton_fp8_matmul(completion, seed):
    """Tensor maps made on the device, TMA, mbarriers, wgmma, TMA stores; ragged in every size."""
    m, n, k = 100, 72, 208
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(rows, k, generator=generator).to(torch.float8_e4m3fn) for rows in (m, n))
    c = torch.zeros(m, n, dtype=torch.float16)
    scratch = np.zeros(4 * 3 * 128, np.uint8)  # each of the four CTAs has three maps
    sizes = [np.int32(x) for x in (m, n, k)]
    args = [sim.read_only(a), sim.read_only(b), sim.output(c), *sizes, scratch, NO_SCRATCH]
    report = triton_module("matmul_fp8_sm90").launch(
        "matmul", grid=(2, 2), block=128, smem=24600, args=args, seed=seed, completion=completion
    )
    assert report.ok, str(report)
    assert report.instructions["wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3"] > 0
    expected = torch.from_numpy(sim.tensor_core_matmul(a, b)).half()
    assert torch.equal(c, expected), "the bits of Hopper's tensor core, to FP16"
