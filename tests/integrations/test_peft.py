"""LoRA of peft over FP8 weights: gradients, merging, and that no wide copy of a weight is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.linear_testing import gradient, sqnr
from torchext import dequantize_weights, memory_report, quantize_for_inference
from torchext.nn import FP8Linear

peft = pytest.importorskip("peft")

from torchext.integrations import peft as torchext_peft  # noqa: E402

pytestmark = pytest.mark.slow  # the import of peft


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(128, 256, dtype=torch.bfloat16)
        self.second = nn.Linear(256, 128, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x)))


@pytest.fixture(params=["w8a8", "w8a16"])
def adapted(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    model = Model()
    quantize_for_inference(model, request.param)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["first", "second"])
    model = peft.get_peft_model(model, torchext_peft.over_fp8(config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return model


def x() -> Tensor:
    return torch.randn(16, 128, generator=torch.Generator().manual_seed(1)).bfloat16()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_are_those_of_the_dequantized_model(adapted):
    assert isinstance(adapted.base_model.model.first, torchext_peft.LoraFP8Linear)
    wide = copy.deepcopy(adapted)
    dequantize_weights(wide)
    for parameter in wide.parameters():
        parameter.requires_grad_(parameter.shape[0] == 8 or parameter.shape[-1] == 8)
    with memory_report(adapted) as report:
        adapted(x()).float().square().mean().backward()
    wide(x()).float().square().mean().backward()
    assert len(trained(adapted)) == 4
    for name, parameter in trained(adapted).items():
        assert parameter.dtype == torch.float32
        assert sqnr(gradient(trained(wide)[name]), gradient(parameter)) > 20
    kept = {module.name: module.saved for module in report.modules}
    assert max(kept.values()) < 128 * 256  # less than a byte for each weight


def test_merge_and_unmerge(adapted):
    before = adapted(x()).detach()
    layer = adapted.base_model.model.first
    weight = layer.base_layer.weight.clone()
    adapted.merge_adapter(safe_merge=True)
    assert 0 < layer.merge_errors["default"].of_weight < 0.04
    assert not torch.equal(layer.base_layer.weight, weight)
    assert sqnr(before, adapted(x()).detach()) > 20
    adapted.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, weight)
    assert torch.equal(adapted(x()), before)


def test_merge_and_unload_gives_fp8_layers(adapted):
    before = adapted(x()).detach()
    model = adapted.merge_and_unload()
    assert type(model.first) is FP8Linear
    assert sqnr(before, model(x()).detach()) > 20


def test_trainer_on_an_fp8_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from torchext.integrations import transformers as torchext_transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    wide = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    wide.save_pretrained(tmp_path)
    with torchext_transformers.enable():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            quantization_config=transformers.FineGrainedFP8Config(),
            dtype=torch.bfloat16,
        )
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(model, torchext_peft.over_fp8(lora))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, learning_rate=0.05, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        ids = torch.arange(16)
        data = [{"input_ids": ids, "labels": ids}] * 4
        transformers.Trainer(model, arguments, train_dataset=data).train()
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert isinstance(layer, torchext_peft.LoraFP8Linear)
        lora_b: Any = layer.lora_B["default"]
        assert lora_b.weight.abs().max() > 0.01
        model.eval()
        expected = model(ids[None]).logits.detach()
        merged = model.merge_and_unload()
        assert merged.model.layers[0].self_attn.q_proj.weight.dtype == torch.float8_e4m3fn
        assert sqnr(expected, merged(ids[None]).logits.detach()) > 20


def test_what_cannot_merge(adapted):
    layer = adapted.base_model.model.first
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"adapter must have finite values .*'default'"):
        layer.merge(safe_merge=True)
    layer.lora_bias["default"] = True
    with pytest.raises(NotImplementedError, match="adapter must be plain LoRA without a bias"):
        layer.merge()
