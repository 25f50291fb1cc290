"""Decides which layers of a model are converted to FP8, by which recipe, and why others are not."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ._dispatch.layout import GROUP
from ._patterns import Patterns
from .nn.converted import is_transposed_linear, overrides
from .nn.experts import trains_in_fp8
from .nn.frozen_weights import FrozenWeights
from .nn.mlp import can_fuse_recipe
from .recipe import Recipe

RecipeByName = Mapping[str, Recipe | None]

NO_PATTERN = 'no pattern of `recipe` matches its name ("*" matches every name)'
EXCLUDED = "excluded by module_filter_fn"
NO_RECIPE = "its recipe is None"

_WILDCARDS = frozenset("*?[")
HEAD_NAMES = {"lm_head", "output", "head", "classifier", "score", "embed_out", "unembed", "logits"}
ROUTER_NAMES = {"router", "gate", "shared_expert_gate"}
_WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_layers(model: torch.nn.Module, experts: Container[str]) -> dict[str, torch.nn.Module]:
    """Every layer that a conversion considers, by name, in FP8 or not: torch.nn.Linears, layers
    that hold the weight transposed, the modules named in `experts`, and torchext.nn.MoE."""
    return {
        fqn: module
        for fqn, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        or trains_in_fp8(module)
        or isinstance(module, FrozenWeights)
        or fqn in experts
        or is_transposed_linear(module)
    }


class RecipeOf:
    """The recipe of each layer.

    `recipe` is one recipe for all, or a mapping of patterns (_patterns.py) to recipes, of which the
    last that matches a name counts. `names` are all linear layers'. Raises ValueError if a pattern
    matches none of them, or cannot be read.
    """

    def __init__(self, recipe: Recipe | RecipeByName | None, names: Mapping[str, object]) -> None:
        self._by_pattern: dict[str, Recipe | None] = {"*": Recipe.deepseek_v3()}
        if recipe is not None:
            self._by_pattern = dict(recipe) if isinstance(recipe, Mapping) else {"*": recipe}
        self._patterns = Patterns(self._by_pattern, "convert_to_fp8_training: recipe")
        for name in names:
            self._patterns.match(name)
        if isinstance(recipe, Mapping) and self._patterns.unmatched:
            raise ValueError(
                "convert_to_fp8_training: recipe must have patterns that match a linear layer's "
                f"name (got {', '.join(map(repr, self._patterns.unmatched))}, which match none of "
                f"{_some(names)}); correct or remove them"
            )

    def __call__(self, name: str) -> tuple[Recipe | None, str | None]:
        """(recipe, None), or (None, the reason why the layer has no recipe)."""
        pattern = self._that_counts(name)
        if pattern is None:
            return None, NO_PATTERN
        recipe = self._by_pattern[pattern]
        return recipe, NO_RECIPE if recipe is None else None

    def is_named(self, name: str) -> bool:
        """Whether the entry that counts is the layer's whole name, without wildcards."""
        return self._that_counts(name) == name and not _WILDCARDS.intersection(name)

    def _that_counts(self, name: str) -> str | None:
        matching = set(self._patterns.all_matching(name))
        return next((p for p in reversed(self._by_pattern) if p in matching), None)


def _some(names: Mapping[str, object]) -> str:
    shown = [name or "the model itself" for name in list(names)[:5]]
    return ", ".join(shown) + (", ..." if len(names) > 5 else "") or "its no linear layers"


def why_impossible(layer: torch.nn.Module) -> str | None:
    """The reason why `layer`, one of `linear_layers`, cannot be converted; None if it can."""
    if trains_in_fp8(layer):
        return "trains in FP8 already"
    if isinstance(layer, FrozenWeights):
        return "holds FP8 weights for inference (call torchext.dequantize_weights first)"
    return why_unfit(layer)


def why_unfit(layer: torch.nn.Module) -> str | None:
    """The reason why the wide weights of `layer` cannot be replaced by FP8 ones, or read as such;
    None if they can."""
    if is_parametrized(layer):
        return "its parameters are parametrized (convert first, parametrize after)"
    weights = weights_of(layer)
    kind = type(layer).__name__
    if isinstance(layer, torch.nn.Linear) and type(layer) is not torch.nn.Linear:
        multiplied_elsewhere = torch.nn.modules.linear.NonDynamicallyQuantizableLinear
        if is_lazy(weights[0]):
            return f"{kind} is a subclass whose own behavior would be lost (run a forward first)"
        if isinstance(layer, multiplied_elsewhere):
            return f"{kind} is a subclass whose weight MultiheadAttention multiplies by itself"
        name = overrides(layer)
        if name is not None:
            return (
                f"{kind} is a subclass whose own behavior would be lost (it has its own {name}; "
                "replace it by a plain one)"
            )
    if "forward" in vars(layer):
        return (
            "its forward was replaced by another function (convert before accelerate or others add "
            "their hooks)"
        )
    for weight in weights:
        if type(weight) not in (torch.nn.Parameter, torch.Tensor):
            kind = type(weight).__name__
            return f"its weight is a {kind} (convert before sharding or quantizing)"
        if weight.dtype not in _WIDE_DTYPES:
            return f"its weight is {weight.dtype}, not FP32, BF16 or FP16 (change it with .to())"
    return None


def why_impossible_for_experts(recipe: Recipe) -> str | None:
    """The reason why experts cannot be converted by this recipe; None if they can."""
    if can_fuse_recipe(recipe):
        return None
    return f"experts need a blockwise recipe whose GEMMs are all FP8 (its recipe is {recipe})"


def weights_of(layer: torch.nn.Module) -> list[torch.Tensor]:
    """The weight of a linear layer, or those of experts."""
    if isinstance(layer, FrozenWeights):
        return [layer.get_parameter(name) for name in layer.frozen_names()]
    parameters: list[torch.Tensor] = list(layer.parameters(recurse=False))
    if not isinstance(layer, torch.nn.Linear) and all(p.dim() == 3 for p in parameters):
        return parameters  # of experts
    return [layer.weight]  # type: ignore[list-item]


def why_not_worthwhile(layer: torch.nn.Module, fqn: str, embeddings: set[int]) -> str | None:
    """The reason why `layer` stays wide unless the user asks for it; None if it should convert.

    `embeddings` has the id() of each embedding's weight.
    """
    *path, name = fqn.split(".")
    in_repeated_block = any(part.isdigit() for part in path)
    weights = weights_of(layer)
    out_features, in_features = weights[0].shape[-2:]
    if not isinstance(layer, torch.nn.Linear):
        in_features, out_features = out_features, in_features
    if id(weights[0]) in embeddings:
        return "output head: shares its weight with an embedding"
    if name in HEAD_NAMES and not in_repeated_block:
        return "output head: its error goes straight into the loss"
    # A SwiGLU layer called `gate` has more outputs than inputs, a router fewer.
    if "router" in path or (name in ROUTER_NAMES and out_features < in_features):
        return "router: its error changes which expert a token goes to"
    if min(size for weight in weights for size in weight.shape[-2:]) < GROUP:
        return f"fewer than {GROUP} in or out features: smaller than one scale group"
    return None
