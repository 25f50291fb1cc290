"""`python -m torchext.collect_env` prints what a bug report needs."""

from __future__ import annotations

import subprocess
import sys

import torch

import torchext
from torchext import collect_env
from torchext._architectures import built_paths


def test_the_report_has_the_versions_and_what_works():
    run = subprocess.run(
        [sys.executable, "-m", "torchext.collect_env"], capture_output=True, text=True, check=True
    )
    assert f"torchext: {torchext.__version__}" in run.stdout
    assert f"PyTorch version: {torch.__version__}" in run.stdout
    assert f"GEMM kernels: {', '.join(built_paths()) or 'those of the CPU'}\n" in run.stdout
    for feature, answer in torchext.is_available().items():
        assert f"available: {feature}: {answer}" in run.stdout


def test_variables_that_matter_are_listed(monkeypatch):
    monkeypatch.setenv("TORCHEXT_ANYTHING", "1")
    monkeypatch.setenv("UNRELATED", "1")
    found = collect_env.variables()
    assert found["TORCHEXT_ANYTHING"] == "1"
    assert "UNRELATED" not in found


def test_a_failing_import_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchext", None)  # `import torchext` raises ImportError
    found = collect_env.facts()
    assert "ImportError" in found["import"] or "ModuleNotFoundError" in found["import"]
    assert "PTX for" in found
