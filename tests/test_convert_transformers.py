"""convert_to_fp8_training on tiny random models of transformers, and on one with torchtitan's
structure: what converts, how close outputs and gradients are to float64 and BF16, that they learn,
under checkpointing and torch.compile, too, and that files and unconvert give plain models back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.linear_testing import sqnr
from torchext import convert_to_fp8_training, memory_report, quantize_for_inference, unconvert

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
MIXTURE = {
    **GROUPED,
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
LATENT = {
    **SIZES,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}
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
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        MIXTURE,
        {**{f"{module}_proj": 2 for module in ("q", "k", "v", "o")}, "experts": 2},
    ),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        LATENT,
        {
            **{f"q_{half}_proj": 2 for half in "ab"},
            **{"kv_a_proj_with_mqa": 2, "kv_b_proj": 2, "o_proj": 2, "experts": 1},
            **{f"mlp.{module}_proj": 1 for module in ("gate", "up", "down")},
            **{f"shared_experts.{module}_proj": 1 for module in ("gate", "up", "down")},
        },
    ),
    "torchtitan": ("", "", {}, {**dict.fromkeys(("wq", "wk", "wv", "wo", "w1", "w2", "w3"), 2)}),
    "BERT": ("BertConfig", "BertForMaskedLM", SIZES, {}),
    "ViT": (
        "ViTConfig",
        "ViTForImageClassification",
        {**SIZES, "image_size": 32, "patch_size": 8, "num_labels": 16},
        {},
    ),
}
# These modules run fused.
FUSED: dict[str, list[str]] = {
    "Gemma": ["GEGLU"] * 2,
    "GPT-2": ["GELU"] * 2,
    "Qwen3-MoE": ["SwiGLU experts"] * 2,
    "DeepSeek-V3": ["SwiGLU", "SwiGLU", "SwiGLU experts"],
    "BERT": ["GELU"] * 2,
    "ViT": ["GELU"] * 2,
}
# Configurations differ in which sizes they take.
UNUSED = {"ViT": ("vocab_size", "max_position_embeddings")}
every_family = pytest.mark.parametrize("family", FAMILIES)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in "qkvo")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (2, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.feed_forward = FeedForward(width, inner)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Output(NamedTuple):
    logits: Tensor
    loss: Tensor


class Titan(nn.Module):
    """A model of the user's own, with the structure and the names of torchtitan's Llama 3."""

    def __init__(self, layers: int, width: int = 128, inner: int = 256) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleDict({str(i): Block(width, inner) for i in range(layers)})
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, VOCABULARY, bias=False)
        self.call: Callable[..., Any] = Titan.call_layer

    @staticmethod
    def call_layer(layer: nn.Module, x: Tensor) -> Any:
        return layer(x)

    def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
        self.call = functools.partial(checkpoint, **options)

    def gradient_checkpointing_disable(self) -> None:
        self.call = Titan.call_layer

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.tok_embeddings(input_ids)
        for layer in self.layers.values():
            x = self.call(layer, x)
        logits = self.output(self.norm(x))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return Output(logits, loss)


def make(family: str, layers: int = 2) -> Any:
    if family == "torchtitan":
        torch.manual_seed(0)
        return Titan(layers)
    config, model, sizes, _ = FAMILIES[family]
    sizes = {**sizes, "n_layer" if family == "GPT-2" else "num_hidden_layers": layers}
    sizes = {name: size for name, size in sizes.items() if name not in UNUSED.get(family, ())}
    made = getattr(transformers, config)(**sizes)
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop",
                 "hidden_dropout_prob", "attention_probs_dropout_prob"):  # fmt: skip
        if hasattr(made, name):
            setattr(made, name, 0.0)
    torch.manual_seed(0)
    made = getattr(transformers, model)(made)
    if family == "GPT-2":
        made.loss_type = "ForCausalLM"  # Dynamo cannot trace the warning that it is unset
    return made


def in_float64(family: str, model: Any) -> Any:
    model = copy.deepcopy(model)
    if "experts" in FAMILIES[family][3]:  # torch's grouped products refuse float64
        model.set_experts_implementation("eager")
    return model.double()


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
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.dim() >= 2}
    return output.logits.detach(), grads


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}


@every_family
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_")
def test_close_to_wide_trains_and_comes_back(family, tmp_path):
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
    norms = {name for name, m in wide.named_modules() if type(m).__name__.endswith("Norm")}
    assert norms and norms <= result.fused.keys()
    fused = [kind for name, kind in result.fused.items() if name not in norms]
    assert sorted(fused) == FUSED.get(family, ["SwiGLU"] * 2)

    exact, exact_grads = step(in_float64(family, wide), cast(inputs, torch.float64))
    logits, grads = step(model, inputs)
    rounded, rounded_grads = step(wide.bfloat16(), cast(inputs, torch.bfloat16))
    assert sqnr(exact, logits) > 20 and sqnr(exact, rounded) > sqnr(exact, logits)
    for name, expected in exact_grads.items():
        # Some tokens go to other experts, which changes gradients, the router's most.
        limit = 5 if name.endswith("mlp.gate.weight") else 8 if "experts" in counts else 12
        assert sqnr(expected, grads[name]) > limit, name
        assert sqnr(expected, rounded_grads[name].float()) > limit, name

    for use_reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert_same(step(model, inputs), (logits, grads))
    model.gradient_checkpointing_disable()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]

    trained = copy.deepcopy(model.state_dict())
    if family != "torchtitan":
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).train()
    assert unconvert(model) == result.converted
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    plain = make(family)
    plain.load_state_dict(trained)
    expected = plain(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    if family != "torchtitan":
        assert [type(module) for module in loaded.modules()] == kinds
        assert torch.equal(loaded(**inputs).logits, expected)


def assert_same(got: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    assert torch.equal(got[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.equal(got[1][name], gradient), name


@every_family
def test_compiled_in_one_graph(family):
    """A compiled model runs MLPs and norms fused, to the bits of the eager model."""
    model, inputs = make(family, layers=2 if family == "DeepSeek-V3" else 1), batch(family)
    convert_to_fp8_training(model)
    expected = step(model, inputs)
    torch._dynamo.reset()
    # What AOTAutograd sees differs between these families alone.
    backend = "aot_eager" if family in ("Llama", "GPT-2", "Qwen3-MoE", "BERT") else "eager"
    model.compile(fullgraph=True, backend=backend)
    assert_same(step(model, inputs), expected)


def test_experts_with_other_layouts():
    """Llama 4's are called without choices; GPT-OSS's have biases."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_local_experts": 4}
    llama = transformers.models.llama4.modeling_llama4.Llama4TextExperts(
        transformers.Llama4TextConfig(**sizes)
    )
    for parameter in llama.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(12, 128)
    expected = llama(x)
    convert_to_fp8_training(llama).require(1.0)
    assert sqnr(expected, llama(x)) > 20
    quantize_for_inference(llama, "w8a16").require(1.0)
    assert sqnr(expected, llama(x)) > 25
    gpt = transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts(
        transformers.GptOssConfig(**sizes)
    )
    model = nn.ModuleDict({"experts": gpt, "linear": nn.Linear(128, 128)})
    wide = quantize_for_inference(model).wide
    assert "besides the matrices of experts: gate_up_proj_bias, down_proj_bias" in wide[0].reason


def test_saved_bytes_of_a_decoder():
    model, inputs = make("Llama").bfloat16(), batch("Llama")
    with memory_report(model) as wide:
        model(**inputs).loss.backward()
    convert_to_fp8_training(model)
    with memory_report(model) as fp8:
        model(**inputs).loss.backward()
    # Attention, the head and the loss keep what they did, and are large in so small a model.
    assert fp8.saved < 0.85 * wide.saved and fp8.parameters == wide.parameters
