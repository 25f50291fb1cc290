"""The logger "torchext": silent unless asked; conversions, forced kernels, the library."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

import torchext
from torchext import gemm_selection


def model():
    return torch.nn.ModuleDict(
        {"up": torch.nn.Linear(128, 256), "lm_head": torch.nn.Linear(256, 128)}
    )


def test_it_is_silent_by_default():
    script = (
        "import torch, torchext; "
        "torchext.convert_to_fp8_training(torch.nn.Sequential(torch.nn.Linear(128, 256)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == run.stderr == ""


def test_loading_says_what_was_loaded():
    script = "import logging; logging.basicConfig(level=logging.INFO); import torchext"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stderr.startswith("INFO:torchext:loaded ")
    assert "_C.so, built with" in run.stderr and torch.__version__ in run.stderr


def test_conversions_say_how_many_layers_and_which_not(caplog):
    converted = model()
    with caplog.at_level(logging.DEBUG, "torchext"):
        torchext.convert_to_fp8_training(converted)
        torchext.revert_to_linear(converted)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        (
            "INFO",
            "convert_to_fp8_training: converted 1 of 2 linear layers of ModuleDict, recipe "
            "blockwise",
        ),
        (
            "DEBUG",
            "convert_to_fp8_training: skipped lm_head: output head: its error goes straight into "
            "the loss",
        ),
        ("INFO", "revert_to_linear: 1 layers of ModuleDict"),
    ]


def test_forced_paths_are_recorded(caplog):
    with caplog.at_level(logging.INFO, "torchext"), gemm_selection.forced_path("sm80"):
        assert not caplog.records  # logged at DEBUG only
    with caplog.at_level(logging.DEBUG, "torchext"), gemm_selection.forced_path("sm80"):
        pass
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["GEMMs run the sm80 kernels", "GEMMs run the kernels of the GPU"]


@pytest.mark.parametrize("training", [True, False])
def test_calls_record_nothing(training, caplog):
    with caplog.at_level(logging.DEBUG, "torchext"):
        layer = torchext.nn.Linear(128, 256).train(training)
        layer(torch.randn(2, 128)).sum().backward()
    assert not caplog.records
