"""What torchext.checkpoint refuses, and what a conversion leaves behind when it ends early."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoint_testing import FINE_GRAINED, config_of, fp8, load, same, save, scales
from torchext import checkpoint
from torchext.checkpoint import CheckpointError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def sound(folder: Path, **changes: torch.Tensor | None) -> Path:
    """A fine-grained checkpoint of two files; `changes` replaces or removes tensors."""
    tensors = {
        "a.up.weight": fp8(256, 192),
        "a.up.weight_scale_inv": scales(2, 2),
        "a.down.weight": fp8(192, 200),
        "a.down.weight_scale_inv": scales(2, 2),
        "lm_head.weight": torch.randn(300, 192).bfloat16(),
        "norm.weight": torch.ones(192),
    }
    tensors = {n: t for n, t in (tensors | changes).items() if t is not None}
    quantization = FINE_GRAINED | {"modules_to_not_convert": ["lm_head"]}
    return save(folder, tensors, quantization, shards=2)


def edit_index(folder: Path, **weight_map: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= weight_map
    index["weight_map"] = {n: file for n, file in index["weight_map"].items() if file}
    (folder / INDEX).write_text(json.dumps(index))


def edit_config(folder: Path, **quantization: object) -> None:
    config = config_of(folder)
    config["quantization_config"] |= quantization
    (folder / "config.json").write_text(json.dumps(config))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"dtype"', b'"dtipe"'))


FILES = {  # what makes a folder unreadable, and the error
    "truncated": (lambda f: truncate(f / SECOND), rf"{SECOND} must be a whole .*truncated"),
    "damaged": (lambda f: damage(f / FIRST), rf"{FIRST} must be a whole safetensors file"),
    "missing file": (lambda f: (f / SECOND).unlink(), rf"{SECOND} must exist"),
    "name in no file": (
        lambda f: edit_index(f, ghost=FIRST), rf"ghost of {INDEX} must be in {FIRST}"
    ),
    "name not in the index": (
        lambda f: edit_index(f, **{"norm.weight": None}),
        rf"norm\.weight in {SECOND} must be in {INDEX}",
    ),
    "name of another file": (
        lambda f: edit_index(f, **{"norm.weight": FIRST}), rf"norm\.weight in {SECOND} .*{FIRST}"
    ),
    "file elsewhere": (lambda f: edit_index(f, ghost="../x"), r"ghost of .*beside the index"),
    "twice": (lambda f: (f / INDEX).unlink() or (f / "z.safetensors").write_bytes(
        (f / FIRST).read_bytes()), r"in z\.safetensors must be in one file only"),
    "index": (lambda f: (f / INDEX).write_text("{"), rf"{INDEX} must be JSON"),
    "config": (lambda f: (f / "config.json").write_text("[]"), r"config\.json must hold a JSON ob"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_unreadable_folders(tmp_path, case):
    edit, message = FILES[case]
    folder = sound(tmp_path / "fp8")
    assert checkpoint.verify(folder).ok
    edit(folder)
    for function in (checkpoint.inspect, checkpoint.verify):
        with pytest.raises(CheckpointError, match=message):
            function(folder)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.dequantize(folder, tmp_path / "wide")
    assert sorted(tmp_path.iterdir()) == [folder]


NAN_BYTES = fp8(256, 192).view(torch.uint8).index_fill(1, torch.tensor([7]), 0xFF)


def with_values(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


SATURATED = torch.zeros(256, 192)
SATURATED[128:, :128] = -448

# Changed tensors, changes of quantization_config, the error, and whether `inspect` sees it.
CONTENTS: dict[str, tuple[dict[str, Any], dict[str, Any], str, bool]] = {
    "no scale": (
        {"a.up.weight_scale_inv": None}, {}, r"a\.up\.weight in .* must have a scale", True
    ),
    "no weight": (
        {"a.up.weight": None}, {}, r"a\.up\.weight_scale_inv in .* must belong to an FP8", True
    ),
    "wide weight": (
        {"a.up.weight": torch.randn(256, 192)}, {},
        r"a\.up\.weight_scale_inv in .*\(got a\.up\.weight \(F32 \[256, 192\]\)\)", True,
    ),
    "shape": (
        {"a.up.weight_scale_inv": scales(2, 1)}, {}, r"a\.up\.weight_scale_inv in .*shape", True
    ),
    "block size": ({}, {"weight_block_size": [64, 64]}, r"weight_scale_inv in .*\[64, 64\]", True),
    "dtype of scales": (
        {"a.up.weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, {}, r"dtype of scales", True
    ),
    "vector": (
        {"a.b.weight": fp8(3), "a.b.weight_scale_inv": scales(1)}, {},
        r"a\.b\.weight in .*matri", True,
    ),
    "pattern": (
        {}, {"modules_to_not_convert": ["lm_head", "u"]}, r"\(got 'u', which matches none", True
    ),
    "kept wide, they say": (
        {}, {"modules_to_not_convert": ["lm_head", "a.up"]},
        r"a\.up\.weight in .*must be wide", True,
    ),
    "NaN scale": (
        {"a.up.weight_scale_inv": with_values(scales(2, 2), torch.nan)}, {},
        r"a\.up\.weight_scale_inv in .* must have finite scales above 0", False,
    ),
    "zero scale": (
        {"a.up.weight_scale_inv": with_values(scales(2, 2), 0.0)}, {}, r"such as 0\.0", False
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENTS)
def test_unsound_contents(tmp_path, case):
    tensors, quantization, message, seen = CONTENTS[case]
    folder = sound(tmp_path / "fp8", **tensors)
    edit_config(folder, **quantization)

    def found(report):
        return any(re.search(message, problem) for problem in report.problems)

    assert found(checkpoint.inspect(folder)) == seen
    assert found(checkpoint.verify(folder))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.dequantize(folder, tmp_path / "wide")
    assert not (tmp_path / "wide").exists()


VALUES = {  # what only `verify` looks for: conversions keep the bytes
    "NaN weight": (
        {"a.up.weight": NAN_BYTES.view(torch.float8_e4m3fn)},
        r"a\.up\.weight in .* must be finite \(got 256 elements",
    ),
    "saturated": (
        {"a.up.weight": SATURATED.to(torch.float8_e4m3fn)},
        r"a\.up\.weight in .*saturated.*\(got 1 of 128x128, .* row 128, column 0",
    ),
    "not powers of two": (
        {"a.up.weight_scale_inv": with_values(scales(2, 2), 0.3)}, r"must have powers of two.*got 1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_values_that_verify_finds(tmp_path, case):
    tensors, message = VALUES[case]
    folder = sound(tmp_path / "fp8", **tensors)
    edit_config(folder, scale_fmt="ue8m0")
    (problem,) = checkpoint.verify(folder).problems
    assert re.search(message, problem)


def test_verify_compares_with_the_original(tmp_path):
    tensors = {"a.up.weight": torch.randn(128, 192), "a.down.weight": torch.randn(192, 128)}
    save(tmp_path / "wide", tensors)
    checkpoint.quantize(tmp_path / "wide", tmp_path / "fp8")
    found = load(tmp_path / "fp8")
    found["a.up.weight_scale_inv"] *= 200
    save(tmp_path / "wrong", found, FINE_GRAINED)
    result = checkpoint.verify(tmp_path / "wrong", original=tmp_path / "wide")
    assert [error.name for error in result.errors] == ["a.up.weight", "a.down.weight"]
    assert result.errors[0].sqnr < 0 and 29 < result.errors[1].sqnr < 34
    assert len(result.problems) == 1 and "a.up.weight must be within 25 dB" in result.problems[0]
    save(tmp_path / "other", {"a.up.weight": torch.randn(64, 192)})
    result = checkpoint.verify(tmp_path / "fp8", original=tmp_path / "other")
    assert "a.down.weight" in result.problems[0] and "(got none)" in result.problems[0]
    assert "a.up.weight" in result.problems[1] and "(got [64, 192])" in result.problems[1]


def test_patterns_and_names_of_quantize(tmp_path):
    wide = save(tmp_path / "wide", {"a.mlp.gate_up_proj.weight": torch.randn(256, 128)})
    with pytest.raises(CheckpointError, match=r"modules_to_not_convert .*'mlp\.gate', which"):
        checkpoint.quantize(wide, tmp_path / "fp8", modules_to_not_convert=["mlp.gate"])
    pairs = load(wide)
    with pytest.raises(CheckpointError, match=r"'mlp\.gate', which matches none"):
        list(checkpoint.quantize_state_dict(pairs, modules_to_not_convert=["mlp.gate"]))
    with pytest.raises(TypeError, match=r"must be patterns of names \(got"):
        checkpoint.quantize(wide, tmp_path / "fp8", modules_to_not_convert="lm_head")
    with pytest.raises(ValueError, match=r"or regular expressions after re:"):
        checkpoint.quantize(wide, tmp_path / "fp8", modules_to_not_convert=["re:("])
    with pytest.raises(
        ValueError, match=r"experts must be one of 'keep', 'one_by_one', .*\(got 'x'"
    ):
        checkpoint.quantize(wide, tmp_path / "fp8", experts="x")
    with pytest.raises(CheckpointError, match=r"must have weights to convert to fp8"):
        checkpoint.quantize(wide, tmp_path / "fp8", modules_to_not_convert=["a.*.gate_*"])
    with pytest.raises(CheckpointError, match=r"must not exist \(got a folder\)"):
        checkpoint.quantize(wide, wide)
    assert sorted(tmp_path.iterdir()) == [wide]
    checkpoint.quantize(
        wide, tmp_path / "fp8", modules_to_not_convert=["mlp.gate"], allow_unmatched=True
    )
    with pytest.raises(CheckpointError, match=r"a\.mlp\.gate_up_proj\.weight in .*must be wide to"):
        checkpoint.quantize(tmp_path / "fp8", tmp_path / "again")
    broken = save(tmp_path / "nan", {"a.up.weight": torch.full((128, 128), torch.nan)})
    with pytest.raises(
        CheckpointError, match=r"a\.up\.weight in model\.safetensors must be finite"
    ):
        checkpoint.quantize(broken, tmp_path / "again")
    with pytest.raises(CheckpointError, match=r"a\.up\.weight must be finite"):
        list(checkpoint.quantize_state_dict(load(broken)))


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    tensors = {f"layers.{i}.up.weight": torch.randn(128, 128) for i in range(4)}
    wide = save(tmp_path / "wide", tensors)
    run = checkpoint.steps.Quantize.run
    seen: list[str] = []

    def interrupted(step, *args):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(step.source.name)
        run(step, *args)

    arguments = {"source": wide, "target": tmp_path / "fp8", "max_shard_bytes": 20_000}
    monkeypatch.setattr(checkpoint.steps.Quantize, "run", interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        checkpoint.quantize(**arguments)
    notes = getattr(stopped.value, "__notes__", ["2 of 4 files are finished; run the same"])
    assert "2 of 4 files are finished" in notes[0] and "run the same" in notes[0]
    partial = tmp_path / "fp8.partial"
    assert not (tmp_path / "fp8").exists()
    assert len(list(partial.glob("*.safetensors"))) == 2
    monkeypatch.setattr(checkpoint.steps.Quantize, "run", run)
    with pytest.raises(CheckpointError, match=r"fp8\.partial must hold the beginning of this"):
        checkpoint.quantize(**arguments, pow2_scale=True)
    finished = {file: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    truncate(partial / "model-00002-of-00004.safetensors")  # by a crash of the machine
    result = checkpoint.quantize(**arguments)
    assert result.resumed_files == 1 and result.files == 4 and not partial.exists()
    first = tmp_path / "fp8/model-00001-of-00004.safetensors"
    assert first.stat().st_mtime_ns == finished[partial / first.name]
    streamed, stored = dict(checkpoint.quantize_state_dict(tensors)), load(tmp_path / "fp8")
    assert streamed.keys() == stored.keys()
    assert all(same(streamed[name], stored[name]) for name in stored)


def test_a_missing_safetensors_is_named(tmp_path, monkeypatch):
    wide = save(tmp_path / "wide", {"up.weight": torch.randn(128, 128)})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install safetensors"):
        checkpoint.inspect(wide)
