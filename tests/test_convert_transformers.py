"""convert_to_fp8_training on tiny random models of transformers: what converts, how close outputs
and gradients are to FP32 and BF16, that they learn, and that unconvert restores them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from support.linear_testing import sqnr
from torchext import convert_to_fp8_training, memory_report, unconvert

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

VOCABULARY = 512
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 128}
DECODER = {f"{module}_proj": 2 for module in ("q", "k", "v", "o", "gate", "up", "down")}
# Family: configuration, model, and how many layers with each last part of their name convert.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, int]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED, DECODER),
    "Mistral": ("MistralConfig", "MistralForCausalLM", GROUPED, DECODER),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**SIZES, "num_key_value_heads": 2}, {}),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED, DECODER),
    "Gemma": ("GemmaConfig", "GemmaForCausalLM", GROUPED, DECODER),
    "GPT-2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 64},
        {"c_attn": 2, "c_proj": 4, "c_fc": 2},
    ),
    "BERT": ("BertConfig", "BertForMaskedLM", SIZES, {}),
    "ViT": (
        "ViTConfig",
        "ViTForImageClassification",
        {**SIZES, "image_size": 32, "patch_size": 8, "num_labels": 16},
        {},
    ),
}
# Configurations differ in which sizes they take.
UNUSED = {"ViT": ("vocab_size", "max_position_embeddings")}
every_family = pytest.mark.parametrize("family", FAMILIES)


def make(family: str) -> Any:
    config, model, sizes, _ = FAMILIES[family]
    sizes = {name: size for name, size in sizes.items() if name not in UNUSED.get(family, ())}
    made = getattr(transformers, config)(**sizes)
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop",
                 "hidden_dropout_prob", "attention_probs_dropout_prob"):  # fmt: skip
        if hasattr(made, name):
            setattr(made, name, 0.0)
    torch.manual_seed(0)
    return getattr(transformers, model)(made)


def batch(family: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if family == "ViT":
        return {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.arange(4)}
    tokens = torch.randint(VOCABULARY, (4, 32))
    return {"input_ids": tokens, "labels": tokens}


def step(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of all matrices."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.dim() == 2}
    return output.logits.detach(), grads


@every_family
def test_close_to_wide_trains_and_comes_back(family):
    wide, inputs = make(family), batch(family)
    model = copy.deepcopy(wide)
    state = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    result = convert_to_fp8_training(model)
    # Only a head, the patch embedding and look-ups stay wide.
    result.require(0.8, of="flops")
    counts = FAMILIES[family][3]
    for last, count in counts.items():
        assert sum(name.endswith(f".{last}") for name in result.converted) == count
    assert not counts or len(result.converted) == sum(counts.values())
    assert list(model.state_dict()) == list(state)

    exact, exact_grads = step(wide, inputs)
    logits, grads = step(model, inputs)
    rounded, rounded_grads = step(wide.bfloat16(), _bfloat16(inputs))
    assert sqnr(exact, logits) > 20 and sqnr(exact, rounded) > sqnr(exact, logits)
    for name, expected in exact_grads.items():
        assert sqnr(expected, grads[name]) > 8, name
        assert sqnr(expected, rounded_grads[name].float()) > 8, name

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]

    trained = copy.deepcopy(model.state_dict())
    assert unconvert(model) == result.converted
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    plain = make(family)
    plain.load_state_dict(trained)
    assert torch.equal(plain(**inputs).logits, model(**inputs).logits)


def _bfloat16(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.bfloat16() if t.is_floating_point() else t for n, t in inputs.items()}


def test_saved_bytes_of_a_decoder():
    model, inputs = make("Llama").bfloat16(), batch("Llama")
    with memory_report(model) as wide:
        model(**inputs).loss.backward()
    convert_to_fp8_training(model)
    with memory_report(model) as fp8:
        model(**inputs).loss.backward()
    assert fp8.saved < wide.saved and fp8.parameters == wide.parameters
