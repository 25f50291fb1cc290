"""convert_to_fp8_training: recipes by layer, and the report of parameters, FLOPs and bytes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import nn

from torchext import Recipe, convert_to_fp8_training
from torchext.nn import Linear

ROWWISE = Recipe.rowwise()
WIDE_WGRAD = Recipe.parse("blockwise+wgrad=bf16")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 128)
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.lm_head = nn.Linear(128, 512, bias=False)


def recipes(model: nn.Module) -> dict[str, str]:
    return {name: str(m.recipe) for name, m in model.named_modules() if isinstance(m, Linear)}


# ---- recipes by layer ----


def test_the_last_pattern_that_matches_counts():
    model = Model()
    result = convert_to_fp8_training(
        model, {"layers.*": Recipe(), "*.down": WIDE_WGRAD, "layers.0.*": None, "*.0.up": ROWWISE}
    )
    assert recipes(model) == {
        "layers.0.up": "rowwise",
        "layers.1.up": "blockwise",
        "layers.1.down": "blockwise + wgrad wide",
        "layers.2.up": "blockwise",
        "layers.2.down": "blockwise + wgrad wide",
    }
    assert result.skipped["layers.0.down"] == "its recipe is None"
    assert result.skipped["lm_head"] == (
        'no pattern of `recipe` matches its name ("*" matches every name)'
    )
    lines = str(result).splitlines()
    assert lines[1:7] == [
        "by the recipe rowwise:",
        "  layers.0.up",
        "by the recipe blockwise:",
        "  layers.*.up (2)",
        "by the recipe blockwise + wgrad wide:",
        "  layers.*.down (2)",
    ]


def test_a_whole_name_overrides_the_default_filter():
    for globs, converted in (
        ({"*": Recipe()}, False),
        ({"lm_*": Recipe(), "*.up": Recipe()}, False),
        ({"*": Recipe(), "lm_head": ROWWISE}, True),
        ({"lm_head": ROWWISE, "*": Recipe()}, False),  # the last entry counts
    ):
        model = Model()
        convert_to_fp8_training(model, globs)
        assert (recipes(model).get("lm_head") == "rowwise") == converted
    model = Model()
    convert_to_fp8_training(model, {"*": Recipe()}, lambda module, name: name == "lm_head")
    assert recipes(model) == {"lm_head": "blockwise"}


def test_patterns_are_those_of_checkpoints_and_inference():
    for patterns, converted in (
        ({"layers.1": Recipe()}, ["layers.1.up", "layers.1.down"]),
        ({"down": Recipe()}, [f"layers.{i}.down" for i in range(3)]),
        ({"layers.?.u*": Recipe()}, [f"layers.{i}.up" for i in range(3)]),
        ({r"re:layers\.[12]": Recipe(), "layers.2": None}, ["layers.1.up", "layers.1.down"]),
    ):
        assert list(convert_to_fp8_training(Model(), patterns).converted) == converted
    with pytest.raises(ValueError, match="recipe must have globs, or regular expressions"):
        convert_to_fp8_training(Model(), {"re:(": Recipe()})


def test_the_model_itself_by_its_empty_name():
    model = nn.Linear(128, 128)
    assert convert_to_fp8_training(model, {"": ROWWISE}).converted == ("",)


def test_patterns_that_match_nothing_are_refused_before_anything_changes():
    model = Model()
    expected = (
        r"^convert_to_fp8_training: recipe must have patterns .*\(got '\*\.gate', 'layer\.0', "
        r"which match none of layers\.0\.up, .*, \.\.\.\); correct or remove them"
    )
    with pytest.raises(ValueError, match=expected):
        convert_to_fp8_training(model, {"*": Recipe(), "*.gate": None, "layer.0": Recipe()})
    assert not recipes(model)
    with pytest.raises(ValueError, match="its no linear layers"):
        convert_to_fp8_training(nn.ReLU(), {"*": Recipe()})


@pytest.mark.parametrize(
    "recipe, message",
    [
        ({"*": "rowwise"}, r"a torchext\.Recipe or None for '\*' \(got 'rowwise'\)"),
        ({0: Recipe()}, r"a mapping of patterns to recipes \(got 0\)"),
    ],
)
def test_wrong_mappings_are_refused(recipe: Any, message: str):
    with pytest.raises(TypeError, match=f"convert_to_fp8_training: recipe must be {message}"):
        convert_to_fp8_training(Model(), recipe)


# ---- the report ----


def by_name(result) -> dict[str, Any]:
    return {parameter.name: parameter for parameter in result.parameters}


def test_every_matrix_is_reported():
    model = Model()
    result = convert_to_fp8_training(
        model, {"*": Recipe(), "*.down": WIDE_WGRAD, "layers.0.*": ROWWISE}
    )
    reports = by_name(result)
    assert list(reports) == [name for name, p in model.named_parameters() if p.dim() == 2]
    assert {p.name for p in result.wide} == {n for n, p in reports.items() if p.recipe is None}
    product = 2 * 128 * 256
    up, down = reports["layers.1.up.weight"], reports["layers.1.down.weight"]
    assert (up.shape, up.recipe, up.reason) == ((256, 128), "blockwise", None)
    assert (up.flops, up.fp8_flops) == (3 * product, 3 * product)
    assert (up.bf16_bytes, up.saved_bytes) == (256, 128 + 4)  # a scale for 128 tokens
    assert (down.flops, down.fp8_flops) == (3 * product, 2 * product)
    assert (down.bf16_bytes, down.saved_bytes) == (512, 512)
    assert reports["layers.0.up.weight"].saved_bytes == 128
    head, words = reports["lm_head.weight"], reports["embedding.weight"]
    assert (head.flops, head.fp8_flops, head.recipe) == (3 * 2 * 128 * 512, 0, None)
    assert head.reason is not None and head.reason.startswith("output head")
    assert (words.flops, words.bf16_bytes) == (0, 0)
    assert result.flops == sum(p.flops for p in reports.values())
    assert result.fp8_flops_share == pytest.approx(16 / 24)
    plain = result.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["parameters"][1]["recipe"] == "rowwise" and plain["flops"] == result.flops


def test_frozen_weights_have_no_wgrad_and_keep_no_input():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)).requires_grad_(False)
    (report, _) = convert_to_fp8_training(model, {"0": Recipe(), "1": Recipe()}).parameters
    assert report.flops == report.fp8_flops == 2 * 2 * 128 * 128
    assert report.bf16_bytes == report.saved_bytes == 0


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(8, 256, 128))


@pytest.mark.parametrize("attribute", ["top_k", "num_experts_per_tok", None])
def test_flops_of_experts_are_those_of_the_ones_that_a_token_passes(attribute):
    model: Any = nn.Module()
    model.router, model.experts = nn.Linear(128, 8), Experts()
    if attribute is not None:
        setattr(model.router, attribute, 2)
    with pytest.warns(UserWarning, match="no parameter"):
        reports = by_name(convert_to_fp8_training(model))
    passed = 1 if attribute is None else 2
    assert reports["experts.gate_up_proj"].flops == passed * 3 * 2 * 256 * 128


def test_a_layer_in_two_places_runs_twice():
    model: Any = nn.Module()
    model.first = model.second = nn.Linear(128, 128)
    (report,) = convert_to_fp8_training(model).parameters
    assert report.flops == report.fp8_flops == 2 * 3 * 2 * 128 * 128
    assert report.bf16_bytes == 2 * 256


def test_require():
    result = convert_to_fp8_training(Model(), {"layers.*": WIDE_WGRAD})
    result.require(0.5)
    result.require(0.5, of="flops")
    result.require(result.fp8_share)
    with pytest.raises(RuntimeError) as caught:
        result.require(0.9)
    assert re.fullmatch(
        r"ConversionResult\.require: at least 90\.0% of the parameters must train in FP8 \(got "
        r"59\.9%\); what stays wide: 20\.0%: embedding: [^;]*; 20\.0%: no pattern of [^;]*",
        str(caught.value),
    )
    # Wide GEMMs count as FLOPs that stay wide.
    with pytest.raises(RuntimeError, match=r"FLOPs .* 25\.0%: recipe blockw.*; 25\.0%: no pattern"):
        result.require(0.9, of="flops")


@pytest.mark.parametrize(
    "share, of, message",
    [(90, "parameters", r"share must be from 0 to 1 \(got 90\)"), (0.9, "layers", "of must be ")],
)
def test_require_refuses_other_arguments(share, of, message):
    result = convert_to_fp8_training(Model())
    with pytest.raises(ValueError, match=rf"ConversionResult\.require: {message}"):
        result.require(share, of=of)
