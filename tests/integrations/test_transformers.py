"""FP8 models of transformers on torchext's kernels: quantized on the fly and loaded from files in
the layout of released checkpoints, with experts in every implementation; bits that save_pretrained
writes, gradients for adapters, and that everything is undone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from support.linear_testing import gradient, sqnr
from torchext import ops
from torchext.integrations import _transformers_names

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from transformers import AutoModelForCausalLM, FineGrainedFP8Config  # noqa: E402

from torchext.integrations.transformers import _linear, enable  # noqa: E402

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 64,
}
MIXTURE = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "Qwen3-MoE, I = 128": ("Qwen3MoeConfig", {**MIXTURE, "moe_intermediate_size": 128}),
    "Qwen3-MoE, I = 64": ("Qwen3MoeConfig", {**MIXTURE, "moe_intermediate_size": 64}),
}
IDS = torch.arange(12)[None]


class Quantized(NamedTuple):
    model: Any
    logits: Tensor  # of `model`
    wide: Any  # the BF16 model that it was made of
    folder: Path


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    name, options = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**options)
    wide = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for parameter in wide.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_()  # norms and biases, which are constant otherwise
    folder = tmp_path_factory.mktemp("wide")
    wide.save_pretrained(folder)
    with enable():
        model = load(folder, quantization_config=FineGrainedFP8Config())
        yield Quantized(model, model(IDS).logits.detach(), wide, folder)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def test_quantized_on_the_fly(quantized: Quantized) -> None:
    assert sqnr(quantized.wide(IDS).logits.detach(), quantized.logits) > 18
    state, wide = quantized.model.state_dict(), quantized.wide.state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    data, scale = ops.quantize_128x128(wide[name])
    assert torch.equal(bits(state[name]), bits(data))
    assert torch.equal(state[f"{name}_scale_inv"], scale)
    matrices = [p for n, p in quantized.model.named_parameters() if ".layers." in n and p.dim() > 1]
    assert sum(p.dtype == torch.float8_e4m3fn for p in matrices) >= 6


def test_save_pretrained_writes_the_same_bits(quantized: Quantized, tmp_path: Path) -> None:
    quantized.model.save_pretrained(tmp_path)
    again = load(tmp_path)
    state, expected = again.state_dict(), quantized.model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(bits(state[name]), bits(tensor))
    assert torch.equal(again(IDS).logits, quantized.logits)
    made = again.generate(IDS, max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 15)
    assert made[0, 12] == quantized.logits[0, -1].argmax()


def test_every_implementation_of_experts(quantized: Quantized) -> None:
    if not hasattr(quantized.model.config, "num_experts"):
        pytest.skip("has no experts")
    model = quantized.model
    before = model.config._experts_implementation
    for name in ("eager", "batched_mm", "grouped_mm", "deepgemm"):
        model.set_experts_implementation(name)
        assert sqnr(quantized.logits, model(IDS).logits.detach()) > 40
    model.set_experts_implementation(before)


def test_files_in_the_layout_of_released_checkpoints(quantized: Quantized, tmp_path: Path) -> None:
    """Experts one by one, gate and up apart."""
    state = quantized.model.state_dict()
    files: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, last = name.rpartition(".experts.")
        if not path:
            files[name] = tensor
            continue
        projection, suffix = last.removesuffix("_scale_inv"), "weight"
        if last.endswith("_scale_inv"):
            suffix += "_scale_inv"
        for expert, matrix in enumerate(tensor):
            parts = {projection: matrix}
            if projection == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            for part, values in parts.items():
                files[f"{path}.experts.{expert}.{part}.{suffix}"] = values.contiguous()
    safetensors_torch.save_file(files, tmp_path / "model.safetensors")
    config = json.loads(quantized.model.config.to_json_string())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(bits(tensor), bits(state[name]))
    assert torch.equal(loaded(IDS).logits, quantized.logits)


def test_gradients_reach_what_is_below(quantized: Quantized) -> None:
    """Those of the model whose weights are dequantized."""
    inputs = quantized.wide.get_input_embeddings()(IDS).detach()
    found = []
    for model in (quantized.model, quantized.wide):
        x = inputs.clone().requires_grad_()
        model(inputs_embeds=x).logits.float().square().mean().backward()
        found.append(gradient(x))
        model.zero_grad()
    assert sqnr(found[1], found[0]) > 15


def test_compiles_to_one_graph(quantized: Quantized) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(quantized.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS).logits, quantized.logits)


def test_weights_only(quantized: Quantized) -> None:
    wide = quantized.wide(IDS).logits.detach()
    with enable("w8a16"):
        logits = quantized.model(IDS).logits.detach()
    assert sqnr(wide, logits) > sqnr(wide, quantized.logits)
    assert torch.equal(quantized.model(IDS).logits, quantized.logits)


def test_everything_is_undone() -> None:
    names = _transformers_names.find()
    functions = names.fp8.ALL_FP8_EXPERTS_FUNCTIONS
    owners = (names.fp8, names.fp8.Fp8Quantize, names.quantizer)
    before = [dict(vars(owner)) for owner in owners]
    mappings = dict(functions)
    handle = enable()
    with enable("w8a16"):
        assert names.fp8.fp8_linear is not before[0]["fp8_linear"]
    handle.disable()
    handle.disable()
    assert [dict(vars(owner)) for owner in owners] == before
    assert dict(functions) == mappings


def test_a_name_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8 = _transformers_names.find().fp8
    monkeypatch.delattr(fp8, "_apply_if_grad")
    monkeypatch.setattr(fp8, "fp8_linear", lambda x, weight: x)
    with pytest.raises(ImportError) as raised:
        enable()
    text = str(raised.value)
    assert "without transformers.integrations.finegrained_fp8._apply_if_grad" in text
    assert "finegrained_fp8.fp8_linear with ('input', 'weight'" in text
    assert f"install transformers=={_transformers_names.TESTED}" in text


def test_scales_of_activations_and_of_whole_weights() -> None:
    x, w = torch.randn(5, 256), torch.randn(130, 256)
    expected = x @ w.t()
    blocks = ops.quantize_128x128(w)
    whole = ops.quantize_tensorwise(w)
    static = x.abs().max().view(()) / 448
    for (data, scale), size in ((blocks, (128, 128)), (whole, None)):
        given = scale.view(()) if size is None else scale.to(torch.bfloat16)
        for activation in (None, static):
            assert sqnr(expected, _linear("w8a8", x, data, given, size, None, activation)) > 24


def test_errors() -> None:
    x, (data, scale) = torch.randn(5, 256), ops.quantize_128x128(torch.randn(128, 256))
    with pytest.raises(NotImplementedError, match=r"weight must be .*got torch.int8, such as FP4"):
        _linear("w8a8", x, data.view(torch.int8), scale, (128, 128))
    with pytest.raises(NotImplementedError, match=r"weight_block_size must be .*\(64, 64\)"):
        _linear("w8a8", x, data, scale, (64, 64))
    mode: Any = "w4a4"
    with pytest.raises(ValueError, match="enable: mode must be"):
        enable(mode)
