"""Options of the tests: `--device cpu` runs the CPU kernels, `sim` the CUDA kernels' PTX on the
simulator (of the GPU that `--sim-arch` names), and `cuda` the CUDA kernels on a GPU. Tests that
call ops take the `device` fixture."""

from __future__ import annotations

import collections
import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import torchext
from torchext import _architectures

pytest.register_assert_rewrite("support")  # shows values in helpers' failed asserts, as in tests'

from support.simulated_gpus import EVERY, SimulatedGpu, gpus_of, kernels_origin  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "sim", "cuda"])
    parser.addoption("--sim-seed", type=int, default=0, help="schedule of the simulator")
    parser.addoption(
        "--sim-arch", default="90", choices=[*map(str, _architectures.simulated()), EVERY],
        help="compute capability of the simulated GPU; or `every`: 90, and for tests marked "
        "every_architecture the earlier generations, too, with few SMs",
    )  # fmt: skip
    parser.addoption(
        "--sim-sms", type=int, default=132,
        help="SMs of the simulated GPU; launchers choose larger tiles where there are few",
    )  # fmt: skip
    parser.addoption(
        "--sim-completion", default="random", choices=["eager", "late", "random"],
        help="when the simulator lets asynchronous work complete",
    )  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On other devices than the CPU, keeps only tests of ops and modules; on the simulator, without
    those marked `large` and those whose kernels another generation's run covers."""
    where = config.getoption("--device")
    (usual,) = gpus_of(config, every_architecture=False)
    gpu_of = {item: parameters_of(item).get("simulated_gpu", usual) for item in items}
    superfluous = {
        item
        for item, gpu in gpu_of.items()
        if gpu != usual and not item.get_closest_marker("every_architecture")
    }
    config.hook.pytest_deselected(items=list(superfluous))
    items[:] = [item for item in items if item not in superfluous]
    for item in items:
        takes_device = "device" in getattr(item, "fixturenames", ())
        if where != "cpu" and not takes_device:
            item.add_marker(pytest.mark.skip(reason="runs on the CPU only"))
        if where == "sim" and item.get_closest_marker("large"):
            item.add_marker(pytest.mark.skip(reason="too large for the simulator"))
        mark = item.get_closest_marker("every_architecture")
        if where == "sim" and mark and "kernels" in mark.kwargs:
            arch = gpu_of[item].compute_capability
            origin = kernels_origin(arch, mark.kwargs["kernels"])
            if origin != arch:
                reason = f"sm_{arch} runs the kernels of sm_{origin}: tested there"
                item.add_marker(pytest.mark.skip(reason=reason))


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test once for each simulated GPU, if there are several."""
    if metafunc.config.getoption("--sim-arch") != EVERY or not has_mark(metafunc.definition):
        return
    if "simulated_gpu" in metafunc.fixturenames:
        gpus = gpus_of(metafunc.config, every_architecture=True)
        metafunc.parametrize("simulated_gpu", gpus, ids=str)


def has_mark(definition: pytest.Function) -> bool:
    """Whether the test has the mark `every_architecture`, with all of its parameters or some."""
    if definition.get_closest_marker("every_architecture"):
        return True
    lists = [mark.args[1] for mark in definition.iter_markers("parametrize") if len(mark.args) > 1]
    values = [value for values in lists if isinstance(values, list) for value in values]
    return any(
        mark.name == "every_architecture" for v in values for mark in getattr(v, "marks", ())
    )


@pytest.fixture
def simulated_gpu(request: pytest.FixtureRequest) -> SimulatedGpu:
    """The GPU that `--device sim` simulates for this test."""
    (gpu,) = gpus_of(request.config, every_architecture=False)
    return gpu


@pytest.fixture
def gpu_path(request: pytest.FixtureRequest, simulated_gpu: SimulatedGpu) -> str | None:
    """The path of the (maybe simulated) GPU; None on the CPU."""
    where = request.config.getoption("--device")
    if where == "cpu":
        return None
    capability = simulated_gpu.compute_capability
    if where == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    return _architectures.path_of(capability)


@pytest.fixture
def device(request: pytest.FixtureRequest, simulated_gpu: SimulatedGpu):
    """The torch device of a test's tensors: "cpu" (also under the simulator) or "cuda"."""
    where = request.config.getoption("--device")
    available, reason = torchext.is_available(where)
    if not available:
        pytest.fail(f"--device {where}: {reason}")  # not a skip: the user asked for this device
    context = contextlib.nullcontext()
    if where == "sim":
        context = torchext.sim.simulate(
            seed=request.config.getoption("--sim-seed"),
            completion=request.config.getoption("--sim-completion"),
            compute_capability=simulated_gpu.compute_capability,
            num_sms=simulated_gpu.num_sms,
        )
    torch.manual_seed(0)
    with context:
        yield torch.device("cuda" if where == "cuda" else "cpu")


@pytest.fixture
def gpu(request: pytest.FixtureRequest, device: torch.device):
    """Makes ops check operands as on a GPU, also in tests that run on the CPU: on the simulator."""
    if request.config.getoption("--device") != "cpu":
        yield
        return
    available, reason = torchext.is_available("sim")
    if not available:
        pytest.skip(f"no GPU, no simulator: {reason}")
    with torchext.sim.simulate():
        yield


@pytest.fixture
def mesh(tmp_path: Path):
    """A device mesh of one CPU process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names the packages whose absence skips tests, which -q leaves out."""
    counts: collections.Counter[str] = collections.Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        missing = re.search(r"No module named '(\w+)", reason)
        if missing is not None:
            counts[missing[1]] += 1
    for package, count in sorted(counts.items()):
        terminalreporter.write_line(
            f"skipped for want of {package}: {count} tests or files; the development group of "
            "pyproject.toml has it"
        )
