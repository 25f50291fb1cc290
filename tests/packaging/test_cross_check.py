"""The CPU kernels, compiled without torch and checked element by element, on every level of this
machine; and what tools/cross_check.py says if it cannot run."""

import re
import subprocess

import pytest

import cross_check


@pytest.mark.slow
def test_kernels_of_every_level_are_right(capfd):
    assert cross_check.main(["native"]) == 0
    output = capfd.readouterr().out
    assert "0 failures" in output
    checked = re.findall(r"^(gemm|quantize) (\w+): (\d+) ", output, re.M)
    ran = {(what, name) for what, name, _ in checked}
    assert {("gemm", "portable"), ("quantize", "portable"), ("quantize", "tiles")} <= ran
    assert all(int(count) > 100 for _, _, count in checked)


@pytest.mark.slow
@pytest.mark.skipif(
    bool(cross_check.missing(cross_check.TARGETS["aarch64"])), reason="no cross compiler or qemu"
)
def test_every_kernel_compiles_for_aarch64(tmp_path):
    """`make cross-check` also compiles the rest of the library, and runs the program."""
    compiler = cross_check.TARGETS["aarch64"].compiler
    for source in cross_check.kernel_sources():
        subprocess.run(
            [compiler, "-fsyntax-only", *cross_check.FLAGS, *cross_check.include_flags(), source],
            check=True,
        )


def test_a_missing_tool_is_named_with_its_package(monkeypatch, capsys):
    monkeypatch.setattr(cross_check.shutil, "which", lambda name: None)
    assert cross_check.main(["aarch64"]) == 2
    message = capsys.readouterr().err
    assert "aarch64 needs aarch64-linux-gnu-g++, qemu-aarch64" in message
    assert "apt-get install g++-aarch64-linux-gnu qemu-user" in message


def test_sources_that_do_not_compile_fail(monkeypatch, tmp_path, capsys):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main() { return missing; }")
    monkeypatch.setattr(cross_check, "ROOT", tmp_path)
    monkeypatch.setattr(cross_check, "kernel_sources", lambda: [broken])
    assert cross_check.main(["native"]) == 1
    assert "missing" in capsys.readouterr().err


def test_the_library_is_what_a_build_without_nvcc_compiles():
    library = {str(path.relative_to(cross_check.ROOT)) for path in cross_check.library_sources()}
    assert {"csrc/ops.cpp", "csrc/gemm/gemm.cpp", "csrc/quantize/quantize.cpp"} <= library
    assert "csrc/runtime/cuda_device.cpp" not in library
    for source in cross_check.NEED_TORCH:
        assert source in library
