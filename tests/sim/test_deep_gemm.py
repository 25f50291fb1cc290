"""DeepGEMM's FP8 kernels for Hopper, compiled from the headers of the wheel `sgl-deep-gemm`, run in
the simulator: right numbers, and no findings but those that its tiles of under 64 rows have."""

import numpy as np
import pytest
import torch

from benchmarks.deep_gemm_kernel import (
    Configuration,
    compile_kernels,
    configuration,
    headers,
    kernel_name,
    launch_options,
)
from benchmarks.simulated_times import DeepGemm
from torchext.sim.compiler import CompileError, find_nvcc

# Shape and configuration: ragged in M and N, one and two CTAs in a cluster, A or B shared by them.
CASES = {
    "256x128, A shared": ((300, 256, 256), Configuration(256, 128, 3, 2, True, sms=4)),
    "128x160, B shared": ((300, 328, 384), Configuration(128, 160, 4, 2, False, sms=4)),
    "32x48": ((20, 96, 640), Configuration(32, 48, 8, sms=2)),
}

PREDICTED = (64, 128, 512)


@pytest.fixture(scope="module")
def module():
    try:
        find_nvcc()
        headers()
    except (CompileError, ModuleNotFoundError) as missing:
        pytest.skip(str(missing))
    kernels = [(chosen, n, k) for (_, n, k), chosen in CASES.values()]
    return compile_kernels([*kernels, (configuration(*PREDICTED), *PREDICTED[1:])])


def operands(m, n, k):
    generator = torch.Generator().manual_seed(m)
    a, b = (torch.randn(rows, k, generator=generator).to(torch.float8_e4m3fn) for rows in (m, n))
    a_scale = torch.rand(k // 128, -(-m // 4) * 4, generator=generator) + 0.5
    b_scale = torch.rand(-(-n // 128), k // 128, generator=generator) + 0.5
    return (a, a_scale), (b, b_scale)


def product(scaled_a, scaled_b):
    """In float64: the result, and the sum of the products' magnitudes."""
    (a, a_scale), (b, b_scale) = scaled_a, scaled_b
    a = a.double() * a_scale[:, : len(a)].t().double().repeat_interleave(128, 1)
    blocks = b_scale.double().repeat_interleave(128, 0)[: len(b)].repeat_interleave(128, 1)
    b = b.double() * blocks
    return a @ b.t(), a.abs() @ b.abs().t()


@pytest.mark.slow
@pytest.mark.parametrize("completion", ["late", "eager", "random"])
@pytest.mark.parametrize("case", CASES)
def test_deep_gemm(module, case, completion):
    (m, n, k), chosen = CASES[case]
    inputs = operands(m, n, k)
    d = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    options = launch_options(chosen, *inputs, d)
    name = kernel_name(module, chosen, n, k)
    report = module.launch(name, completion=completion, num_threads=1, **options)
    expected, magnitude = product(*inputs)
    error = (d.double() - expected).abs()
    assert (error <= 2**-8 * expected.abs() + 2**-12 * magnitude).all()
    kinds = {finding.kind for finding in report.findings if finding.grade == "error"}
    # wgmma reads 64 rows of a tile of 32: the others are bytes that TMA may be writing, and the
    # kernel drops their results. Where the columns' scales of B have one row, it also reads a
    # second one, which it has not loaded, and does not use it.
    assert kinds == ({"data race", "uninitialized memory"} if case == "32x48" else set())


def test_configuration():
    """Large tiles with a shared operand for large M, small tiles that fill the GPU for small M."""
    assert configuration(4096, 7168, 16384) == Configuration(256, 128, 3, 2, True)
    assert configuration(64, 2112, 7168) == Configuration(64, 16, 16)
    assert configuration(2048, 2048, 16384).multicast == 1


@pytest.mark.slow
def test_predicted_times(module):
    """The H200 differs by its clock and its memory; times have no noise."""
    key = configuration(*PREDICTED), *PREDICTED[1:]
    predictor = DeepGemm(modules={key: module})
    shape = [np.array([size]) for size in PREDICTED]
    h100, h200, again = (float(predictor(gpu, *shape)[0]) for gpu in ("h100", "h200", "h100"))
    assert 2 < h100 < 10 and 2 < h200 < 10 and h100 != h200 and again == h100
