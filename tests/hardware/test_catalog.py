"""gpu_check and the soak call every op of the catalog, also ops that they do not name."""

from __future__ import annotations

import dataclasses
import random

import pytest

from benchmarks.selection import NoSelection
from tests.hardware.gpu_check import op_calls
from tests.hardware.soak import __main__ as soak
from tests.hardware.soak import jobs
from tests.hardware.soak.operands import Lab
from torchext import ops
from torchext._catalog import CATALOG


@pytest.fixture
def new_op(monkeypatch):
    """Adds an entry for an op that no program names."""
    entry = dataclasses.replace(CATALOG["quantize_1x128"], name="new_op")
    monkeypatch.setitem(CATALOG, "new_op", entry)


def test_gpu_check_calls_a_new_op(new_op):
    labels = CATALOG["new_op"].samples
    assert [call for call in op_calls.every_call() if "new_op" in call] == [
        f"new_op {label}" for label in labels
    ]


def test_the_soak_draws_a_new_op(new_op, monkeypatch):
    monkeypatch.setattr(ops, "new_op", ops.quantize_1x128, raising=False)
    monkeypatch.setattr(jobs, "MAKERS", ())
    monkeypatch.setattr(jobs, "ops_without_a_maker", lambda: ["new_op"])
    job = jobs.draw(Lab("cpu", NoSelection()), random.Random(0))
    assert job.name.startswith("new_op ")
    outputs = job.call()
    with pytest.raises(AttributeError, match="new_op"):  # torchext.reference has none
        job.bound(outputs)


def test_the_soak_refuses_an_op_without_a_job(monkeypatch, capsys):
    monkeypatch.setattr(ops, "OPS", (*ops.OPS, "new_op"))
    assert soak.main(["--device", "cpu", "--minutes", "0"]) == 2
    assert "soak: every op" in (said := capsys.readouterr().err) and "(none draws new_op)" in said
