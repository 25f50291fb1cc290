"""PTX that nvcc makes of other people's kernels: CUB and libcu++ (third_party.cu)."""

from pathlib import Path

import numpy as np
import pytest

from torchext import sim
from torchext.sim.compiler import CompileError, find_nvcc


@pytest.fixture(scope="module")
def module():
    try:
        find_nvcc()
    except CompileError:
        pytest.skip("there is no nvcc to compile with")
    return sim.compile_cuda(Path(__file__).with_name("third_party.cu"))


@pytest.fixture(params=["late", "eager", "random"])
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
    for _ in range(3):  # three seeds, each in place
        expected = np.cumsum(expected)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("fenced", [True, False])
def test_memcpy_async(launch, fenced):
    """Right either way; without a fence after init() the barrier is not for the async proxy."""
    x = np.random.default_rng(2).integers(0, 2**31, (2, 256, 4), dtype=np.int32)
    y = np.zeros_like(x)
    name = "reverse_fenced" if fenced else "reverse_unfenced"
    reports = launch(name, 256, [sim.read_only(x), sim.output(y)], grid=2)
    np.testing.assert_array_equal(y, x[:, ::-1])
    kinds = {f.kind for report in reports for f in report.findings}
    assert kinds == (set() if fenced else {"missing mbarrier fence"})
