"""torchext.Recipe: the three named recipes, and errors for impossible ones."""

from __future__ import annotations

import dataclasses
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
