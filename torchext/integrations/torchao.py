"""Configurations for torchao's quantize_: it calls torchext for each linear layer.

    quantize_(model, FP8InferenceConfig(mode="w8a16"))
    quantize_(model, FP8TrainingConfig(), filter_fn=lambda module, name: "lm_head" not in name)

Tested with torchao 0.18.0. torchext.quantize_for_inference and convert_to_fp8_training do more:
they also quantize experts, choose layers, and report.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from ..nn import FP8Linear, Linear
from ..nn.fp8_linear import Mode
from ..recipe import Recipe


@dataclass
class FP8InferenceConfig(AOBaseConfig):
    """Linear layers become torchext.nn.FP8Linears; arguments as in its `from_linear`."""

    mode: Mode = "w8a8"
    pow2_scale: bool = False


@dataclass
class FP8TrainingConfig(AOBaseConfig):
    """Linear layers become torchext.nn.Linears with this recipe, Recipe.deepseek_v3() if None."""

    recipe: Recipe | None = None


@register_quantize_module_handler(FP8InferenceConfig)
def _hold_in_fp8(module: torch.nn.Linear, config: FP8InferenceConfig) -> torch.nn.Module:
    return FP8Linear.from_linear(module, config.mode, pow2_scale=config.pow2_scale)


@register_quantize_module_handler(FP8TrainingConfig)
def _train_in_fp8(module: torch.nn.Linear, config: FP8TrainingConfig) -> torch.nn.Module:
    return Linear.from_linear(module, config.recipe)
