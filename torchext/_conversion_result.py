"""The result of a conversion: which parameters train in FP8, and why the others do not."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ._dispatch.layout import GROUP
from ._experts import why_not_experts
from .nn.experts import ExpertsInFP8, ExpertsRoles, FP8EqualExperts, trains_in_fp8
from .recipe import GEMMS, Recipe

_NORMS = ("RMSNorm", "LayerNorm")
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


@dataclasses.dataclass(frozen=True)
class MatrixReport:
    """What a parameter of two or more dimensions does in training.

    FLOPs count two for each multiplication of fprop, dgrad and, unless the parameter is frozen,
    wgrad. They are those of one token; of one output position for a convolution. An embedding, a
    norm and a parameter that no module of a known kind holds count none. Of the experts in a 3-D
    parameter, each token passes as many as the attribute `top_k` or `num_experts_per_tok` of their
    module, or of one beside it, says; one if there is no such attribute.

    Attributes:
        name: the fully qualified name; for a parameter that several modules share, the first one.
        shape: its sizes; () for a lazy parameter whose shape is not known yet.
        recipe: str() of the recipe that it trains with; None if it stays wide.
        reason: why it stays wide, in a few words; None if it trains in FP8.
        flops: FLOPs of all its products.
        fp8_flops: FLOPs of those that run in FP8.
        bf16_bytes: bytes of the layer's input that backward would keep for each token in BF16; 0
            if it stays wide.
        saved_bytes: bytes of the input that backward does keep for each token, with scales. Layers
            that share an input each count it, here as in `bf16_bytes`.
    """

    name: str
    shape: tuple[int, ...]
    recipe: str | None
    reason: str | None
    flops: int
    fp8_flops: int
    bf16_bytes: float
    saved_bytes: float


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ConversionResult:
    """The result of convert_to_fp8_training; `print` it for a summary.

    It can be copied, pickled and saved, also as an attribute of the model. `to_dict()` and
    `to_json()` omit the model; a file written by `torch.save(result.to_dict(), path)` loads with
    `weights_only=True`.

    Attributes:
        model: the model that was passed, converted in place.
        converted: fully qualified names of the layers that were converted.
        skipped: {fully qualified name of every other linear layer: reason in a few words}.
        wide: every parameter of two or more dimensions that stays wide, the largest first: weights
            of skipped layers, embeddings, convolutions, experts held as one 3-D parameter, ...
        fp8_elements: the number of elements of parameters that train in FP8, including those of
            layers that were converted before. A parameter that modules share counts once.
        elements: the number of elements of all parameters, each counted once.
        parameters: every parameter of two or more dimensions, in the model's order: whether it
            trains in FP8 and by which recipe, or why not; its FLOPs, and the bytes it saves.
        fused: {fully qualified name of an MLP, of experts or of a norm that run fused: their kind,
            such as "SwiGLU", "SwiGLU experts" or "RMSNorm"}.
    """

    model: nn.Module
    converted: tuple[str, ...]
    skipped: Mapping[str, str]
    wide: tuple[WideParameter, ...] = ()
    fp8_elements: int = 0
    elements: int = 0
    parameters: tuple[MatrixReport, ...] = ()
    fused: Mapping[str, str] = dataclasses.field(default_factory=lambda: ReadOnlyDict({}))

    @property
    def fp8_share(self) -> float:
        """The share of the model's parameters that trains in FP8, from 0 to 1."""
        return self.fp8_elements / self.elements if self.elements else 0.0

    @property
    def flops(self) -> int:
        """FLOPs of the products of all parameters for one token; see MatrixReport."""
        return sum(parameter.flops for parameter in self.parameters)

    @property
    def fp8_flops(self) -> int:
        """FLOPs of those products that run in FP8."""
        return sum(parameter.fp8_flops for parameter in self.parameters)

    @property
    def fp8_flops_share(self) -> float:
        """The share of `flops` that runs in FP8, from 0 to 1."""
        return self.fp8_flops / self.flops if self.flops else 0.0

    @property
    def bf16_bytes(self) -> float:
        """Bytes of inputs that the FP8 layers would keep for each token in BF16."""
        return sum(parameter.bf16_bytes for parameter in self.parameters)

    @property
    def saved_bytes(self) -> float:
        """Bytes of inputs that the FP8 layers keep for each token; see MatrixReport."""
        return sum(parameter.saved_bytes for parameter in self.parameters)

    def require(self, share: float, *, of: Literal["parameters", "flops"] = "parameters") -> None:
        """Raises RuntimeError, with the reasons, if less than `share` trains in FP8.

        Args:
            share: from 0 to 1.
            of: "parameters" compares fp8_share, "flops" fp8_flops_share.

        Raises:
            RuntimeError: the share is smaller.
            ValueError: share is not from 0 to 1, or `of` is neither.
        """
        if not 0 <= share <= 1:
            raise ValueError(
                f"ConversionResult.require: share must be from 0 to 1 (got {share!r}); pass 0.9 "
                "for 90%"
            )
        if of not in ("parameters", "flops"):
            raise ValueError(
                f'ConversionResult.require: of must be "parameters" or "flops" (got {of!r}); omit '
                "it for parameters"
            )
        got = self.fp8_share if of == "parameters" else self.fp8_flops_share
        if got >= share:
            return
        sizes: dict[str, int] = {}
        for parameter in self.parameters:
            size = parameter.flops - parameter.fp8_flops
            if of == "parameters":
                size = 0 if parameter.recipe else math.prod(parameter.shape)
            if size:
                reason = parameter.reason or f"recipe {parameter.recipe}"
                sizes[reason] = sizes.get(reason, 0) + size
        total = self.elements if of == "parameters" else self.flops
        reasons = "; ".join(
            f"{percent(size / total)}: {reason}"
            for reason, size in sorted(sizes.items(), key=lambda item: -item[1])
        )
        what = "parameters" if of == "parameters" else "FLOPs"
        raise RuntimeError(
            f"ConversionResult.require: at least {share:.1%} of the {what} must train in FP8 (got "
            f"{percent(got)}); what stays wide: {reasons or 'biases and other vectors'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything except the model, as plain lists, dicts, strings and numbers."""
        return {
            "converted": list(self.converted),
            "skipped": dict(self.skipped),
            "fused": dict(self.fused),
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
            "parameters": [
                {**dataclasses.asdict(parameter), "shape": list(parameter.shape)}
                for parameter in self.parameters
            ],
            "flops": self.flops,
            "fp8_flops": self.fp8_flops,
            "fp8_flops_share": self.fp8_flops_share,
            "bf16_bytes": self.bf16_bytes,
            "saved_bytes": self.saved_bytes,
        }

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict()` as JSON; `indent` as in json.dumps."""
        return json.dumps(self.to_dict(), indent=indent)

    def __repr__(self) -> str:
        return (
            f"<ConversionResult: {self._headline()}, {percent(self.fp8_share)} of the "
            "parameters; print() shows all>"
        )

    def __str__(self) -> str:
        lines = [self._headline()]
        recipes = {p.name.rpartition(".")[0]: p.recipe for p in self.parameters if p.recipe}
        used = dict.fromkeys(recipes.get(name) for name in self.converted)
        for recipe in used:
            if len(used) > 1:
                lines.append(f"by the recipe {recipe}:")
            lines += indented(name for name in self.converted if recipes.get(name) == recipe)
        for kind in dict.fromkeys(self.fused.values()):
            what = "quantizes its result" if kind in _NORMS else "with FP8 between its GEMMs"
            lines.append(f"fused: {kind} {what}")
            lines += indented(name for name, its_kind in self.fused.items() if its_kind == kind)
        lines += lines_on_wide(self.skipped, self.wide, self.elements)
        if self.elements:
            lines.append(
                f"{percent(self.fp8_share)} of the parameters train in FP8: "
                f"{self.fp8_elements:,} of {self.elements:,}"
            )
        if self.fp8_flops:
            lines.append(
                f"{percent(self.fp8_flops_share)} of the FLOPs run in FP8: {self.fp8_flops:,} of "
                f"{self.flops:,} for each token"
            )
            lines.append(
                f"inputs kept for backward: {self.saved_bytes:,.0f} bytes for each token, "
                f"{self.bf16_bytes:,.0f} in BF16"
            )
        return "\n".join(lines)

    def _headline(self) -> str:
        total = len(self.converted) + len(self.skipped)
        return f"{len(self.converted)} of {total} linear layers train in FP8"


def survey(model: nn.Module, skipped: Mapping[str, str]) -> dict[str, Any]:
    """The ConversionResult's fields of a converted model, from `wide` on.

    `skipped` maps the name of every linear layer that stays wide to the reason.
    """
    modules = dict(model.named_modules())
    in_fp8: dict[int, Recipe] = {}
    for owner, module in modules.items():
        linear = _linear_around(owner, modules, skipped)
        if linear is not None and trains_in_fp8(modules[linear]):
            for name, parameter in module.named_parameters(recurse=False):
                if _is_matrix(name, parameter):
                    in_fp8[id(parameter)] = modules[linear].recipe  # type: ignore[assignment]
    uses = _uses(model, skipped)
    seen: set[int] = set()
    wide, reports = [], []
    elements = fp8_elements = 0
    for owner, module in modules.items():
        for name, parameter in module.named_parameters(owner, recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            shape = () if is_lazy(parameter) else tuple(parameter.shape)
            elements += 0 if is_lazy(parameter) else parameter.numel()
            if not _is_matrix(name, parameter):
                continue
            recipe = in_fp8.get(id(parameter))
            reason = None
            if recipe is None:
                reason = why_wide(owner, parameter, modules, skipped)
                wide.append(WideParameter(name, shape, reason))
            else:
                fp8_elements += parameter.numel()
            text = None if recipe is None else str(recipe)
            reports.append(MatrixReport(name, shape, text, reason, *uses.get(id(parameter), _NONE)))
    wide.sort(key=lambda parameter: -parameter.numel)
    return {
        "wide": tuple(wide),
        "fp8_elements": fp8_elements,
        "elements": elements,
        "parameters": tuple(reports),
    }


_NONE = (0, 0, 0.0, 0.0)


def _uses(model: nn.Module, skipped: Mapping[str, str]) -> dict[int, tuple[int, int, float, float]]:
    """For the id() of each parameter that is multiplied: (flops, fp8_flops, bf16_bytes,
    saved_bytes), as in MatrixReport, summed over all modules that hold it."""
    uses: dict[int, tuple[int, int, float, float]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))  # a module may run in two places
    for owner, module in modules.items():
        linear = _linear_around(owner, modules, skipped)
        for name, parameter in module.named_parameters(recurse=False):
            if is_lazy(parameter) or not _is_matrix(name, parameter):
                continue
            gemms = [gemm for gemm in GEMMS if gemm != "wgrad" or parameter.requires_grad]
            of_experts = _holds_experts(module, parameter)
            in_linear = linear is not None and not of_experts
            share = _multiplied_share(owner, in_linear, parameter, modules)
            product = round(2 * parameter.numel() * share)
            use = (product * len(gemms), 0, 0.0, 0.0)
            layer = module if linear is None else modules[linear]
            if trains_in_fp8(layer):
                recipe: Recipe = layer.recipe  # type: ignore[assignment]
                if isinstance(layer, ExpertsInFP8):
                    transposed = layer._is_transposed
                else:
                    transposed = not isinstance(layer, nn.Linear)
                in_features = parameter.shape[-2 if transposed else -1]
                if of_experts:  # those that a token passes
                    in_features *= round(share * parameter.shape[0])
                fp8 = [gemm for gemm in gemms if gemm not in recipe.wide_gemms]
                bytes_in_bf16 = 2.0 * in_features if "wgrad" in gemms else 0.0
                saved = bytes_in_bf16 if "wgrad" not in fp8 else in_features * _bytes_of(recipe)
                if of_experts and "wgrad" in fp8 and _reads_tokens(layer, parameter):
                    width = parameter.shape[-2 if transposed else -1]
                    if in_features > 2 * width:  # the token is kept, which is smaller than its rows
                        saved = 2.0 * width
                use = (use[0], product * len(fp8), bytes_in_bf16, saved)
            before = uses.get(id(parameter), _NONE)
            uses[id(parameter)] = tuple(map(sum, zip(before, use, strict=True)))  # type: ignore
    return uses


def _reads_tokens(layer: nn.Module, parameter: torch.Tensor) -> bool:
    """Whether `parameter` is the first that experts multiply, called with choices of tokens."""
    roles = getattr(layer, "fused_roles", None)
    return (
        isinstance(roles, ExpertsRoles)
        and len(roles.arguments) == 3
        and parameter is getattr(layer, roles.parameters[0])
    )


def _bytes_of(recipe: Recipe) -> float:
    """Bytes of an element of x_t with its share of scales; those of the coarse granularities do not
    grow with the number of tokens."""
    return 1 + 4 / GROUP if recipe.granularity == "blockwise" else 1.0


_MULTIPLYING = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)


def _multiplied_share(
    owner: str, in_linear: bool, parameter: torch.Tensor, modules: Mapping[str, nn.Module]
) -> float:
    """By what share of its elements a token is multiplied; 0 if that is not known."""
    module = modules[owner]
    if in_linear or isinstance(module, (nn.modules.conv._ConvNd, *_MULTIPLYING)):
        return 1.0
    if _is_conv1d(module, parameter):
        return 1.0
    if not _holds_experts(module, parameter):
        return 0.0
    return experts_of_a_token(owner, parameter, modules) / parameter.shape[0]


def experts_of_a_token(
    owner: str, parameter: torch.Tensor, modules: Mapping[str, nn.Module]
) -> int:
    """How many of the experts in a 3-D parameter of module `owner` a token passes: what `top_k` or
    `num_experts_per_tok` of the module, or of one beside it, says; 1 if there is none. All of them
    if converted experts get as many rows each."""
    module = modules[owner]
    if isinstance(module, FP8EqualExperts):
        return parameter.shape[0]
    parent = modules.get(owner.rpartition(".")[0], module)
    for near in (module, parent, *parent.children()):
        for name in ("top_k", "num_experts_per_tok"):
            count = getattr(near, name, None)
            if isinstance(count, int) and 0 < count <= parameter.shape[0]:
                return count
    return 1


def _is_conv1d(module: nn.Module, parameter: torch.Tensor) -> bool:
    return type(module).__name__ == "Conv1D" and parameter.dim() == 2


def _holds_experts(module: nn.Module, parameter: torch.Tensor) -> bool:
    known = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
    return parameter.dim() == 3 and parameter.shape[0] > 1 and not isinstance(module, known)


def lines_on_wide(
    skipped: Mapping[str, str], wide: Sequence[WideParameter], elements: int
) -> Iterator[str]:
    """What stays wide and why: first linear layers, then parameters of other modules.

    Each reason says which share it has of the model's `elements`.
    """

    def share(reason: str) -> str:
        its = sum(parameter.numel for parameter in wide if parameter.reason == reason)
        return f" ({percent(its / elements)} of the parameters)" if its else ""

    of_layers = dict.fromkeys(skipped.values())
    for reason in of_layers:
        yield f"left alone: {reason}{share(reason)}"
        yield from indented(name for name, why in skipped.items() if why == reason)
    others = [parameter for parameter in wide if parameter.reason not in of_layers]
    for reason in dict.fromkeys(parameter.reason for parameter in others):
        yield f"not a linear layer: {reason}{share(reason)}"
        yield from indented(f"{p.name} {list(p.shape)}" for p in others if p.reason == reason)


def percent(share: float) -> str:
    return "less than 0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def _is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether it has two or more dimensions. For a lazy parameter, whose shape is not known yet,
    whether its name ends in `weight`."""
    return name.endswith("weight") if is_lazy(parameter) else parameter.dim() >= 2


def _linear_around(
    name: str, modules: Mapping[str, nn.Module], skipped: Mapping[str, str]
) -> str | None:
    """The name of the linear layer that module `name` is, or is a parametrization of."""
    while not (isinstance(modules.get(name), nn.Linear) or name in skipped):
        if name in modules and trains_in_fp8(modules[name]):
            return name
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def why_wide(
    owner: str,
    parameter: torch.Tensor,
    modules: Mapping[str, nn.Module],
    skipped: Mapping[str, str],
) -> str:
    linear = _linear_around(owner, modules, skipped)
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
    if _is_conv1d(module, parameter):  # one that does not compute what transformers' class does
        return (
            "Conv1D holds a transposed weight (replace it by a torch.nn.Linear with weight.T, then "
            "convert)"
        )
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return f"{kind} multiplies element by element"
    if _holds_experts(module, parameter):
        return (
            f"{kind} holds matrices, such as experts, in one 3-D parameter (not recognized as "
            f"experts: {why_not_experts(module)}; make each a torch.nn.Linear, or call "
            "torchext.ops.m_grouped_fp8_gemm_nt_contiguous)"
        )
    return f"parameter of {kind} itself (only a torch.nn.Linear is converted)"


def indented(names: Iterable[str]) -> Iterator[str]:
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
