"""torchtitan's linear layers in FP8: an override for its command line, and a converter.

    torchrun ... -m torchtitan.train ... \\
        --override.imports torchext.integrations.torchtitan.fp8_linear
        --override.imports 'torchext.integrations.torchtitan.fp8_linear={"recipe": "rowwise"}'

or, in a function of a config registry, `converters=[FP8LinearConverter.Config(skip=["wo"])]`. Both
swap the configs of linear layers, so that the model is built with FP8 layers; parallelism,
checkpoints and compilation are torchtitan's. They leave output heads, routers and layers with fewer
than 128 features alone, and experts in 3-D parameters, which torchext.convert_to_fp8_training
converts once the model is built.

Tested with torchtitan 0.3.0.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from torchtitan.config import derive, override
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module

from .. import nn
from .._patterns import Patterns
from ..checkpoint.files import Spec
from ..checkpoint.rules import why_wide
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
        if patterns.unmatched:
            raise ValueError(
                "FP8LinearConverter: skip must have patterns that match a linear layer's name (got "
                f"{', '.join(map(repr, patterns.unmatched))}, which match none of "
                f"{', '.join(name for name, *_ in found[:5])}, ...); correct or remove them"
            )
        for (name, config, parent, attribute), reason in zip(found, reasons, strict=True):
            if reason is not None:
                self.skipped[name] = reason
                continue
            new = derive(config, FP8Linear.Config, recipe=self.config.recipe)
            if isinstance(parent, list):
                parent[attribute] = new
            else:
                setattr(parent, attribute, new)
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
