"""python -m torchext.checkpoint, the reports, and how patterns match."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from support.checkpoint_testing import load, save
from torchext import checkpoint
from torchext._patterns import Patterns
from torchext.checkpoint.__main__ import main


def test_the_commands(tmp_path, capsys):
    tensors = {
        "model.embed_tokens.weight": torch.randn(300, 128).bfloat16(),
        "model.layers.0.mlp.gate.weight": torch.randn(8, 128).bfloat16(),
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.randn(128, 128).bfloat16(),
        "model.layers.1.mlp.up_proj.weight": torch.randn(128, 128).bfloat16(),
    }
    wide, target = save(tmp_path / "wide", tensors, tie_word_embeddings=True), tmp_path / "fp8"
    command = ["convert", str(wide), str(target), "--to", "fp8", "--keep", "layers.1"]
    assert main([*command, "--max-shard-size", "10KB"]) == 0
    out, err = capsys.readouterr()
    assert not err  # no progress bar without a terminal
    assert "weights: 1 quantized, 3 stay wide" in out
    assert "pattern 'layers.1': 1 matched: model.layers.1.mlp.up_proj" in out
    assert main(["inspect", str(target), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "fine-grained FP8" and found["block_sizes"] == [[128, 128]]
    assert (
        found["scale_dtypes"] == {"F32": 1} and found["experts"] == "one by one, gate and up apart"
    )
    assert found["patterns"]["lm_head"] == ["lm_head"]  # tied, so in no file
    assert found["bytes"] == sum(tensor.nbytes for tensor in load(target).values())
    assert main(["inspect", str(target)]) == 0
    out = capsys.readouterr().out
    assert "scales: 1 F32; 1 by block, blocks of 128x128" in out
    assert "pattern 'model.layers.1.mlp.up_proj': 1 matched" in out
    assert main(["verify", str(target), "--original", str(wide), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["ok"] and len(verified["errors"]) == 1
    assert main(["verify", str(target), "--original", str(wide), "--min-sqnr", "60"]) == 1
    assert capsys.readouterr().out.endswith("1 problems\n")
    assert main(command) == 1
    assert "fp8 must not exist" in capsys.readouterr().err
    assert main(["convert", str(target), str(tmp_path / "back"), "--to", "bf16"]) == 0
    assert load(tmp_path / "back").keys() == tensors.keys()


@pytest.mark.slow
def test_the_module_runs(tmp_path):
    wide = save(tmp_path / "wide", {"a.up.weight": torch.randn(128, 128)})
    run = subprocess.run(
        [sys.executable, "-m", "torchext.checkpoint", "inspect", str(wide)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.startswith(f"{wide}: wide\ntensors: 1 in 1 files\n") and not run.stderr


def test_a_terminal_gets_a_progress_bar(tmp_path, monkeypatch, capsys):
    wide = save(tmp_path / "wide", {"a.up.weight": torch.randn(128, 128)})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    checkpoint.quantize(wide, tmp_path / "fp8")
    assert "[##############################] 0.00 of 0.00 GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "pattern, name, matches",
    [
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_up_proj", False),
        ("model.layers.1", "model.layers.10.mlp", False),
        ("model.layers.1", "model.language_model.layers.1", False),
        ("layers.1", "model.language_model.layers.1.mlp.up", True),
        ("visual", "model.visual.blocks.0.fc1", True),
        ("layers.*.mlp", "model.layers.3.mlp.up", True),
        ("layers.*.up", "model.layers.3.mlp.up", False),
        ("gate*", "a.gate_up_proj", True),
        ("layers.[0-2].up", "layers.1.up", True),
        ("layers.[!0-2].up", "layers.1.up", False),
        ("layers.?.up", "layers.10.up", False),
        ("a+b", "a+b", True),
        ("lm_head.weight", "lm_head", True),
        ("re:.*gate$", "model.mlp.gate", True),
        ("re:gate$", "model.mlp.gate", False),
    ],
)
def test_patterns(pattern, name, matches):
    patterns = Patterns([pattern], "test: patterns")
    assert (patterns.match(name) == pattern) == matches
    assert patterns.unmatched == ([] if matches else [pattern])


# In a process of its own: its peak counts pages of mapped files, too.
PEAK = """
import json, resource, sys
import torch, torchext
from torchext import checkpoint
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, source, target = sys.argv[1:]
checkpoint.quantize(small, small + "-fp8")  # what is loaded at first use does not count
torch.ones(1 << 12).sum()
before = most()
checkpoint.quantize(source, target + "-fp8", max_shard_bytes=40_000_000)
checkpoint.verify(target + "-fp8", original=source)
checkpoint.dequantize(target + "-fp8", target + "-wide", max_shard_bytes=40_000_000)
print(most() - before)
"""


@pytest.mark.slow
def test_peak_memory(tmp_path):
    """One weight fills its file, which is the largest."""
    largest = 4096 * 8192 * 2
    tensors = {"a.up.weight": torch.randn(4096, 8192).bfloat16()}
    tensors |= {f"layers.{i}.up.weight": torch.randn(2048, 2048).bfloat16() for i in range(4)}
    source = save(tmp_path / "wide", tensors, shards=2)
    save(tmp_path / "small", {"up.weight": torch.randn(128, 128).bfloat16()})
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "small", source, tmp_path / "big"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(run.stdout) < 1.2 * largest
