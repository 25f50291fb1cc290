"""A short run of the demonstration learns, compares and reports; its text and model are sound."""

from __future__ import annotations

import pytest
import torch

from torchext.demo.__main__ import main
from torchext.demo.data import batches, standard_library
from torchext.demo.model import ByteTransformer
from torchext.demo.report import gap
from torchext.demo.train import Run


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr("torchext.demo.__main__.BATCH", 4)
    monkeypatch.setattr("torchext.demo.__main__.LENGTH", 64)


@pytest.mark.slow
@pytest.mark.usefixtures("small_batches")
@pytest.mark.large
def test_short_run(device, tmp_path, capsys):
    plot = tmp_path / "folder" / "loss.png"
    code = main(["--steps", "12", "--device", device.type, "--plot", str(plot)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "step   12/12" in printed
    assert "21 of 22 linear layers train in FP8" in printed
    assert "left alone: output head" in printed
    assert "fused: SwiGLU with FP8 between its GEMMs\n  blocks.*.mlp (3)" in printed
    kernels = "silu_mul_backward_quantize_1x128_dual x 3, silu_mul_quantize_1x128 x 3"
    assert kernels in printed and " quantize_1x128_dual x 18" in printed
    assert "fused: RMSNorm quantizes its result\n  blocks.*.attention_norm (3)" in printed
    assert "rms_norm_quantize_1x128_dual x 7" in printed
    assert "final gap: " in printed and "no verdict on fewer than 300 steps" in printed
    saved = next(line for line in printed.splitlines() if line.startswith("saved for backward"))
    assert float(saved.split()[-1].rstrip("%")) < -45  # against BF16
    rows = {line[:20].strip(): line[20:].split() for line in printed.splitlines()}
    assert int(rows["kernels of one step"][2]) < int(rows["before fusing"][0])
    assert rows["time of one step"][1::2][:3] == ["ms"] * 3
    losses = [line.split() for line in printed.splitlines() if " steps  " in line]
    assert [row[0] for row in losses] == ["0", "12"]
    assert float(losses[-1][3]) < float(losses[0][3]) - 1
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.usefixtures("small_batches")
@pytest.mark.large
@pytest.mark.slow
def test_a_large_gap_fails(device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchext.demo.__main__.gap", lambda reference, other: 0.011)
    monkeypatch.setattr("torchext.demo.__main__.LEAST_STEPS", 1)
    code = main(["--steps", "1", "--device", device.type, "--plot", str(tmp_path / "loss.png")])
    assert code == 1
    assert "final gap: +1.10%, NOT within 1%" in capsys.readouterr().out


def test_gap_is_of_the_last_held_out_loss():
    reference, fp8 = (Run(name, [], {}, 0, {}, 0, 0.0) for name in ("fp32", "fp8"))
    reference.held_out, fp8.held_out = {0: 5.0, 10: 2.0}, {0: 5.0, 10: 1.98}
    assert gap(reference, fp8) == pytest.approx(-0.01)


def test_steps_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        main(["--steps", "0"])
    assert "--steps must be at least 1 (got 0)" in capsys.readouterr().err


def test_text_is_the_same_each_time_and_split_by_file():
    first, second = standard_library(), standard_library()
    assert torch.equal(first.train, second.train) and torch.equal(first.held_out, second.held_out)
    assert first.num_files > 300 and len(first.train) > 3_000_000
    assert 0.05 < len(first.held_out) / len(first.train) < 0.25
    some = batches(first.train, 3, 2, 16, seed=1)
    assert some.shape == (3, 2, 17) and some.dtype == torch.int64
    assert torch.equal(some, batches(first.train, 3, 2, 16, seed=1))
    assert not torch.equal(some, batches(first.train, 3, 2, 16, seed=2))


def test_no_sources_on_disk_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"standard library as \.py files in .*\(got 0 files\)"
    ):
        standard_library()


def test_model_size_and_causality():
    torch.manual_seed(0)
    model = ByteTransformer().eval()
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 2.5e6
    tokens = torch.randint(256, (2, 32))
    changed = tokens.clone()
    changed[:, 20:] = 7
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert before.shape == (2, 32, 256)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])
