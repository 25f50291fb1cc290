"""The result of a conversion: which layers train in FP8, which parameters stay wide, and why."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .nn import Linear

_WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ReadOnlyDict(dict[str, str]):
    """A dict that cannot be changed. It is a dict because json and pickle require one."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "ConversionResult: skipped must stay as it is (got a change to this read-only dict); "
            "change a copy, dict(result.skipped)"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]
    clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadOnlyDict, (dict(self),)


@dataclasses.dataclass(frozen=True)
class WideParameter:
    """A parameter of two or more dimensions that takes no part in FP8 training.

    Attributes:
        name: the fully qualified name; for a parameter that several modules share, the first one.
        shape: its sizes; () for a lazy parameter whose shape is not known yet.
        reason: why it stays wide, in a few words, with a remedy if there is one.
    """

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def numel(self) -> int:
        """The number of elements; 0 for a lazy parameter whose shape is not known yet."""
        return math.prod(self.shape) if self.shape else 0


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ConversionResult:
    """The result of convert_to_fp8_training; `print` it for a summary.

    It can be copied, pickled and saved, also as an attribute of the model. `to_dict()` and
    `to_json()` omit the model; a file written by `torch.save(result.to_dict(), path)` loads with
    `weights_only=True`.

    Attributes:
        model: the model that was passed, converted in place.
        converted: fully qualified names of the layers that were converted.
        skipped: {fully qualified name of every other torch.nn.Linear: reason in a few words}.
        wide: every parameter of two or more dimensions that stays wide, the largest first: weights
            of skipped layers, embeddings, convolutions, experts held as one 3-D parameter, ...
        fp8_elements: the number of elements of parameters that train in FP8, including those of
            layers that were converted before. A parameter that modules share counts once.
        elements: the number of elements of all parameters, each counted once.
    """

    model: nn.Module
    converted: tuple[str, ...]
    skipped: Mapping[str, str]
    wide: tuple[WideParameter, ...] = ()
    fp8_elements: int = 0
    elements: int = 0

    @property
    def fp8_share(self) -> float:
        """The share of the model's parameters that trains in FP8, from 0 to 1."""
        return self.fp8_elements / self.elements if self.elements else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything except the model, as plain lists, dicts, strings and numbers."""
        return {
            "converted": list(self.converted),
            "skipped": dict(self.skipped),
            "wide": [
                {
                    "name": parameter.name,
                    "shape": list(parameter.shape),
                    "numel": parameter.numel,
                    "reason": parameter.reason,
                }
                for parameter in self.wide
            ],
            "fp8_elements": self.fp8_elements,
            "elements": self.elements,
            "fp8_share": self.fp8_share,
        }

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict()` as JSON; `indent` as in json.dumps."""
        return json.dumps(self.to_dict(), indent=indent)

    def __repr__(self) -> str:
        return (
            f"<ConversionResult: {self._headline()}, {_percent(self.fp8_share)} of the "
            "parameters; print() shows all>"
        )

    def __str__(self) -> str:
        lines = [self._headline(), *_indented(self.converted)]
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            lines += [f"left alone: {reason}{self._share(reason)}", *_indented(names)]
        others = [parameter for parameter in self.wide if not self._is_of_a_linear(parameter)]
        for reason in dict.fromkeys(parameter.reason for parameter in others):
            group = [parameter for parameter in others if parameter.reason == reason]
            lines.append(f"not a linear layer: {reason}{self._share(reason)}")
            lines += _indented(f"{parameter.name} {list(parameter.shape)}" for parameter in group)
        if self.elements:
            lines.append(
                f"{_percent(self.fp8_share)} of the parameters train in FP8: "
                f"{self.fp8_elements:,} of {self.elements:,}"
            )
        return "\n".join(lines)

    def _share(self, reason: str) -> str:
        elements = sum(parameter.numel for parameter in self.wide if parameter.reason == reason)
        return f" ({_percent(elements / self.elements)} of the parameters)" if elements else ""

    def _is_of_a_linear(self, parameter: WideParameter) -> bool:
        return parameter.reason in self.skipped.values()

    def _headline(self) -> str:
        total = len(self.converted) + len(self.skipped)
        return f"{len(self.converted)} of {total} linear layers train in FP8"


def survey(
    model: nn.Module, skipped: Mapping[str, str]
) -> tuple[tuple[WideParameter, ...], int, int]:
    """(wide, fp8_elements, elements) of the `ConversionResult` for a converted model.

    `skipped` maps the name of every torch.nn.Linear that stays wide to the reason.
    """
    modules = dict(model.named_modules())
    in_fp8 = {}
    for owner, module in modules.items():
        linear = _linear_around(owner, modules)
        if linear is not None and isinstance(modules[linear], Linear):
            for name, parameter in module.named_parameters(recurse=False):
                if _is_matrix(name, parameter):
                    in_fp8[id(parameter)] = parameter
    seen: set[int] = set()
    wide = []
    elements = 0
    for owner, module in modules.items():
        for name, parameter in module.named_parameters(owner, recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            shape = () if is_lazy(parameter) else tuple(parameter.shape)
            elements += 0 if is_lazy(parameter) else parameter.numel()
            if _is_matrix(name, parameter) and id(parameter) not in in_fp8:
                reason = _why_wide(owner, parameter, modules, skipped)
                wide.append(WideParameter(name, shape, reason))
    wide.sort(key=lambda parameter: -parameter.numel)
    fp8_elements = sum(parameter.numel() for parameter in in_fp8.values())
    return tuple(wide), fp8_elements, elements


def _percent(share: float) -> str:
    return "less than 0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def _is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether it has two or more dimensions. For a lazy parameter, whose shape is not known yet,
    whether its name ends in `weight`."""
    return name.endswith("weight") if is_lazy(parameter) else parameter.dim() >= 2


def _linear_around(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the torch.nn.Linear that module `name` is, or is a parametrization of."""
    while not isinstance(modules.get(name), nn.Linear):
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def _why_wide(
    owner: str,
    parameter: torch.Tensor,
    modules: Mapping[str, nn.Module],
    skipped: Mapping[str, str],
) -> str:
    linear = _linear_around(owner, modules)
    if linear is not None:
        return skipped[linear]
    module = modules[owner]
    kind = type(module).__name__
    if parameter.dtype not in _WIDE_DTYPES:
        return f"its dtype is {parameter.dtype}, not FP32, BF16 or FP16"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding: its rows are looked up, not multiplied"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution: torchext has no FP8 convolution"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return f"{kind}: PyTorch computes all of its GEMMs in one operator"
    if isinstance(module, nn.MultiheadAttention):
        return (
            "MultiheadAttention multiplies it by itself (write q, k and v as torch.nn.Linears to "
            "convert them)"
        )
    if kind == "Conv1D" and parameter.dim() == 2:  # the class that transformers uses in GPT-2
        return (
            "Conv1D holds a transposed weight (replace it by a torch.nn.Linear with weight.T, then "
            "convert)"
        )
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return f"{kind} multiplies element by element"
    if parameter.dim() == 3 and parameter.shape[0] > 1:
        return (
            f"{kind} holds matrices, such as experts, in one 3-D parameter (make each a "
            "torch.nn.Linear, or call torchext.ops.m_grouped_fp8_gemm_nt_contiguous)"
        )
    return f"parameter of {kind} itself (only a torch.nn.Linear is converted)"


def _indented(names: Iterable[str]) -> Iterator[str]:
    """Indented names; those in repeated blocks share a line: layers.*.attention.query (32)."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        if re.fullmatch(r"[*.]*", pattern):  # layers of a Sequential are named by numbers only
            pattern = name
        patterns.setdefault(pattern, []).append(name)
    for pattern, alike in patterns.items():
        yield "  " + (
            f"{pattern} ({len(alike)})" if len(alike) > 1 else alike[0] or "the model itself"
        )
