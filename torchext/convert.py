"""Turns the nn.Linears of a model into FP8 ones, and says which it left alone and why."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import torch
from torch.nn.utils.parametrize import is_parametrized

from ._layout import GROUP
from .nn import Linear
from .recipe import Recipe

ModuleFilter = Callable[[torch.nn.Module, str], bool]

_HEAD_NAMES = {"lm_head", "output", "head", "classifier", "score", "embed_out", "unembed", "logits"}
_ROUTER_NAMES = {"router", "gate", "shared_expert_gate"}


@dataclasses.dataclass(frozen=True)
class ConversionResult:
    """What convert_to_fp8_training did; `print` it for a summary.

    Attributes:
        model: the model that was passed, converted in place.
        converted: fully qualified names of the layers that now train in FP8.
        skipped: every other torch.nn.Linear's name, and the reason in a few words.
    """

    model: torch.nn.Module
    converted: tuple[str, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        total = len(self.converted) + len(self.skipped)
        lines = [f"{len(self.converted)} of {total} linear layers train in FP8"]
        lines += [f"  {name}" for name in _summarise(self.converted)]
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            lines.append(f"left alone: {reason}")
            lines += [f"  {name}" for name in _summarise(names)]
        return "\n".join(lines)


def convert_to_fp8_training(
    model: torch.nn.Module,
    recipe: Recipe | None = None,
    module_filter_fn: ModuleFilter | None = None,
) -> ConversionResult:
    """Makes the torch.nn.Linears of `model` train in FP8, in place.

    Each becomes a torchext.nn.Linear and stays the same object with the same parameters, hooks,
    requires_grad and mode, so an optimiser may be made before or after. Call it before
    torch.compile and before the model is sharded.

    Args:
        model: any module; a torch.nn.Linear itself, too.
        recipe: of every converted layer; Recipe.deepseek_v3() if None.
        module_filter_fn: called as (module, fully qualified name) for each torch.nn.Linear that
            could be converted; true means convert it. If None, these are left alone: layers with
            fewer than 128 in or out features (smaller than one group of scales), output heads
            (their error goes straight into the loss), and routers (where it changes which expert a
            token meets). Heads and routers are known by their names, and a head also by sharing its
            weight with an embedding.

    Whatever the filter says, these are left alone: subclasses of torch.nn.Linear, layers whose
    weight is parametrised or whose `forward` was replaced, and weights that are not plain FP32,
    BF16 or FP16 tensors.

    Raises TypeError for a model, recipe or filter of another type.
    """
    _check_arguments(model, recipe, module_filter_fn)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    converted, skipped = [], {}
    for fqn, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear):
            continue
        reason = _why_impossible(module)
        if reason is None:
            if module_filter_fn is None:
                reason = _why_not_worthwhile(module, fqn, embeddings)
            elif not module_filter_fn(module, fqn):
                reason = "module_filter_fn said no"
        if reason is None:
            Linear.convert_(module, recipe)
            converted.append(fqn)
        else:
            skipped[fqn] = reason
    return ConversionResult(model, tuple(converted), MappingProxyType(skipped))


def _check_arguments(
    model: torch.nn.Module, recipe: Recipe | None, module_filter_fn: ModuleFilter | None
) -> None:
    def refuse(name: str, expected: str, got: object) -> None:
        raise TypeError(f"convert_to_fp8_training: {name}: expected {expected}; got {got!r}")

    if not isinstance(model, torch.nn.Module):
        refuse("model", "a torch.nn.Module", model)
    if recipe is not None and not isinstance(recipe, Recipe):
        refuse("recipe", "a torchext.Recipe, for example Recipe.deepseek_v3()", recipe)
    if module_filter_fn is not None and not callable(module_filter_fn):
        refuse("module_filter_fn", "a function (module, name) -> bool", module_filter_fn)


def _why_impossible(linear: torch.nn.Linear) -> str | None:
    if isinstance(linear, Linear):
        return "trains in FP8 already"
    if is_parametrized(linear):
        return "its parameters are parametrised (convert first, parametrise after)"
    if type(linear) is not torch.nn.Linear:
        return f"{type(linear).__name__} is a subclass whose own behaviour would be lost"
    if "forward" in vars(linear):
        return "its forward was replaced by another function"
    weight = linear.weight
    if type(weight) not in (torch.nn.Parameter, torch.Tensor):
        return f"its weight is a {type(weight).__name__} (convert before sharding or quantising)"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {weight.dtype}, not FP32, BF16 or FP16"
    return None


def _why_not_worthwhile(linear: torch.nn.Linear, fqn: str, embeddings: set[int]) -> str | None:
    *path, name = fqn.split(".")
    in_repeated_block = any(part.isdigit() for part in path)
    if id(linear.weight) in embeddings:
        return "output head: shares its weight with an embedding"
    if name in _HEAD_NAMES and not in_repeated_block:
        return "output head: its error goes straight into the loss"
    # SwiGLU's `gate` widens; a router's narrows to the number of experts.
    if "router" in path or (name in _ROUTER_NAMES and linear.out_features < linear.in_features):
        return "router: its error changes which expert a token meets"
    if min(linear.in_features, linear.out_features) < GROUP:
        return f"fewer than {GROUP} in or out features: smaller than one group of scales"
    return None


def _summarise(names: Iterable[str]) -> list[str]:
    """Names of repeated blocks on one line: layers.*.attention.query (32)."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name) or "the model itself"
        counts[pattern] = counts.get(pattern, 0) + 1
    return [
        f"{pattern} ({count})" if "*" in pattern else pattern for pattern, count in counts.items()
    ]
