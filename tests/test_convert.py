"""convert_to_fp8_training: what it converts, what it leaves alone, and what it says of both."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from torchext import Recipe, convert_to_fp8_training
from torchext.nn import Linear


class Block(nn.Module):
    def __init__(self, width: int = 128, experts: int = 8) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.output = nn.Linear(width, width, bias=False)  # inside a block: no output head
        self.gate = nn.Linear(width, 2 * width)  # SwiGLU's
        self.down = nn.Linear(2 * width, width)
        self.moe = nn.ModuleDict({"gate": nn.Linear(width, experts)})
        self.router = nn.Sequential(nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.output(self.query(x)) * self.router(x).mean()
        return x + self.down(self.gate(x).relu()) * self.moe["gate"](x).mean()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 128)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.narrow = nn.Linear(128, 127)
        self.short = nn.Linear(127, 128)
        self.lm_head = nn.Linear(128, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.short(self.narrow(x)))


CONVERTED = tuple(
    f"blocks.{i}.{name}" for i in (0, 1) for name in ("query", "output", "gate", "down")
)


def everything(module: nn.Module, fqn: str) -> bool:
    return True


def test_default_filter():
    model = Model()
    result = convert_to_fp8_training(model)
    assert result.model is model
    assert result.converted == CONVERTED
    assert {fqn.replace("1", "0"): reason[:13] for fqn, reason in result.skipped.items()} == {
        "blocks.0.moe.gate": "router: its e",
        "blocks.0.router.0": "router: its e",
        "narrow": "fewer than 12",
        "short": "fewer than 12",
        "lm_head": "output head: ",
    }
    for fqn, module in model.named_modules():
        assert isinstance(module, Linear) == (fqn in CONVERTED)


def test_summary():
    assert str(convert_to_fp8_training(Model())).splitlines() == [
        "8 of 15 linear layers train in FP8",
        "  blocks.*.query (2)",
        "  blocks.*.output (2)",
        "  blocks.*.gate (2)",
        "  blocks.*.down (2)",
        "left alone: router: its error changes which expert a token meets",
        "  blocks.*.moe.gate (2)",
        "  blocks.*.router.* (2)",
        "left alone: fewer than 128 in or out features: smaller than one group of scales",
        "  narrow",
        "  short",
        "left alone: output head: its error goes straight into the loss",
        "  lm_head",
    ]
    assert "the model itself" in str(convert_to_fp8_training(nn.Linear(128, 128)))


def test_result_is_frozen():
    result = convert_to_fp8_training(Model())
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.converted = ()
    with pytest.raises(TypeError):
        result.skipped["lm_head"] = "no reason"


def test_own_filter_sees_every_linear_and_decides():
    seen = []

    def only_heads(module: nn.Module, fqn: str) -> bool:
        seen.append((type(module), fqn))
        return "head" in fqn

    result = convert_to_fp8_training(Model(), module_filter_fn=only_heads)
    assert result.converted == ("lm_head",)
    assert set(result.skipped.values()) == {"module_filter_fn said no"}
    assert len(seen) == 15 and {kind for kind, _ in seen} == {nn.Linear}


def test_recipe_reaches_every_layer():
    model = convert_to_fp8_training(Model(), Recipe.rowwise()).model
    assert {m.recipe for m in model.modules() if isinstance(m, Linear)} == {Recipe.rowwise()}


def test_the_model_itself_is_a_linear():
    linear = nn.Linear(128, 256)
    result = convert_to_fp8_training(linear)
    assert result.model is linear and type(linear) is Linear
    assert result.converted == ("",)


def test_layers_keep_their_identity_and_state(device):
    model = Model().to(device).eval()
    query = model.blocks[0].query
    query.weight.requires_grad_(False)
    model.blocks[1].query = query  # one layer in two places
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    calls = []
    query.register_forward_hook(lambda module, args, output: calls.append(module))
    convert_to_fp8_training(model)
    assert model.blocks[0].query is model.blocks[1].query is query
    assert type(query) is Linear and not query.training
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not query.weight.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    model(torch.zeros(1, 4, dtype=torch.long, device=device))
    assert calls == [query, query]
    Model().to(device).load_state_dict(model.state_dict())


@pytest.mark.parametrize("recipe", [None, Recipe.rowwise(), Recipe.tensorwise()], ids=str)
def test_a_converted_model_learns(device, recipe):
    torch.manual_seed(0)
    model = Model().to(device)
    tokens = torch.randint(256, (4, 16), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # made before the conversion
    convert_to_fp8_training(model, recipe)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_converting_twice_changes_nothing():
    model = Model()
    convert_to_fp8_training(model, Recipe.rowwise())
    result = convert_to_fp8_training(model)
    assert result.converted == ()
    assert result.skipped["blocks.0.query"] == "trains in FP8 already"
    assert model.blocks[0].query.recipe == Recipe.rowwise()


def test_a_head_tied_to_the_embedding_is_left_alone():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(256, 128)
            self.to_words = nn.Linear(128, 256, bias=False)
            self.to_words.weight = self.words.weight

    result = convert_to_fp8_training(Tied())
    assert result.skipped == {"to_words": "output head: shares its weight with an embedding"}


class OwnForward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def _parametrised() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(128, 128))


def _replaced_forward() -> nn.Module:
    linear = nn.Linear(128, 128)
    linear.forward = lambda input: input
    return linear


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: OwnForward(128, 128), "OwnForward is a subclass whose own behaviour"),
        (lambda: nn.LazyLinear(128), "LazyLinear is a subclass"),
        (lambda: nn.MultiheadAttention(128, 1), "NonDynamicallyQuantizableLinear is a subclass"),
        (_parametrised, "its parameters are parametrised"),
        (_replaced_forward, "its forward was replaced"),
        (lambda: nn.Linear(128, 128, dtype=torch.float64), "its weight is torch.float64"),
    ],
    ids=["subclass", "lazy", "attention", "parametrised", "patched", "float64"],
)
def test_what_no_filter_can_convert(make, reason):
    model = nn.Sequential(make())
    kinds = [type(module) for module in model.modules()]
    result = convert_to_fp8_training(model, module_filter_fn=everything)
    assert result.converted == ()
    (told,) = result.skipped.values()
    assert told.startswith(reason)
    assert [type(module) for module in model.modules()] == kinds


def test_pruned_layers_stay_pruned(device):
    linear = nn.Linear(128, 128, device=device)
    prune.l1_unstructured(linear, "weight", 0.5)
    convert_to_fp8_training(linear)
    linear(torch.ones(4, 128, device=device)).sum().backward()
    assert not linear.weight_orig.grad[linear.weight_mask == 0].any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("model",), "model: expected a torch.nn.Module; got 'model'"),
        ((nn.Identity(), "rowwise"), "recipe: expected a torchext.Recipe.*got 'rowwise'"),
        ((nn.Identity(), None, "lm_head"), "module_filter_fn: expected a function.*got 'lm_head'"),
    ],
    ids=["model", "recipe", "filter"],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(TypeError, match=f"convert_to_fp8_training: {message}"):
        convert_to_fp8_training(*arguments)


def test_a_model_without_linears():
    result = convert_to_fp8_training(nn.Sequential(nn.ReLU()))
    assert result.converted == () and not result.skipped
    assert str(result) == "0 of 0 linear layers train in FP8"


def test_compiled_model_gives_one_graph(device):
    torch._dynamo.reset()
    model = convert_to_fp8_training(
        nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    )
    eager = model.model.to(device)
    compiled = torch.compile(eager, fullgraph=True)
    x = torch.randn(8, 128, device=device)
    torch.testing.assert_close(compiled(x), eager(x))
