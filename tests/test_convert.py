"""convert_to_fp8_training: which layers it converts, which it skips, and what it reports.

Above 500 lines because each reason for leaving a parameter wide has a small model of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, prune

import torchext
from torchext import Recipe, convert_to_fp8_training, revert_to_linear
from torchext.nn import Linear


class Block(nn.Module):
    def __init__(self, width: int = 128, experts: int = 8) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.output = nn.Linear(width, width, bias=False)  # inside a block, so no output head
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
    model = Model()
    parameters = sum(p.numel() for p in model.parameters())
    in_fp8 = sum(dict(model.named_parameters())[f"{name}.weight"].numel() for name in CONVERTED)
    result = convert_to_fp8_training(model)
    assert (result.fp8_elements, result.elements) == (in_fp8, parameters)
    assert str(result).splitlines() == [
        "8 of 15 linear layers train in FP8",
        "  blocks.*.query (2)",
        "  blocks.*.output (2)",
        "  blocks.*.gate (2)",
        "  blocks.*.down (2)",
        "left alone: router: its error changes which expert a token goes to (18.6% of the "
        "parameters)",
        "  blocks.*.moe.gate (2)",
        "  blocks.*.router.* (2)",
        "left alone: fewer than 128 in or out features: smaller than one scale group (8.9% of "
        "the parameters)",
        "  narrow",
        "  short",
        "left alone: output head: its error goes straight into the loss (9.0% of the parameters)",
        "  lm_head",
        "not a linear layer: embedding: its rows are looked up, not multiplied (9.0% of the "
        "parameters)",
        "  embedding.weight [256, 128]",
        f"{in_fp8 / parameters:.1%} of the parameters train in FP8: {in_fp8:,} of {parameters:,}",
        "59.7% of the FLOPs run in FP8: 1,179,648 of 1,976,832 for each token",
        "inputs kept for backward: 1,320 bytes for each token, 2,560 in BF16",
    ]
    assert repr(result) == (
        "<ConversionResult: 8 of 15 linear layers train in FP8, "
        f"{in_fp8 / parameters:.1%} of the parameters; print() shows all>"
    )
    assert "the model itself" in str(convert_to_fp8_training(nn.Linear(128, 128)))


def linears(*names: str) -> nn.Module:
    model = nn.Module()
    for name in names:
        path, _, last = name.rpartition(".")
        parent = model
        for part in filter(None, path.split(".")):
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(128, 128))
    return model


@pytest.mark.parametrize(
    "names, lines",
    [
        (["0", "2"], ["0", "2"]),
        (["0.0", "0.1"], ["0.0", "0.1"]),
        (["layers.0.q", "layers.1.q"], ["layers.*.q (2)"]),
        (["layers.7.q"], ["layers.7.q"]),  # a single layer keeps its name
        (["0.q", "1.q", "10.q"], ["*.q (3)"]),
        (["h.0.mlp.1", "h.1.mlp.1"], ["h.*.mlp.* (2)"]),
        (["w1.v2"], ["w1.v2"]),  # digits within a name
    ],
    ids=str,
)
def test_summary_groups_repeated_blocks(names, lines):
    told = str(convert_to_fp8_training(linears(*names))).splitlines()
    assert told[1:-3] == [f"  {line}" for line in lines]


def test_result_is_frozen():
    result: Any = convert_to_fp8_training(Model())
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.converted = ()
    with pytest.raises(TypeError):
        result.skipped["lm_head"] = "no reason"


# ---- what stays wide ----


def _replaced_forward() -> nn.Module:
    linear = nn.Linear(128, 128)
    linear.forward = lambda input: input  # type: ignore[method-assign]
    return linear


class Experts(nn.Module):
    """Experts as transformers and torchtitan hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 256, 128))
        self.bias = nn.Parameter(torch.zeros(256))


class Conv1D(nn.Module):
    """A layer as transformers' GPT-2 has it, with its weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(128, 384))


class Bare(nn.Module):
    """A bare matrix, and position embeddings of a vision transformer, which have three dimensions
    but are no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.randn(128, 128))
        self.positions = nn.Parameter(torch.randn(1, 16, 128))
        self.temperature = nn.Parameter(torch.tensor(1.0))


def _quantized() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return module


@pytest.mark.parametrize(
    "make, names, reason",
    [
        (Experts, ["part.gate_up_proj"], "Experts holds matrices, such as experts, in one 3-D"),
        (Conv1D, ["part.weight"], r"Conv1D holds a transposed weight \(replace it by"),
        (lambda: nn.Conv2d(3, 8, 3), ["part.weight"], "convolution: "),
        (lambda: nn.ConvTranspose1d(4, 8, 3), ["part.weight"], "convolution: "),
        (lambda: nn.Embedding(10, 4), ["part.weight"], "embedding: "),
        (lambda: nn.EmbeddingBag(10, 4), ["part.weight"], "embedding: "),
        (lambda: nn.LSTM(4, 4), ["part.weight_hh_l0", "part.weight_ih_l0"], "LSTM: "),
        (lambda: nn.GRUCell(4, 4), ["part.weight_hh", "part.weight_ih"], "GRUCell: "),
        (lambda: nn.Bilinear(4, 4, 4), ["part.weight"], "Bilinear holds matrices"),
        (lambda: nn.LayerNorm((4, 4)), ["part.bias", "part.weight"], "LayerNorm multiplies elem"),
        (Bare, ["part.positions", "part.projection"], "parameter of Bare itself"),
        (
            lambda: nn.ParameterList([torch.randn(4, 4), torch.randn(4)]),
            ["part.0"],
            "parameter of ParameterList",
        ),
        (_quantized, ["part.weight"], "its dtype is torch.int8"),
        (
            lambda: nn.MultiheadAttention(128, 2),
            ["part.in_proj_weight", "part.out_proj.weight"],
            "MultiheadAttention multiplies|NonDynamicallyQuantizableLinear is a subclass",
        ),
        (lambda: nn.LazyLinear(128), ["part.weight"], "LazyLinear is a subclass .*run a forward"),
        (
            lambda: parametrizations.weight_norm(nn.Linear(128, 128)),
            ["part.parametrizations.weight.original0", "part.parametrizations.weight.original1"],
            "its parameters are parametrized",
        ),
        (lambda: nn.Linear(128, 4), ["part.weight"], "fewer than 128"),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_what_stays_wide_is_listed_with_its_reason(make, names, reason):
    model = nn.Sequential()
    model.layer, model.part = nn.Linear(128, 128), make()
    result = convert_to_fp8_training(model)
    assert result.converted == ("layer",)
    assert sorted(parameter.name for parameter in result.wide) == names
    parameters = dict(model.named_parameters())
    for parameter in result.wide:
        assert re.match(reason, parameter.reason)
        assert parameter.reason in str(result)
        if not is_lazy(parameters[parameter.name]):
            assert parameter.shape == parameters[parameter.name].shape
            assert parameter.numel == parameters[parameter.name].numel()


def test_a_parameter_that_modules_share_counts_once():
    model = nn.Module()
    model.words, model.head = nn.Embedding(256, 128), nn.Linear(128, 256, bias=False)
    model.head.weight = model.words.weight
    model.first, model.second = nn.Linear(128, 128), nn.Linear(128, 128)
    model.second.weight = model.first.weight
    result = convert_to_fp8_training(model)
    assert [parameter.name for parameter in result.wide] == ["words.weight"]
    assert result.fp8_elements == 128 * 128
    assert result.elements == 256 * 128 + 128 * 128 + 2 * 128
    tied_head_too = convert_to_fp8_training(model, module_filter_fn=everything)
    assert tied_head_too.wide == ()
    assert tied_head_too.fp8_elements == 256 * 128 + 128 * 128


def test_what_was_converted_before_counts():
    model = Model()
    first = convert_to_fp8_training(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = convert_to_fp8_training(model)
    assert second.converted == ()
    assert second.fp8_elements == first.fp8_elements and second.wide == first.wide


@pytest.mark.parametrize(
    "make, filter_fn, reason",
    [
        (Conv1D, None, "this Conv1D trains in FP8: Conv1D holds a transposed weight"),
        (Experts, None, "Experts holds matrices"),
        (nn.ReLU, None, "it has no torch.nn.Linear"),
        (lambda: nn.Linear(4, 4), None, "fewer than 128 .* module_filter_fn can convert"),
        (Model, lambda module, fqn: False, "excluded by module_filter_fn"),
        (_replaced_forward, None, "convert before accelerate"),
    ],
    ids=["Conv1D", "experts", "no linear", "small", "filter", "hooks"],
)
def test_a_model_in_which_nothing_converts_is_warned_of(make, filter_fn, reason):
    with pytest.warns(UserWarning, match=rf"(?s)^convert_to_fp8_training: .*{reason}") as caught:
        convert_to_fp8_training(make(), module_filter_fn=filter_fn)
    (warning,) = caught
    assert warning.filename == __file__


# ---- a result that a model keeps ----


class KeepsItsResult(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.small, self.experts = nn.Linear(256, 256), nn.Linear(4, 4), Experts()
        self.conversion = convert_to_fp8_training(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def _saved(value: object, **options: Any) -> object:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: pickle.loads(pickle.dumps(x, protocol=2)),
        lambda x: _saved(x, weights_only=False),
    ],
    ids=["copy", "deepcopy", "pickle", "pickle 2", "torch.save"],
)
def test_a_result_and_a_model_that_keeps_it_are_copied(copied):
    model = KeepsItsResult()
    for kept in (model.conversion, copied(model).conversion, copied(model.conversion)):
        assert isinstance(kept, torchext.ConversionResult)
        assert kept.to_dict() == model.conversion.to_dict()
        assert str(kept) == str(model.conversion)
        skipped: Any = kept.skipped
        with pytest.raises(TypeError, match="read-only"):
            skipped["linear"] = "no reason"
    assert copy.deepcopy(model).conversion.model is not model
    # Hashed by identity, like modules.
    assert len({model.conversion, copied(model.conversion)}) == 2


def test_result_as_plain_data():
    result = KeepsItsResult().conversion
    plain = result.to_dict()
    assert json.loads(json.dumps(plain)) == json.loads(result.to_json(indent=1)) == plain
    assert json.loads(json.dumps(result.skipped)) == result.skipped
    assert _saved(plain, weights_only=True) == plain
    assert plain["converted"] == ["linear"]
    assert plain["skipped"]["small"].startswith("fewer than 128")
    assert plain["wide"][0]["name"] == "experts.gate_up_proj"
    assert plain["wide"][0]["shape"] == [4, 256, 128] and plain["wide"][0]["numel"] == 131072
    assert plain["fp8_elements"] == 65536
    assert plain["fp8_share"] == pytest.approx(65536 / plain["elements"])


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("small"),
        lambda d: d.clear(),
        lambda d: d.update(small=""),
        lambda d: d.setdefault("x", ""),
        lambda d: d.__delitem__("small"),
        lambda d: d.__ior__({}),
    ],
)
def test_reasons_cannot_be_changed(change):
    expected = r"^ConversionResult: skipped must .*\(got .*read-only dict\); .*dict\("
    with pytest.raises(TypeError, match=expected):
        change(KeepsItsResult().conversion.skipped)


# ---- revert_to_linear ----


def test_a_model_becomes_wide_again(device):
    model = Model().to(device).eval()
    tokens = torch.zeros(1, 4, dtype=torch.long, device=device)
    plain = model(tokens)
    kinds = [type(module) for module in model.modules()]
    parameters, text = list(model.parameters()), repr(model)
    convert_to_fp8_training(model, Recipe.rowwise())
    assert not torch.equal(model(tokens), plain)  # may also make the layers keep FP8 weights
    assert repr(model).count("fp8=rowwise") == 4  # equal blocks are printed once
    assert revert_to_linear(model) == CONVERTED
    assert [type(module) for module in model.modules()] == kinds
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(tokens), plain)
    assert repr(model) == text
    assert set(vars(model.blocks[0].query)) == set(vars(nn.Linear(1, 1)))
    assert revert_to_linear(model) == ()
    assert convert_to_fp8_training(model).converted == CONVERTED


def test_what_cannot_become_wide_again_is_left_as_it_was():
    class Own(Linear):
        pass

    for subclass in (Own(128, 128), parametrizations.weight_norm(Linear(128, 128))):
        model = nn.Sequential(Linear(128, 128), subclass)
        with pytest.raises(TypeError, match=r"revert_to_linear: 1 must be .* subclass"):
            revert_to_linear(model)
        assert type(model[0]) is Linear
        with pytest.raises(TypeError, match=r"Linear.revert_: .* subclass"):
            subclass.revert_()
    with pytest.raises(TypeError, match=r"revert_to_linear: model must be .* \(got 'model'\)"):
        revert_to_linear("model")  # type: ignore[arg-type]


# ---- what is converted ----


def test_own_filter_sees_every_linear_and_decides():
    seen = []

    def only_heads(module: nn.Module, fqn: str) -> bool:
        seen.append((type(module), fqn))
        return "head" in fqn

    result = convert_to_fp8_training(Model(), module_filter_fn=only_heads)
    assert result.converted == ("lm_head",)
    assert set(result.skipped.values()) == {"excluded by module_filter_fn"}
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
    query: Any = model.blocks[0].query
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
    model: Any = Model()
    convert_to_fp8_training(model, Recipe.rowwise())
    result = convert_to_fp8_training(model)
    assert result.converted == ()
    assert result.skipped["blocks.0.query"] == "trains in FP8 already"
    assert model.blocks[0].query.recipe == Recipe.rowwise()


@pytest.mark.filterwarnings("ignore:convert_to_fp8_training")
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


def _parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(128, 128))


@pytest.mark.filterwarnings("ignore:convert_to_fp8_training")
@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: OwnForward(128, 128), "OwnForward is a subclass whose own behavior"),
        (lambda: nn.LazyLinear(128), "LazyLinear is a subclass"),
        (lambda: nn.MultiheadAttention(128, 1), "NonDynamicallyQuantizableLinear is a subclass"),
        (_parametrized, "its parameters are parametrized"),
        (_replaced_forward, "its forward was replaced by another function (convert before "),
        (lambda: nn.Linear(128, 128, dtype=torch.float64), "its weight is torch.float64"),
    ],
    ids=["subclass", "lazy", "attention", "parametrized", "patched", "float64"],
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
    linear: Any = nn.Linear(128, 128, device=device)
    prune.l1_unstructured(linear, "weight", 0.5)
    convert_to_fp8_training(linear)
    linear(torch.ones(4, 128, device=device)).sum().backward()
    assert not linear.weight_orig.grad[linear.weight_mask == 0].any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("model",), r"model must be a torch\.nn\.Module \(got 'model'\)"),
        ((nn.Identity(), "rowwise"), r"recipe must be a torchext\.Recipe \(got 'rowwise'\)"),
        (
            (nn.Identity(), None, "lm_head"),
            r"module_filter_fn must be a function.*\(got 'lm_head'\)",
        ),
    ],
    ids=["model", "recipe", "filter"],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(TypeError, match=f"convert_to_fp8_training: {message}"):
        convert_to_fp8_training(*arguments)


@pytest.mark.filterwarnings("ignore:convert_to_fp8_training")
def test_a_model_without_linears():
    result = convert_to_fp8_training(nn.Sequential(nn.ReLU()))
    assert result.converted == () and not result.skipped
    assert str(result) == "0 of 0 linear layers train in FP8"


@pytest.mark.slow
def test_compiled_model_gives_one_graph(device):
    torch._dynamo.reset()
    model = convert_to_fp8_training(
        nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    )
    eager = model.model.to(device)
    compiled = torch.compile(eager, fullgraph=True)
    x = torch.randn(8, 128, device=device)
    torch.testing.assert_close(compiled(x), eager(x))
