"""examples/: each runs, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["w8a16", "w8a8"])
def test_serving_a_tiny_model_from_the_cpu(mode: str) -> None:
    for package in ("transformers", "accelerate", "safetensors"):
        pytest.importorskip(package)
    command = [sys.executable, "examples/serve_cpu.py", "--size", "tiny", "--mode", mode]
    command += ["--prompt", "8", "--tokens", "2", "--rounds", "1"]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "weights: 14 quantized, 1 stay wide" in run.stdout
    table = re.findall(
        r"^(\w+) +([\d.]+) tokens/s +([\d.]+) ms to the first token +([\d.]+) MB of weights$",
        run.stdout, re.MULTILINE,
    )  # fmt: skip
    assert [name for name, *_ in table] == ["BF16", "FP8"]
    assert all(float(rate) > 0 and float(first) > 0 for _, rate, first, _ in table)
    share = re.search(r"as fast, in ([\d.]+) times the memory", run.stdout)
    assert share and 0.5 < float(share[1]) < 0.55
    agreement = re.search(r"relative error ([\d.]+), the same .* at (\d+)% of pos", run.stdout)
    assert agreement and 0 < float(agreement[1]) < 0.2 and int(agreement[2]) > 80


@pytest.mark.slow
def test_training_experts_on_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "losses.png"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "examples/train_moe.py", "--steps", "3"]
    command += ["--batch", "4", "--length", "64", "--layers", "1", "--picture", str(picture)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"step +\d+  loss ([\d.]+)", run.stdout)]
    assert len(losses) == 6 and losses[2] < losses[0] and losses[5] < losses[3]
    gap = re.search(r"largest difference of means of 20 steps: ([\d.]+)%", run.stdout)
    assert gap and float(gap[1]) < 3
    share = re.search(r"\(ratio ([\d.]+)\)", run.stdout)
    assert share and 0.5 < float(share[1]) < 0.75
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_overlapping_two_micro_batches(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture, trace = tmp_path / "overlap.png", tmp_path / "trace.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "examples/overlap_moe.py", "--tokens", "32"]
    command += ["--width", "128", "--inner", "128", "--layers", "1"]
    command += ["--picture", str(picture), "--trace", str(trace)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "of all ranks have the same bits: True" in run.stdout
    lines = r"^ *(\w+ward): the (\w+) of (?:tokens|rows), [\d.]+ ms .* for: (\d)$"
    gemms = {(half, what): int(n) for half, what, n in re.findall(lines, run.stdout, re.MULTILINE)}
    # The forward of experts is two GEMMs, their backward four.
    assert gemms["backward", "dispatch"] == 2 and gemms["forward", "return"] == 4
    assert "torchext.moe: starts the dispatch of tokens" in trace.read_text()
    assert picture.stat().st_size > 10_000
