"""Checkpoints of a few tensors, and what their FP8 weights are in plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FINE_GRAINED: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def save(
    folder: Path,
    tensors: dict[str, Tensor],
    quantization: dict[str, Any] | None = None,
    shards: int = 1,
    **config: Any,
) -> Path:
    """Writes `tensors` into `shards` files with config.json and a tokenizer."""
    folder.mkdir()
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[shard::shards]}
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(name).clone() for name in handle.offset_keys()}
    return tensors


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def fp8(*shape: int) -> Tensor:
    """Random finite e4m3 values."""
    return (torch.randn(shape) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)


def scales(*shape: int) -> Tensor:
    """Random positive powers of two, which every dtype of scales holds."""
    return torch.exp2(torch.randint(-9, -3, shape).float())


def spread(scale: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    """[rows, columns] float32: the scale of each element."""
    wide = scale.float().repeat_interleave(block[0], -2)[..., :rows, :]
    return wide.repeat_interleave(block[1], -1)[..., :columns]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether dtypes, shapes and bits agree."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
