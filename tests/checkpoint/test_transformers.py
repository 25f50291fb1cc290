"""Checkpoints that torchext writes load in transformers and in FP8Linear, with the same bits."""

from __future__ import annotations

import pytest
import torch

import torchext
from support.checkpoint_testing import load, same
from torchext import checkpoint, ops

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers loads FP8 checkpoints with accelerate")
pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
}


def models():
    torch.manual_seed(0)
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    for config in (
        transformers.LlamaConfig(**SIZES),
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
        transformers.Qwen3MoeConfig(**SIZES, **moe),
    ):
        yield transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_written_checkpoints_load(tmp_path):
    for number, model in enumerate(models()):
        wide, target = tmp_path / f"wide{number}", tmp_path / f"fp8-{number}"
        model.save_pretrained(wide)
        result = checkpoint.quantize(wide, target, max_shard_bytes=200_000)
        assert checkpoint.verify(target, original=wide, min_sqnr=29).ok
        # Without a GPU transformers dequantizes while it loads.
        loaded = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
        state = loaded.state_dict()
        checkpoint.dequantize(target, tmp_path / f"back{number}")
        back = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / f"back{number}", dtype=torch.bfloat16
        )
        expected = back.state_dict()
        assert state.keys() == expected.keys() == model.state_dict().keys()
        assert all(same(state[name], expected[name]) for name in state)
        stored = load(wide)
        for name in result.quantized:
            data, scale = ops.quantize_128x128(stored[name])
            if name in state:
                assert same(state[name], ops.dequantize(data, scale, out_dtype=torch.bfloat16))
        wide_names = {name for name in stored if name not in result.quantized}
        assert all(same(state[name], stored[name]) for name in wide_names if name in state)
        assert len(result.quantized) >= 14


def test_exported_weights_are_those_on_disk(tmp_path):
    """From a model in memory, with the experts that transformers holds in 3-D one by one."""
    for number, model in enumerate(models()):
        model.save_pretrained(tmp_path / f"wide{number}")
        checkpoint.quantize(tmp_path / f"wide{number}", tmp_path / f"fp8-{number}")
        stored = load(tmp_path / f"fp8-{number}")
        named = model.state_dict()
        if model.config.tie_word_embeddings:
            del named["lm_head.weight"]
        streamed = dict(checkpoint.quantize_state_dict(named, experts="one_by_one"))
        assert streamed.keys() == stored.keys()
        assert all(same(streamed[name], stored[name]) for name in stored)


def test_fp8_layers_hold_the_bits_on_disk(tmp_path):
    model = next(models())
    model.save_pretrained(tmp_path / "wide")
    checkpoint.quantize(tmp_path / "wide", tmp_path / "fp8")
    stored = load(tmp_path / "fp8")
    torchext.quantize_for_inference(model)
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(same(state[name], stored[name]) for name in stored)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(stored)
    assert all(same(tensor, stored[name]) for name, tensor in model.state_dict().items())
