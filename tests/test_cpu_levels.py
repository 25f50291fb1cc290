"""The levels of the CPU kernels, and TORCHEXT_CPU, the environment variable that chooses one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import cpu_levels
import torchext

LEVELS = ["portable", "avx2", "avx512", "avx512_bf16", "amx", "neon"]
REPORT = "import torchext; print(torchext.is_available('cpu').reason)"
CALL = """
import torch, torchext
try:
    torchext.ops.quantize_1x128(torch.ones(1, 128))
except ValueError as error:
    print(error)
"""


def output(script: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.strip()


def test_the_level_in_use_is_named() -> None:
    answer = torchext.is_available("cpu")
    assert answer.ok
    assert answer.reason.startswith("CPU kernels are part of every build; this process uses ")


@pytest.mark.slow
def test_a_lower_level_can_be_forced() -> None:
    assert output(REPORT, TORCHEXT_CPU="portable").endswith("those for portable")


def test_aten_s_variable_lowers_the_level() -> None:
    assert output(REPORT, ATEN_CPU_CAPABILITY="default").endswith("those for portable")


@pytest.mark.slow
def test_a_level_that_the_machine_lacks_is_an_error() -> None:
    other = "avx2" if os.uname().machine == "aarch64" else "neon"
    expected = "torchext: TORCHEXT_CPU must name a level of this machine: portable"
    for wanted in (other, "fastest"):
        for script in (REPORT, CALL):
            message = output(script, TORCHEXT_CPU=wanted)
            assert message.startswith(expected)
            assert message.endswith(f"(got {wanted}); unset it to use the best")


@pytest.mark.slow
def test_the_lower_levels_are_listed_for_the_makefile() -> None:
    """`make test-cpu-levels` runs the tests of ops at each of them."""
    lower = cpu_levels.lower_levels()
    assert lower == sorted(lower, key=LEVELS.index)
    in_use = torchext.is_available("cpu").reason.rpartition(" ")[2]
    assert in_use not in lower and ("portable" in lower or in_use == "portable")


def test_a_library_that_lists_no_levels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_levels, "answer", lambda level: "uses those for portable")
    with pytest.raises(RuntimeError, match="must refuse TORCHEXT_CPU=none"):
        cpu_levels.lower_levels()
