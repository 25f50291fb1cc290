"""csrc/build: the compiler wrapper rejects bad kernels, and the build finds toolkits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import generations
import nvcc
import toolchain

BUILD = Path(__file__).parents[2] / "csrc" / "build"

CLEAN = """
ptxas info    : Compiling entry function 'good' for 'sm_90a'
ptxas info    : Function properties for good
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers
"""


def test_clean_report_has_no_findings() -> None:
    assert nvcc.findings(CLEAN) == []


@pytest.mark.parametrize(
    "line",
    [
        "    0 bytes stack frame, 8 bytes spill stores, 20 bytes spill loads",
        "    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
    ],
)
def test_spills_and_local_memory_name_the_kernel(line: str) -> None:
    report = CLEAN + f"ptxas info : Compiling entry function 'bad' for 'sm_90a'\n{line}\n"
    (finding,) = nvcc.findings(report)
    assert finding.startswith("bad: ")


@pytest.mark.parametrize("code", ["C7508", "C7510"])
def test_performance_warnings_are_findings(code: str) -> None:
    line = f"ptxas warning : ({code}) Potential Performance Loss: something in 'bad'"
    assert nvcc.findings(CLEAN + line) == [line]


@pytest.mark.skipif(toolchain.find_toolkit() is None, reason="no nvcc")
@pytest.mark.slow
def test_a_spilling_kernel_does_not_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run-time index into a register array puts it in local memory."""
    source = tmp_path / "spill.cu"
    source.write_text(
        'extern "C" __global__ void spill(float* x, int n) {\n'
        "  float v[32];\n"
        "  for (int i = 0; i < n; ++i) v[x[i] > 0 ? i & 31 : 31 - (i & 31)] = x[i];\n"
        "  for (int i = 0; i < n; ++i) x[i] = v[i & 31];\n"
        "}\n"
    )
    toolkit = toolchain.find_toolkit()
    assert toolkit is not None
    monkeypatch.setenv("TORCHEXT_NVCC", str(toolkit.nvcc))
    command = [sys.executable, str(BUILD / "nvcc.py"), "-c", str(source)]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-o", str(tmp_path / "spill.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "error: spill: " in result.stdout
    assert not (tmp_path / "spill.o").exists()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("csrc/gemm/sm90/x.cu", ["arch=compute_90a,code=sm_90a"]),
        ("csrc/gemm/sm80/x.cu", ["arch=compute_80,code=[sm_80,compute_80]"]),
        (
            "csrc/quantize/cuda/x.cu",
            [
                "arch=compute_75,code=[sm_75,sm_80]",
                "arch=compute_89,code=sm_89",
                "arch=compute_90,code=[sm_90,compute_90]",
            ],
        ),
    ],
)
def test_a_folder_says_what_its_kernels_are_compiled_for(source: str, expected: list[str]) -> None:
    assert nvcc.gencodes(Path(source)) == [f"-gencode={option}" for option in expected]


@pytest.mark.skipif(toolchain.find_toolkit() is None, reason="no nvcc")
@pytest.mark.slow
def test_keeps_the_ptx_of_each_architecture_and_the_headers_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "header.cuh").write_text("#define VALUE 1\n")
    source = tmp_path / "portable.cu"
    source.write_text(
        '#include "header.cuh"\nextern "C" __global__ void set(int* x) { *x = VALUE; }\n'
    )
    toolkit = toolchain.find_toolkit()
    assert toolkit is not None
    monkeypatch.setenv("TORCHEXT_NVCC", str(toolkit.nvcc))
    command = [sys.executable, str(BUILD / "nvcc.py"), "-c", str(source), nvcc.BY_FOLDER]
    subprocess.run([*command, "-o", str(tmp_path / "portable.o")], check=True)
    kept = {path.name for path in tmp_path.glob("*.ptx")}
    assert kept == {f"portable.{n}.ptx" for n in nvcc.PORTABLE}
    for n in nvcc.PORTABLE:
        assert f".target sm_{n}\n" in (tmp_path / f"portable.{n}.ptx").read_text()
    assert not nvcc.is_outdated(tmp_path / "portable.o")
    os.utime(tmp_path / "header.cuh", times=(time.time() + 60,) * 2)
    assert nvcc.is_outdated(tmp_path / "portable.o")


# ---- TORCHEXT_ARCHS ----

ROOT = BUILD.parents[1]
KERNELS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/*/*.cu"))


def folders(text: str) -> set[str]:
    """The folders of architectures whose files a value of the variable compiles."""
    chosen = generations.parse(text)
    found = {Path(file).parent.name for file in KERNELS if generations.needs(file, chosen)}
    return {name for name in found if name.startswith("sm")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90a", {"sm90"}), ("9.0", {"sm90"}), ("sm_90a", {"sm90"}), ("75", {"sm75"}),
        ("86", {"sm80"}), ("89", {"sm80", "sm89"}), ("8.0; 90", {"sm80", "sm90"}),
        ("10.0", {"sm80"}), ("100f,75", {"sm75", "sm80"}), ("120", {"sm80", "sm89"}),
        ("", {"sm75", "sm80", "sm89", "sm90"}),
    ],
)  # fmt: skip
def test_chosen_gpus_choose_folders(text: str, expected: set[str]) -> None:
    assert folders(text) == expected


def test_every_file_is_compiled_by_default_and_belongs_to_a_generation() -> None:
    every = generations.parse("")
    assert all(generations.needs(file, every) for file in KERNELS)
    assert generations.portable(every) == nvcc.PORTABLE
    for file in KERNELS:
        assert any(generations.needs(file, (number,)) for number in every), file
    assert all((ROOT / file).is_file() for file in generations.SHARED)


def test_sm89_takes_nothing_of_sm80_but_the_weights_only_products() -> None:
    files = [f for f in KERNELS if "/sm80/" in f and generations.needs(f, generations.parse("89"))]
    assert files == ["csrc/gemm/sm80/mma80_fp8_linear.cu"]


def test_a_gpu_of_no_generation_is_refused() -> None:
    for text in ("95", "hopper", "90x", "90a+ptx"):
        with pytest.raises(ValueError, match=r"TORCHEXT_ARCHS: each GPU must be one of 75, .*got"):
            generations.parse(text)


@pytest.mark.skipif(toolchain.find_toolkit() is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("chosen", "expected"), [("90", {"90"}), ("80", {"75"}), ("75,90", {"75", "90"})]
)
@pytest.mark.slow
def test_portable_kernels_are_compiled_for_the_chosen_generations(
    chosen: str, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "portable.cu"
    source.write_text('extern "C" __global__ void set(int* x) { *x = 1; }\n')
    toolkit = toolchain.find_toolkit()
    assert toolkit is not None
    monkeypatch.setenv("TORCHEXT_NVCC", str(toolkit.nvcc))
    command = [sys.executable, str(BUILD / "generations.py"), chosen, nvcc.BY_FOLDER]
    command += ["-c", str(source), "-o", str(tmp_path / "portable.o")]
    subprocess.run(command, check=True)
    assert {path.name.split(".")[1] for path in tmp_path.glob("*.ptx")} == expected


def test_every_kernel_has_a_stand_in() -> None:
    """Any .cu file may be left out, because what launchers call is also defined in absent.cpp."""
    header = (ROOT / "csrc/gemm/mma/kernels.h").read_text()
    absent = (ROOT / "csrc/gemm/mma/absent.cpp").read_text()
    lists = re.findall(r"^Select(?:Kernel|Linear) (\w+(?:,\s*\w+)*);", header, re.MULTILINE)
    names = re.findall(r"\w+", " ".join(lists))
    assert len(names) == 8
    for name in [*names, "plain_fp8_gemm_nt"]:
        assert f" {name}(" in absent


def test_cuda_home_is_not_second_guessed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolchain.find_toolkit() is None


def test_finds_the_layout_of_nvidias_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "nvidia" / "cu13"
    for file in ("bin/nvcc", "lib/libcudart_static.a"):
        (home / file).parent.mkdir(parents=True)
        (home / file).touch()
    monkeypatch.setattr(toolchain.rule, "_candidates", lambda: [tmp_path / "absent", home])
    found = toolchain.find_toolkit()
    assert found is not None
    assert (found.nvcc, found.library_dir) == (home / "bin/nvcc", home / "lib")


def test_the_build_and_the_simulator_have_one_rule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only the build skips a toolkit with which it could not link."""
    from torchext import _toolchain
    from torchext.sim import compiler

    assert str(toolchain.rule.__file__) == _toolchain.__file__
    assert compiler.find_toolkit is _toolchain.find_toolkit
    compiles_only, links = tmp_path / "compiles", tmp_path / "links"
    for home in (compiles_only, links):
        (home / "bin").mkdir(parents=True)
        (home / "bin" / "nvcc").touch()
    (links / "lib64").mkdir()
    (links / "lib64" / "libcudart_static.a").touch()
    for rule in (toolchain.rule, _toolchain):
        monkeypatch.setattr(rule, "_candidates", lambda: [tmp_path, compiles_only, links])
    assert compiler.find_nvcc() == compiles_only / "bin" / "nvcc"
    assert toolchain.find_toolkit().nvcc == links / "bin" / "nvcc"


def test_packages_of_the_compiler_are_searched_newest_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for folder in ("cu12", "cu13", "cudnn"):
        (tmp_path / "nvidia" / folder).mkdir(parents=True)
    monkeypatch.setattr(toolchain.rule, "installed_site_packages", lambda: [tmp_path])
    assert toolchain.rule._candidates()[-2:] == [tmp_path / "nvidia/cu13", tmp_path / "nvidia/cu12"]
