"""Rehearsals of the comparisons with a GPU, in which the simulator takes the GPU's place."""

from __future__ import annotations

import pytest
import torch

from tests.hardware import bits, tensor_core

pytest.importorskip("torchext._sim")


def test_every_case_can_be_made():
    """Every op accepts its sample; one configuration stands for all."""
    names = set()
    for case in bits.every_case(132):
        assert case.name not in names
        names.add(case.name)
        if case.configuration is None or "seed 1" in case.name:
            assert bits.run_on(case, "cpu", 132), case.name


def test_a_difference_is_found_and_described():
    case = next(case for case in bits.every_case(132) if case.op == "quantize_rowwise")
    right = bits.run_on(case, "cpu", 132)
    wrong = [t.clone() for t in right]
    wrong[0].view(torch.uint8)[2, 3] ^= 1
    found, (text,) = bits.compare("sim", wrong, right, [None, None], case)
    assert found and "1 of" in text and "first at [2, 3]" in text
    assert bits.compare("sim", right, right, [None, None], case) == (False, [])
    strided = [right[0].t().contiguous().t(), right[1]]
    assert bits.compare("sim", strided, right, [None, None], case)[0]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["bits", "tensor_core"])
def test_rehearsal(program, tmp_path, monkeypatch, capsys):
    options = {
        "bits": ["--jobs", "1", "--only", "quantize_rowwise one row"],
        "tensor_core": ["--ctas", "1", "--only", "f32.e4m3.e4m3"],
    }[program]
    arguments = [program, "--device", "cpu", "--out", str(tmp_path), *options]
    monkeypatch.setattr("sys.argv", arguments)
    assert {"bits": bits, "tensor_core": tensor_core}[program].main() == 0, capsys.readouterr().out
    text = (tmp_path / f"{program}.txt").read_text()
    assert {"bits": "1 cases: 1 ok", "tensor_core": "0 of 30 cases differ"}[program] in text
