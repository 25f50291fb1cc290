"""torchtitan's linear layers and experts in FP8: overrides for its command line, and converters.

    torchrun ... -m torchtitan.train ... \\
        --override.imports torchext.integrations.torchtitan.fp8_linear
        --override.imports 'torchext.integrations.torchtitan.fp8_linear={"recipe": "rowwise"}'
        --override.imports torchext.integrations.torchtitan.fp8_experts

or, in a function of a config registry, `converters=[FP8LinearConverter.Config(skip=["wo"]),
FP8ExpertsConverter.Config()]`. They swap the configs of layers, so that the model is built with FP8
layers; parallelism, checkpoints and compilation are torchtitan's.

Output heads, routers and layers with fewer than 128 features stay wide. Experts run grouped FP8
GEMMs, without padding, and where torchtitan's all-to-all takes tokens to other ranks,
torchext.moe.Dispatcher sends them in FP8 instead, each once for each rank.

Tested with torchtitan 0.3.0. The interfaces of experts and dispatch are the same at commit
b5bcd76c66d0 (August 2026), from which they were read.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torchtitan.config import derive, override
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import (
    AllToAllTokenDispatcher,
    BaseEPTokenDispatcher,
    LocalTokenDispatcher,
)
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module

from .. import nn
from .._dispatch.layout import GROUP
from .._experts import convert_experts_
from .._patterns import Patterns
from ..checkpoint.files import Spec
from ..checkpoint.rules import why_wide
from ..moe import Dispatcher, Routing
from ..moe.wide_rows import combine_rows, dispatch_rows
from ..nn.experts import SortedExpertsRoles
from ..nn.mlp import can_fuse_recipe
from ..recipe import Recipe

_log = logging.getLogger("torchext")


class FP8Linear(nn.Linear, Module):
    """torchext.nn.Linear, built from torchtitan's config of a linear layer."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        recipe: str = "blockwise"
        """A recipe as torchext.Recipe.parse reads it."""

    def __init__(self, config: Config) -> None:
        nn.Linear.__init__(
            self, config.in_features, config.out_features, config.bias,
            recipe=Recipe.parse(config.recipe),
        )  # fmt: skip


# The globs match every linear layer of a block but routers; `*` crosses dots.
@override(
    target=Linear.Config,
    fqns=["layers.*attention*", "layers.*feed_forward*", "layers.*shared_experts*"],
    description="FP8 linear layers of torchext",
    exact=True,
)
def fp8_linear(config: Any, recipe: str = "blockwise") -> Any:
    """The config of the FP8 layer, or `config` itself if the layer has fewer than 128 in or out
    features. recipe: as torchext.Recipe.parse reads it."""
    reason = _why_wide("linear.weight", config, Patterns((), "torchext"))
    return config if reason else derive(config, FP8Linear.Config, recipe=recipe)


class FP8LinearConverter(ModelConfigConverter):
    """Swaps the configs of a model's linear layers; `skip` has patterns as in
    torchext.quantize_for_inference.

    Attributes:
        converted: fully qualified names of the layers that will train in FP8.
        skipped: {name of every other linear layer: the reason}.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        recipe: str = "blockwise"
        skip: list[str] = field(default_factory=list)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.converted: list[str] = []
        self.skipped: dict[str, str] = {}

    def convert(self, model_config: Any) -> Any:
        """Swaps configs in place.

        Raises:
            ValueError: a pattern of `skip` matches no linear layer, or `recipe` cannot be read.
        """
        Recipe.parse(self.config.recipe)
        patterns = Patterns(self.config.skip, "FP8LinearConverter: skip")
        found = list(model_config.traverse(Linear.Config))
        reasons = [self._why_wide(name, config, patterns) for name, config, *_ in found]
        _check_matched(patterns, "FP8LinearConverter", "a linear layer", found)
        for (name, config, parent, attribute), reason in zip(found, reasons, strict=True):
            if reason is not None:
                self.skipped[name] = reason
                continue
            new = derive(config, FP8Linear.Config, recipe=self.config.recipe)
            _put(parent, attribute, new)
            self.converted.append(name)
        _log.info("%d of %d linear layers train in FP8", len(self.converted), len(found))
        return model_config

    @staticmethod
    def _why_wide(name: str, config: Any, patterns: Patterns) -> str | None:
        reason = _why_wide(f"{name}.weight", config, patterns)
        if reason is None and type(config) is not Linear.Config:
            return f"{type(config).__qualname__} is a subclass whose own behavior would be lost"
        return reason


def _why_wide(name: str, config: Any, patterns: Patterns) -> str | None:
    shape = (config.out_features, config.in_features)
    return why_wide(Spec(name, "BF16", shape), patterns)


def _check_matched(patterns: Patterns, converter: str, what: str, found: list[Any]) -> None:
    if patterns.unmatched:
        raise ValueError(
            f"{converter}: skip must have patterns that match {what}'s name (got "
            f"{', '.join(map(repr, patterns.unmatched))}, which match none of "
            f"{', '.join(name for name, *_ in found[:5])}, ...); correct or remove them"
        )


def _put(parent: Any, attribute: Any, config: Any) -> None:
    if isinstance(parent, list):
        parent[attribute] = config
    else:
        setattr(parent, attribute, config)


# ---- experts ----


@dataclass(frozen=True, kw_only=True)
class FP8DispatchMetadata:
    """What `combine` needs of `dispatch`: the routing, scores, and the weight of each row."""

    routing: Routing
    topk_scores: Tensor
    weight: Tensor


class FP8TokenDispatcher(BaseEPTokenDispatcher):
    """torchtitan's token dispatcher whose tokens travel in FP8, by torchext.moe.Dispatcher.

    Experts get rows in the dtype of the tokens, rounded once to FP8. Scores are applied to the
    experts' results, in FP32, on the ranks of the experts; rows return in the tokens' dtype. The
    result, and the gradients of tokens and scores, have the same bits for any number of ranks, if
    experts compute a row alone. Without expert parallelism it is LocalTokenDispatcher.

    Its collectives are a break in a compiled graph. It tells the type checker of torchtitan's
    backend "spmd_types" nothing.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseEPTokenDispatcher.Config):
        recipe: str = "blockwise"
        """A blockwise recipe as torchext.Recipe.parse reads it."""
        exact: bool = True
        """As for torchext.moe.Dispatcher.combine, forward and backward."""
        capacity: int | None = None
        """As for torchext.moe.Dispatcher: the most rows from one rank to another."""
        timeout: float | None = None
        """As for torchext.moe.Dispatcher, in seconds."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self._dispatcher: Dispatcher | None = None

    def init_buffer(self) -> None:
        """Makes the dispatcher for the mesh that `wire_meshes` has set. It allocates nothing."""
        self._dispatcher = None
        if self.ep_mesh is not None:
            self._dispatcher = Dispatcher(
                self.num_experts,
                group=self.ep_mesh.get_group(),
                recipe=Recipe.parse(self.config.recipe),
                capacity=self.config.capacity,
                timeout=self.config.timeout,
            )

    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, Any]:
        """Rows of this rank's experts, their number for each expert, and what `combine` needs."""
        given = x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E
        if self._dispatcher is None:
            return LocalTokenDispatcher.dispatch(self, *given)  # type: ignore[no-any-return]
        routing = self._dispatcher.create_routing(topk_expert_ids_TK, topk_scores_TK)
        rows, ends, weight = dispatch_rows(x_TD, self._dispatcher, routing, exact=self.config.exact)
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        metadata = FP8DispatchMetadata(routing=routing, topk_scores=topk_scores_TK, weight=weight)
        return rows, counts.to(num_local_tokens_per_expert_E.dtype), metadata

    def combine(self, routed_output_RD: Tensor, metadata: Any, x_TD: Tensor) -> Tensor:
        """The sum of each token's rows, times their scores."""
        if self._dispatcher is None:
            return LocalTokenDispatcher.combine(self, routed_output_RD, metadata, x_TD)  # type: ignore[no-any-return]
        return combine_rows(
            routed_output_RD,
            metadata.weight,
            metadata.topk_scores,
            self._dispatcher,
            metadata.routing,
            exact=self.config.exact,
        )


class FP8GroupedExperts(GroupedExperts):
    """torchtitan's experts with grouped FP8 GEMMs, forward and backward, without padding.

    Raises ValueError if the recipe is not blockwise, with all GEMMs in FP8.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        recipe: str = "blockwise"
        """A recipe as torchext.Recipe.parse reads it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        names = "w1_EFD", "w3_EFD", "w2_EDF"
        arguments = "x_RD", "num_tokens_per_expert_E"
        roles = SortedExpertsRoles(names, "silu_mul", None, arguments)
        convert_experts_(self, roles, _blockwise(config.recipe), "fp8")


def _blockwise(text: str) -> Recipe:
    recipe = Recipe.parse(text)
    if not can_fuse_recipe(recipe):
        raise ValueError(
            "torchext.integrations.torchtitan: the recipe of experts must be blockwise, with all "
            f'GEMMs in FP8 (got {recipe}); pass, for example, "blockwise"'
        )
    return recipe


@override(target=RoutedExperts.Config, description="FP8 experts and dispatch of torchext")
def fp8_experts(
    config: Any,
    recipe: str = "blockwise",
    exact: bool = True,
    capacity: int | None = None,
    timeout: float | None = None,
) -> Any:
    """The config with experts and dispatch in FP8.

    Experts of another class than GroupedExperts, or with fewer than 128 features, stay as they are;
    so do token dispatchers other than AllToAllTokenDispatcher. Arguments: as in
    FP8TokenDispatcher.Config.
    """
    _blockwise(recipe)
    inner, dispatcher = config.inner_experts, config.token_dispatcher
    if _why_wide_experts("experts", inner, Patterns((), "torchext")) is None:
        inner = derive(inner, FP8GroupedExperts.Config, recipe=recipe)
    if type(dispatcher) is AllToAllTokenDispatcher.Config:
        options = {"recipe": recipe, "exact": exact, "capacity": capacity, "timeout": timeout}
        dispatcher = derive(dispatcher, FP8TokenDispatcher.Config, **options)
    return replace(config, inner_experts=inner, token_dispatcher=dispatcher)


class FP8ExpertsConverter(ModelConfigConverter):
    """Swaps the configs of a model's experts and of their dispatch, as `fp8_experts` does; `skip`
    has patterns as in torchext.quantize_for_inference.

    Attributes:
        converted: fully qualified names of the experts that will train in FP8.
        dispatched: those of the experts whose tokens will travel in FP8.
        skipped: {name of all other experts: the reason}.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        recipe: str = "blockwise"
        exact: bool = True
        capacity: int | None = None
        timeout: float | None = None
        skip: list[str] = field(default_factory=list)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.converted: list[str] = []
        self.dispatched: list[str] = []
        self.skipped: dict[str, str] = {}

    def convert(self, model_config: Any) -> Any:
        """Swaps configs in place.

        Raises:
            ValueError: a pattern of `skip` matches no experts, or `recipe` is not blockwise.
        """
        own = self.config
        patterns = Patterns(own.skip, "FP8ExpertsConverter: skip")
        found = list(model_config.traverse(RoutedExperts.Config))
        named = [(name, config.inner_experts) for name, config, *_ in found]
        reasons = [_why_wide_experts(name, inner, patterns) for name, inner in named]
        _check_matched(patterns, "FP8ExpertsConverter", "experts", found)
        for (name, config, parent, attribute), reason in zip(found, reasons, strict=True):
            if reason is not None:
                self.skipped[name] = reason
            if patterns.all_matching(name):
                continue
            new = fp8_experts(config, own.recipe, own.exact, own.capacity, own.timeout)
            _put(parent, attribute, new)
            if reason is None:
                self.converted.append(name)
            if type(new.token_dispatcher) is FP8TokenDispatcher.Config:
                self.dispatched.append(name)
        _log.info(
            "%d of %d mixtures of experts train in FP8, %d receive their tokens in FP8",
            *(len(self.converted), len(found), len(self.dispatched)),
        )
        return model_config


def _why_wide_experts(name: str, config: Any, patterns: Patterns) -> str | None:
    pattern = patterns.match(name)
    if pattern is not None:
        return f"{pattern!r} of skip matches it"
    if type(config) is not GroupedExperts.Config:
        return f"{type(config).__qualname__} is a subclass whose own behavior would be lost"
    if min(config.dim, config.hidden_dim) < GROUP:
        return f"fewer than {GROUP} features: smaller than one scale group"
    return None
