"""Cooperative groups as nvcc compiles them (cooperative.cu): grid.sync() and tiles of warps."""

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
    return sim.compile_cuda(Path(__file__).with_name("cooperative.cu"))


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("ctas", [1, 3, 8])
def test_grid_sync(module, ctas, num_threads):
    for seed in range(3):
        data, out = np.zeros(2 * ctas, np.int32), np.zeros(ctas, np.int32)
        report = module.launch(
            "rounds", grid=ctas, block=64, args=[data, out, np.int32(3)], seed=seed,
            num_threads=num_threads,
        )  # fmt: skip
        assert report.ok, str(report)
        assert (out == 1 + ctas + ctas**2).all()


def test_a_grid_knows_its_workspace(module):
    out = np.zeros(96, np.int32)
    assert module.launch("valid", grid=3, block=32, args=[out]).ok
    assert (out == 96).all()


def test_a_grid_that_does_not_fit_the_gpu_deadlocks(module):
    """CUDA refuses such a launch. The simulator reports a deadlock: CTAs wait for CTAs that cannot
    start."""
    data, out = np.zeros(8, np.int32), np.zeros(4, np.int32)
    report = module.launch(
        "rounds", grid=4, block=32, args=[data, out, np.int32(1)], num_sms=2, num_threads=1
    )
    assert {f.kind for f in report.findings} == {"deadlock"}


@pytest.mark.parametrize("seed", range(3))
def test_tiles_of_two_warps(module, seed):
    values, out = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    report = module.launch("tiles", grid=1, block=128, args=[values, out], seed=seed)
    assert report.ok, str(report)
    tile = np.arange(128) // 64
    sums = values.reshape(2, 64).sum(axis=1)[tile]
    np.testing.assert_array_equal(out, sums * 1000 + tile * 100 + np.arange(128) % 64)
