"""Loading the op library, facts that a build reports, and the cost of `import torchext`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchext
from torchext import _architectures, availability
from torchext._dispatch import library

ROOT = Path(__file__).resolve().parents[1]


def test_a_missing_library_is_an_import_error_that_says_how_to_build(tmp_path):
    missing = tmp_path / "_C.so"
    with pytest.raises(ImportError, match=r"must be in .*_C\.so \(got .*pip install") as error:
        library.load(missing)
    assert str(missing) in str(error.value)


def test_a_library_that_does_not_load_is_an_import_error_with_its_cause(tmp_path):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not an ELF file")
    with pytest.raises(
        ImportError, match=r"2\.10 or later and able to load _C\.so.*pip install"
    ) as error:
        library.load(broken)
    assert isinstance(error.value.__cause__, OSError)
    assert torch.__version__ in str(error.value)


def test_cpu_is_always_available():
    assert torchext.is_available("cpu")[0] is True


@pytest.mark.parametrize("feature", ["cpu", "cuda", "sm90", "sim"])
def test_is_available_gives_a_reason_either_way(feature):
    available, reason = torchext.is_available(feature)
    assert isinstance(available, bool)
    assert reason


def test_is_available_is_true_or_false_by_itself(monkeypatch, tmp_path):
    assert torchext.is_available("cpu")
    without_ptx(monkeypatch, tmp_path)
    absent = torchext.is_available("cuda")
    assert not absent
    assert absent.ok is False and "nvcc" in absent.reason
    assert str(absent) == f"no: {absent.reason}"


def test_is_available_without_a_feature_tells_all():
    table = torchext.is_available()
    assert list(table) == ["cpu", "cuda", "sm90", "sim"]
    for feature, answer in table.items():
        assert answer == torchext.is_available(feature)
        assert re.search(rf"^{feature} +{'yes' if answer else 'no'}: ", str(table), re.MULTILINE)
    assert repr(table) == str(table)


def test_is_available_refuses_an_unknown_feature():
    with pytest.raises(ValueError, match=r"feature must be one of 'cpu', 'cuda'.*\(got 'tpu'\)"):
        torchext.is_available("tpu")


def without_ptx(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "PACKAGE", tmp_path)


def with_ptx(monkeypatch, tmp_path):
    (tmp_path / "_ptx" / "90a").mkdir(parents=True)
    (tmp_path / "_ptx" / "90a" / "kernel.ptx.gz").touch()
    monkeypatch.setattr(library, "PACKAGE", tmp_path)
    with_paths(monkeypatch, tuple(_architectures.paths()))


def with_paths(monkeypatch, built):
    monkeypatch.setattr(_architectures, "built_paths", lambda: built)
    monkeypatch.setattr(availability, "built_paths", lambda: built)


def with_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize("feature", ["cuda", "sm90", "sim"])
def test_a_build_without_nvcc_says_so(feature, monkeypatch, tmp_path):
    without_ptx(monkeypatch, tmp_path)
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: object())
    available, reason = torchext.is_available(feature)
    assert not available
    assert "nvcc" in reason


def test_a_torch_without_cuda_is_named(monkeypatch, tmp_path):
    with_ptx(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    available, reason = torchext.is_available("cuda")
    assert not available
    assert "torch" in reason and "without CUDA" in reason


def test_sm90_needs_compute_capability_9_0(monkeypatch, tmp_path):
    with_ptx(monkeypatch, tmp_path)
    with_gpu(monkeypatch, (8, 0))
    assert torchext.is_available("cuda")[0]
    available, reason = torchext.is_available("sm90")
    assert not available
    assert "Some GPU has compute capability 8.0" in reason
    with_gpu(monkeypatch, (9, 0))
    assert torchext.is_available("sm90") == (True, "Some GPU has compute capability 9.0")


@pytest.mark.parametrize(
    ("capability", "path"),
    [((7, 5), "plain"), ((8, 0), "sm80"), ((8, 6), "sm80"), ((8, 9), "sm89"), ((9, 0), "sm90"),
     ((10, 0), "sm80"), ((12, 0), "sm89")],
)  # fmt: skip
def test_cuda_names_the_kernels_that_a_gpu_takes(capability, path, monkeypatch, tmp_path):
    with_ptx(monkeypatch, tmp_path)
    with_gpu(monkeypatch, capability)
    available, reason = torchext.is_available("cuda")
    assert available
    assert reason.endswith(f"runs the {path} GEMM kernels")


@pytest.mark.parametrize(("capability", "path"), [((10, 7), "sm80"), ((13, 0), "sm89")])
def test_cuda_says_that_it_does_not_know_a_gpu(capability, path, monkeypatch, tmp_path):
    with_ptx(monkeypatch, tmp_path)
    with_gpu(monkeypatch, capability)
    available, reason = torchext.is_available("cuda")
    assert available
    assert f"runs the {path} GEMM kernels; this version of torchext does not know" in reason


@pytest.mark.parametrize(
    ("capability", "number"),
    [((8, 0), 80), ((8, 9), 89), ((10, 0), 80), ((12, 0), 89), ((7, 5), 75)],
)
def test_a_gpu_that_was_left_out_is_named_with_the_variable(
    capability, number, monkeypatch, tmp_path
):
    with_ptx(monkeypatch, tmp_path)
    with_paths(monkeypatch, ("sm90",))
    with_gpu(monkeypatch, capability)
    available, reason = torchext.is_available("cuda")
    assert not available
    assert "has no" in reason and "but only sm90" in reason
    assert f"reinstall torchext with TORCHEXT_ARCHS={number} or without" in reason
    with_gpu(monkeypatch, (9, 0))
    available, reason = torchext.is_available("cuda")
    assert available and reason.startswith("the sm90 CUDA kernels are built")


def test_the_simulator_refuses_a_gpu_that_was_left_out(monkeypatch):
    if not torchext.is_available("sim"):
        pytest.skip(torchext.is_available("sim").reason)
    with_paths(monkeypatch, ("sm89", "plain"))
    for capability in (80, 90):
        with (
            pytest.raises(RuntimeError, match=rf"simulate: .* TORCHEXT_ARCHS={capability} or"),
            torchext.sim.simulate(compute_capability=capability),
        ):
            raise AssertionError("not refused")
    with pytest.raises(RuntimeError, match=r"gemm_selection: .* TORCHEXT_ARCHS=90 or"):
        torchext.explain_gemm(64, 128, 128)
    assert "of the GEMM kernels only plain and sm89" in torchext.is_available("sim").reason


def test_a_gpu_before_turing_is_refused(monkeypatch, tmp_path):
    with_ptx(monkeypatch, tmp_path)
    with_gpu(monkeypatch, (7, 0))
    available, reason = torchext.is_available("cuda")
    assert not available
    assert "compute capability 7.0; the CUDA kernels need 7.5" in reason


def test_sim_needs_its_extension(monkeypatch, tmp_path):
    with_ptx(monkeypatch, tmp_path)
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: None)
    available, reason = torchext.is_available("sim")
    assert not available
    assert "torchext._sim" in reason


@pytest.mark.parametrize("hidden", ["numpy", "torchext._sim"])
@pytest.mark.slow
def test_the_simulator_says_what_it_lacks(hidden):
    script = f"""
import sys
sys.modules[{hidden!r}] = None
import torchext
print(torchext.is_available("sim"))
try:
    torchext.sim
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    answer, error = run.stdout.splitlines()
    remedy = "pip install numpy" if hidden == "numpy" else "reinstall torchext from source"
    assert answer.startswith("no: ") and hidden in answer and remedy in answer
    assert error.startswith("torchext.sim: ") and hidden in error
    assert remedy in error.replace("`", "")


def test_get_include_of_this_installation_has_the_headers():
    folder = Path(torchext.get_include())
    assert (folder / "ptx" / "isa" / "wgmma.h").is_file()


def test_get_include_of_a_wheel_is_inside_the_package(monkeypatch, tmp_path):
    package = tmp_path / "torchext"
    headers = package / "include" / "ptx" / "isa"
    headers.mkdir(parents=True)
    (headers / "wgmma.h").touch()
    monkeypatch.setattr(library, "PACKAGE", package)
    assert torchext.get_include() == str(package / "include")


def test_get_include_without_headers_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "PACKAGE", tmp_path / "torchext")
    with pytest.raises(FileNotFoundError, match="include"):
        torchext.get_include()


def test_import_loads_neither_the_simulator_nor_the_references():
    script = (
        "import sys, torchext; "
        "print([m for m in ('torchext.sim', 'torchext._sim', 'torchext.reference', 'matplotlib') "
        "if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_import_loads_no_slow_part_of_torch():
    """Importing Dynamo takes seconds and DTensor most of a second; only their users should pay."""
    parts = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor")
    script = f"import sys, torchext; print(*(set({parts}) & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert not result.stdout.split()


def test_references_load_as_an_attribute():
    script = "import torchext; print(torchext.reference.quantize_1x128.__name__)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "quantize_1x128"


def test_completion_shows_what_is_public():
    script = "import torchext; print(*dir(torchext))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lazy = {"checkpoint", "compat", "debug", "distributed", "moe", "reference", "sim"}
    assert set(run.stdout.split()) == {*torchext.__all__, *lazy}
    for name in dir(torchext):
        assert hasattr(torchext, name)
    assert dir(torchext.compat) == ["deep_gemm"]
    assert torchext.compat.deep_gemm.fp8_gemm_nt


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = torchext.nothing


def test_exports():
    assert set(torchext.__all__) == {
        "Advice",
        "ConversionResult",
        "InferenceResult",
        "MemoryReport",
        "Recipe",
        "WeightGradientQueue",
        "__version__",
        "advise",
        "convert_to_fp8_training",
        "delay_weight_gradients",
        "dequantize_weights",
        "explain_gemm",
        "fixed_weights",
        "get_include",
        "is_available",
        "memory_report",
        "nn",
        "ops",
        "quantize_for_inference",
        "revert_to_linear",
        "sm_budget",
        "unconvert",
    }
    for name in torchext.__all__:
        assert hasattr(torchext, name)


def test_version_is_the_projects():
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert torchext.__version__ == declared[1]


def test_the_package_is_marked_as_typed():
    assert (Path(torchext.__file__).parent / "py.typed").is_file()


def test_every_folder_of_the_package_is_a_package() -> None:
    """setup.py finds only packages, so a wheel would lack the modules of any other folder."""
    folders = {file.parent for file in (ROOT / "torchext").rglob("*.py")}
    assert folders and all((folder / "__init__.py").is_file() for folder in folders)
