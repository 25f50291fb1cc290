"""The environment variable TORCHEXT_CPU, which chooses the level of the CPU kernels."""

from __future__ import annotations

import os
import subprocess
import sys

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
