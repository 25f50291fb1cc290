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


def models_that_blocks_do_not_divide():
    """DeepSeek-V3 with kv_a_proj_with_mqa of 576 rows, and Qwen3-MoE with experts of 192."""
    torch.manual_seed(0)
    deepseek = {
        "q_lora_rank": 192,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "qk_nope_head_dim": 64,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 192,
        "first_k_dense_replace": 1,
    }
    sizes = SIZES | {"num_key_value_heads": 2, "intermediate_size": 320}
    for config in (
        transformers.DeepseekV3Config(**sizes, **deepseek),
        transformers.Qwen3MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=192
        ),
    ):  # fmt: skip
        yield transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_sizes_that_blocks_do_not_divide(tmp_path):
    """transformers' own dequantization fails for these, or takes other blocks."""
    for number, model in enumerate(models_that_blocks_do_not_divide()):
        wide, target, back = (tmp_path / f"{name}{number}" for name in ("wide", "fp8", "back"))
        model.save_pretrained(wide)
        result = checkpoint.quantize(wide, target, max_shard_bytes=400_000)
        assert checkpoint.verify(target, original=wide, min_sqnr=29).ok
        stored, written = load(wide), load(target)
        for name in result.quantized:
            data, scale = ops.quantize_128x128(stored[name])
            assert same(written[name], data) and same(written[f"{name}_scale_inv"], scale)
        kv = [name for name in result.quantized if "kv_a_proj" in name]
        assert all(written[f"{name}_scale_inv"].shape == (5, 2) for name in kv)
        assert bool(kv) == (number == 0)
        checkpoint.dequantize(target, back)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.bfloat16)
        state = loaded.state_dict()
        # transformers holds the experts in 3-D; so does torchext if it is asked
        checkpoint.dequantize(target, tmp_path / f"3d{number}", experts="stacked")
        stacked = load(tmp_path / f"3d{number}")
        experts = [name for name in stacked if name.endswith("experts.gate_up_proj")]
        assert experts
        assert all(same(state[name], tensor) for name, tensor in stacked.items())


def test_exported_weights_are_those_that_training_multiplied(tmp_path):
    """An engine in BF16 gets the FP8 weights that a layer in BF16 trains with."""
    torch.manual_seed(0)
    master = torch.nn.Linear(320, 200)
    trained = torch.nn.Linear(320, 200, dtype=torch.bfloat16)
    trained.load_state_dict(master.state_dict())
    layer = torchext.nn.Linear.convert_(trained)
    with torchext.fixed_weights(layer), torch.no_grad():
        layer(torch.randn(4, 320, dtype=torch.bfloat16))
        operand = layer._weight_cache.operand(layer.weight, layer.recipe, transposed=False)
        assert operand is not None and operand.data is not None and operand.scale is not None
    named = {f"up_proj.{name}": tensor for name, tensor in master.state_dict().items()}
    exported = dict(checkpoint.quantize_state_dict(named, wide_dtype=torch.bfloat16))
    assert same(exported["up_proj.weight"], operand.data)
    assert same(exported["up_proj.weight_scale_inv"], operand.scale)
    served = torchext.nn.FP8Linear.from_tensors(
        exported["up_proj.weight"], exported["up_proj.weight_scale_inv"], exported["up_proj.bias"]
    )
    x = torch.randn(4, 320, dtype=torch.bfloat16)
    assert torch.equal(served(x), layer(x))


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
