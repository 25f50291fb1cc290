"""The levels of the CPU kernels, and TORCHEXT_CPU, the environment variable that chooses one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import torchext

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


def test_a_lower_level_can_be_forced() -> None:
    assert output(REPORT, TORCHEXT_CPU="portable").endswith("those for portable")


def test_aten_s_variable_lowers_the_level() -> None:
    assert output(REPORT, ATEN_CPU_CAPABILITY="default").endswith("those for portable")


def test_a_level_that_the_machine_lacks_is_an_error() -> None:
    other = "avx2" if os.uname().machine == "aarch64" else "neon"
    expected = "torchext: TORCHEXT_CPU must name a level of this machine: portable"
    for wanted in (other, "fastest"):
        for script in (REPORT, CALL):
            message = output(script, TORCHEXT_CPU=wanted)
            assert message.startswith(expected)
            assert message.endswith(f"(got {wanted}); unset it to use the best")


ROOT = Path(__file__).parents[1]
NUMERICS = [
    *("quantize/test_quantize.py", "quantize/test_dequantize.py", "gemm/test_fp8_gemm.py"),
    *("gemm/test_cpu_gemm.py", "gemm/test_grouped.py", "gemm/test_fused.py"),
    *("activation/test_activation.py", "norm/test_norm_quantize.py", "norm/test_norm_backward.py"),
]


@pytest.mark.slow
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_bf16", "amx", "neon"])
def test_every_level_passes_the_tests_of_results(level: str) -> None:
    reason = output(REPORT, TORCHEXT_CPU=level)
    if "must name a level of this machine" in reason:
        pytest.skip(f"this machine lacks {level}")
    files = [f"tests/{name}" for name in NUMERICS]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files],
        env={**os.environ, "TORCHEXT_CPU": level},
        check=False, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
