"""Converts the linear layers of a model to FP8 and back; reports which it left alone and why."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping

import torch

from . import _conversion_rules as rules
from ._conversion_result import ConversionResult, ReadOnlyDict, survey
from ._experts import convert_experts_, find_experts
from ._fusion import NAMES, fuse_mlps, unfuse_mlps
from ._norm_fusion import fuse_norms, unfuse_norms
from ._split_fusion import fuse_split_mlps, unfuse_split_mlps
from .nn import Linear, MoE
from .nn.converted import TransposedLinear, convert_subclass_, convert_transposed_
from .nn.experts import FP8Experts, trains_in_fp8
from .nn.mlp import check_save
from .ops.mlp_function import Save
from .recipe import Recipe

_log = logging.getLogger("torchext")
ModuleFilter = Callable[[torch.nn.Module, str], bool]


def convert_to_fp8_training(
    model: torch.nn.Module,
    recipe: Recipe | rules.RecipeByName | None = None,
    module_filter_fn: ModuleFilter | None = None,
    *,
    fuse: bool = True,
    save: Save = "fp8",
) -> ConversionResult:
    """Makes the linear layers of `model` train in FP8, in place.

    Each stays the same object with the same parameters, hooks, requires_grad and mode. A
    torch.nn.Linear becomes a torchext.nn.Linear. A layer of a subclass that inherits the forward of
    torch.nn.Linear becomes an instance of both classes. A layer that holds its weight as
    [in_features, out_features], such as the Conv1D of transformers' GPT-2, stays one of its class.
    Experts that a module holds as 3-D parameters, as in transformers 5 and torchtitan, train by
    grouped GEMMs (docs/layers.md). So an optimizer may be created before or after the conversion.
    Convert before torch.compile and before the model is sharded. `unconvert` undoes the conversion.

    Args:
        model: any module, including a torch.nn.Linear.
        recipe: the recipe of every converted layer, Recipe.deepseek_v3() if None; or a mapping of
            patterns to recipes. A name, such as "lm_head" or "mlp.gate", matches whole segments of
            a fully qualified name ("...mlp.gate", but not "...mlp.gate_up"), and whatever is
            inside; each segment may be a glob; "re:..." is a regular expression for the beginning
            of the name. Each layer gets the recipe of the last pattern that matches its name, and
            stays wide if that recipe is None or if no pattern matches. A key without wildcards that
            is a layer's whole name converts that layer even if the default filter would leave it
            alone.
        module_filter_fn: called as module_filter_fn(module, fully qualified name) for each linear
            layer, and each module of experts, that can be converted and has a recipe; it is
            converted if the result is true. The
            default, None, leaves alone: layers with fewer than 128 in or out features (smaller than
            one scale group), output heads (their error goes straight into the loss), and routers
            (an error may send a token to another expert). It recognizes heads and routers by name,
            and heads also if they share their weight with an embedding.
        fuse: whether MLPs run fused, with FP8 between their GEMMs, forward and backward, and norms
            quantize their results for the FP8 layers that read them. Both are recognized by what
            they compute (docs/layers.md). A module stays the same object; its class becomes a
            subclass of the same name.
        save: what a fused MLP, and experts, keep of the activation's operands for backward, as
            `save` of torchext.nn.SwiGLU.

    Some layers cannot be converted, whatever the filter returns: those of subclasses of
    torch.nn.Linear with a forward of their own, those whose weight is parametrized or whose
    `forward` was replaced, those whose weight is not a plain FP32, BF16 or FP16 tensor, and experts
    whose recipe is not blockwise or leaves a GEMM wide.
    Parameters of other modules do not change. `result.parameters` tells of each parameter of two or
    more dimensions whether it trains in FP8, and if not why.

    Returns:
        A ConversionResult. It lists converted and skipped layers, and prints as a summary.

    Raises:
        TypeError: model, recipe or module_filter_fn has another type.
        ValueError: a pattern matches no linear layer's name or cannot be read, or `save` is another
            string. Nothing has been changed then.

    Warns:
        UserWarning: no parameter of the model trains in FP8 afterwards.
    """
    _check_arguments(model, recipe, module_filter_fn)
    check_save("convert_to_fp8_training", save)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    experts = find_experts(model)
    layers = rules.linear_layers(model, experts)
    recipe_of = rules.RecipeOf(recipe, layers)
    converted, skipped, fused = [], {}, {}
    for fqn, layer in layers.items():
        own_recipe = None
        reason = rules.why_impossible(layer)
        if reason is None:
            own_recipe, reason = recipe_of(fqn)
        if reason is None and own_recipe is not None and fqn in experts:
            reason = rules.why_impossible_for_experts(own_recipe)
        if reason is None:
            if module_filter_fn is not None:
                reason = None if module_filter_fn(layer, fqn) else rules.EXCLUDED
            elif not recipe_of.is_named(fqn):
                reason = rules.why_not_worthwhile(layer, fqn, embeddings)
        if reason is not None or own_recipe is None:
            skipped[fqn] = reason or rules.NO_RECIPE
        elif fqn in experts:
            convert_experts_(layer, experts[fqn], own_recipe, save)
            converted.append(fqn)
            fused[fqn] = f"{NAMES[experts[fqn].activation]} experts"
        elif isinstance(layer, torch.nn.Linear):
            convert_subclass_(layer, own_recipe)
            converted.append(fqn)
        else:
            convert_transposed_(layer, own_recipe)
            converted.append(fqn)
    if fuse:
        fused |= fuse_mlps(model, save) | fuse_split_mlps(model, save) | fuse_norms(model)
    result = ConversionResult(
        model,
        tuple(converted),
        ReadOnlyDict(skipped),
        **survey(model, skipped),
        fused=ReadOnlyDict(fused),
    )
    _log.info(
        "convert_to_fp8_training: converted %d of %d linear layers of %s, recipe %s",
        len(converted),
        len(converted) + len(skipped),
        type(model).__name__,
        "by name" if isinstance(recipe, Mapping) else recipe or Recipe.deepseek_v3(),
    )
    for fqn, reason in skipped.items():
        _log.debug("convert_to_fp8_training: skipped %s: %s", fqn, reason)
    if result.fp8_elements == 0:
        warnings.warn(_nothing_converted(result), stacklevel=2)
    return result


def unconvert(model: torch.nn.Module) -> tuple[str, ...]:
    """Undoes `convert_to_fp8_training`: gives the FP8 layers of `model` their own classes back.

    Fused MLPs and norms get their classes back, too. Each layer stays the same object with the same
    parameters, hooks and mode; torchext.nn.Linears that no conversion made become torch.nn.Linears,
    too. A torchext.nn.MoE stays one. Call it, for example, before another library quantizes the
    model.

    Args:
        model: any module, including an FP8 layer.

    Returns:
        The fully qualified names of these layers.

    Raises:
        TypeError: model is not a torch.nn.Module, or contains a layer of a subclass of
            torchext.nn.Linear that no conversion made, which a parametrized layer is, too. Nothing
            has been changed then.
    """
    return _unconvert(model, "unconvert")


def revert_to_linear(model: torch.nn.Module) -> tuple[str, ...]:
    """Deprecated name of `unconvert`."""
    warnings.warn(
        "torchext.revert_to_linear is deprecated: call torchext.unconvert, which does the same",
        DeprecationWarning,
        stacklevel=2,
    )
    return _unconvert(model, "revert_to_linear")


def _unconvert(model: torch.nn.Module, name: str) -> tuple[str, ...]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"{name}: model must be a torch.nn.Module (got {model!r}); pass the model that was "
            "converted"
        )
    layers = {
        fqn: m for fqn, m in model.named_modules() if trains_in_fp8(m) and not isinstance(m, MoE)
    }
    for fqn, layer in layers.items():
        if type(layer) is not Linear and "plain_class" not in vars(type(layer)):
            raise TypeError(
                f"{name}: {fqn} must be a torchext.nn.Linear (got its subclass "
                f"{type(layer).__name__}, whose own behavior would be lost); first remove its "
                "parametrizations, or replace the layer"
            )
    unfuse_mlps(model)
    unfuse_split_mlps(model)
    unfuse_norms(model)
    for layer in layers.values():
        assert isinstance(layer, (Linear, TransposedLinear, FP8Experts))
        layer.revert_()
    _log.info("%s: %d layers of %s", name, len(layers), type(model).__name__)
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


def _check_arguments(model: object, recipe: object, module_filter_fn: object) -> None:
    def refuse(name: str, expected: str, got: object, remedy: str) -> None:
        raise TypeError(
            f"convert_to_fp8_training: {name} must be {expected} (got {got!r}); {remedy}"
        )

    if not isinstance(model, torch.nn.Module):
        refuse("model", "a torch.nn.Module", model, "pass the model to convert")
    if isinstance(recipe, Mapping):
        for pattern, its_recipe in recipe.items():
            if not isinstance(pattern, str):
                expected = "a mapping of patterns to recipes"
                refuse("recipe", expected, pattern, "make each key a string")
            if its_recipe is not None and not isinstance(its_recipe, Recipe):
                expected = f"a torchext.Recipe or None for {pattern!r}"
                refuse("recipe", expected, its_recipe, "pass, for example, Recipe.parse(text)")
    elif recipe is not None and not isinstance(recipe, Recipe):
        remedy = "pass, for example, Recipe.deepseek_v3(), or a mapping of patterns to recipes"
        refuse("recipe", "a torchext.Recipe", recipe, remedy)
    if module_filter_fn is not None and not callable(module_filter_fn):
        expected = "a function (module, name) -> bool"
        refuse("module_filter_fn", expected, module_filter_fn, "omit it for the default filter")
