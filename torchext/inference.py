"""Quantizes the weights of a model for inference; reports which it left alone and why."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from . import _conversion_rules as rules
from ._conversion_result import (
    ReadOnlyDict,
    WideParameter,
    indented,
    lines_on_wide,
    percent,
    why_wide,
)
from ._experts import find_experts
from ._patterns import Patterns
from .convert import unconvert
from .nn.converted import is_transposed_linear
from .nn.experts import trains_in_fp8
from .nn.fp8_linear import FP8Linear, Mode, check_mode, quantize_linear_
from .nn.frozen_experts import quantize_experts_
from .nn.frozen_weights import E4M3, FrozenWeights

_log = logging.getLogger("torchext")
_SUBCLASS = (
    "is a subclass whose own behavior would be lost (replace it by a plain torch.nn.Linear, or "
    "call torchext.nn.FP8Linear.from_linear)"
)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class InferenceResult:
    """The result of quantize_for_inference; `print` it for a summary.

    Attributes:
        model: the model that was passed, quantized in place.
        converted: {fully qualified name of each module whose weights are in FP8 now: its mode}.
        skipped: {fully qualified name of every other linear layer, or module of experts: reason in
            a few words}.
        matched: {each pattern of `skip`: the names that it matched}.
        wide: every parameter of two or more dimensions that stays wide, the largest first, and why.
        fp8_elements: the number of elements of FP8 weights, each counted once.
        elements: the number of elements of all parameters but scales, each counted once.
        bytes_before, bytes_after: bytes of all parameters, with scales, before and after.
    """

    model: torch.nn.Module
    converted: Mapping[str, str]
    skipped: Mapping[str, str]
    matched: Mapping[str, tuple[str, ...]]
    wide: tuple[WideParameter, ...]
    fp8_elements: int
    elements: int
    bytes_before: int
    bytes_after: int

    @property
    def fp8_share(self) -> float:
        """The share of the model's parameters that is in FP8, from 0 to 1."""
        return self.fp8_elements / self.elements if self.elements else 0.0

    @property
    def bytes_per_parameter(self) -> float:
        """bytes_after / elements."""
        return self.bytes_after / self.elements if self.elements else 0.0

    def require(self, share: float) -> None:
        """Raises RuntimeError, with the reasons, if less than `share` of the parameters is in FP8.

        Raises:
            RuntimeError: the share is smaller.
            ValueError: share is not from 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(
                f"InferenceResult.require: share must be from 0 to 1 (got {share!r}); pass 0.9 for "
                "90%"
            )
        if self.fp8_share < share:
            sizes: dict[str, int] = {}
            for parameter in self.wide:
                sizes[parameter.reason] = sizes.get(parameter.reason, 0) + parameter.numel
            reasons = "; ".join(f"{percent(n / self.elements)}: {why}" for why, n in sizes.items())
            raise RuntimeError(
                f"InferenceResult.require: at least {share:.1%} of the parameters must be in FP8 "
                f"(got {percent(self.fp8_share)}); what stays wide: {reasons or 'vectors'}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything except the model, as plain lists, dicts, strings and numbers."""
        return {
            "converted": dict(self.converted),
            "skipped": dict(self.skipped),
            "matched": {pattern: list(names) for pattern, names in self.matched.items()},
            "wide": [
                {**dataclasses.asdict(parameter), "shape": list(parameter.shape)}
                for parameter in self.wide
            ],
            "fp8_elements": self.fp8_elements,
            "elements": self.elements,
            "fp8_share": self.fp8_share,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict()` as JSON; `indent` as in json.dumps."""
        return json.dumps(self.to_dict(), indent=indent)

    def __repr__(self) -> str:
        return (
            f"<InferenceResult: {self._headline()}, {percent(self.fp8_share)} of the parameters; "
            "print() shows all>"
        )

    def __str__(self) -> str:
        lines = [self._headline()]
        for mode in dict.fromkeys(self.converted.values()):
            lines += [f"{mode}:", *indented(n for n, m in self.converted.items() if m == mode)]
        lines += lines_on_wide(self.skipped, self.wide, self.elements)
        lines.append(
            f"{percent(self.fp8_share)} of the parameters are in FP8: {self.fp8_elements:,} of "
            f"{self.elements:,}"
        )
        if self.bytes_before:
            lines.append(
                f"bytes of parameters and scales: {self.bytes_after:,}, "
                f"{self.bytes_after / self.bytes_before:.2f} times the {self.bytes_before:,} before"
            )
        return "\n".join(lines)

    def _headline(self) -> str:
        total = len(self.converted) + len(self.skipped)
        return f"{len(self.converted)} of {total} linear layers hold FP8 weights"


def quantize_for_inference(
    model: torch.nn.Module,
    mode: Mode = "w8a8",
    *,
    skip: Iterable[str] = (),
    module_filter_fn: Callable[[torch.nn.Module, str], bool] | None = None,
    pow2_scale: bool = False,
) -> InferenceResult:
    """Replaces the weights of `model`'s linear layers by FP8 ones, in place: one byte for each.

    A torch.nn.Linear becomes a torchext.nn.FP8Linear and stays the same object with the same bias,
    hooks and mode. Experts that a module holds as 3-D parameters (docs/layers.md) become FP8, too,
    with their module's class, and so do those of torchext.nn.MoE. A model that trains in FP8 is
    unconverted first. No wide copy is kept; while it runs, there is one of a single module. The
    weights do not train any more, but gradients pass through them to adapters.

    `state_dict` has the layout of FP8 checkpoints: `X.weight` and `X.weight_scale_inv`.
    `dequantize_weights(model)` undoes it, except for the rounding.

    Args:
        model: any module, including a torch.nn.Linear.
        mode: "w8a8" multiplies FP8 inputs, "w8a16" inputs as they are; see torchext.nn.FP8Linear.
            Experts multiply in grouped GEMMs in mode "w8a8", one after another in "w8a16".
        skip: patterns of names to leave alone: a name, such as "lm_head" or "mlp.gate", matches
            whole segments of a fully qualified name ("model.layers.0.mlp.gate", not
            "...mlp.gate_up"), and whatever is inside; each segment may be a glob; "re:..." is a
            regular expression that must match from the beginning of the name.
        module_filter_fn: called as in convert_to_fp8_training, whose default filter it replaces:
            layers with fewer than 128 features, output heads and routers.
        pow2_scale: round scales up to powers of two.

    Returns:
        An InferenceResult. It lists converted and skipped modules, and prints as a summary.

    Raises:
        TypeError: model, skip or module_filter_fn has another type.
        ValueError: mode is another string, or a pattern of `skip` matches no linear layer. Nothing
            has been changed then.

    Warns:
        UserWarning: no weight of the model is in FP8 afterwards.
    """
    _check_arguments(model, module_filter_fn)
    check_mode("quantize_for_inference", mode)
    experts = find_experts(model)
    layers = rules.linear_layers(model, experts)
    matched = _matches(skip, layers)
    if any(trains_in_fp8(module) for module in layers.values()):
        unconvert(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    bytes_before = _bytes(model)
    skipped_by = {name: pattern for pattern, names in matched.items() for name in names}
    converted, skipped = {}, {}
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    shared: dict[int, tuple[torch.Tensor, FP8Linear]] = {}  # by the id of the wide weight
    for fqn, layer in layers.items():
        reason = f"skipped by {skipped_by[fqn]!r}" if fqn in skipped_by else None
        reason = reason or _why_impossible(layer, fqn, experts, mode)
        if reason is None and module_filter_fn is not None:
            reason = None if module_filter_fn(layer, fqn) else rules.EXCLUDED
        elif reason is None:
            reason = rules.why_not_worthwhile(layer, fqn, embeddings)
        if reason is not None:
            skipped[fqn] = reason
        elif isinstance(layer, torch.nn.Linear):
            wide = layer.weight
            quantized = quantize_linear_(layer, mode, pow2_scale=pow2_scale)
            if uses[id(wide)] > 1:
                _, twin = shared.setdefault(id(wide), (wide, quantized))
                quantized.weight, quantized.weight_scale_inv = twin.weight, twin.weight_scale_inv
            converted[fqn] = mode
        else:
            quantize_experts_(layer, experts[fqn], mode, pow2_scale=pow2_scale)
            converted[fqn] = mode
    if converted:
        _LeftOutOfDDP.set(model)
    result = InferenceResult(
        model,
        ReadOnlyDict(converted),
        ReadOnlyDict(skipped),
        matched,
        **_survey(model, skipped),
        bytes_before=bytes_before,
        bytes_after=_bytes(model),
    )
    _log.info(
        "quantize_for_inference: %d of %d linear layers of %s, mode %s",
        *(len(converted), len(converted) + len(skipped), type(model).__name__, mode),
    )
    for fqn, reason in skipped.items():
        _log.debug("quantize_for_inference: skipped %s: %s", fqn, reason)
    if result.fp8_elements == 0:
        reasons = "; ".join(dict.fromkeys(skipped.values())) or "it has no torch.nn.Linear"
        warnings.warn(
            f"quantize_for_inference: no weight of this {type(model).__name__} is in FP8: "
            f"{reasons}",
            stacklevel=2,
        )
    return result


def dequantize_weights(model: torch.nn.Module, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """Undoes `quantize_for_inference`, except for the rounding: gives the weights back in `dtype`.

    Each layer stays the same object with the same bias, hooks and mode.

    Args:
        model: any module, including a torchext.nn.FP8Linear.
        dtype: FP32, BF16 or FP16; if None, what each weight had before.

    Returns:
        The fully qualified names of the modules.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, FrozenWeights)}
    for module in found.values():
        module.dequantize_(dtype)  # type: ignore[operator]
    return tuple(found)


class _LeftOutOfDDP:
    """The names that DistributedDataParallel reads from a model, which it then does not broadcast:
    those of FP8 weights, which gloo cannot, and those that others gave.

    They are those of the moment when DDP wraps the model, because modules may move until then.
    """

    attribute = "_ddp_params_and_buffers_to_ignore"  # what DDP's own function for this sets

    def __init__(self, model: torch.nn.Module, others: Iterable[str]) -> None:
        self._model, self._others = model, tuple(others)

    def __iter__(self) -> Iterator[str]:
        frozen = (name for name, p in self._model.named_parameters() if p.dtype is E4M3)
        return iter(dict.fromkeys([*self._others, *frozen]))

    @classmethod
    def set(cls, model: torch.nn.Module) -> None:
        before = getattr(model, cls.attribute, ())
        if not isinstance(before, cls):
            setattr(model, cls.attribute, cls(model, before))


def _why_impossible(
    layer: torch.nn.Module, fqn: str, experts: Mapping[str, Any], mode: Mode
) -> str | None:
    if isinstance(layer, FrozenWeights):
        return "holds FP8 weights already"
    reason = rules.why_unfit(layer)
    if reason is None and mode == "w8a16" and getattr(layer, "dispatcher", None) is not None:
        return "its dispatcher sends rows in FP8, which w8a16 does not multiply (use mode w8a8)"
    if reason is None and is_transposed_linear(layer):
        return f"{type(layer).__name__} holds a transposed weight (replace it by a torch.nn.Linear)"
    if reason is None and fqn not in experts and type(layer) is not torch.nn.Linear:
        return f"{type(layer).__name__} {_SUBCLASS}"
    return reason


def _matches(skip: Iterable[str], names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    names = list(names)
    patterns = Patterns(skip, "quantize_for_inference: skip")
    for name in names:
        patterns.match(name)
    if patterns.unmatched:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            "quantize_for_inference: skip must have patterns that match a linear layer's name (got "
            f"{', '.join(map(repr, patterns.unmatched))}, which match none of "
            f"{shown or 'its no linear layers'}); correct or remove them"
        )
    return {pattern: tuple(found) for pattern, found in patterns.matched.items()}


def _bytes(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def _survey(model: torch.nn.Module, skipped: Mapping[str, str]) -> dict[str, Any]:
    modules = dict(model.named_modules())
    scales = {
        id(getattr(module, f"{name}_scale_inv"))
        for module in modules.values()
        if isinstance(module, FrozenWeights)
        for name in module.frozen_names()
    }
    seen: set[int] = set()
    wide = []
    elements = fp8_elements = 0
    for owner, module in modules.items():
        frozen = module.frozen_names() if isinstance(module, FrozenWeights) else ()
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or id(parameter) in scales:
                continue
            seen.add(id(parameter))
            elements += parameter.numel()
            if name in frozen:
                fp8_elements += parameter.numel()
            elif parameter.dim() >= 2:
                full_name = f"{owner}.{name}" if owner else name
                reason = why_wide(owner, parameter, modules, skipped)
                wide.append(WideParameter(full_name, tuple(parameter.shape), reason))
    wide.sort(key=lambda parameter: -math.prod(parameter.shape))
    return {"wide": tuple(wide), "fp8_elements": fp8_elements, "elements": elements}


def _check_arguments(model: object, module_filter_fn: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"quantize_for_inference: model must be a torch.nn.Module (got {model!r}); pass the "
            "model to quantize"
        )
    if module_filter_fn is not None and not callable(module_filter_fn):
        raise TypeError(
            "quantize_for_inference: module_filter_fn must be a function (module, name) -> bool "
            f"(got {module_filter_fn!r}); omit it for the default filter"
        )
