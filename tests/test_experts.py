"""Experts in 3-D parameters are recognized by what they compute, converted in place, reported, and
given back."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.linear_testing import gradient, sqnr
from torchext import Recipe, convert_to_fp8_training, unconvert
from torchext._experts import recognize_experts, why_not_experts
from torchext.nn.experts import (
    ExpertsRoles,
    FP8EqualExperts,
    FP8Experts,
    FP8SortedExperts,
    SortedExpertsRoles,
)


class Experts(nn.Module):
    """A model's own experts: other names, another order, all products in one einsum each."""

    def __init__(self, features: int = 128, inner: int = 192, count: int = 4) -> None:
        super().__init__()
        self.out = nn.Parameter(torch.randn(count, features, inner) / inner**0.5)
        self.both = nn.Parameter(torch.randn(count, 2 * inner, features) / features**0.5)

    def activate(self, wide: Tensor) -> Tensor:
        gate, up = wide.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, tokens: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        h = self.activate(torch.einsum("tcwk,tk->tcw", self.both[chosen], tokens))
        return torch.einsum("tcki,tci,tc->tk", self.out[chosen], h, scores)


class Products(Experts):
    """Grouped products as torch has them, which refuse float64."""

    def forward(self, tokens: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        ids, order = chosen.flatten().sort(stable=True)
        rows = tokens[order // chosen.shape[1]]
        numbers = torch.arange(len(self.out))
        ends = torch.searchsorted(ids, numbers, right=True).int()
        h = self.activate(F.grouped_mm(rows, self.both.mT, offs=ends))
        y = F.grouped_mm(h, self.out.mT, offs=ends) * scores.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, order // chosen.shape[1], y)


class Sorted(nn.Module):
    """Gate, up and down apart, called with rows sorted by expert, as torchtitan's."""

    def __init__(self, features: int = 128, inner: int = 192, count: int = 4) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(count, inner, features) / features**0.5)
        self.c = nn.Parameter(torch.randn(count, features, inner) / inner**0.5)
        self.b = nn.Parameter(torch.randn(count, inner, features) / features**0.5)

    def activate(self, gate: Tensor) -> Tensor:
        return F.silu(gate)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        parts = rows.split(counts.tolist())
        hs = [
            self.activate(x @ a.T) * (x @ b.T)
            for x, a, b in zip(parts, self.a, self.b, strict=True)
        ]
        return torch.cat([h @ c.T for h, c in zip(hs, self.c, strict=True)])


class SortedInBF16(Sorted):
    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        a, b, c = (weight.bfloat16().mT for weight in (self.a, self.b, self.c))
        x = rows.bfloat16()
        h = self.activate(F.grouped_mm(x, a, offs=ends)) * F.grouped_mm(x, b, offs=ends)
        return F.grouped_mm(h, c, offs=ends).to(rows)


class SortedWithGELU(Sorted):
    def activate(self, gate: Tensor) -> Tensor:
        return F.gelu(gate)


class QuickInBF16(SortedInBF16):
    """GELU is near, but not what it computes."""

    def activate(self, gate: Tensor) -> Tensor:
        return gate * (1.702 * gate).sigmoid()


class ClampedInBF16(SortedInBF16):
    def activate(self, gate: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=7))


class Interleaved(Experts):
    def activate(self, wide: Tensor) -> Tensor:
        return F.silu(wide[..., ::2]) * wide[..., 1::2]


class Clamped(Experts):
    def activate(self, wide: Tensor) -> Tensor:
        return super().activate(wide.clamp(max=7))


class OtherScores(Experts):
    def forward(self, tokens: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        return super().forward(tokens, chosen, scores / scores.sum(1, keepdim=True))


class OtherOrder(Experts):
    def forward(  # type: ignore[override]
        self, tokens: Tensor, scores: Tensor, chosen: Tensor
    ) -> Tensor:
        return super().forward(tokens, chosen, scores)


class WithBias(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4, 384))


class Tuple(Experts):
    def forward(self, tokens: Tensor, chosen: Tensor, scores: Tensor) -> Any:
        return super().forward(tokens, chosen, scores), None


ROLES = ExpertsRoles(("both", "out"), "silu_mul", None, ("tokens", "chosen", "scores"))


class Transposed(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Parameter(self.out.detach().mT.contiguous())
        self.both = nn.Parameter(self.both.detach().mT.contiguous())

    def forward(self, tokens: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        h = self.activate(torch.einsum("tckw,tk->tcw", self.both[chosen], tokens))
        return torch.einsum("tcik,tci,tc->tk", self.out[chosen], h, scores)


class Equal(Transposed):
    """Called with as many rows for each expert, and with sizes as attributes, as Llama 4's."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.features = self.both.shape[:2]

    def forward(self, rows: Tensor) -> Tensor:  # type: ignore[override]
        x = rows.view(self.count, -1, self.features)
        h = self.activate(torch.bmm(x, self.both))
        return torch.bmm(h, self.out).view(-1, self.features)


def test_experts_with_equal_runs_of_rows():
    """Each row is the choice of one expert, with the bits of a choice that weighs 1."""
    equal: Any = Equal()
    assert recognize_experts(equal) == ROLES._replace(transposed=True, arguments=("rows",))
    chosen: Any = Transposed()
    chosen.load_state_dict(equal.state_dict())
    x, ids, ones = torch.randn(12, 128), torch.arange(12)[:, None] // 3, torch.ones(12, 1)
    wide = equal(x)
    assert torch.equal(equal(x[:0]), x[:0])
    found = []
    for module, rest in ((equal, ()), (chosen, (ids, ones))):
        assert convert_to_fp8_training(module, {"": Recipe()}).fp8_elements == 4 * 3 * 192 * 128
        leaf = x.clone().requires_grad_()
        y = module(leaf, *rest)
        y.square().sum().backward()
        found.append([y.detach(), gradient(leaf), *map(gradient, module.parameters())])
    assert all(map(torch.equal, *found)) and sqnr(wide, found[0][0]) > 20
    assert isinstance(equal, FP8EqualExperts)
    assert torch.equal(equal(x[:0]), x[:0])  # by the class's forward
    assert torch.equal(pickle.loads(pickle.dumps(equal))(x), found[0][0])
    unconvert(equal)
    assert torch.equal(equal(x), wide) and type(equal) is Equal


class OtherShapes(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Parameter(torch.zeros(4, 7, 5))


class OneMatrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.zeros(4, 7, 5))


class NoArguments(Experts):
    def forward(self) -> Tensor:  # type: ignore[override]
        return self.out


@pytest.mark.parametrize(
    "module, reason",
    [
        (WithBias, "parameters besides the matrices of experts: bias"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "besides the matrices of experts: 0.weight, 0.b"),
        (Clamped, "may clamp, interleave"),
        (OtherShapes, "do not have the shapes of experts"),
        (OneMatrix, "not up and down, or gate, up and down"),
        (NoArguments, "its forward takes nothing; those of experts, 3 or 1 arguments"),
    ],
)
def test_why_experts_are_left_alone(module, reason):
    assert reason in str(why_not_experts(module()))
    assert why_not_experts(Experts()) is None


def test_transposed_weights_are_recognized():
    assert recognize_experts(Transposed()) == ROLES._replace(transposed=True)
    model = Model(Transposed())
    result = convert_to_fp8_training(model, {"experts": Recipe()})
    plain = Model()
    assert result.bf16_bytes == convert_to_fp8_training(plain, {"experts": Recipe()}).bf16_bytes


@pytest.mark.parametrize("kind", [Experts, Products])
def test_recognized(kind):
    module = kind().eval()
    state = torch.get_rng_state()
    before = copy.deepcopy(module.state_dict())
    assert recognize_experts(module) == ROLES
    assert torch.equal(torch.get_rng_state(), state) and not module.training
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    with torch.device("meta"):  # the default device of what the module makes
        assert recognize_experts(kind()) == ROLES


@pytest.mark.parametrize(
    "kind, activation",
    [(Sorted, "silu_mul"), (SortedInBF16, "silu_mul"), (SortedWithGELU, "gelu_mul")],
)
def test_sorted_experts_are_recognized(kind, activation):
    tanh = False if kind is SortedWithGELU else None
    expected = SortedExpertsRoles(("a", "b", "c"), activation, tanh, ("rows", "counts"))
    assert recognize_experts(kind()) == expected


UNKNOWN = [Interleaved, Clamped, OtherScores, OtherOrder, WithBias, Tuple]


@pytest.mark.parametrize("kind", [*UNKNOWN, QuickInBF16, ClampedInBF16])
def test_left_alone(kind):
    assert recognize_experts(kind()) is None


class Model(nn.Module):
    def __init__(self, experts: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(128, 4)
        self.top_k = 2
        self.experts = experts or Experts()
        self.projection = nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).softmax(-1).topk(self.top_k)
        return self.projection(self.experts(x, chosen, scores))


def test_converted_in_place_and_given_back():
    model, x = Model(), torch.randn(40, 128)
    state, y = copy.deepcopy(model.state_dict()), model(x)
    parameters = list(model.parameters())
    result = convert_to_fp8_training(model)
    assert result.converted == ("experts", "projection")
    assert result.fused == {"experts": "SwiGLU experts"}
    assert isinstance(model.experts, FP8Experts) and isinstance(model.experts, Experts)
    assert repr(model.experts) == "Experts(fp8=blockwise)"
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert not torch.equal(model(x), y)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.experts) is type(model.experts)
        assert torch.equal(twin(x), model(x))
    assert convert_to_fp8_training(model).converted == ()
    attributes = set(vars(Model().experts))
    assert unconvert(model) == ("experts", "projection")
    assert type(model.experts) is Experts and set(vars(model.experts)) == attributes
    assert torch.equal(model(x), y)


def test_reported():
    result = convert_to_fp8_training(Model())
    reports = {p.name: p for p in result.parameters}
    up, down = reports["experts.both"], reports["experts.out"]
    assert up.recipe == down.recipe == "blockwise" and up.reason is down.reason is None
    assert up.flops == up.fp8_flops == 2 * 3 * 2 * 384 * 128  # two of the experts
    assert down.flops == down.fp8_flops == 2 * 3 * 2 * 192 * 128
    assert (up.bf16_bytes, down.bf16_bytes) == (2 * 2 * 128, 2 * 2 * 192)
    assert up.saved_bytes == 2 * 132
    assert result.fp8_elements == 4 * 3 * 192 * 128 + 128 * 128
    result.require(0.99)


@pytest.mark.parametrize(
    "experts, recipe, reason",
    [
        (Experts(), Recipe.rowwise(), r"experts need a blockwise .* \(its recipe is rowwise\)"),
        (Experts(), Recipe.parse("blockwise+wgrad=bf16"), "whose GEMMs are all FP8"),
        (Experts(), {"projection": Recipe()}, "no pattern of"),
        (Experts(inner=64), None, "fewer than 128"),
        (Experts().double(), None, "its weight is torch.float64"),
    ],
    ids=["rowwise", "wide wgrad", "by name", "small", "float64"],
)
def test_skipped_with_a_reason(experts, recipe, reason):
    model = Model(experts)
    result = convert_to_fp8_training(model, recipe)
    assert type(model.experts) is Experts and result.converted == ("projection",)
    assert re.search(reason, result.skipped["experts"])
    assert {p.reason for p in result.wide if p.name != "router.weight"} == {
        result.skipped["experts"]
    }


def test_filters_and_names_choose_experts():
    seen = []

    def only_experts(module: nn.Module, name: str) -> bool:
        seen.append(name)
        return name == "experts"

    result = convert_to_fp8_training(Model(), module_filter_fn=only_experts)
    assert seen == ["router", "experts", "projection"] and result.converted == ("experts",)
    small = Model(Experts(inner=64))
    assert convert_to_fp8_training(small, {"experts": Recipe()}).converted == ("experts",)


class SortedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = SortedInBF16(inner=136)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, torch.tensor([9, 0, 3, x.shape[0] - 12]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Model, lambda: Model(Transposed()), SortedModel])
def test_compiled_in_one_graph(kind):
    """A number of rows that is no multiple of 4, to which scales are padded; then another one."""
    model = kind()
    convert_to_fp8_training(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (33, 51):
        x = torch.randn(tokens, 128)
        ys, gradients = [], []
        for call in (model, compiled):
            model.zero_grad()
            ys.append(call(x))
            ys[-1].square().sum().backward()
            gradients.append([gradient(p).clone() for p in model.parameters()])
        assert torch.equal(*ys) and all(map(torch.equal, *gradients))


def test_sorted_experts_in_a_model():
    model, x = SortedModel(), torch.randn(33, 128)
    wide = model(x)
    state = copy.deepcopy(model.state_dict())
    result = convert_to_fp8_training(model)
    assert result.converted == ("experts",) and result.fused == {"experts": "SwiGLU experts"}
    result.require(1.0)
    assert isinstance(model.experts, FP8SortedExperts) and isinstance(model.experts, SortedInBF16)
    y = model(x)
    assert not torch.equal(y, wide) and sqnr(wide, y) > 20
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    with torch.no_grad():
        assert torch.equal(model(x), y)
        assert torch.equal(SortedInBF16.forward(model.experts, x[:0], torch.zeros(4).int()), x[:0])
    assert unconvert(model) == ("experts",) and type(model.experts) is SortedInBF16
    assert torch.equal(model(x), wide)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_exported_experts_run_as_their_class():
    model, x = Model(), torch.randn(40, 128)
    convert_to_fp8_training(model, {"experts": Recipe()})
    y = torch.export.export(model, (x,)).module()(x)
    unconvert(model)
    torch.testing.assert_close(y, model(x))
