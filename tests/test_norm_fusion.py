"""Norms of any class are recognized by what they compute, fused in place, and given back."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.linear_testing import OpCounter
from torchext import Recipe, convert_to_fp8_training, unconvert
from torchext._norm_fusion import NormRoles, recognize_norm

K = 160


class Llama(nn.Module):
    """As in transformers: rounds before it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(K))
        self.variance_epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class Gemma(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.zeros(K))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class Hidden(nn.Module):
    """Its eps is no attribute, and its parameters have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(K))
        self.gamma = nn.Parameter(torch.ones(K))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-12) * self.gamma + self.beta


RECOGNIZED: dict[str, tuple[Any, NormRoles]] = {
    "torch, RMSNorm": (
        nn.RMSNorm(K),
        NormRoles("rms_norm", False, "weight", None, "eps", True),
    ),
    "torch, LayerNorm": (
        nn.LayerNorm(K),
        NormRoles("layer_norm", False, "weight", "bias", "eps", True),
    ),
    "Llama": (
        Llama(),
        NormRoles("rms_norm", False, "weight", None, "variance_epsilon", False),
    ),
    "Gemma": (Gemma(), NormRoles("rms_norm", True, "weight", None, "eps", True)),
    "eps in the code": (
        Hidden(),
        NormRoles("layer_norm", False, "gamma", "beta", 1e-12, False),
    ),
}
recognized = pytest.mark.parametrize("name", RECOGNIZED)


@recognized
def test_recognized(name):
    module, roles = RECOGNIZED[name]
    state = torch.get_rng_state()
    assert recognize_norm(module) == roles
    with torch.device("meta"):
        assert recognize_norm(copy.deepcopy(module).to("meta")) == roles
    assert torch.equal(torch.get_rng_state(), state)
    assert recognize_norm(module, {K + 1}) is None


class L2(Llama):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True) * self.weight


class Clamped(Llama):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-20, 20))


class OtherAxis(Llama):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-2, keepdim=True) + 1e-5) * self.weight


class Gated(Llama):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


class Scale(Llama):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


OTHERS = {
    "no mean": L2(),
    "clamped": Clamped(),
    "another axis": OtherAxis(),
    "two inputs": Gated(),
    "a scale": Scale(),
    "a linear layer": nn.Linear(1, K),
    "no weight": nn.RMSNorm(K, elementwise_affine=False),
    "two dimensions": nn.LayerNorm((2, K)),
    "a batch norm": nn.BatchNorm1d(K),
    "children": nn.Sequential(nn.RMSNorm(K)),
}


@pytest.mark.parametrize("module", OTHERS.values(), ids=OTHERS)
def test_left_alone(module):
    assert recognize_norm(module) is None


# ---- in a converted model ----


def model_of(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(norm), nn.Linear(K, 128), nn.RMSNorm(128))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@recognized
def test_converted_and_back(name):
    model = model_of(RECOGNIZED[name][0])
    plain, norm = copy.deepcopy(model), model[0]
    hidden = plain[0](x := torch.randn(3, K))
    result = convert_to_fp8_training(model)
    kinds = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}
    assert result.fused == {"0": kinds[RECOGNIZED[name][1].kind]}
    assert "quantizes its result\n  0\n" in str(result)
    assert model[0] is norm and type(norm).__name__ == type(plain[0]).__name__
    torch.testing.assert_close(norm(x), hidden)
    with OpCounter() as counter:
        y = model(x)
    assert counter.of("rms_norm_quantize_1x128_dual", "layer_norm_quantize_1x128_dual") == 1
    assert counter.of("quantize_1x128_dual") == 0

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), y) and type(again[0]) is type(norm)
    assert list(model.state_dict()) == list(plain.state_dict())

    assert unconvert(model) == ("1",)
    assert model[0] is norm and type(norm) is type(plain[0])
    assert vars(norm).keys() == vars(plain[0]).keys()
    assert torch.equal(model(x), plain(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma", "eps in the code"])
def test_compiled_in_one_graph(name):
    model = model_of(RECOGNIZED[name][0])
    x = torch.randn(3, K)
    expected = model[0](x)
    convert_to_fp8_training(model)
    compiled = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_dtype_of_the_result_stays():
    """Llama's norm returns FP32 if the weight is FP32, Gemma's does not."""
    x = torch.randn(3, K).bfloat16()
    for plain in (Llama(), Gemma()):
        model = model_of(plain)
        convert_to_fp8_training(model)
        assert model[0](x).dtype == plain(x).dtype
        assert model.bfloat16()[0](x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [{"fuse": False}, {"recipe": Recipe.rowwise()}, {"recipe": Recipe(fprop="wide")}],
    ids=str,
)
def test_not_fused(options):
    assert convert_to_fp8_training(model_of(Llama()), **options).fused == {}
