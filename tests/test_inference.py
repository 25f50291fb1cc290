"""quantize_for_inference: what it quantizes, what it leaves alone and says about it, that bytes and
numbers are as promised, and how to get back."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchext
from support.linear_testing import normal, sqnr
from support.op_testing import opcheck
from torchext import convert_to_fp8_training, dequantize_weights, ops, quantize_for_inference
from torchext.nn import FP8Linear
from torchext.nn.frozen_experts import FrozenExperts

E4M3 = torch.float8_e4m3fn


class Experts(nn.Module):
    """SwiGLU experts in two 3-D parameters, under names of their own."""

    def __init__(self, features: int = 128, inner: int = 192, count: int = 4) -> None:
        super().__init__()
        self.out = nn.Parameter(torch.randn(count, features, inner) / inner**0.5)
        self.both = nn.Parameter(torch.randn(count, 2 * inner, features) / features**0.5)

    def forward(self, tokens: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        wide = torch.einsum("tcwk,tk->tcw", self.both[chosen], tokens)
        gate, up = wide.chunk(2, dim=-1)
        return torch.einsum("tcki,tci,tc->tk", self.out[chosen], F.silu(gate) * up, scores)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(128, 4, bias=False)  # a router
        self.gate_proj = nn.Linear(128, 256, bias=False)
        self.up_proj = nn.Linear(128, 256, bias=False)
        self.down_proj = nn.Linear(256, 128)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        weights, ids = self.gate(x).softmax(-1).topk(2)
        return x + self.experts(x, ids, weights)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(128, 512)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().bfloat16().eval()


IDS = torch.arange(12)
PROJECTIONS = [f"blocks.{i}.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")]


def test_w8a8(model):
    expected = model(IDS)
    before = dict(model.named_modules())
    result = quantize_for_inference(model)
    assert set(result.converted) == {*PROJECTIONS, "blocks.0.experts", "blocks.1.experts"}
    assert set(result.converted.values()) == {"w8a8"}
    assert dict(model.named_modules()) == before  # the same objects
    assert "router" in result.skipped["blocks.0.gate"]
    assert "head" in result.skipped["lm_head"]
    assert sqnr(expected, model(IDS)) > 25
    with torch.inference_mode():
        assert sqnr(expected, model(IDS)) > 25
    assert result.fp8_elements == 2 * (3 * 128 * 256 + 3 * 4 * 192 * 128)
    assert result.bytes_after == sum(p.nbytes for p in model.parameters())
    assert result.bytes_after < 0.55 * result.bytes_before
    result.require(0.8)
    with pytest.raises(RuntimeError, match=r"at least 99.0% .*output head"):
        result.require(0.99)
    assert json.loads(result.to_json())["converted"] == dict(result.converted)
    text = str(result)
    assert text.startswith("8 of 11 linear layers hold FP8 weights\nw8a8:\n")
    assert "not a linear layer: embedding: its rows are looked up, not multiplied (" in text
    assert f"bytes of parameters and scales: {result.bytes_after:,}, 0.54 times" in text


def test_w8a16(model):
    """Inputs stay as they are: the result is that of the dequantized weights but for rounding."""
    expected = model(IDS)
    result = quantize_for_inference(model, "w8a16")
    assert set(result.converted) == {*PROJECTIONS, "blocks.0.experts", "blocks.1.experts"}
    assert set(result.converted.values()) == {"w8a16"}
    assert result.bytes_after < 0.55 * result.bytes_before
    assert "mode='w8a16'" in repr(model.blocks[0].experts)
    assert sqnr(expected, model(IDS)) > 28
    y = model(IDS)
    with torch.inference_mode():
        assert torch.equal(model(IDS), y)
    dequantize_weights(model)
    assert sqnr(model(IDS), y) > 40


def test_experts_in_w8a16_read_no_more_than_their_rows():
    """They read no expert without tokens, skip choices of absent experts, and accept no tokens."""
    torch.manual_seed(1)
    experts: Any = Experts(256, 192, 6)
    quantize_for_inference(experts, "w8a16")
    wide = copy.deepcopy(experts).dequantize_()
    x, weights = torch.randn(9, 256), torch.rand(9, 2)
    ids = torch.randint(0, 3, (9, 2)) * 2  # 1, 3 and 5 have none
    assert sqnr(wide(x, ids, weights), experts(x, ids, weights)) > 100  # FP32
    with torch.no_grad():
        experts._parameters["both_scale_inv"][[1, 3, 5]] = torch.nan
    assert experts(x, ids, weights).isfinite().all()
    elsewhere = torch.where(ids == 4, 6, ids)  # as expert parallelism marks them
    kept = torch.where(ids == 4, 0, weights)
    assert torch.equal(experts(x, elsewhere, weights), experts(x, ids, kept))
    assert experts(x[:0], ids[:0], weights[:0]).shape == (0, 256)


def test_state_dict_is_a_checkpoint(model):
    plain = model.state_dict()
    quantize_for_inference(model)
    state = model.state_dict()
    name = "blocks.1.down_proj.weight"
    data, scale = ops.quantize_128x128(plain[name])
    assert torch.equal(state[name].float(), data.float())
    assert torch.equal(state[f"{name}_scale_inv"], scale)
    data, scale = ops.quantize_128x128(plain["blocks.0.experts.both"])
    assert state["blocks.0.experts.both"].dtype == E4M3
    assert torch.equal(state["blocks.0.experts.both"].float(), data.float())
    assert torch.equal(state["blocks.0.experts.both_scale_inv"], scale)
    other = Model().bfloat16().eval()
    quantize_for_inference(other)
    other.load_state_dict(state)
    assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize(("mode", "least"), [("w8a8", 22), ("w8a16", 45)])
def test_gradients_pass_through(model, mode, least):
    """An adapter below frozen experts and layers gets the gradient of the dequantized model."""
    quantize_for_inference(model, mode)
    wide = copy.deepcopy(model)
    dequantize_weights(wide, torch.float32)
    wide.float()
    x = normal(12, 128, device=torch.device("cpu"), grad=True)
    for part in ("experts", "down_proj"):
        x.grad = None
        if part == "experts":
            weights = torch.rand(12, 2).requires_grad_()
            arguments: tuple[Tensor, ...] = (torch.arange(24).view(12, 2) % 4, weights)
        else:
            arguments = ()
        inputs = x if part == "experts" else torch.cat([x, x], -1)
        found = []
        for each in (model, wide):
            y = each.blocks[0].get_submodule(part)(inputs, *arguments)
            leaves = [x, weights] if part == "experts" else [x]
            found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for got, wanted in zip(*found, strict=True):
            assert sqnr(wanted, got) > least


@pytest.mark.parametrize("mode", ["w8a8", "w8a16"])
def test_experts_are_copied_moved_and_pickled(model, mode):
    quantize_for_inference(model, mode)
    experts = model.blocks[0].experts
    assert isinstance(experts, FrozenExperts)
    assert isinstance(experts, Experts)
    x, ids, weights = torch.randn(3, 128), torch.tensor([[0], [3], [3]]), torch.ones(3, 1)
    expected = experts(x, ids, weights)
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts)), experts.half()):
        assert other.both.dtype == E4M3
        assert torch.equal(other(x, ids, weights), expected)
    with pytest.raises(TypeError, match="arguments must be tokens, chosen, scores"):
        experts(x, ids)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["w8a8", "w8a16"])
def test_compiles_to_one_graph(model, mode):
    torch._dynamo.reset()
    quantize_for_inference(model, mode)
    expected = model(IDS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(IDS), expected)


@pytest.mark.slow
def test_the_op_of_experts_in_w8a16_passes_opcheck():
    weight, scale = ops.quantize_128x128(torch.randn(3, 40, 48))
    x, ends = torch.randn(7, 48, requires_grad=True), torch.tensor([2, 2, 6], dtype=torch.int32)
    op = torch.ops.torchext._fp8_linear_by_expert.default
    opcheck(op, (x, weight, scale, ends))
    y = op(x, weight, scale, ends)
    assert torch.equal(y[2:6], ops.fp8_linear(x[2:6], weight[2], scale[2]))
    assert torch.equal(y[6:], torch.zeros(1, 40))
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.equal(dx[6:], torch.zeros(1, 48))
    batch = torch.stack([x, 2 * x]).detach()
    batched = torch.vmap(op, in_dims=(0, None, None, None))(batch, weight, scale, ends)
    assert torch.equal(batched, torch.stack([y, op(batch[1], weight, scale, ends)]))


def test_skip_patterns_match_parts_of_names(model):
    quantize_for_inference(model, skip=["blocks.0", "up_proj", "*.1.down_*"])
    fp8 = {name for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    assert fp8 == {"blocks.1.gate_proj"}  # "gate" is no part of it


def test_skip_reports_what_each_pattern_matched(model):
    result = quantize_for_inference(model, skip=["gate", "lm_head"])
    assert result.matched == {
        "gate": ("blocks.0.gate", "blocks.1.gate"), "lm_head": ("lm_head",)
    }  # fmt: skip
    assert result.skipped["lm_head"] == "skipped by 'lm_head'"
    state = {name: parameter.clone() for name, parameter in Model().state_dict().items()}
    for wrong in (["mlp.gate"], ["lm_heads"], ["blocks.*.q_proj"]):
        plain = Model()
        plain.load_state_dict(state)
        with pytest.raises(ValueError, match=r"skip must have patterns .*which match none of"):
            quantize_for_inference(plain, skip=wrong)
        assert list(plain.state_dict()) == list(state)


def test_a_filter_replaces_the_default(model):
    result = quantize_for_inference(model, module_filter_fn=lambda m, name: name == "lm_head")
    assert list(result.converted) == ["lm_head"]
    assert type(model.lm_head) is FP8Linear


def test_shared_weights_stay_shared():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 128))
    model[2].weight = model[0].weight
    result = quantize_for_inference(model)
    assert model[2].weight is model[0].weight
    assert model[2].weight_scale_inv is model[0].weight_scale_inv
    assert result.fp8_elements == 2 * 128 * 128
    tied = nn.Sequential(nn.Embedding(256, 128), nn.Linear(128, 256))
    tied[1].weight = tied[0].weight
    with pytest.warns(UserWarning, match="shares its weight with an embedding"):
        quantize_for_inference(tied)


def test_a_model_that_trained_in_fp8(model):
    expected = copy.deepcopy(model)
    quantize_for_inference(expected)
    convert_to_fp8_training(model)
    result = quantize_for_inference(model)
    assert len(result.converted) == 8
    assert torch.equal(model(IDS), expected(IDS))
    again = quantize_for_inference(model)
    assert not again.converted
    assert again.skipped["blocks.0.up_proj"] == "holds FP8 weights already"
    assert again.fp8_elements == result.fp8_elements


def test_training_in_fp8_says_what_to_do_first(model):
    quantize_for_inference(model)
    with pytest.warns(UserWarning, match="no parameter of this Model trains in FP8"):
        result = convert_to_fp8_training(model)
    assert "call torchext.dequantize_weights first" in result.skipped["blocks.0.up_proj"]
    dequantize_weights(model)
    assert len(convert_to_fp8_training(model).converted) == 8


def test_dequantize_weights_gives_the_classes_back(model):
    plain = copy.deepcopy(model)
    result = quantize_for_inference(model)
    assert set(dequantize_weights(model)) == set(result.converted)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    state = model.state_dict()
    for name, parameter in plain.state_dict().items():
        assert state[name].dtype == parameter.dtype
        assert sqnr(parameter, state[name]) > 25


def test_what_cannot_be_quantized():
    wrong: Any = 3

    class Conv1D(nn.Module):  # as transformers' layer for GPT-2
        def __init__(self, out_features: int, in_features: int) -> None:
            super().__init__()
            self.nf = out_features
            self.weight = nn.Parameter(torch.randn(in_features, out_features))
            self.bias = nn.Parameter(torch.randn(out_features))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    class Custom(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(128, 128))
    model = nn.ModuleDict(
        {"custom": Custom(128, 128), "norm": parametrized, "transposed": Conv1D(128, 128)}
    )
    with pytest.warns(UserWarning, match="no weight of this ModuleDict is in FP8"):
        result = quantize_for_inference(model)
    assert "own behavior would be lost" in result.skipped["custom"]
    assert "parametrized" in result.skipped["norm"]
    assert result.skipped["transposed"].startswith("Conv1D holds a transposed weight")
    with pytest.raises(TypeError, match="skip must be patterns"):
        quantize_for_inference(model, skip="lm_head")
    with pytest.raises(ValueError, match="mode must be"):
        quantize_for_inference(model, wrong)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        torchext.quantize_for_inference(wrong)
