"""torchext.Recipe: the three named recipes, and errors for impossible ones."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from typing import Any

import pytest
import torch

from torchext import Recipe

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize(
    "recipe, granularity, grad_dtype",
    [
        (Recipe.deepseek_v3(), "blockwise", E4M3),
        (Recipe.rowwise(), "rowwise", E4M3),
        (Recipe.tensorwise(), "tensorwise", E5M2),
        (Recipe(), "blockwise", E4M3),
    ],
)
def test_named_recipes(recipe, granularity, grad_dtype):
    assert recipe == Recipe(granularity, E4M3, E4M3, grad_dtype, False)


@pytest.mark.parametrize("name", ["deepseek_v3", "rowwise", "tensorwise"])
def test_pow2_scale(name):
    recipe = getattr(Recipe, name)(pow2_scale=True)
    assert recipe == dataclasses.replace(getattr(Recipe, name)(), pow2_scale=True)
    assert recipe != getattr(Recipe, name)()


def test_it_is_a_value():
    recipe: Any = Recipe.tensorwise()
    assert hash(recipe) == hash(Recipe.tensorwise())
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.granularity = "rowwise"


def test_str_names_what_differs():
    assert str(Recipe.deepseek_v3()) == "blockwise"
    assert str(Recipe.tensorwise(pow2_scale=True)) == "tensorwise + grad e5m2 + pow2 scales"


@pytest.mark.parametrize("granularity", ["1x128", None, 128])
def test_unknown_granularity_is_refused(granularity):
    with pytest.raises(ValueError, match="Recipe: granularity must be one of blockwise, rowwise"):
        Recipe(granularity)


@pytest.mark.parametrize("field", ["input_dtype", "weight_dtype", "grad_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fnuz, None, "e4m3"])
def test_other_dtypes_are_refused(field, dtype):
    with pytest.raises(TypeError, match=f"Recipe: {field} must be torch.float8_e4m3fn"):
        Recipe(**{field: dtype})


def test_pow2_scale_must_be_a_bool():
    with pytest.raises(TypeError, match=r"Recipe: pow2_scale must be True or False \(got 1\)"):
        Recipe(pow2_scale=1)  # type: ignore[arg-type]


# ---- GEMMs that do not run in FP8 ----


def test_wide_gemms():
    recipe = Recipe(dgrad="wide", wgrad="wide")
    assert recipe.wide_gemms == ("dgrad", "wgrad") and Recipe().wide_gemms == ()
    with pytest.raises(ValueError, match=r'Recipe: wgrad must be "fp8" or "wide" \(got \'bf16\'\)'):
        Recipe(wgrad="bf16")  # type: ignore[arg-type]


# ---- text, dictionaries and JSON ----

EVERY_FIELD = [
    Recipe(*fields)  # type: ignore[arg-type]
    for fields in itertools.product(
        ("blockwise", "rowwise", "tensorwise"), *[(E4M3, E5M2)] * 3, (False, True),
        *[("fp8", "wide")] * 3,
    )
]  # fmt: skip


def test_every_recipe_survives_text_dict_and_json():
    assert len({str(recipe) for recipe in EVERY_FIELD}) == len(EVERY_FIELD)
    for recipe in EVERY_FIELD:
        assert Recipe.parse(str(recipe)) == recipe
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    "text, recipe",
    [
        ("blockwise", Recipe()),
        ("blockwise+wgrad=bf16", Recipe(wgrad="wide")),
        (" rowwise +  fprop = wide+dgrad fp8 ", Recipe("rowwise", fprop="wide")),
        ("tensorwise+grad=e5m2+pow2", Recipe.tensorwise(pow2_scale=True)),
    ],
)
def test_parse(text, recipe):
    assert Recipe.parse(text) == recipe


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"begin with one of blockwise, .* \(got '' in ''\)"),
        ("wgrad=bf16", "begin with one of blockwise"),
        ("blockwise+wgrad=fp16", r"consist of words such .* \(got 'wgrad fp16' in 'blockwise\+wg"),
        ("blockwise+", r"consist of words .* \(got '' in 'blockwise\+'\)"),
        ("blockwise+grad=e4m3fn", "consist of words"),
        ("blockwise+wgrad=bf16+wgrad=fp8", "say everything once .*'wgrad fp8'"),
    ],
)
def test_parse_refuses_other_text(text, message):
    with pytest.raises(ValueError, match=f"^Recipe.parse: text must {message}"):
        Recipe.parse(text)


def test_wrong_kinds_of_text_and_fields_are_refused():
    with pytest.raises(TypeError, match=r"Recipe\.parse: text must be a string"):
        Recipe.parse(Recipe())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Recipe\.from_dict: fields must be a mapping"):
        Recipe.from_json('["blockwise"]')
    with pytest.raises(ValueError, match=r"fields must be some of granularity, .* \(got 'grain'"):
        Recipe.from_dict({"grain": "blockwise"})
    with pytest.raises(ValueError, match="input_dtype must be one of float8_e4m3fn, float8_e5m2"):
        Recipe.from_dict({"input_dtype": "bfloat16"})
    assert Recipe.from_dict({"granularity": "rowwise"}) == Recipe("rowwise")
