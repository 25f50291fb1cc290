"""The wheel is complete, and its op library works with any Python and any supported torch."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import old_libraries
from support.cuda_stubs import write_stubs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.alone  # builds in the tree, on all cores
OTHER_TORCH = "2.10.0"  # the oldest supported

# A program for the environment with the other torch: every kind of op once, with its results.
SMOKE = """
import concurrent.futures, pathlib, sys, torch, torch._vmap_internals, torchext
assert torch.__version__.startswith(sys.argv[1]), torch.__version__
package = pathlib.Path(torchext.__file__).parent
assert "site-packages" in str(package), package
assert (pathlib.Path(torchext.get_include()) / "ptx/isa/wgmma.h").exists()
torch.manual_seed(0)
x, w = torch.randn(65, 200), torch.randn(150, 200)
a, b = torchext.ops.quantize_1x128(x), torchext.ops.quantize_128x128(w)
y = torchext.ops.fp8_gemm_nt(*a, *b, out_dtype=torch.float32)
exact = (
    torchext.ops.dequantize(*a, out_dtype=torch.float32).double()
    @ torchext.ops.dequantize(*b, out_dtype=torch.float32).double().T
)
assert (y - exact).abs().max() < 1e-3 * exact.abs().max()
model = torchext.convert_to_fp8_training(torch.nn.Sequential(torch.nn.Linear(256, 128))).model
model(torch.randn(8, 256)).square().mean().backward()
assert model[0].weight.grad.isfinite().all() and type(model[0]) is torchext.nn.Linear
# Batched gradients, in another thread as on CUDA. They rely on private functions of torch.
x = torch.randn(2, 256, requires_grad=True)
y, dys = model(x), torch.randn(3, 2, 128)
pull = lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0]
with concurrent.futures.ThreadPoolExecutor(1) as thread:
    batched = torch._vmap_internals._vmap(lambda dy: thread.submit(pull, dy).result())(dys)
torch.testing.assert_close(batched, torch.stack([pull(dy) for dy in dys]))
try:
    torchext.ops.quantize_1x128(x.double())
except TypeError as error:
    assert "quantize_1x128" in str(error)
else:
    raise AssertionError("float64 was accepted")
print("smoke passed")
"""


def test_contents(wheel: Path) -> None:
    assert re.fullmatch(r"torchext_fp8-[\d.]+-py3-none-manylinux_2_28_x86_64\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "torchext/_C.so" in names
    assert "torchext/py.typed" in names
    for header in (ROOT / "ptx" / "isa").glob("*.h"):
        assert f"torchext/include/ptx/isa/{header.name}" in names
    assert {n.split("/")[0] for n in names if not re.match(r"torchext_fp8-.*\.dist-info/", n)} == {
        "torchext"
    }


def test_carries_the_ptx_of_every_kernel(wheel: Path) -> None:
    """With nvcc, each architecture has each of its kernels once, and the GEMMs made for it."""
    archive = zipfile.ZipFile(wheel)
    entries: dict[str, list[str]] = {}
    for name in archive.namelist():
        if match := re.fullmatch(r"torchext/_ptx/(\w+)/\w+\.ptx\.gz", name):
            text = gzip.decompress(archive.read(name)).decode()
            assert f".target sm_{match[1]}" in text
            entries.setdefault(match[1], []).extend(re.findall(r"\.visible \.entry (\w+)\(", text))
    gemms = {"75": "plain", "80": "mma80", "89": "mma89", "90": None, "90a": "sm90"}
    assert entries.keys() == gemms.keys()
    for architecture, kernels in entries.items():
        assert len(kernels) == len(set(kernels))
        families = {kernel.partition("_fp8_gemm_nt")[0] for kernel in kernels if "gemm" in kernel}
        assert families == ({gemms[architecture]} if gemms[architecture] else set())
        assert ("quantize_1x128_bf16_e4m3" in kernels) == (architecture in ("75", "89", "90"))


def test_is_small_enough(wheel: Path) -> None:
    """On disk, and unpacked (most PTX text is compressed within the wheel, too)."""
    assert wheel.stat().st_size < 40_000_000
    assert sum(entry.file_size for entry in zipfile.ZipFile(wheel).infolist()) < 60_000_000


def test_binaries_run_on_old_systems(wheel: Path, tmp_path: Path) -> None:
    """auditwheel has accepted the wheel; this also finds symbols that need a newer system and have
    no version, which it does not see."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    binaries = list(tmp_path.glob("torchext/*.so"))
    assert len(binaries) == 2
    for binary in binaries:
        assert old_libraries.too_new(binary) == []


def test_versions_are_compared_by_their_numbers() -> None:
    assert old_libraries.is_old("GLIBC_2.2.5") and old_libraries.is_old("GLIBC_2.28")
    assert not old_libraries.is_old("GLIBC_2.29") and not old_libraries.is_old("GLIBC_2.34")
    assert old_libraries.is_old("GLIBCXX_3.4.9") and not old_libraries.is_old("GLIBCXX_3.4.26")
    assert not old_libraries.is_old("GLIBC_PRIVATE")


def test_library_depends_on_no_python_and_no_cuda(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extract("torchext/_C.so", tmp_path)
    library = str(tmp_path / "torchext/_C.so")
    dynamic = subprocess.run(
        ["readelf", "-dW", library], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed
    assert not [n for n in needed if re.match(r"lib(python|torch_python|cuda|cudart)", n)], needed
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in undefined.splitlines()]
    assert not [n for n in names if re.match(r"_?Py[A-Z_]|cu[A-Z]|cuda[A-Z]", n)]


def test_an_isolated_build_uses_the_installed_torch(tmp_path: Path) -> None:
    """A user's `pip install .` up to the metadata; the isolated environment has and fetches no
    torch."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "-vv"]
    command += ["--ignore-installed", "--target", str(tmp_path), str(ROOT)]
    of_user = {name: value for name, value in os.environ.items() if name != "TORCHEXT_WERROR"}
    result = subprocess.run(command, env=of_user, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Would install torchext-fp8-" in result.stdout
    assert not re.search(r"(Collecting|Installing collected packages:.*) ?\btorch\b", result.stdout)


@pytest.mark.slow
def test_runs_on_another_torch(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "other"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "--no-deps", f"torch=={OTHER_TORCH}", str(wheel)], check=True)
    # The dependencies that `import torch` needs, except CUDA's.
    subprocess.run(
        [*pip, "typing_extensions", "filelock", "sympy", "networkx", "jinja2", "fsspec", "numpy"],
        check=True,
    )
    (torch_lib,) = environment.glob("lib/python*/site-packages/torch/lib")
    write_stubs(torch_lib, tmp_path / "stubs")
    result = subprocess.run(
        [python, "-c", SMOKE, OTHER_TORCH],
        cwd=tmp_path,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path / "stubs")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "smoke passed" in result.stdout
