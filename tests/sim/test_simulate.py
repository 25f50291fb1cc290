"""torchext.sim.simulate: ops on CPU tensors run the launcher and the kernel's PTX."""

import pytest
import torch

import torchext
from torchext import gemm_selection, sim

available, reason = torchext.is_available("sim")
pytestmark = pytest.mark.skipif(not available, reason=reason)


def quantize() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torchext.ops.quantize_1x128(torch.randn(33, 300).bfloat16())


@pytest.mark.parametrize("completion", ["late", "eager", "random"])
def test_ops_run_their_kernels(completion):
    expected = quantize()
    with sim.simulate(seed=3, completion=completion) as simulation:
        got = quantize()
    assert torch.equal(got[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(got[1], expected[1])
    (report,) = simulation.reports
    assert report.ok and report.kernel.startswith("quantize_1x128") and report.warp_instructions > 0
    quantize()
    assert len(simulation.reports) == 1, "outside the block, ops run on the CPU"


def test_blocks_nest():
    with sim.simulate() as outer:
        with sim.simulate(seed=1) as inner:
            quantize()
        assert (len(outer.reports), len(inner.reports)) == (0, 1)
        quantize()
        assert (len(outer.reports), len(inner.reports)) == (1, 1)


def test_the_cpu_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError), sim.simulate() as simulation:
        1 / 0  # noqa: B018
    quantize()
    assert simulation.reports == []


def test_options_are_checked():
    with pytest.raises(ValueError, match="simulate: completion must be one of late, eager, random"):
        sim.simulate(completion="never").__enter__()


def test_a_kernel_that_does_not_end_raises_with_its_report():
    with (
        sim.simulate(max_instructions=100) as simulation,
        pytest.raises(RuntimeError, match="error: instruction limit"),
    ):
        quantize()
    (report,) = simulation.reports
    assert {f.kind for f in report.findings} == {"instruction limit"}


@pytest.mark.parametrize(
    ("capability", "prefix"),
    [(90, "sm90"), (89, "mma89"), (86, "mma80"), (80, "mma80"), (75, "plain")],
)
def test_launchers_choose_by_compute_capability(capability, prefix):
    a, b = quantize(), torchext.ops.quantize_128x128(torch.randn(40, 300).bfloat16())
    with sim.simulate(compute_capability=capability) as simulation:
        torchext.ops.fp8_gemm_nt(*a, *b)
    (report,) = simulation.reports
    assert report.kernel.startswith(f"{prefix}_fp8_gemm_nt")


@pytest.mark.parametrize("path", ["sm89", "sm80", "plain"])
def test_a_later_gpu_can_be_made_to_run_earlier_kernels(path):
    a, b = quantize(), torchext.ops.quantize_128x128(torch.randn(40, 300).bfloat16())
    with sim.simulate() as simulation:
        with gemm_selection.forced_path(path):
            torchext.ops.fp8_gemm_nt(*a, *b)
        torchext.ops.fp8_gemm_nt(*a, *b)
    forced, own = (report.kernel for report in simulation.reports)
    assert forced.startswith(("mma", "plain")) and own.startswith("sm90")


def test_a_gpu_cannot_be_made_to_run_later_kernels():
    a, b = quantize(), torchext.ops.quantize_128x128(torch.randn(40, 300).bfloat16())
    with (
        sim.simulate(compute_capability=80),
        gemm_selection.forced_path("sm89"),
        pytest.raises(RuntimeError, match=r"must be one that sm_80 can run \(got path 89\)"),
    ):
        torchext.ops.fp8_gemm_nt(*a, *b)
    with pytest.raises(ValueError, match=r"path must be one of 'sm90', .*\(got 'sm70'\)"):
        gemm_selection.forced_path("sm70").__enter__()


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ValueError, match=r"compute_capability must be one of 75, .*\(got 70\)"):
        sim.simulate(compute_capability=70).__enter__()
