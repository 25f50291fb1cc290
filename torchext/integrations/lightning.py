"""Precision plug-ins of Lightning 2: models train in FP8, the rest of them under BF16 autocast.

    fabric = Fabric(plugins=[FabricFP8Precision()])
    trainer = Trainer(plugins=[TrainerFP8Precision(recipe=Recipe.rowwise())])

Tested with lightning 2.6.6.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.pytorch.plugins.precision import Precision as TrainerPrecision

from ..convert import convert_to_fp8_training


class _FP8:
    """Converts the model that Lightning sets up.

    Attributes:
        result: what convert_to_fp8_training returned for the last model; None before.
    """

    precision = "bf16-mixed"

    def __init__(self, **options: Any) -> None:
        """options: arguments of torchext.convert_to_fp8_training, such as `recipe`."""
        super().__init__()
        self.options = options
        self.result: Any = None

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        self.result = convert_to_fp8_training(module, **self.options)
        return module

    def forward_context(self) -> AbstractContextManager[Any]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.autocast(device, dtype=torch.bfloat16)


class FabricFP8Precision(_FP8, FabricPrecision):
    """For lightning.fabric.Fabric(plugins=[...])."""


class TrainerFP8Precision(_FP8, TrainerPrecision):
    """For lightning.Trainer(plugins=[...])."""
