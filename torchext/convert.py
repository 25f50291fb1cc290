"""Converts a model's nn.Linears to FP8 layers and back, and reports which it left alone and why."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import torch
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ._conversion_result import ConversionResult, ReadOnlyDict, survey
from ._dispatch.layout import GROUP
from .nn import Linear
from .recipe import Recipe

_log = logging.getLogger("torchext")
ModuleFilter = Callable[[torch.nn.Module, str], bool]

_HEAD_NAMES = {"lm_head", "output", "head", "classifier", "score", "embed_out", "unembed", "logits"}
_ROUTER_NAMES = {"router", "gate", "shared_expert_gate"}


def convert_to_fp8_training(
    model: torch.nn.Module,
    recipe: Recipe | None = None,
    module_filter_fn: ModuleFilter | None = None,
) -> ConversionResult:
    """Makes the torch.nn.Linears of `model` train in FP8, in place.

    Each becomes a torchext.nn.Linear and stays the same object with the same parameters, hooks,
    requires_grad and mode. So an optimizer may be created before or after the conversion. Convert
    before torch.compile and before the model is sharded. `revert_to_linear` undoes the conversion.

    Args:
        model: any module, including a torch.nn.Linear.
        recipe: the recipe of every converted layer; Recipe.deepseek_v3() if None.
        module_filter_fn: called as module_filter_fn(module, fully qualified name) for each
            torch.nn.Linear that can be converted; it is converted if the result is true. The
            default, None, leaves alone: layers with fewer than 128 in or out features (smaller than
            one scale group), output heads (their error goes straight into the loss), and routers
            (an error may send a token to another expert). It recognizes heads and routers by name,
            and heads also if they share their weight with an embedding.

    Some layers cannot be converted, whatever the filter returns: subclasses of torch.nn.Linear,
    layers whose weight is parametrized or whose `forward` was replaced, and layers whose weight is
    not a plain FP32, BF16 or FP16 tensor. Parameters of other modules do not change. `result.wide`
    lists those of two or more dimensions, so that no expert or Conv1D stays wide unnoticed.

    Returns:
        A ConversionResult. It lists converted and skipped layers, and prints as a summary.

    Raises:
        TypeError: model, recipe or module_filter_fn has another type.

    Warns:
        UserWarning: no parameter of the model trains in FP8 afterwards.
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
                reason = "excluded by module_filter_fn"
        if reason is None:
            Linear.convert_(module, recipe)
            converted.append(fqn)
        else:
            skipped[fqn] = reason
    result = ConversionResult(
        model, tuple(converted), ReadOnlyDict(skipped), *survey(model, skipped)
    )
    _log.info(
        "convert_to_fp8_training: converted %d of %d linear layers of %s, recipe %s",
        len(converted),
        len(converted) + len(skipped),
        type(model).__name__,
        recipe or Recipe.deepseek_v3(),
    )
    for fqn, reason in skipped.items():
        _log.debug("convert_to_fp8_training: skipped %s: %s", fqn, reason)
    if result.fp8_elements == 0:
        warnings.warn(_nothing_converted(result), stacklevel=2)
    return result


def revert_to_linear(model: torch.nn.Module) -> tuple[str, ...]:
    """Turns the FP8 layers of `model` back into torch.nn.Linears, in place.

    Each stays the same object with the same parameters, hooks and mode. Call it, for example,
    before another library quantizes the model.

    Args:
        model: any module, including a torchext.nn.Linear.

    Returns:
        The fully qualified names of the reverted layers.

    Raises:
        TypeError: model is not a torch.nn.Module, or contains a subclass of torchext.nn.Linear,
            which a parametrized layer is, too. Nothing has been changed then.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"revert_to_linear: model must be a torch.nn.Module (got {model!r}); pass the model "
            "that was converted"
        )
    layers = {fqn: m for fqn, m in model.named_modules() if isinstance(m, Linear)}
    for fqn, layer in layers.items():
        if type(layer) is not Linear:
            raise TypeError(
                f"revert_to_linear: {fqn} must be a torchext.nn.Linear (got its subclass "
                f"{type(layer).__name__}, whose own behavior would be lost); first remove its "
                "parametrizations, or replace the layer"
            )
    for layer in layers.values():
        layer.revert_()
    _log.info("revert_to_linear: %d layers of %s", len(layers), type(model).__name__)
    return tuple(layers)


def _nothing_converted(result: ConversionResult) -> str:
    reasons = dict.fromkeys([p.reason for p in result.wide] + list(result.skipped.values()))
    text = "; ".join(reasons) or "it has no torch.nn.Linear"
    if result.skipped:
        text += ". module_filter_fn can convert heads, routers and small layers"
    return (
        f"convert_to_fp8_training: no parameter of this {type(result.model).__name__} trains in "
        f"FP8: {text}"
    )


def _check_arguments(
    model: torch.nn.Module, recipe: Recipe | None, module_filter_fn: ModuleFilter | None
) -> None:
    def refuse(name: str, expected: str, got: object, remedy: str) -> None:
        raise TypeError(
            f"convert_to_fp8_training: {name} must be {expected} (got {got!r}); {remedy}"
        )

    if not isinstance(model, torch.nn.Module):
        refuse("model", "a torch.nn.Module", model, "pass the model to convert")
    if recipe is not None and not isinstance(recipe, Recipe):
        refuse("recipe", "a torchext.Recipe", recipe, "pass, for example, Recipe.deepseek_v3()")
    if module_filter_fn is not None and not callable(module_filter_fn):
        expected = "a function (module, name) -> bool"
        refuse("module_filter_fn", expected, module_filter_fn, "omit it for the default filter")


def _why_impossible(linear: torch.nn.Linear) -> str | None:
    if isinstance(linear, Linear):
        return "trains in FP8 already"
    if is_parametrized(linear):
        return "its parameters are parametrized (convert first, parametrize after)"
    if type(linear) is not torch.nn.Linear:
        kind = type(linear).__name__
        remedy = "run a forward first" if is_lazy(linear.weight) else "replace it by a plain one"
        return f"{kind} is a subclass whose own behavior would be lost ({remedy})"
    if "forward" in vars(linear):
        return (
            "its forward was replaced by another function (convert before accelerate or others add "
            "their hooks)"
        )
    weight = linear.weight
    if type(weight) not in (torch.nn.Parameter, torch.Tensor):
        return f"its weight is a {type(weight).__name__} (convert before sharding or quantizing)"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {weight.dtype}, not FP32, BF16 or FP16 (change it with .to())"
    return None


def _why_not_worthwhile(linear: torch.nn.Linear, fqn: str, embeddings: set[int]) -> str | None:
    *path, name = fqn.split(".")
    in_repeated_block = any(part.isdigit() for part in path)
    if id(linear.weight) in embeddings:
        return "output head: shares its weight with an embedding"
    if name in _HEAD_NAMES and not in_repeated_block:
        return "output head: its error goes straight into the loss"
    # A SwiGLU layer called `gate` has more outputs than inputs, a router fewer.
    if "router" in path or (name in _ROUTER_NAMES and linear.out_features < linear.in_features):
        return "router: its error changes which expert a token goes to"
    if min(linear.in_features, linear.out_features) < GROUP:
        return f"fewer than {GROUP} in or out features: smaller than one scale group"
    return None
